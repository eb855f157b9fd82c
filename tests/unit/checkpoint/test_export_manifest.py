"""The manifest of an export, which anybody may have written."""

import json

import pytest
from exports import WIDE

from grokctl.checkpoint.export_manifest import (
    ExportManifest,
    export_manifest_bytes,
    parse_export_manifest,
)
from grokctl.checkpoint.manifest import FileRecord, Source
from grokctl.errors import CorruptCheckpointError, Reason

MANIFEST = ExportManifest(
    format="gguf",
    type="q8_0",
    embedding="bf16",
    config=WIDE,
    source=Source(name="grok-1", infohash=None, proven=False, verified_at=None),
    errors={"token_embd.weight": 0.001},
    folded=("layers.0.attention.out", "layers.0.attention.value"),
    float32=("layers.0.moe.gate",),
    files=(FileRecord(name="grok-1.gguf", nbytes=5, sha256="ab" * 32),),
)


def test_a_manifest_is_read_as_it_was_written():
    assert parse_export_manifest(export_manifest_bytes(MANIFEST)) == MANIFEST


@pytest.mark.parametrize(
    "change",
    [
        {"format": "grokctl"},
        {"version": 2},
        {"relative_rms_error": {"a": 10**400}},
        {"relative_rms_error": {"a": float("inf")}},
        {"relative_rms_error": {"a": float("nan")}},
        {"relative_rms_error": {"a": -1}},
        {"relative_rms_error": []},
        {"folded": "abc"},
        {"float32": 5},
        {"config": {**WIDE.to_dict(), "num_layers": 10**9}},
        {"config": None},
        {"files": [{"name": "../x", "sha256": "ab" * 32, "bytes": 5}]},
        {"files": [{"name": "x", "sha256": "ab", "bytes": 5}]},
        {"files": [{"name": "x", "sha256": "ab" * 32, "bytes": -5}]},
        {"files": [{"name": "x", "sha256": "ab" * 32, "bytes": 5}] * 2},
        {"source": "x"},
    ],
    ids=repr,
)
def test_what_makes_no_sense_is_damage_to_the_manifest(change):
    data = json.dumps(json.loads(export_manifest_bytes(MANIFEST)) | change).encode()

    with pytest.raises(CorruptCheckpointError) as caught:
        parse_export_manifest(data)

    assert [item.file for item in caught.value.damage] == ["grokctl-export.json"]
    assert caught.value.damage[0].reason is Reason.MALFORMED
