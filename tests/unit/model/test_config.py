import json
import pickle
from dataclasses import FrozenInstanceError, fields, replace

import pytest

from grokctl.errors import CorruptCheckpointError, Reason
from grokctl.model.config import GROK_1, GrokConfig

GOOD = GROK_1.to_dict()
FIELDS = [field.name for field in fields(GrokConfig)]
FLOATS = ["embedding_multiplier_scale", "output_multiplier_scale", "attn_output_multiplier"]
COUNTS = [name for name in FIELDS if name not in FLOATS]


def refusal(make) -> CorruptCheckpointError:
    with pytest.raises(CorruptCheckpointError) as caught:
        make()
    error = caught.value
    assert error.exit_code == 20
    assert error.damage[0].reason is Reason.MALFORMED
    assert str(error).isprintable()
    assert len(str(error)) < 500
    return error


def test_grok_1_has_the_published_numbers():
    assert GROK_1.ffn_size == 32768
    assert GROK_1.q_size == 6144
    assert GROK_1.kv_size == 1024
    assert GROK_1.num_layers == 64
    assert GROK_1.attn_logit_cap == 30.0
    assert GROK_1.attn_output_multiplier == pytest.approx(128**-0.5)


@pytest.mark.parametrize(
    ("emb", "widening", "ffn"),
    [
        pytest.param(6144, 8, 32768, id="grok-1"),
        pytest.param(64, 8, 344, id="rounded-up-to-eight"),
        pytest.param(128, 8, 688, id="miniature"),
        pytest.param(2, 6, 8, id="a-multiple-of-eight-stays"),
    ],
)
def test_an_expert_is_two_thirds_of_the_widening_rounded_up_to_eight(emb, widening, ffn):
    assert replace(GROK_1, emb_size=emb, widening_factor=widening).ffn_size == ffn


def test_a_config_survives_json_and_pickle():
    assert GrokConfig.from_dict(json.loads(json.dumps(GROK_1.to_dict()))) == GROK_1
    assert pickle.loads(pickle.dumps(GROK_1)) == GROK_1
    assert len({GROK_1, replace(GROK_1)}) == 1


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        GROK_1.num_layers = 1


def test_a_genuine_config_is_read(golden):
    config = GrokConfig.read(golden / "config.json")

    assert (config.num_layers, config.emb_size, config.vocab_size) == (2, 64, 256)


def test_unknown_fields_are_ignored():
    assert GrokConfig.from_dict(GOOD | {"shard_activations": True}) == GROK_1


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(name):
    values = {key: value for key, value in GOOD.items() if key != name}

    assert name in str(refusal(lambda: GrokConfig.from_dict(values)))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(0, id="zero"),
        pytest.param(-1, id="negative"),
        pytest.param(True, id="true"),
        pytest.param(None, id="null"),
        pytest.param("8", id="text"),
        pytest.param([8], id="list"),
        pytest.param({}, id="object"),
        pytest.param(8.0, id="fraction"),
        pytest.param(float("nan"), id="nan"),
        pytest.param(float("inf"), id="infinity"),
        pytest.param(2**24 + 1, id="too-large"),
        pytest.param(2**64, id="64-bits"),
        pytest.param("\x1b[2J", id="an-escape"),
    ],
)
@pytest.mark.parametrize("name", [name for name in COUNTS if not name.endswith("_token")])
def test_a_size_that_no_model_has_is_refused(name, value):
    assert name in str(refusal(lambda: GrokConfig.from_dict(GOOD | {name: value})))


@pytest.mark.parametrize(
    "value", [0, 0.0, -1.0, float("nan"), float("inf"), 1e300, True, None, "1", [1.0]]
)
@pytest.mark.parametrize("name", FLOATS)
def test_a_multiplier_that_no_model_has_is_refused(name, value):
    assert name in str(refusal(lambda: GrokConfig.from_dict(GOOD | {name: value})))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(10**4000, id="4000-digits"),
        pytest.param("x" * 100_000, id="a-long-text"),
        pytest.param([0] * 100_000, id="a-long-list"),
    ],
)
@pytest.mark.parametrize("name", ["emb_size", "attn_output_multiplier"])
def test_a_long_value_does_not_fill_the_screen(name, value):
    assert name in str(refusal(lambda: GrokConfig.from_dict(GOOD | {name: value})))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        pytest.param({"num_q_heads": 47}, "47 over 8", id="heads-that-do-not-divide"),
        pytest.param({"key_size": 7}, "7 over 2", id="an-odd-head"),
        pytest.param({"num_selected_experts": 9}, "9 of 8", id="more-experts-than-there-are"),
        pytest.param({"pad_token": 131072}, "131072", id="pad-outside-of-the-vocabulary"),
        pytest.param({"eos_token": 131072}, "131072", id="eos-outside-of-the-vocabulary"),
        pytest.param({"eos_token": -1}, "-1", id="a-negative-token"),
        pytest.param({"num_layers": 4097}, "4097", id="4097-layers"),
        pytest.param({"num_experts": 4097}, "4097", id="4097-experts"),
        pytest.param({"num_experts": 1}, "2 of 1", id="one-expert-of-which-two"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(changes, named):
    assert named in str(refusal(lambda: GrokConfig.from_dict(GOOD | changes)))


def test_a_model_without_any_width_of_its_experts_is_refused():
    refusal(lambda: GrokConfig.from_dict(GOOD | {"emb_size": 1, "widening_factor": 1}))


@pytest.mark.parametrize("values", [None, 5, "text", [], [GOOD], True])
def test_what_is_no_object_is_refused(values):
    assert "no JSON object" in str(refusal(lambda: GrokConfig.from_dict(values)))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="cut"),
        pytest.param(b"\xff\xfe\x00", id="no-text"),
        pytest.param(b"\x80\x04N.", id="a-pickle"),
        pytest.param(b"[" * 100_000, id="deep-lists"),
        pytest.param(b'{"a":' * 100_000, id="deep-objects"),
        pytest.param(b"[" * 50_000 + b"]" * 50_000, id="deep-and-closed"),
        pytest.param(b'{"vocab_size": ' + b"9" * 5000 + b"}", id="5000-digits"),
        pytest.param(b"nul", id="a-word"),
        pytest.param(b"null", id="null"),
        pytest.param(b"NaN", id="nan"),
        pytest.param(b"{}", id="an-empty-object"),
        pytest.param(b"\xef\xbb\xbf{}", id="a-byte-order-mark"),
        pytest.param(b'"' + b"x" * 10_000_000 + b'"', id="10-MB"),
        pytest.param(b'{"vocab_size": "' + b"x" * 1_000_000 + b'"}', id="1-MB"),
    ],
)
def test_a_file_that_is_no_config_is_refused(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)

    refusal(lambda: GrokConfig.read(path))


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(2**40)

    error = refusal(lambda: GrokConfig.read(path))

    assert f"{2**40:,}" in str(error)


@pytest.mark.parametrize(
    "literal", ["1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e-400", "true", "null", '"1"']
)
def test_a_literal_that_json_lets_through_is_refused(tmp_path, literal):
    text = json.dumps(GOOD).replace(repr(GROK_1.output_multiplier_scale), literal)
    path = tmp_path / "config.json"
    path.write_text(text)

    error = refusal(lambda: GrokConfig.read(path))

    assert "output_multiplier_scale" in str(error)
