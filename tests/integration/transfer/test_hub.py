"""Downloads from a hub on the loopback interface, where no peer sends the torrent."""

import hashlib
import shutil
import time
from dataclasses import replace

import pytest
from hub import COMMIT, files_in, hub_of

from grokctl.checkpoint.finding import find_checkpoint
from grokctl.checkpoint.hub_record import HUB_PROOF, hub_release, read_promise
from grokctl.checkpoint.proving import root_to_prove
from grokctl.checkpoint.receipt import proof_of, read_receipt
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.unfinished import read_unfinished
from grokctl.errors import FetchError, StalledError, UsageError
from grokctl.events import Advanced, Noted, Stage
from grokctl.fetch import FetchOptions, fetch, plan_fetch
from grokctl.integrity.provenance import describe_proof
from grokctl.paths import Home
from grokctl.repair import repair
from grokctl.transfer.hub_fetch import hub_for
from grokctl.transfer.sources import MIRRORS, FetchRequest, parse_source
from grokctl.verify import verify


@pytest.fixture(autouse=True)
def no_time_for_peers(monkeypatch):
    """There are none, and every test would wait for them."""
    monkeypatch.setattr("grokctl.transfer.hub_fetch.METADATA_S", 0.2)
    monkeypatch.setattr("grokctl.transfer.hub_fetch.AGAIN_S", 0.2)


NOBODY = {"bind": "127.0.0.1", "port": 0, "dht": False, "lsd": False}
LARGE = "ckpt-0/tensor00002_000"
"""A file of a dozen ranges."""


@pytest.fixture
def hub(swarm):
    """A hub with the files of the seeded release, and a document that its torrent lacks."""
    with hub_of({**files_in(swarm.root), "README.md": b"hello", ".gitattributes": b"x"}) as hub:
        yield hub


@pytest.fixture
def root(tmp_path):
    return tmp_path / "got"


def of_hub(hub, **changes):
    """Options for a hub and nobody else."""
    return FetchOptions(**{**NOBODY, "mirrors": (hub.mirror,), "stall_timeout_s": 30, **changes})


def notes_of(events):
    return [event.message for event in events if isinstance(event, Noted)]


def assert_same(swarm, root):
    for name in swarm.files:
        assert (root / name).read_bytes() == (swarm.root / name).read_bytes(), name


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("folder", ["ckpt-0", "ckpt", ""])
def test_a_hub_is_enough_whatever_its_layout_and_the_receipt_says_by_what(swarm, root, folder):
    events = []

    with hub_of({**files_in(swarm.root, folder), "README.md": b"hello", "run.py": b"x"}) as hub:
        hub.page = 5
        fetched = fetch(swarm.magnet, root, of_hub(hub), observe=events.append)

    assert_same(swarm, root)
    assert not (root / "run.py").exists()
    assert (fetched.is_complete, fetched.is_proven, fetched.proven_by) == (True, False, HUB_PROOF)
    assert fetched.downloaded == sum(map(len, hub.files.values())) - len(b"x")
    assert fetched.blobs == ("README.md", "config.json")
    receipt = read_receipt(root)
    assert (receipt.proven_by, receipt.is_complete) == (HUB_PROOF, True)
    assert COMMIT in receipt.root_of_trust
    assert hub.endpoint in receipt.root_of_trust
    assert any("asking the hub" in note for note in notes_of(events))
    assert any("not by the infohash" in note for note in notes_of(events))
    assert any(isinstance(event, Advanced) and event.parts for event in events)


def test_both_layouts_at_once_are_fetched_once(swarm, root):
    with hub_of({**files_in(swarm.root), **files_in(swarm.root, "ckpt")}) as hub:
        fetched = fetch(swarm.magnet, root, of_hub(hub))

    assert fetched.downloaded == swarm.metainfo.total


def test_everything_downstream_says_what_it_is_proven_by(swarm, hub, root):
    fetch(swarm.magnet, root, of_hub(hub))

    verdict = verify(root, rehash=True)
    release = open_release(root)
    proof = proof_of(release)

    assert not verdict.damage
    assert (verdict.is_proven, verdict.proven_by) == (False, HUB_PROOF)
    assert verdict.hashed == verdict.nbytes
    assert verify(root).hashed == 0
    assert proof.receipt is None
    assert proof.by_hub.proven_by == HUB_PROOF
    assert "the infohash proves none of it" in describe_proof(proof, root)
    assert "not by the infohash" in proof.reason


