"""Runs that go on where they stopped: what is believed of what an earlier one left."""

import json
import os
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cuts import contents, cut, interrupt_at, journal_of, kept_by, partial_of
from golden import load_golden
from hypothesis import given, settings
from hypothesis import strategies as st

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.release import Release, open_release
from grokctl.errors import UsageError
from grokctl.events import Advanced, Finished, Stage, Started
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Precision
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, ReshardPlan, plan_reshard

MB = 2**20
MESH = MeshShape(1, 2)
FORMS = {
    "int8": {},
    "int8-zstd": {"compression": Compression(1)},
    "int4": {"precision": Precision.INT4},
    "int4-zstd": {"precision": Precision.INT4, "compression": Compression(1)},
    "bf16": {"precision": Precision.BFLOAT16},
}


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    """A layer that can be cut in any precision; its tensors are several arrays and frames."""
    root = tmp_path_factory.mktemp("release") / "small"
    write_miniature(root, replace(MINIATURE, num_layers=1, emb_size=96), tokenizer=False)
    return open_release(root)


@dataclass(frozen=True)
class Stopped:
    """A run that stopped on its way, to go on with, and what an uninterrupted one writes."""

    out: Path
    planned: ReshardPlan
    whole: dict[str, str]

    @property
    def partial(self) -> Path:
        return partial_of(self.out)

    @property
    def journal(self) -> Path:
        return self.partial / "journal"

    @property
    def first(self) -> Path:
        """The first device's file."""
        return next(
            path for path in sorted(self.partial.iterdir()) if path.name.startswith("device-")
        )

    def go_on(self) -> int:
        """Run it to its end; how many tensors it kept."""
        events = []
        reshard(self.planned, observe=events.append)
        assert contents(self.out) == self.whole
        assert [path.name for path in self.out.parent.iterdir()] == ["out"]
        return kept_by(events)


