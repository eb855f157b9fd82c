import errno
import os
import shutil
import stat
from pathlib import Path

import pytest
from damaging import refuse

from grokctl.checkpoint.torrent import Metainfo, build_metainfo, parse_metainfo
from grokctl.errors import DiskFullError, FetchError
from grokctl.events import Noted
from grokctl.integrity.backup import DAMAGED, forget, set_aside
from grokctl.marks import MARK
from grokctl.paths import REPLACED
from grokctl.text import format_bytes

PIECE = 16384
FILES = ("ckpt-0/a", "ckpt-0/b", "c")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "release"
    for name, size in zip(FILES, (4 * PIECE + 100, 3 * PIECE, 50), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(os.urandom(size))
    return root


@pytest.fixture
def metainfo(root: Path) -> Metainfo:
    data = build_metainfo(root, FILES, name="x", piece_length=PIECE)
    return parse_metainfo(data, source="x")


def places_of(metainfo: Metainfo) -> dict[int, str]:
    return {file.index: "/".join(file.path) for file in metainfo.files}


def keep(root: Path, metainfo: Metainfo, pieces: set[int], **options) -> Path | None:
    return set_aside(root, metainfo, places_of(metainfo), pieces, **options)


def content(root: Path) -> dict[str, bytes]:
    """Every regular file of the release but what is set aside."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and ".grokctl" not in path.parts
    }


def kept_in(folder: Path) -> set[str]:
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    return files - {MARK}


def test_the_ranges_of_bad_pieces_are_kept_at_their_own_offsets(root, metainfo):
    before = content(root)
    events = []

    folder = keep(root, metainfo, {1, 4}, observe=events.append)

    assert folder.parent == root / ".grokctl" / "damaged"
    assert kept_in(folder) == {"ckpt-0/a", "ckpt-0/b"}
    kept, original = (folder / "ckpt-0/a").read_bytes(), before["ckpt-0/a"]
    assert len(kept) == len(original)
    assert kept[PIECE : 2 * PIECE] == original[PIECE : 2 * PIECE]
    assert kept[4 * PIECE :] == original[4 * PIECE :]
    assert not any(kept[:PIECE] + kept[2 * PIECE : 4 * PIECE])
    assert (folder / "ckpt-0/b").read_bytes()[: PIECE - 100] == before["ckpt-0/b"][: PIECE - 100]
    assert content(root) == before
    kept_size = format_bytes(2 * PIECE)
    assert events == [
        Noted(message=f"keeping {kept_size} of damaged data until the repair is proven")
    ]


def test_what_is_kept_takes_the_space_of_what_was_damaged(root, metainfo):
    folder = keep(root, metainfo, {1})

    assert (folder / "ckpt-0/a").stat().st_blocks * 512 <= 2 * PIECE


def test_the_tail_of_a_file_that_is_too_long_is_kept(root, metainfo):
    with (root / "ckpt-0/b").open("ab") as file:
        file.write(b"too much")

    folder = keep(root, metainfo, set())

    assert kept_in(folder) == {"ckpt-0/b"}
    assert (folder / "ckpt-0/b").read_bytes() == bytes(3 * PIECE) + b"too much"


def test_nothing_is_kept_of_what_is_not_there(root, metainfo):
    (root / "ckpt-0/b").unlink()
    os.truncate(root / "ckpt-0/a", 0)
    os.truncate(root / "ckpt-0/a", 4 * PIECE + 100)

    assert keep(root, metainfo, {0, 1, 2, 3}) is None
    assert not (root / ".grokctl").exists()


def test_a_truncated_file_keeps_what_it_has(root, metainfo):
    os.truncate(root / "ckpt-0/a", PIECE + 10)
    before = content(root)

    folder = keep(root, metainfo, {1, 2, 3, 4})

    kept = (folder / "ckpt-0/a").read_bytes()
    assert kept == bytes(PIECE) + before["ckpt-0/a"][PIECE:]
    assert (folder / "ckpt-0/b").exists()


@pytest.mark.parametrize(
    ("make", "is_kind"),
    [
        pytest.param(lambda path: path.mkdir(), stat.S_ISDIR, id="folder"),
        pytest.param(os.mkfifo, stat.S_ISFIFO, id="pipe"),
        pytest.param(lambda path: path.symlink_to("/etc/passwd"), stat.S_ISLNK, id="link"),
    ],
)
def test_what_is_no_regular_file_is_moved_out_of_the_way(root, metainfo, make, is_kind):
    (root / "ckpt-0/b").unlink()
    make(root / "ckpt-0/b")

    folder = keep(root, metainfo, {4, 5, 6, 7})

    assert not os.path.lexists(root / "ckpt-0/b")
    assert is_kind((folder / "ckpt-0/b").lstat().st_mode)


def test_a_folder_with_files_is_not_taken_for_damage(root, metainfo):
    (root / "ckpt-0/b").unlink()
    (root / "ckpt-0/b").mkdir()
    (root / "ckpt-0/b/mine").write_text("mine")

    with pytest.raises(FetchError, match="expected a file, found a folder"):
        keep(root, metainfo, {4, 5, 6, 7})

    assert (root / "ckpt-0/b/mine").read_text() == "mine"


def test_two_repairs_in_one_second_keep_apart(root, metainfo):
    folders = {keep(root, metainfo, {piece}) for piece in (0, 1, 2)}

    assert len(folders) == 3
    assert all(folder.is_dir() for folder in folders)


def test_all_is_forgotten_when_the_release_is_whole(root, metainfo):
    before = content(root)
    for piece in (0, 1):
        keep(root, metainfo, {piece})
    (root / ".grokctl" / "receipt.json").write_text("{}")

    forget(root)
    forget(root)

    assert [path.name for path in (root / ".grokctl").iterdir()] == ["receipt.json"]
    assert content(root) == before


# --- whose backup it is


def rename_to(root: Path, name: str) -> Path:
    """Work of this user, which somebody renames to the name of a backup."""
    thesis = root.parent / "thesis"
    (thesis / "sub").mkdir(parents=True)
    (thesis / "sub/chapter").write_text("years")
    (root / ".grokctl").mkdir(exist_ok=True)
    place = root / ".grokctl" / name
    place.parent.mkdir(exist_ok=True)
    return thesis.rename(place)


@pytest.mark.parametrize(
    "name",
    [
        "damaged",
        "damaged/2026-11-30T120000Z",
        "damaged/2026-11-30T120000Z.begun",
        "replaced/x.begun",
    ],
)
@pytest.mark.parametrize("where", [".", ".grokctl"])
def test_what_others_renamed_to_a_backup_is_not_deleted(root, metainfo, name, where):
    place = rename_to(root, name)
    (root / where).chmod(0o777)

    kept = keep(root, metainfo, {1})
    forget(root)

    assert (place / "sub/chapter").read_text() == "years"
    assert not kept.exists()


def test_backups_of_an_earlier_version_are_deleted_where_nobody_else_can_write(root, metainfo):
    rename_to(root, "damaged/2026-11-30T120000Z")
    rename_to(root, "damaged/2026-11-30T120001Z.begun")

    assert keep(root, metainfo, {1}) is not None
    assert len(list((root / ".grokctl/damaged").iterdir())) == 2
    forget(root)

    assert list((root / ".grokctl").iterdir()) == []


def test_a_backup_that_is_swapped_while_it_is_deleted_takes_nothing_with_it(
    root, metainfo, monkeypatch
):
    kept, unlink = keep(root, metainfo, {1}), os.unlink
    swapped = []

    def swap(name, **options):
        if not swapped:
            kept.rename(root / "aside")
            swapped.append(rename_to(root, f"damaged/{kept.name}"))
        unlink(name, **options)

    monkeypatch.setattr(os, "unlink", swap)
    forget(root)

    assert (swapped[0] / "sub/chapter").read_text() == "years"


# --- where links lead


@pytest.mark.parametrize("place", [".grokctl", ".grokctl/damaged"])
def test_nothing_is_written_or_removed_where_a_link_leads(root, metainfo, tmp_path, place):
    victim = tmp_path / "victim"
    (victim / "damaged").mkdir(parents=True)
    (victim / "precious").write_text("precious")
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).symlink_to(victim)

    with pytest.raises(FetchError):
        keep(root, metainfo, {0})
    forget(root)

    assert sorted(path.name for path in victim.iterdir()) == ["damaged", "precious"]
    assert list((victim / "damaged").iterdir()) == []


def test_a_folder_that_is_a_link_is_not_followed(root, metainfo, tmp_path):
    (root / "ckpt-0").rename(tmp_path / "elsewhere")
    (root / "ckpt-0").symlink_to(tmp_path / "elsewhere")

    with pytest.raises(FetchError, match="ckpt-0"):
        keep(root, metainfo, {0})


def test_a_link_to_a_good_file_stays_as_it_is(root, metainfo):
    (root / "c").rename(root / "aside")
    (root / "c").symlink_to(root / "aside")
    before = (root / "aside").read_bytes()

    keep(root, metainfo, {0})

    assert (root / "c").is_symlink()
    assert (root / "aside").read_bytes() == before


def test_a_link_to_something_longer_is_refused_before_anything_changes(root, metainfo):
    (root / "c").rename(root / "aside")
    (root / "aside").write_bytes((root / "aside").read_bytes() + b"more")
    (root / "c").symlink_to(root / "aside")
    before = content(root)

    with pytest.raises(FetchError, match="expected a file, found a symbolic link"):
        keep(root, metainfo, {0})

    assert content(root) == before
    assert not (root / ".grokctl").exists()


# --- disks that are full, or old


def test_no_room_is_found_before_anything_changes(root, metainfo, monkeypatch):
    real = os.statvfs

    def statvfs(path):
        found = list(real(path))
        found[4] = 2 * PIECE // found[1]  # f_bavail
        return os.statvfs_result(found)

    monkeypatch.setattr(os, "statvfs", statvfs)
    before = content(root)

    with pytest.raises(
        DiskFullError, match=rf"expected {format_bytes(3 * PIECE)} free for backup and repair"
    ):
        keep(root, metainfo, {0, 1, 2})

    assert content(root) == before
    assert not (root / ".grokctl").exists()
    assert keep(root, metainfo, {0, 1}) is not None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_a_disk_that_refuses_on_the_way_leaves_everything_as_it_was(
    root, metainfo, monkeypatch, code
):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    before = content(root)
    monkeypatch.setattr(os, "copy_file_range", refuse)

    with pytest.raises((DiskFullError, FetchError), match=os.strerror(code)):
        keep(root, metainfo, {0, 1})

    assert content(root) == before
    assert list((root / ".grokctl" / "damaged").iterdir()) == []


def test_room_for_what_is_moved_is_counted_before_anything_moves(root, metainfo, monkeypatch):
    path = root / FILES[1]
    path.unlink()
    path.mkdir()
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=3 * PIECE - 1))

    with pytest.raises(DiskFullError, match=" free for backup and repair"):
        keep(root, metainfo, {4, 5, 6, 7})

    assert path.is_dir()
    assert not (root / ".grokctl").exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ESTALE])
def test_a_file_that_the_machine_refuses_is_not_moved(root, metainfo, monkeypatch, code):
    refuse(monkeypatch, FILES[1], code)

    with pytest.raises(FetchError, match=os.strerror(code)):
        keep(root, metainfo, {1, 4, 5})

    assert (root / FILES[1]).is_file()
    assert not (root / ".grokctl").exists()


def test_a_file_system_that_cannot_copy_by_itself_is_copied_from_and_to(
    root, metainfo, monkeypatch
):
    def refuse(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "copy_file_range", refuse)

    folder = keep(root, metainfo, {2, 3})

    original = (root / "ckpt-0/a").read_bytes()
    assert (folder / "ckpt-0/a").read_bytes()[2 * PIECE : 4 * PIECE] == original[
        2 * PIECE : 4 * PIECE
    ]


def test_what_the_disk_refuses_to_read_is_left_out(root, metainfo, monkeypatch):
    def copy(source, target, count, low, at):
        if low < PIECE + 4096 and low + count > PIECE:
            if low == PIECE:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            count = PIECE - low
        return real(source, target, count, low, at)

    real = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", copy)

    folder = keep(root, metainfo, {0, 1, 2})

    kept, original = (folder / "ckpt-0/a").read_bytes(), (root / "ckpt-0/a").read_bytes()
    assert kept[:PIECE] == original[:PIECE]
    assert not any(kept[PIECE : PIECE + 4096])
    assert kept[PIECE + 4096 : 3 * PIECE] == original[PIECE + 4096 : 3 * PIECE]


@pytest.mark.parametrize("under", [DAMAGED, REPLACED])
@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_a_backup_follows_the_umask_and_is_closed_if_it_will_be_deleted(
    root, metainfo, umask, under
):
    before = os.umask(umask)
    try:
        folder = keep(root, metainfo, {1, 4}, under=under)
    finally:
        os.umask(before)

    if under == DAMAGED:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o777 & ~umask)
    assert (folder / MARK).exists() == (under == DAMAGED)
    for path in (folder.parent, folder, folder / "ckpt-0", folder / "ckpt-0/a"):
        full = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == full & ~umask