def test_a_torrent_that_turns_up_upgrades_the_proof_without_fetching(
    swarm, root, torrent_file, tmp_path
):
    with hub_of(files_in(swarm.root)) as hub:
        fetch(swarm.magnet, root, of_hub(hub))
    home = Home(tmp_path / "home")

    found = find_checkpoint(home, str(root))
    place = root_to_prove(home, found, torrent_file, is_repaired=False)
    verdict = verify(place)

    assert place == root
    assert not verdict.damage
    assert (verdict.is_proven, verdict.proven_by) == (True, "infohash")
    assert proof_of(open_release(root)).receipt is not None
    assert proof_of(open_release(root)).by_hub is None


def test_a_swarm_that_comes_alive_upgrades_the_proof_without_fetching(swarm, root):
    with hub_of(files_in(swarm.root)) as hub:
        fetch(swarm.magnet, root, of_hub(hub))
        fetched = fetch(swarm.magnet, root, swarm.options(mirrors=(hub.mirror,)))

    assert fetched.downloaded == 0
    assert fetched.is_complete
    assert verify(root).is_proven


def test_the_torrent_of_another_release_is_refused(swarm, hub, root, tmp_path):
    fetch(swarm.magnet.replace(swarm.metainfo.infohash, "1" * 40), root, of_hub(hub))
    other = tmp_path / "other.torrent"
    other.write_bytes(swarm.torrent)
    home = Home(tmp_path / "home")

    with pytest.raises(UsageError, match="expected release 1111"):
        root_to_prove(home, find_checkpoint(home, str(root)), other, is_repaired=False)


def test_a_wrong_byte_on_the_disk_is_found_and_only_its_range_fetched_again(swarm, hub, root):
    fetch(swarm.magnet, root, of_hub(hub))
    length = hub_release(root).metainfo.piece_length
    flip(root / LARGE, 3 * length + 7)
    hub.parts.clear()

    verdict = verify(root)
    repaired = repair(root, verdict, FetchOptions(**NOBODY))

    (damage,) = verdict.damage
    assert damage.file == LARGE
    assert damage.ranges == ((3 * length, 4 * length),)
    assert hub.parts == [(LARGE, 3 * length, 4 * length - 1)]
    assert repaired.fetched.downloaded == length
    assert not repaired.verdict.damage
    assert repaired.verdict.proven_by == HUB_PROOF
    assert_same(swarm, root)


def test_a_wrong_byte_on_the_way_is_found_by_the_hash_of_its_file_and_mended(swarm, hub, root):
    hub.lies = {LARGE: (20_000,)}
    events = []

    fetched = fetch(swarm.magnet, root, of_hub(hub), observe=events.append)

    assert_same(swarm, root)
    assert fetched.is_complete
    size = len(hub.files[LARGE])
    assert size < hub.sent_of(LARGE) <= size + 5 * 16384  # only until the range that differs
    assert any("other bytes than the hub's hash" in note for note in notes_of(events))


def test_a_hub_that_lies_twice_is_refused_and_nothing_of_it_is_proven(swarm, hub, root):
    hub.lies, hub.always_lies = {LARGE: (20_000,)}, True

    with pytest.raises(FetchError, match=f"{LARGE}: expected sha256 .*, found .* the same bytes"):
        fetch(swarm.magnet, root, of_hub(hub))

    assert hub.sent_of(LARGE) == 2 * len(hub.files[LARGE])
    assert LARGE not in read_receipt(root).stamps
    assert hub_release(root) is None
    hub.lies, sent = {}, hub.sent_of(LARGE)
    fetch(swarm.magnet, root, of_hub(hub))  # the same command, when it tells the truth again
    assert_same(swarm, root)
    assert hub.sent_of(LARGE) - sent <= len(hub.files[LARGE])


def test_small_files_are_held_to_their_git_blobs(swarm, hub, root):
    hub.promised["README.md"] |= {"oid": "0" * 40}

    with pytest.raises(FetchError, match=r"README\.md: expected git blob 0000"):
        fetch(swarm.magnet, root, of_hub(hub))


def test_limits_expired_addresses_and_cut_answers_cost_only_time(swarm, hub, root):
    hub.retry_after = {"RateLimit": '"resolvers";r=0;t=1'}
    hub.uses, hub.cuts, hub.busy = 2, 3, 1
    events = []

    fetched = fetch(swarm.magnet, root, of_hub(hub), observe=events.append)

    assert_same(swarm, root)
    assert fetched.is_complete
    waits = [event.detail for event in events if isinstance(event, Advanced)]
    assert any("asks to wait 1 s" in detail for detail in waits)
    assert sum("/resolve/" in path for path in hub.asked) > len(hub.files)  # asked for anew
    assert "closed the connection" in fetched.troubles[0].reason