@pytest.fixture(scope="module")
def wholes(release, tmp_path_factory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("whole")
    return {
        name: contents(cut(release, MESH, folder / name, **form).root)
        for name, form in FORMS.items()
    }


@pytest.fixture(scope="module")
def nearly(release, tmp_path_factory) -> dict[str, Path]:
    """Folders of runs that stopped just before they published: all tensors are journalled."""
    found = {}
    for name, form in FORMS.items():
        out = tmp_path_factory.mktemp("nearly") / "out"

        def at_the_end(event):
            if event == Finished(stage=Stage.RESHARD):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            cut(release, MESH, out, observe=at_the_end, **form)
        found[name] = partial_of(out)
    return found


@pytest.fixture(params=FORMS)
def form(request) -> str:
    return request.param


@pytest.fixture
def stopped(release, wholes, nearly, form, tmp_path) -> Stopped:
    """All tensors are there and journalled; whoever asks for it takes some away."""
    return stopped_in(tmp_path, release, wholes, nearly, form)


def stopped_in(folder, release, wholes, nearly, form) -> Stopped:
    folder.mkdir(exist_ok=True)
    out = folder / "out"
    shutil.copytree(nearly[form], folder / nearly[form].name)
    return Stopped(
        out, plan_reshard(release, ReshardOptions(mesh=MESH, out=out, **FORMS[form])), wholes[form]
    )


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


# --- any moment


def test_a_run_interrupted_after_its_last_tensor_copies_nothing_again(stopped):
    count, events = len(stopped.planned.storage.tensors), []

    reshard(stopped.planned, observe=events.append)

    assert kept_by(events) == count
    assert not [event for event in events if isinstance(event, Advanced)]
    assert contents(stopped.out) == stopped.whole


def test_it_goes_on_behind_any_tensor(release, wholes, nearly, form, tmp_path):
    count = len(lines_of(nearly[form] / "journal"))

    for keep in range(0, count, 1 if form.startswith("int4") else 3):
        stopped = stopped_in(tmp_path / str(keep), release, wholes, nearly, form)
        stopped.journal.write_bytes(b"".join(lines_of(stopped.journal)[:keep]))

        assert stopped.go_on() == keep
        shutil.rmtree(tmp_path / str(keep))


@pytest.mark.parametrize("mesh", [MeshShape(1, 1), MeshShape(1, 4), MeshShape(2, 8)], ids=str)
def test_interrupted_at_any_event_it_goes_on_from_its_journal_to_the_same_bytes(
    release, mesh, tmp_path
):
    events = []
    whole = contents(cut(release, mesh, tmp_path / "whole", jobs=2, observe=events.append).root)
    moments = sum(isinstance(event, Advanced) for event in events)
    stops = random.Random(mesh.size).sample(range(2, moments), 6)

    for number, stop in enumerate([*stops, 1, moments]):
        out = tmp_path / str(number) / "out"
        planned = plan_reshard(release, ReshardOptions(mesh=mesh, out=out, jobs=2))
        with pytest.raises(KeyboardInterrupt):
            reshard(planned, observe=interrupt_at(stop))
        assert not out.exists()
        done, events = len(journal_of(out)), []
        reshard(planned, observe=events.append)

        started = next(event for event in events if isinstance(event, Started))
        advanced = [event for event in events if isinstance(event, Advanced)]
        assert started.total == planned.bytes_out
        assert kept_by(events) == done
        assert not advanced or advanced[-1].done == planned.bytes_out
        assert contents(out) == whole
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_run_interrupted_again_and_again_ends_with_the_same_bytes(
    release, wholes, form, tmp_path
):
    planned = plan_reshard(
        release, ReshardOptions(mesh=MESH, out=tmp_path / "out", jobs=1, **FORMS[form])
    )
    done = [0]
    for stop in (17, 9, 5, 12, 1, 3):
        events = []
        with pytest.raises(KeyboardInterrupt):
            reshard(planned, observe=interrupt_at(stop, events))
        assert kept_by(events) == done[-1]
        done.append(len(journal_of(planned.out)))

    reshard(planned)

    assert done == sorted(done)
    assert done[-1] > 0
    assert contents(planned.out) == wholes[form]


def test_another_number_of_threads_or_less_memory_goes_on_too(release, wholes, nearly, tmp_path):
    for number, options in enumerate([{"jobs": 1}, {"jobs": 5}, {"max_memory": 1}]):
        stopped = stopped_in(tmp_path / str(number), release, wholes, nearly, "int4-zstd")
        stopped.journal.write_bytes(b"".join(lines_of(stopped.journal)[:9]))
        other = plan_reshard(
            release, ReshardOptions(mesh=MESH, out=stopped.out, **FORMS["int4-zstd"], **options)
        )

        assert replace(stopped, planned=other).go_on() == 9


def test_another_plan_begins_anew_and_leaves_what_the_first_one_made(
    release, wholes, nearly, tmp_path
):
    stopped = stopped_in(tmp_path, release, wholes, nearly, "int8")
    before = contents(stopped.partial)
    partial = stopped.partial.name

    for form in ("int8-zstd", "int4", "bf16"):
        events = []
        out = cut(release, MESH, stopped.out, force=True, observe=events.append, **FORMS[form]).root
        assert kept_by(events) == 0
        assert contents(out) == wholes[form]

    assert contents(tmp_path / partial) == before


def test_the_name_appears_when_everything_is_there(release, wholes, tmp_path, form):
    out, seen = tmp_path / "out", []

    def look(_event):
        seen.append(out.exists() or any(tmp_path.rglob("grokctl.json")))

    cut(release, MESH, out, observe=look, **FORMS[form])

    assert len(seen) > 20
    assert not any(seen)
    assert contents(out) == wholes[form]


def test_a_source_that_changed_begins_anew(two_layers, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        cut(open_release(two_layers), MESH, out, observe=interrupt_at(40))
    assert journal_of(out)
    path = two_layers / "ckpt-0/tensor00000_000"
    data = bytearray(path.read_bytes())
    data[3000] ^= 1
    path.write_bytes(data)
    changed, events = open_release(two_layers), []

    cut(changed, MESH, out, observe=events.append)

    assert kept_by(events) == 0
    assert contents(out) == contents(cut(changed, MESH, tmp_path / "direct").root)


# --- journals that are not what a run wrote


_OTHER = json.dumps([[[64, "0" * 64, []]] * 2, [0.0, 0.0]]).encode() + b"\n"
GARBAGE = {
    "nothing": b"",
    "blank": b"\n\n",
    "junk": b"junk\n",
    "number": b"999999\n",
    "no-text": b"\xff\xfe\n",
    "zeros": bytes(5000),
    "long-number": b"9" * 5000,
    "infinite": b"[[[Infinity,1,[]],[1e400,1,[]]],[0,0]]\n",
    "nan": b"[[[NaN,1,[]],[NaN,1,[]]],[0,0]]\n",
    "deep": b"[" * 100_000 + b"\n",
    "null": b"null\n",
    "few-marks": b"[[],[0,0]]\n",
    "many-marks": json.dumps([[[64, "0" * 64, []]] * 9, [0.0, 0.0]]).encode() + b"\n",
    "another-digest": _OTHER,
    "negative": _OTHER.replace(b"64", b"-64"),
    "beyond-the-file": _OTHER.replace(b"64", b"6400000000"),
    "beyond-words": _OTHER.replace(b"64", b"6" * 40),
    "frames-of-text": _OTHER.replace(b"[]", b'["ab"]'),
    "no-squares": b"[[[64,1,[]],[64,1,[]]]]\n",
    "odd-squares": _OTHER.replace(b"[0.0, 0.0]", b'["x", null]'),
}


@pytest.mark.parametrize("garbage", [pytest.param(GARBAGE[name], id=name) for name in GARBAGE])
@pytest.mark.parametrize("keep", [0, 6])
def test_a_journal_is_believed_up_to_where_it_makes_no_sense(
    release, wholes, nearly, tmp_path, garbage, keep
):
    stopped = stopped_in(tmp_path, release, wholes, nearly, "int8")
    lines = lines_of(stopped.journal)
    stopped.journal.write_bytes(b"".join(lines[:keep]) + garbage + b"".join(lines[keep:]))

    kept = stopped.go_on()

    assert kept == (len(lines) if not garbage else keep)


@pytest.mark.parametrize("cut_off", [1, 2, 30, -1])
def test_a_torn_last_line_is_done_again(release, wholes, nearly, tmp_path, cut_off):
    stopped = stopped_in(tmp_path, release, wholes, nearly, "int8-zstd")
    lines = lines_of(stopped.journal)
    torn = lines[8][:cut_off] if cut_off > 0 else lines[8].rstrip(b"\n")[:cut_off]
    stopped.journal.write_bytes(b"".join(lines[:8]) + torn)

    assert stopped.go_on() == 8


def test_a_line_without_its_end_is_done_again_and_the_journal_stays_whole(
    release, wholes, nearly, tmp_path
):
    stopped = stopped_in(tmp_path, release, wholes, nearly, "int8")
    lines = lines_of(stopped.journal)
    stopped.journal.write_bytes(b"".join(lines[:9]).rstrip(b"\n"))

    with pytest.raises(KeyboardInterrupt):
        reshard(stopped.planned, observe=interrupt_at(9))

    done = len(journal_of(stopped.out))
    assert done >= 8
    assert lines_of(stopped.journal) == lines[:done]
    assert stopped.go_on() == done


def test_a_journal_that_is_gone_begins_anew(stopped):
    stopped.journal.unlink()

    assert stopped.go_on() == 0


@pytest.mark.parametrize("place", [0, 5, -1])
def test_a_line_that_comes_twice_is_believed_once(stopped, place):
    lines = lines_of(stopped.journal)
    place %= len(lines)
    lines.insert(place, lines[place])
    stopped.journal.write_bytes(b"".join(lines))

    assert stopped.go_on() <= place + 1


def test_lines_in_another_order_or_with_gaps_are_not_believed(stopped):
    lines = lines_of(stopped.journal)
    stopped.journal.write_bytes(b"".join([*lines[:4], *lines[5:]]))

    assert stopped.go_on() <= 4


def test_a_journal_of_another_form_is_not_believed(release, wholes, nearly, form, tmp_path):
    for number, other in enumerate(name for name in FORMS if name != form):
        stopped = stopped_in(tmp_path / str(number), release, wholes, nearly, form)
        shutil.copy(nearly[other] / "journal", stopped.journal)

        assert stopped.go_on() == 0


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda frames: frames[:-1], id="fewer"),
        pytest.param(lambda frames: [*frames, [1, 1]], id="more"),
        pytest.param(lambda frames: [[a + 1, b] for a, b in frames], id="longer"),
        pytest.param(lambda frames: [[a, b + 1] for a, b in frames], id="longer packed"),
        pytest.param(lambda _: [], id="none"),
    ],
)
def test_frames_that_are_not_those_of_the_tensor_are_not_believed(
    release, wholes, nearly, tmp_path, change
):
    stopped = stopped_in(tmp_path, release, wholes, nearly, "int8-zstd")
    lines = [json.loads(line) for line in lines_of(stopped.journal)]
    mark = lines[7][0][1]
    mark[2] = change(mark[2])
    stopped.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert stopped.go_on() <= 7


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_whatever_happens_to_a_journal_the_bytes_are_right(
    release, wholes, nearly, tmp_path_factory, data
):
    folder = tmp_path_factory.mktemp("any")
    form = data.draw(st.sampled_from(["int8", "int8-zstd"]))
    stopped = stopped_in(folder, release, wholes, nearly, form)
    journal = bytearray(stopped.journal.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(journal) - 1))
        length = data.draw(st.integers(0, 200))
        journal[at : at + length] = data.draw(
            st.one_of(
                st.binary(max_size=8),
                st.sampled_from([b"[", b"]", b"\n", b"9", b"-1", b"1e999", b"NaN", b'"']),
                st.just(bytes(journal[at : at + 2 * length])),
            )
        )
    stopped.journal.write_bytes(journal)

    reshard(stopped.planned)

    found = contents(stopped.out)
    for name, digest in stopped.whole.items():
        # what converting changed is in the journal alone, and no digest covers it
        assert found[name] == digest or name in {"grokctl.json", "SHA256SUMS"}
    shutil.rmtree(folder)


