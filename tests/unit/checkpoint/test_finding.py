"""Which checkpoint is meant: with a name, without one, and where other tools put a release."""

import os
import socket
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from folders import make_ready, make_release

from grokctl.checkpoint.finding import find_checkpoint
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release import open_release
from grokctl.errors import UsageError
from grokctl.model.placement import MeshShape
from grokctl.paths import Home, kind_of
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

SMALL = replace(MINIATURE, num_layers=1, emb_size=64, num_q_heads=4, num_kv_heads=2)


def find(home: Home, name: str | None, **kinds: bool) -> Path:
    return find_checkpoint(home, name, **kinds).root


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch) -> Path:
    """The current folder, outside of home."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


# --- without a name


def test_nothing_under_home_is_a_usage_error_that_says_how_to_begin(home):
    with pytest.raises(UsageError, match="no checkpoint under") as caught:
        find(home, None)

    assert caught.value.hint == "grokctl fetch"


def test_without_a_ready_checkpoint_the_hint_is_to_make_one(home):
    make_release(home.releases / "grok-1")

    with pytest.raises(UsageError, match="no checkpoint under") as caught:
        find(home, None, releases=False)

    assert caught.value.hint.startswith("grokctl reshard")


@pytest.mark.parametrize(
    ("make", "folder"),
    [
        pytest.param(make_release, "releases", id="release"),
        pytest.param(make_ready, "ready", id="ready"),
    ],
)
def test_the_only_candidate_is_taken(home, make, folder):
    made = make(home.root / folder / "grok-1")

    assert find(home, None) == made


def test_a_ready_checkpoint_is_preferred_to_its_release(home):
    release = make_release(home.releases / "grok-1")
    ready = make_ready(home.ready / "grok-1-int8-model8")

    assert find(home, None) == ready
    assert find(home, None, ready=False) == release


@pytest.mark.parametrize(
    ("make", "folder"),
    [
        pytest.param(make_release, "releases", id="release"),
        pytest.param(make_ready, "ready", id="ready"),
    ],
)
def test_several_candidates_are_listed(home, make, folder):
    made = [make(home.root / folder / name) for name in ("b", "a")]

    with pytest.raises(UsageError, match="a, b") as caught:
        find(home, None)

    assert str(made[1]) in caught.value.hint


def test_what_is_no_checkpoint_is_no_candidate(home):
    made = make_release(home.releases / "grok-1")
    (home.releases / "empty").mkdir()
    (home.releases / "file").write_text("x")
    make_ready(home.releases / "of-the-other-kind")

    assert find(home, None) == made


def test_a_file_in_place_of_home_is_no_checkpoint(tmp_path):
    (tmp_path / "file").write_text("x")

    with pytest.raises(UsageError):
        find(Home(tmp_path / "file"), None)


# --- with a name


def test_a_name_under_home_is_found(home):
    release = make_release(home.releases / "grok-1")
    ready = make_ready(home.ready / "grok-1-int8-model8")

    assert find(home, "grok-1") == release
    assert find(home, "grok-1-int8-model8") == ready


def test_one_name_for_both_kinds_is_the_wanted_one(home):
    release, ready = make_release(home.releases / "x"), make_ready(home.ready / "x")

    assert find(home, "x") == ready
    assert find(home, "x", ready=False) == release


def test_a_path_is_found_wherever_it_is(home, elsewhere):
    made = make_release(elsewhere / "deep" / "grok-1")

    assert find(home, str(made)) == made
    assert find(home, "deep/grok-1").resolve() == made


def test_a_folder_here_is_found_by_its_name(home, elsewhere):
    made = make_release(elsewhere / "grok-1")

    assert find(home, "grok-1").resolve() == made


def test_a_name_under_home_comes_before_a_folder_here(home, elsewhere):
    make_release(elsewhere / "grok-1")
    made = make_release(home.releases / "grok-1")

    assert find(home, "grok-1") == made
    assert find(home, "./grok-1").resolve() == elsewhere / "grok-1"


def test_here_is_a_path(home, elsewhere):
    (elsewhere / "ckpt-0").mkdir()

    assert find(home, ".").resolve() == elsewhere


@pytest.mark.usefixtures("elsewhere")
def test_an_unknown_name_is_a_usage_error(home):
    with pytest.raises(UsageError, match="nowhere: no such checkpoint"):
        find(home, "nowhere")


def test_a_folder_without_a_checkpoint_is_a_usage_error(home, elsewhere):
    (elsewhere / "empty").mkdir()

    with pytest.raises(UsageError, match="expected a checkpoint, found neither"):
        find(home, "empty")


@pytest.mark.parametrize("as_path", [True, False], ids=["path", "name"])
@pytest.mark.usefixtures("elsewhere")
def test_a_release_where_a_ready_one_is_wanted_is_called_so(home, as_path):
    made = make_release(home.releases / "grok-1")

    with pytest.raises(UsageError, match="expected a ready checkpoint, found a release one"):
        find(home, str(made) if as_path else "grok-1", releases=False)


@pytest.mark.parametrize("as_path", [True, False], ids=["path", "name"])
@pytest.mark.usefixtures("elsewhere")
def test_a_ready_checkpoint_where_a_release_is_wanted_is_called_so(home, as_path):
    made = make_ready(home.ready / "x")

    with pytest.raises(UsageError, match="expected a release checkpoint, found a ready one"):
        find(home, str(made) if as_path else "x", ready=False)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("", id="nothing"),
        pytest.param("..", id="parent"),
        pytest.param("a\0b", id="nul"),
        pytest.param("x" * 300, id="300-characters"),
        pytest.param("x/" * 3000, id="6000-characters"),
        pytest.param("Once upon a time, " * 20, id="a-prompt"),
        pytest.param("\ud800", id="a-surrogate"),
    ],
)
@pytest.mark.usefixtures("elsewhere")
def test_a_name_that_no_file_can_have_is_a_usage_error(home, name):
    make_release(home.releases / "grok-1")

    with pytest.raises(UsageError):
        find(home, name)


def test_the_parent_of_releases_is_not_reached_by_a_name(home, elsewhere):
    make_release(home.root)

    with pytest.raises(UsageError):
        find(home, "..")
    assert kind_of(elsewhere.parent) is None


# --- what is said


def cut_for(home: Home, name: str, devices: int, origin: str = "small") -> Path:
    """A ready checkpoint with a manifest that can be read."""
    root = home.ready / name
    if not (home.root / origin).exists():
        write_miniature(home.root / origin, SMALL, tokenizer=False)
    release = open_release(home.root / origin)
    plan = plan_reshard(release, ReshardOptions(mesh=MeshShape(1, devices), out=root))
    reshard(plan)
    return root


@pytest.fixture
def two(home) -> list[Path]:
    made = [cut_for(home, "z", 1), cut_for(home, "a", 2)]
    os.utime(made[0] / "grokctl.json", (10, 10))
    return made


def test_of_several_ready_checkpoints_of_one_model_the_last_is_taken(home, two):
    assert find(home, None) == two[1]

    os.utime(two[0] / "grokctl.json")
    assert find(home, None) == two[0]


@pytest.mark.usefixtures("two")
def test_checkpoints_of_several_models_are_not_guessed_between(home):
    cut_for(home, "other", 1, "another")

    with pytest.raises(UsageError, match="a, other, z"):
        find(home, None)


@pytest.mark.usefixtures("two")
def test_a_line_says_what_was_taken_and_what_else_was_there(home):
    make_release(home.releases / "grok-1")

    found = find_checkpoint(home, None)
    other = find_checkpoint(home, None, ready=False)

    assert found.note == "checkpoint: ready/a, made last; also there: ready/z, releases/grok-1"
    assert other.note == "checkpoint: releases/grok-1; also there: ready/a, ready/z"
    assert find_checkpoint(home, "z").note is None


def test_the_only_checkpoint_needs_no_line(home):
    make_release(home.releases / "grok-1")

    assert find_checkpoint(home, None).note is None


@pytest.mark.usefixtures("elsewhere")
def test_no_such_checkpoint_lists_what_is(home):
    with pytest.raises(UsageError, match="there is none under"):
        find(home, "nowhere")
    make_release(home.releases / "grok-1")
    make_ready(home.ready / "x")

    for name in ("nowhere", "./nowhere", "nowhere/ckpt-0"):
        with pytest.raises(UsageError, match="there is ready/x, releases/grok-1 under"):
            find(home, name)


@pytest.mark.usefixtures("elsewhere")
def test_a_long_list_is_cut(home):
    for number in range(11):
        make_release(home.releases / f"{number:02}")

    with pytest.raises(UsageError, match="releases/07 and 3 more under"):
        find(home, "nowhere")


@pytest.mark.parametrize("damage", ["{}", "", None], ids=["empty", "nothing", "unreadable"])
def test_a_damaged_ready_checkpoint_is_skipped_with_a_line(home, two, damage):
    manifest = two[1] / "grokctl.json"
    if damage is None:
        manifest.write_bytes(bytes(9 * 2**20))
    else:
        manifest.write_text(damage)

    found = find_checkpoint(home, None)

    assert found.root == two[0]
    assert found.note.startswith("a: skipped, because it is damaged (grokctl.json: ")
    assert found.note.endswith("; checkpoint: ready/z; also there: ready/a")


@pytest.mark.usefixtures("two")
def test_a_damaged_checkpoint_is_not_the_one_to_name(home):
    cut_for(home, "other", 1, "another")
    (home.ready / "a" / "grokctl.json").write_text("{}")

    with pytest.raises(UsageError, match=r"checkpoints under .*: other, z") as caught:
        find(home, None)

    assert caught.value.hint == f"CHECKPOINT {home.ready / 'other'}"


@pytest.mark.usefixtures("two")
def test_where_there_is_no_release_the_hint_names_a_ready_checkpoint(home):
    with pytest.raises(
        UsageError, match=r"no release under .*; there is ready/a, ready/z"
    ) as caught:
        find(home, None, ready=False)

    assert caught.value.hint == "grokctl reshard z --devices 8"


@pytest.mark.parametrize(
    ("make", "places", "line"),
    [
        (make_ready, ["ready/x"], None),
        (make_ready, ["ready/x", "./x"], "x: ready/x is meant; also there: ./x"),
        (make_release, ["releases/x", "./x"], "x: releases/x is meant; also there: ./x"),
        (make_release, ["releases/x", "./x/ckpt"], "x: releases/x is meant; also there: ./x"),
        (make_ready, ["ready/x", "releases/x"], "x: ready/x is meant; also there: releases/x"),
    ],
)
def test_a_line_says_which_of_two_of_one_name_was_taken(home, elsewhere, make, places, line):
    for place in places:
        if place == "./x/ckpt":
            (elsewhere / place).mkdir(parents=True)
            (elsewhere / place / "tensor00000_000").write_text("")
        elif place == "./x":
            make(elsewhere / "x")
        else:
            (make_ready if place.startswith("ready") else make_release)(home.root / place)

    assert find_checkpoint(home, "x").note == line


def test_a_link_here_to_the_checkpoint_under_home_is_no_other(home, elsewhere):
    made = make_ready(home.ready / "x")
    (elsewhere / "x").symlink_to(made)

    assert find_checkpoint(home, "x").note is None


# --- what is there instead


def special(folder: Path, kind: str) -> Path:
    path = folder / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("odd")
    elif kind == "tar":
        with tarfile.open(path, "w") as tar:
            tar.add(folder, arcname="grok-1", recursive=False)
    else:
        path.symlink_to("odd" if kind == "loop" else "gone")
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pipe", "a pipe"),
        ("socket", "a socket"),
        ("loop", "a loop of links"),
        ("dangling", r"a link to nothing \(gone\)"),
        ("tar", "a tar archive"),
    ],
)
def test_what_is_neither_a_file_nor_a_folder_is_named(home, elsewhere, kind, words):
    special(elsewhere, kind)

    with pytest.raises(UsageError, match=f"^odd: expected a checkpoint, found {words}$") as caught:
        find(home, "odd")

    assert caught.value.hint.startswith("tar xf odd" if kind == "tar" else "grokctl fetch")


@pytest.mark.parametrize(
    ("named", "words", "first"),
    [
        ("home", "ready/r, releases/a, releases/b", "ready/r"),
        ("home/releases", "a, b", "a"),
        ("home/ready", "r", "r"),
        ("elsewhere", "clone, one", "clone"),
    ],
)
def test_the_releases_in_a_folder_of_several_are_named(
    home, elsewhere, tmp_path, named, words, first
):
    make_ready(home.ready / "r")
    make_release(home.releases / "a")
    make_release(home.releases / "b")
    make_release(elsewhere / "one")
    make_release(elsewhere / "clone" / "checkpoints")

    with pytest.raises(UsageError, match=f"found a folder of checkpoints: {words}$") as caught:
        find(home, str(tmp_path / named))

    assert caught.value.hint == f"name one, such as {tmp_path / named / first}"


def cached(hub: Path, name: str, *snapshots: str, main: str | None = None) -> Path:
    """A repository in the cache of the hub's client."""
    repository = hub / f"models--{name}"
    for snapshot in snapshots:
        make_release(repository / "snapshots" / snapshot)
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