def test_a_limit_in_the_middle_is_waited_for_and_not_taken_for_a_stall(swarm, hub, root):
    hub.retry_after = {"Retry-After": "6"}
    limits = iter([1])

    def limit(event):
        if isinstance(event, Advanced) and event.stage is Stage.FETCH and event.done:
            hub.busy += next(limits, 0)

    began = time.monotonic()
    options = of_hub(hub, max_download=400_000, stall_timeout_s=4)
    fetch(swarm.magnet, root, options, observe=limit)

    assert_same(swarm, root)
    assert hub.busy == 0
    assert time.monotonic() - began > 6


@pytest.mark.parametrize("keeps_journal", [True, False])
def test_an_interrupted_download_goes_on_and_fetches_nothing_twice(swarm, hub, root, keeps_journal):
    def interrupt(event):
        if isinstance(event, Advanced) and event.stage is Stage.FETCH and event.done > 300_000:
            raise KeyboardInterrupt

    slowly = of_hub(hub, max_download=400_000)
    with pytest.raises(KeyboardInterrupt):
        fetch(swarm.magnet, root, slowly, observe=interrupt)
    unfinished = read_unfinished(root)
    if not keeps_journal:
        (root / ".grokctl/hub.ranges").unlink()
        (root / ".grokctl/receipt.json").unlink(missing_ok=True)
    hub.parts.clear()
    asked = len(hub.asked)
    second = fetch(swarm.magnet, root, of_hub(hub))

    assert_same(swarm, root)
    assert hub.mirror in unfinished.command(root)
    assert 300_000 <= unfinished.have < unfinished.nbytes
    assert second.is_complete
    assert not any("/api/" in path for path in hub.asked[asked:])  # the promise is kept
    whole = sum(map(len, hub.files.values()))
    if keeps_journal:
        assert second.downloaded <= whole - 300_000
    else:
        assert second.downloaded < whole


def test_a_byte_that_changed_after_a_kill_is_fetched_again(swarm, hub, root):
    def interrupt(event):
        if isinstance(event, Advanced) and event.stage is Stage.FETCH and event.done > 200_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(swarm.magnet, root, of_hub(hub, max_download=400_000), observe=interrupt)
    flip(root / "ckpt-0/tensor00000_000", 5)

    fetch(swarm.magnet, root, of_hub(hub))

    assert_same(swarm, root)


def test_a_torn_journal_is_read_up_to_the_tear(swarm, hub, root):
    fetch(swarm.magnet, root, of_hub(hub))
    journal = root / ".grokctl/hub.ranges"
    journal.write_bytes(journal.read_bytes()[:-5])

    assert hub_release(root) is None
    fetched = fetch(swarm.magnet, root, of_hub(hub))
    assert fetched.downloaded == 0
    assert hub_release(root) is not None


def test_only_some_files_are_fetched_and_the_release_stays_unproven(swarm, hub, root):
    fetched = fetch(swarm.magnet, root, of_hub(hub, only=("tensor00002*",)))

    assert (fetched.is_complete, fetched.proven_by) == (False, None)
    assert {path.name for path in (root / "ckpt-0").iterdir()} == {"tensor00002_000"}
    rest = fetch(swarm.magnet, root, of_hub(hub, only=("*",)))
    assert (rest.is_complete, rest.downloaded) == (True, rest.nbytes - fetched.downloaded)


def test_files_of_an_earlier_fetch_count_though_they_are_not_wanted_now(swarm, hub, root):
    fetch(swarm.magnet, root, of_hub(hub))
    (root / LARGE).unlink()

    again = fetch(swarm.magnet, root, of_hub(hub, only=("tensor00002*",)))

    assert (again.is_complete, again.proven_by) == (True, HUB_PROOF)
    assert again.downloaded == len(hub.files[LARGE])
    assert verify(root).hashed == 0


def test_a_plan_counts_the_files_of_the_hub_and_writes_nothing(swarm, hub, root):
    plan = plan_fetch(swarm.magnet, root, of_hub(hub))

    assert plan.wanted_nbytes == swarm.metainfo.total + len(b"hello")
    assert plan.infohash == swarm.metainfo.infohash
    assert plan.fits
    assert not root.exists()