# --- device files that are not what a run wrote


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("place", [0, 1, 7, -1])
def test_a_file_altered_before_a_mark_is_believed_up_to_the_mark_before(stopped, place):
    marks = [line[0][0][0] for line in journal_of(stopped.out)]
    place %= len(marks)
    flip(stopped.first, marks[place] - 1)

    assert stopped.go_on() == place


def test_a_file_altered_or_longer_behind_the_last_mark_is_cut_there(stopped):
    lines = lines_of(stopped.journal)
    stopped.journal.write_bytes(b"".join(lines[:5]))
    mark = json.loads(lines[4])[0][0][0]
    flip(stopped.first, mark)
    with stopped.first.open("ab") as file:
        file.write(b"x" * 10**6)

    assert stopped.go_on() == 5


@pytest.mark.parametrize("lost", [1, 1000, 10**9])
def test_a_file_that_lost_its_end_is_written_again_from_there(stopped, lost):
    marks = [line[0][0][0] for line in journal_of(stopped.out)]
    size = max(0, stopped.first.stat().st_size - lost)
    os.truncate(stopped.first, size)

    assert stopped.go_on() == sum(mark <= size for mark in marks)


def test_a_file_that_is_gone_begins_all_anew(stopped):
    stopped.first.unlink()

    assert stopped.go_on() == 0