def test_the_hubs_cache_is_a_release_by_its_main_branch(home, elsewhere):
    repository = cached(elsewhere / "hub", "xai-org--grok-1", "aa", "bb", main="bb\n")
    cached(elsewhere / "hub", "other--model")

    for named in (repository, elsewhere / "hub"):
        assert find(home, str(named)) == repository / "snapshots" / "bb"


@pytest.mark.parametrize("main", [None, "cc", "", "..", "\xff"])
def test_snapshots_that_no_branch_tells_apart_are_not_guessed_between(home, elsewhere, main):
    repository = cached(elsewhere / "hub", "xai-org--grok-1", "aa", "bb", main=main)

    with pytest.raises(UsageError, match="checkpoints: snapshots/aa, snapshots/bb"):
        find(home, str(repository))


def test_two_releases_in_the_hubs_cache_are_named(home, elsewhere):
    cached(elsewhere / "hub", "xai-org--grok-1", "aa")
    cached(elsewhere / "hub", "me--grok-1", "bb")

    with pytest.raises(UsageError, match="checkpoints: models--me--grok-1, models--xai"):
        find(home, str(elsewhere / "hub"))


def test_a_checkpoint_in_the_users_home_is_found(monkeypatch, tmp_path, home):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = make_release(tmp_path / "mine")

    assert find(home, "~/mine") == made
