"""What is doubtful about a host's files is said by rank 0, whichever host it is."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from cuts import cut, proven_release

from grokctl.checkpoint.ready import read_manifest
from grokctl.checkpoint.refusal import write_refusal
from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.sums import not_made_here
from grokctl.cluster.exchange import Exchange
from grokctl.cluster.launcher import Launch
from grokctl.errors import Damage, PeerError, Reason
from grokctl.events import Noted, ignore
from grokctl.model.placement import MeshShape
from grokctl.paths import Home
from grokctl.session.candidates import find_candidates
from grokctl.session.doubts import note_doubts


class Store(dict):
    """The calls of JAX's coordination service that facts go through."""

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key: str, _: int) -> str:
        while key not in self:
            time.sleep(0.001)
        return self[key]


def said_by(*doubts) -> list[list[str]]:
    """The notes of every rank, each with doubts of its own."""
    store = Store()

    def run(rank: int) -> list[str]:
        launch = Launch(host="127.0.0.1", port=1, count=len(doubts), rank=rank)
        exchange, seen = Exchange(launch, bound_s=20, note=ignore), []
        exchange._store = store
        note_doubts(exchange, doubts[rank], seen.append)
        return [event.message for event in seen if isinstance(event, Noted)]

    with ThreadPoolExecutor(len(doubts)) as pool:
        return list(pool.map(run, range(len(doubts))))


@pytest.mark.parametrize(
    ("doubts", "said"),
    [
        pytest.param([(), ("a",)], ["rank 1: a"], id="another-rank"),
        pytest.param([(), ("a", "b")], ["rank 1: a", "rank 1: b"], id="two-doubts"),
        pytest.param([("a",), ("a",)], [], id="said-of-its-own"),
        pytest.param([("b",), ("a",)], ["rank 1: a"], id="not-its-own"),
        pytest.param([(), ("a",), ("b",), ("a",)], ["ranks 1, 3: a", "rank 2: b"], id="several"),
        pytest.param([(), ("\x1b[2Ja",)], ["rank 1: ?[2Ja"], id="escape"),
        pytest.param([(), ()], [], id="none"),
    ],
)
def test_rank_0_says_what_it_has_not_said_of_its_own_files(doubts, said):
    assert said_by(*doubts) == [said, *([] for _ in doubts[1:])]


def test_doubts_that_are_none_are_a_sentence():
    with pytest.raises(PeerError, match="rank 1: expected a list of doubts, found 7"):
        said_by((), 7)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release") / "small"
    proof = proven_release(root)
    return open_release(root), proof


def doubts_about(root):
    seen = []
    (found,) = find_candidates(Home(root / "no"), str(root), processes=2, observe=seen.append)
    notes = [event.message for event in seen if isinstance(event, Noted)]
    return found.doubts, [*notes, *filter(None, [found.note])]


def test_a_ready_checkpoint_has_the_doubts_that_are_noted(release, tmp_path):
    source, proof = release
    made = cut(source, MeshShape(1, 2), tmp_path / "made", proof=proof).root
    copy = shutil.copytree(made, tmp_path / "copy")
    write_refusal(copy, [Damage("device-01-of-02.safetensors", Reason.ALTERED)])

    assert doubts_about(made) == ((), [])
    doubts, notes = doubts_about(copy)
    assert doubts == tuple(notes)
    assert doubts[0].startswith("copy: verify found 1 damaged file on ")
    assert doubts[1:] == (f"copy: not proven: {not_made_here(read_manifest(copy))}",)


def test_a_release_has_a_doubt_unless_it_is_proven_and_undamaged(release, tmp_path):
    source, _ = release
    copy = shutil.copytree(source.root, tmp_path / "copy")

    assert doubts_about(source.root)[0] == ()
    (doubt,), notes = doubts_about(copy)
    assert doubt.startswith("copy: its content is not proven: ")
    assert any(note.startswith(doubt) for note in notes)
    write_refusal(source.root, [Damage("ckpt-0/tensor00003_000", Reason.ALTERED)])
    (doubt,), _ = doubts_about(source.root)
    assert doubt.startswith("small: verify found 1 damaged file on ")