def test_files_that_changed_places_begin_anew(stopped):
    one, other = sorted(
        path for path in stopped.partial.iterdir() if path.name.startswith("device-")
    )
    aside = stopped.partial / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)

    assert stopped.go_on() == 0


def test_a_link_in_the_place_of_a_file_is_not_followed(stopped, tmp_path_factory):
    precious = tmp_path_factory.mktemp("precious") / "thesis"
    precious.write_text("mine")
    first = stopped.first
    first.unlink()
    first.symlink_to(precious)

    with pytest.raises(UsageError, match="Too many levels"):
        stopped.go_on()

    assert precious.read_text() == "mine"


# --- what changes no byte


@pytest.mark.parametrize("jobs", [1, 3])
def test_neither_threads_nor_memory_change_a_byte(release, wholes, tmp_path, form, jobs):
    options = {"mesh": MESH, "jobs": jobs, **FORMS[form]}
    usual = plan_reshard(release, ReshardOptions(out=tmp_path / "usual", **options))
    little = plan_reshard(release, ReshardOptions(out=tmp_path / "little", max_memory=1, **options))

    for planned in (usual, little):
        reshard(planned)

    assert (usual.jobs, little.jobs) == (jobs, 1)
    assert contents(usual.out) == contents(little.out) == wholes[form]