def test_files_of_others_are_used_if_they_are_right_and_never_overwritten(swarm, hub, root):
    shutil.copytree(swarm.root, root)
    (root / LARGE).unlink()

    fetched = fetch(swarm.magnet, root, of_hub(hub, force=True))

    assert fetched.downloaded == len(hub.files[LARGE]) + len(b"hello")
    assert_same(swarm, root)

    other = root.with_name("other")
    shutil.copytree(swarm.root, other)
    flip(other / LARGE, 9)
    before = (other / LARGE).read_bytes()
    with pytest.raises(FetchError, match=r"expected .* as the hub names it, found"):
        fetch(swarm.magnet, other, of_hub(hub, force=True))
    assert (other / LARGE).read_bytes() == before


def test_a_file_that_the_hub_lists_and_lacks_ends_the_fetch(swarm, hub, root):
    hub.gone = {LARGE}

    with pytest.raises(FetchError, match=f"answers 404.*{LARGE}"):
        fetch(swarm.magnet, root, of_hub(hub))

    hub.gone = set()
    assert fetch(swarm.magnet, root, of_hub(hub)).is_complete


def test_a_hub_that_falls_silent_is_a_stall(swarm, root):
    with hub_of(files_in(swarm.root)) as hub:
        options = of_hub(hub, max_download=200_000, stall_timeout_s=1)

        def leave(event):
            if isinstance(event, Advanced) and event.done > 100_000:
                hub.busy, hub.retry_after = 10**6, {}

        with pytest.raises(StalledError, match=r"hub .*: expected bytes, found none for"):
            fetch(swarm.magnet, root, options, observe=leave)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda hub: hub.promised.clear(), "has no tensorNNNNN_000"),
        (lambda hub: hub.promised[LARGE].pop("lfs"), "names no sha256 for ckpt-0/tensor00002"),
        (lambda hub: hub.promised[LARGE].update(size=-1), "in another form"),
        (lambda hub: hub.promised[LARGE]["lfs"].update(size=5), "in another form"),
        (lambda hub: hub.promised[LARGE].update(path=f"../{LARGE}"), "has no|in another form"),
        (lambda hub: hub.promised[LARGE].update(lfs=7), "in another form"),
        (lambda hub: setattr(hub, "page", 0), "more than 20 pages"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(swarm, hub, root, spoil, problem):
    spoil(hub)

    with pytest.raises(FetchError, match=f"hub {hub.endpoint}.*({problem})"):
        fetch(swarm.magnet, root, of_hub(hub))

    assert not (root / "ckpt-0").exists()


def test_a_record_that_somebody_else_wrote_is_not_believed(swarm, hub, root):
    fetch(swarm.magnet, root, of_hub(hub))
    record = root / ".grokctl/hub.json"
    sha256 = hashlib.sha256(hub.files[LARGE]).hexdigest()

    record.write_text(record.read_text().replace(sha256, "0" * 64))

    assert read_promise(root) is None
    assert hub_release(root) is None
    with pytest.raises(UsageError, match="cannot be proven without"):
        verify(root)


def test_a_file_that_others_can_change_is_no_proof(swarm, hub, root):
    fetch(swarm.magnet, root, of_hub(hub))
    (root / LARGE).chmod(0o666)

    verdict = verify(root)

    assert (verdict.proven_by, verdict.is_exposed) == (None, True)
    assert proof_of(open_release(root)).by_hub is None


GROK_1 = FetchOptions(hub=MIRRORS["hf"].url)


@pytest.mark.parametrize(
    ("source", "changes", "asks"),
    [
        ("grok-1", {}, True),
        ("grok-1", {"hub": None}, False),
        ("grok-1", {"proxy": "socks5://127.0.0.1:1"}, False),
        ("grok-1", {"peers": ("127.0.0.1:1",)}, False),
        ("grok-1", {"dht": False}, False),
        ("grok-1", {"torrent_file": "x.torrent"}, False),
        ("grok-1", {"dht": False, "mirrors": ("hf",)}, True),
        ("grok-1", {"mirrors": ("http://127.0.0.1/plain/",), "dht": False}, False),
        ("magnet:?xt=urn:btih:" + "1" * 40, {}, False),
        ("magnet:?xt=urn:btih:" + "1" * 40, {"mirrors": ("hf",)}, True),
    ],
)
def test_a_hub_is_asked_by_itself_for_grok_1_alone_and_never_if_one_says_whom(
    root, source, changes, asks
):
    request = FetchRequest(
        origin=parse_source(source), root=root, options=replace(GROK_1, **changes)
    )

    assert (hub_for(request) is not None) == asks
