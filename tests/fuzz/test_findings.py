"""What fuzzing has found, each once: inputs that led to something else than a value or an error."""

import json

import pytest
from fuzz_targets import TARGETS

from grokctl.checkpoint.receipt import Receipt


def seed_of(name: str) -> dict:
    return json.loads(TARGETS[name].seeds()[0])


def receipt_of(values: dict) -> Receipt | None:
    target, data = TARGETS["receipt"], json.dumps(values).encode()
    target.run(data)
    receipt, _, _ = target.read(data) or (None, None, None)
    return receipt


ESCAPES = pytest.mark.parametrize(
    "text",
    [
        pytest.param("\x1b[2J", id="escape"),
        pytest.param("a\nb", id="newline"),
        pytest.param("\ud800", id="surrogate"),
        pytest.param("\u202ex", id="right-to-left"),
        pytest.param("x" * 50_000, id="endless"),
    ],
)


@ESCAPES
@pytest.mark.parametrize("key", ["format", "version", "precision"])
def test_a_manifest_speaks_to_no_terminal_through_an_error(key, text):
    data = json.dumps(seed_of("manifest") | {key: text}).encode()

    assert not TARGETS["manifest"].run(data)


@ESCAPES
def test_the_tensors_of_a_manifest_speak_to_no_terminal_through_an_error(text):
    manifest = seed_of("manifest")
    changed = [
        manifest | {"tensors": manifest["tensors"] | {text: {"shape": [1], "dtype": "F32"}}},
        manifest | {"tensors": {text: {"shape": text, "dtype": text}}},
        manifest | {"files": [{"name": text, "bytes": 1, "sha256": text}]},
    ]

    verdicts = [TARGETS["manifest"].run(json.dumps(values).encode()) for values in changed]

    assert verdicts == [False] * len(changed)


@ESCAPES
@pytest.mark.parametrize("key", ["name", "infohash", "verified_at"])
def test_the_source_of_a_manifest_is_shown_without_control_characters(key, text):
    manifest = seed_of("manifest")
    manifest["source"][key] = text

    assert TARGETS["manifest"].run(json.dumps(manifest).encode())


@pytest.mark.parametrize("value", [5, [], {}, True])
def test_the_source_of_a_manifest_is_text_whatever_it_was(value):
    manifest = seed_of("manifest")
    manifest["source"] |= dict.fromkeys(("name", "infohash", "proven", "verified_at"), value)

    assert TARGETS["manifest"].run(json.dumps(manifest).encode())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["manifest", "config", "receipt"])
def test_json_in_another_encoding_is_no_json_and_imports_no_codec(name, encoding):
    assert not TARGETS[name].run(json.dumps(seed_of(name)).encode(encoding))


def test_the_receipt_that_the_false_ones_are_made_from_is_read():
    assert receipt_of(seed_of("receipt")) is not None


@ESCAPES
@pytest.mark.parametrize("key", ["infohash", "verified_at"])
def test_a_receipt_that_could_not_be_shown_is_none(key, text):
    assert receipt_of(seed_of("receipt") | {key: text}) is None


@pytest.mark.parametrize(
    "stamp",
    [
        pytest.param("1234", id="a-text"),
        pytest.param([1, 2, 3], id="three-numbers"),
        pytest.param([1, 2, 3, None], id="none"),
        pytest.param([1, 2, 3, 4.0], id="a-fraction"),
        pytest.param([1, 2, 3, True], id="a-truth"),
        pytest.param([[1], 2, 3, 4], id="a-list"),
        pytest.param({"size": 1}, id="a-dictionary"),
        pytest.param(5, id="a-number"),
    ],
)
def test_a_receipt_with_a_stamp_that_no_file_has_is_none(stamp):
    assert receipt_of(seed_of("receipt") | {"files": {"ckpt-0/x": stamp}}) is None