def test_arrays_are_as_small_as_memory_asks_for(tmp_path):
    root = tmp_path / "release"
    config = replace(MINIATURE, num_layers=1, emb_size=768, vocab_size=4096)
    write_miniature(root, config, tokenizer=False)
    release = open_release(root)
    budgets = (1, 48 * MB, 2**30)
    plans = [
        plan_reshard(
            release, ReshardOptions(mesh=MESH, out=tmp_path / "out", jobs=2, max_memory=nbytes)
        )
        for nbytes in budgets
    ]

    assert plans[0].array_nbytes < plans[1].array_nbytes == plans[2].array_nbytes
    for planned, nbytes in zip(plans[1:], budgets[1:], strict=True):
        assert planned.peak_bytes <= nbytes


@pytest.mark.parametrize("compression", [None, Compression(1)], ids=str)
@pytest.mark.parametrize("jobs", [1, 16, 64])
def test_many_threads_do_not_take_more_than_was_allowed(release, tmp_path, jobs, compression):
    planned = plan_reshard(
        release,
        ReshardOptions(
            mesh=MeshShape(2, 8),
            out=tmp_path / "out",
            jobs=jobs,
            max_memory=64 * MB,
            compression=compression,
        ),
    )

    assert planned.peak_bytes <= (64 + 100) * MB


def test_small_arrays_change_no_byte(tmp_path, monkeypatch):
    monkeypatch.setattr("grokctl.resharding.memory_limits._SMALLEST_ARRAY", 100)
    monkeypatch.setattr("grokctl.resharding.slices.FRAME", 100)
    release = load_golden("two-layers").release
    mesh = MeshShape(1, 4)
    planned = plan_reshard(
        release, ReshardOptions(mesh=mesh, out=tmp_path / "out", max_memory=1, jobs=2)
    )
    usual = plan_reshard(release, ReshardOptions(mesh=mesh, out=tmp_path / "out", jobs=2))
    assert planned.array_nbytes < usual.array_nbytes / 10

    reshard(planned)

    assert contents(planned.out) == contents(cut(release, mesh, tmp_path / "direct").root)


def test_a_plan_touches_nothing(release, tmp_path):
    plan_reshard(release, ReshardOptions(mesh=MeshShape(2, 8), out=tmp_path / "not" / "yet"))

    assert list(tmp_path.iterdir()) == []
