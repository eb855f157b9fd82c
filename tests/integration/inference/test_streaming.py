"""Runs whose experts come from the disk: the same bits as in memory, and not a byte more read."""

import os
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from golden import load_golden, score_logits

from grokctl.checkpoint.frames import Compression
from grokctl.checkpoint.ready import open_ready
from grokctl.errors import CorruptCheckpointError, HardwareError
from grokctl.events import Advanced, Finished, Noted, Stage, Started
from grokctl.infer import infer
from grokctl.inference import expert_loading, expert_stream
from grokctl.inference.plan import EngineOptions, plan
from grokctl.inference.routing import count_experts
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute, Precision
from grokctl.model.sampling import Sampling
from grokctl.model.sizing import needs
from grokctl.native.binary import SWITCH
from grokctl.planning.residence import place
from grokctl.reshard import reshard
from grokctl.resharding.plan import ReshardOptions, plan_reshard

pytestmark = pytest.mark.optimized

ONE = MeshShape(1, 1)
ALL = 16
"""Experts of two layers."""
MOST = 9


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The small golden model, cut for one device at a precision."""
    made = {}

    def ready(precision=Precision.INT8, **options):
        key = (precision, *options)
        if key not in made:
            out = tmp_path_factory.mktemp("ready") / "ready"
            golden = load_golden("two-layers")
            options = ReshardOptions(mesh=ONE, out=out, precision=precision, **options)
            made[key] = reshard(plan_reshard(golden.release, options))
        return made[key]

    return ready


def memory_for(ready, pinned, options):
    """The least memory in which so many experts stay."""
    planned = expert_loading.Loader(ready, ONE, jax.devices()[:1])
    terms = infer_terms(ready, options)
    needed = needs(
        *(ready.config, ONE, terms),
        weights=planned.weights,
        precision=ready.precision,
        platform="cpu",
    )

    def kept(memory):
        found = place(ready.config, needed, experts=planned.expert_nbytes, memory=memory)
        return ALL + 1 if found is None else -1 if found.missing else found.pinned

    low, high = 0, needed.total
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) >= pinned else (middle, high)
    assert kept(high) == pinned
    return high


def infer_terms(ready, options):
    return plan(ready.config, options).terms


def started(ready, pinned, observe=None, **options):
    """An engine that keeps so many experts in memory; None for all of them."""
    given = EngineOptions(mesh=ONE, **{"compute": Compute.FLOAT32, "slots": 2, **options})
    if pinned is not None:
        given = replace(given, max_memory=memory_for(ready, pinned, given))
    engine = infer(ready, given, observe=observe or (lambda _: None))
    assert (engine.runner.stream is None) == (pinned is None)
    if pinned is not None:
        assert engine.runner.stream.residence.pinned == pinned
    return engine


def everything(engine, tokens):
    """Logits of a prompt, of single tokens, and of two sequences at a time."""
    greedy = Sampling(temperature=0)
    logits = score_logits(engine, tokens)
    ids = [t.id for t in engine.generate(tokens, sampling=greedy, max_tokens=6, ignore_eos=True)]
    alone = engine.runner.decode([0], [7], [len(tokens)]).on_host()
    both = engine.runner.decode([0, 1], [3, 5], [len(tokens) + 1, 0]).on_host()
    return [logits, np.array(ids), alone, both]


@pytest.mark.parametrize(
    ("kernel", "precision", "compute"),
    [
        ("native", Precision.INT8, Compute.FLOAT32),
        ("native", Precision.INT4, Compute.BFLOAT16),
        ("off", Precision.INT8, Compute.BFLOAT16),
        ("off", Precision.BFLOAT16, Compute.FLOAT32),
    ],
)
def test_streamed_experts_give_the_bits_of_resident_ones(
    cut, monkeypatch, kernel, precision, compute
):
    if kernel == "off":
        monkeypatch.setenv(SWITCH, "off")
    tokens = load_golden("two-layers").tokens
    ready = cut(precision)
    expected = everything(started(ready, None, compute=compute), tokens)

    for pinned in (0, ALL // 2 - 1, MOST):
        found = everything(started(ready, pinned, compute=compute), tokens)

        for here, there in zip(found, expected, strict=True):
            assert np.array_equal(here, there)


def test_whatever_arrives_first_the_bits_are_the_same(cut, monkeypatch):
    tokens, ready = load_golden("two-layers").tokens, cut()
    expected = everything(started(ready, None), tokens)
    engine = started(ready, 3)
    stream, order = engine.runner.stream, np.random.default_rng(0)
    once = stream.experts

    def shuffled(layer, chosen, **options):
        return once(layer, order.permutation(chosen).tolist(), **options)

    monkeypatch.setattr(stream, "experts", shuffled)

    for here, there in zip(everything(engine, tokens), expected, strict=True):
        assert np.array_equal(here, there)


def test_the_experts_that_counted_texts_chose_most_stay_and_are_hit(cut):
    golden, ready = load_golden("two-layers"), cut()
    counts = count_experts(started(ready, None), golden.tokens).counts
    rarest = tuple(tuple(max(row) - count for count in row) for row in counts)
    hits = {}

    for name, of in (("most", counts), ("least", rarest)):
        engine = started(ready, 5, counts=of)
        stream = engine.runner.stream
        # a fresh list of the most counted, of all layers together
        shares = {
            (layer, number): count / sum(row)
            for layer, row in enumerate(of)
            for number, count in enumerate(row)
        }
        least = min(shares[key] for key in stream._pinned)
        assert least >= max(shares[key] for key in shares.keys() - stream._pinned.keys())
        assert len(stream._pinned) == 5
        before = stream.counts
        for position, token in enumerate(golden.tokens):
            engine.runner.decode([0], [token], [position])
        hits[name] = (stream.counts - before).hit_rate

    in_text = sorted((count for row in counts for count in row), reverse=True)
    assert hits["most"] == pytest.approx(sum(in_text[:5]) / sum(in_text))
    assert hits["least"] < 5 / ALL < hits["most"]


def test_bytes_are_those_of_the_misses_and_a_prompt_reads_every_expert_once(cut):
    golden, ready = load_golden("two-layers"), cut()
    engine = started(ready, 5)
    stream, reader = engine.runner.stream, engine.runner.stream.file.reader
    one = stream.residence.expert_nbytes
    before, counted = reader.nbytes, stream.counts

    score_logits(engine, golden.tokens)
    prompt = stream.counts - counted

    assert prompt.experts_chosen <= ALL
    assert prompt.disk_bytes == prompt.experts_missed * one
    assert reader.nbytes - before <= prompt.experts_missed * (one + 6 * 2 * 4096)
    counted = stream.counts
    list(engine.generate(golden.tokens, sampling=Sampling(temperature=0), max_tokens=5))
    decoded = engine.scheduler.totals
    more = stream.counts - counted
    assert decoded.experts_chosen == 4 * decoded.steps  # two in each of two layers
    assert decoded.disk_bytes == decoded.experts_missed * one
    assert more.experts_missed >= decoded.experts_missed
    assert decoded.hit_rate == 1 - decoded.experts_missed / decoded.experts_chosen


def test_a_prompt_of_several_chunks_reads_every_expert_once_and_gives_the_same_bits(cut):
    tokens, ready = load_golden("two-layers").tokens * 2, cut()
    found = {}

    for pinned in (None, 5):
        engine = started(ready, pinned)
        engine.runner.longest_chunk = 16
        text = engine.generate(
            tokens, sampling=Sampling(temperature=0), max_tokens=4, ignore_eos=True
        )
        ids = np.array([token.id for token in text])
        before = engine.runner.streamed()
        logits = score_logits(engine, tokens)
        prompt = engine.runner.streamed() - before
        scores = engine.score(tokens)
        found[pinned] = [ids, logits, scores.nll]

    assert len(tokens) > 32  # so that there are three chunks
    for here, there in zip(found[5], found[None], strict=True):
        assert np.array_equal(here, there)
    assert 8 < prompt.experts_chosen <= ALL
    assert prompt.disk_bytes <= engine.runner.stream.residence.swept


def test_arrays_lie_in_the_buffers_and_hold_nan_until_something_was_read(cut):
    engine = started(cut(), 0)
    stream = engine.runner.stream
    (buffer, *_), parts = stream._free, stream.file.parts(1, 3)
    buffer.spoil(parts)

    experts = stream.file.experts_of(buffer, parts)

    places = [view.ctypes.data for view in buffer.arrays(parts)]
    memory = {place for place in places if place % 64 == 0}  # JAX copies others
    leaves = jax.tree.leaves(experts)
    own = {leaf.addressable_data(0).unsafe_buffer_pointer() for leaf in leaves}
    assert len(memory) >= 3
    assert memory <= own
    for matrix in (experts.gate, experts.up, experts.down):
        bits = np.asarray(matrix.scales)[..., -1, :]
        assert (bits == 0x7FC0).all()  # NaN in bfloat16


def test_an_expert_that_is_used_before_it_came_is_noticed(cut, monkeypatch):
    golden = load_golden("two-layers")
    engine = started(cut(), 0)
    monkeypatch.setattr(expert_stream.ExpertFile, "wait", lambda _self, _reading: None)
    monkeypatch.setattr(expert_stream.ExpertFile, "ask", _spoil_only)

    assert np.isnan(engine.runner.decode([0], [golden.tokens[0]], [0]).on_host()).any()


def _spoil_only(self, buffer, parts):
    buffer.spoil(parts)
    reading = self.reader.ask(buffer.windows(self.parts(0, 0))[:1])
    reading.wait()
    buffer.spoil(parts)
    return reading


def test_the_load_and_each_prompt_report_bytes_and_one_line_says_what_stays(cut):
    seen = []
    engine = started(cut(), 5, observe=seen.append)
    loaded = list(seen)
    residence = engine.runner.stream.residence
    seen.clear()

    engine.runner.stream._observe = seen.append
    score_logits(engine, load_golden("two-layers").tokens)

    total = residence.dense + 5 * residence.expert_nbytes
    assert Started(stage=Stage.LOAD, total=total) in loaded
    assert [e.done for e in loaded if isinstance(e, Advanced) and e.stage is Stage.LOAD][
        -1
    ] == total
    (note,) = (e.message for e in loaded if isinstance(e, Noted) and "experts" in e.message)
    assert note.startswith("5 of 16 experts in memory, the others read from the disk ")
    assert note.endswith("(estimate)")
    streamed = [e for e in seen if getattr(e, "stage", None) is Stage.STREAM]
    tokens = len(load_golden("two-layers").tokens)
    assert streamed[0] == Started(stage=Stage.STREAM, total=residence.read(tokens))
    assert streamed[-1] == Finished(stage=Stage.STREAM)
    assert streamed[-2].done <= residence.swept
    details = list(dict.fromkeys(e.detail for e in streamed if isinstance(e, Advanced)))
    assert [detail.split(",")[0] for detail in details if detail] == [
        "layer 1 of 2",
        "layer 2 of 2",
    ]
    seen.clear()
    list(engine.generate((1, 2), sampling=Sampling(temperature=0), max_tokens=3))
    stages = [e.stage for e in seen if isinstance(e, Started)]
    assert stages.count(Stage.STREAM) == 1  # the prompt; tokens are to be seen themselves


def test_a_file_that_shrinks_fails_the_request_and_the_engine_goes_on(cut, tmp_path):
    golden = load_golden("two-layers")
    root = tmp_path / "ready"
    shutil.copytree(cut().root, root)
    engine = started(open_ready(root), 5)
    expected = score_logits(engine, golden.tokens)
    (file,) = root.glob("*.safetensors")
    content = file.read_bytes()

    os.truncate(file, 4096)
    with pytest.raises(CorruptCheckpointError, match="ends before byte"):
        score_logits(engine, golden.tokens)
    file.write_bytes(content)

    assert np.array_equal(score_logits(engine, golden.tokens), expected)


def test_an_interrupted_step_leaves_buffers_whole(cut, monkeypatch):
    golden = load_golden("two-layers")
    engine = started(cut(), 5)
    expected = score_logits(engine, golden.tokens)
    stream = engine.runner.stream
    arrived, calls = stream._arrived, []

    def interrupted(key):
        calls.append(key)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return arrived(key)

    monkeypatch.setattr(stream, "_arrived", interrupted)
    with pytest.raises(KeyboardInterrupt):
        score_logits(engine, golden.tokens)
    monkeypatch.setattr(stream, "_arrived", arrived)

    assert np.array_equal(score_logits(engine, golden.tokens), expected)
    held = [stream._free, stream._passing, stream._cancelled]
    assert sum(map(len, held)) == stream.residence.transient


def test_memory_below_the_floor_is_refused_with_every_number(cut):
    ready = cut()
    floor = EngineOptions(mesh=ONE, compute=Compute.FLOAT32)
    least = memory_for(ready, 0, floor)

    infer(ready, replace(floor, max_memory=least))
    with pytest.raises(HardwareError) as caught:
        infer(ready, replace(floor, max_memory=least // 2))

    assert "with all other experts on the disk (" in str(caught.value)


def test_several_devices_map_their_files_and_say_that_memory_has_no_limit(tmp_path):
    mesh, seen = MeshShape(1, 2), []
    release = load_golden("two-layers").release
    options = ReshardOptions(mesh=mesh, out=tmp_path / "ready")
    given = EngineOptions(mesh=mesh, compute=Compute.FLOAT32, max_memory=2**20)

    engine = infer(reshard(plan_reshard(release, options)), given, observe=seen.append)

    assert engine.runner.stream is None
    (note,) = (e.message for e in seen if isinstance(e, Noted) and "--max-memory" in e.message)
    assert "2 devices of model=2" in note
    assert "grokctl reshard --devices 1" in note


def test_only_plain_files_of_one_device_are_streamed(cut):
    options = EngineOptions(mesh=ONE, compute=Compute.FLOAT32, max_memory=2**20)

    engine = infer(cut(compression=Compression(1)), options)

    assert engine.runner.stream is None  # it is read whole, as before
