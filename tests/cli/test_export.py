"""`grokctl export` as a user types it: results, exit codes, and what is said."""

import json
import shlex
import shutil
from dataclasses import replace

import pytest

from grokctl.checkpoint.miniature import MINIATURE, write_miniature

CONFIG = replace(
    MINIATURE,
    num_layers=1,
    vocab_size=512,
    emb_size=256,
    widening_factor=3,
    num_experts=2,
    attn_output_multiplier=16**-0.5,
)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release") / "wide"
    write_miniature(root, CONFIG)
    return root


def test_an_export_is_made_under_home_verified_listed_and_resharded(grokctl, release, tmp_path):
    home = ("--home", tmp_path)

    made = grokctl("export", release, *home, "--json")

    assert made.exit_code == 0, made
    assert made.result.keys() == {
        *("export", "format", "type", "embedding", "files", "bytes", "lossless"),
        *("relative_rms_error", "folded", "float32", "proven", "proven_by", "peak_rss_bytes"),
        "seconds",
    }
    assert made.result["export"] == str(tmp_path / "exports" / "wide-q8_0-gguf")
    assert made.result["files"] == ["wide-q8_0.gguf", "tokenizer.model"]
    assert (made.result["lossless"], made.result["proven"]) == (True, False)
    stages = {event.get("stage") for event in made.events}
    assert "export" in stages

    verified = grokctl("verify", "wide-q8_0-gguf", *home, "--json")
    assert (verified.exit_code, verified.result["ok"]) == (0, True)
    listed = grokctl("inspect", "wide-q8_0-gguf", *home, "--json")
    assert listed.result["kind"] == "export"
    assert len(listed.result["tensors"]) == 14
    cut = grokctl("reshard", "wide-q8_0-gguf", "--devices", 2, *home, "--json")
    assert cut.exit_code == 0
    again = grokctl("export", "wide-q8_0-gguf", *home, "--out", tmp_path / "again", "--json")
    assert again.exit_code == 0
    assert (tmp_path / "again" / "wide-q8_0.gguf").read_bytes() == (
        tmp_path / "exports" / "wide-q8_0-gguf" / "wide-q8_0.gguf"
    ).read_bytes()


@pytest.mark.parametrize("form", ["gguf", "hf"])
def test_a_dry_run_writes_nothing_and_knows_every_byte(grokctl, release, tmp_path, form):
    options = ("export", release, "--format", form, "--home", tmp_path, "--json")

    planned = grokctl(*options, "--dry-run")
    before = list(tmp_path.rglob("*"))
    made = grokctl(*options)

    assert planned.exit_code == made.exit_code == 0
    assert before == []
    assert planned.result["fits"]
    sizes = sum(
        (tmp_path / "exports" / f"wide-{made.result['type']}-{form}" / name).stat().st_size
        for name in planned.result["files"]
    )
    assert planned.result["bytes"] == sizes
    assert planned.result["lossless"] is {"gguf": True, "hf": False}[form]


def test_the_screen_says_what_is_lost_and_what_is_next(grokctl, release, tmp_path):
    exact = grokctl("export", release, "--out", tmp_path / "exact")
    rounded = grokctl("export", release, "--out", tmp_path / "rounded", "--type", "q4_0")

    assert "none: all weights are exact" in exact.stdout
    assert "all exact in float16" in exact.stdout
    assert f"llama-cli -m {tmp_path / 'exact' / 'wide-q8_0.gguf'}" in exact.stdout
    assert "(rms), of blk.0." in rounded.stdout


def test_what_cannot_be_is_refused_with_its_own_code(grokctl, release, tmp_path):
    config = replace(CONFIG, key_size=8, attn_output_multiplier=8**-0.5)
    write_miniature(tmp_path / "narrow", config, tokenizer=False)
    out = ("--out", tmp_path / "out")

    narrow = grokctl("export", tmp_path / "narrow", *out)
    assert narrow.exit_code == 30
    assert narrow.hint.endswith(" --format hf  # has no such limit")
    blocks = grokctl("export", release, *out, "--format", "hf", "--type", "q8_0")
    assert blocks.exit_code == 30
    small = grokctl("export", release, *out, "--split", "1kB")
    assert small.exit_code == 2
    assert small.error.startswith("--split ")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    taken = grokctl("export", release, *out)
    assert taken.exit_code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_export_is_nothing_to_run(grokctl, release, tmp_path):
    assert grokctl("export", release, "--out", tmp_path / "out").exit_code == 0

    run = grokctl("run", tmp_path / "out", "--token-ids", "1")

    assert run.exit_code == 2
    assert "expected a ready checkpoint, found an export" in run.error
    assert run.hint.startswith(f"grokctl reshard {tmp_path / 'out'} --devices 8")
    listed = grokctl("verify", tmp_path / "out" / "wide-q8_0.gguf", "--quick")
    assert listed.exit_code == 2
    assert listed.hint.startswith(f"grokctl verify {tmp_path / 'out'}")
    assert "wide-q8_0" not in listed.hint


def test_damage_to_an_export_has_the_code_of_damage(grokctl, release, tmp_path):
    assert grokctl("export", release, "--out", tmp_path / "out").exit_code == 0
    path = tmp_path / "out" / "wide-q8_0.gguf"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)

    verdict = grokctl("verify", tmp_path / "out", "--json")
    cut = grokctl("reshard", tmp_path / "out", "--devices", 1, "--out", tmp_path / "ready")

    assert verdict.exit_code == cut.exit_code == 20
    assert [item["file"] for item in verdict.result["damage"]] == [path.name]
    assert not (tmp_path / "ready").exists()


def test_a_name_that_no_file_should_have_is_changed(grokctl, release, tmp_path):
    odd = shutil.copytree(release, tmp_path / "my modèle")

    made = grokctl("export", odd, "--out", tmp_path / "out", "--json")

    assert made.exit_code == 0
    assert made.result["files"][0] == "my_mod_le-q8_0.gguf"
    manifest = json.loads((tmp_path / "out" / "grokctl-export.json").read_text())
    assert manifest["source"]["name"] == "my modèle"
    assert grokctl("verify", tmp_path / "out").exit_code == 0


def test_what_a_checkpoint_no_longer_has_comes_from_its_source(grokctl, release, tmp_path):
    home = ("--home", tmp_path)
    ready = ("--devices", "1", "--precision", "int4", "--out", tmp_path / "ready")
    assert grokctl("reshard", release, *ready, *home).exit_code == 0
    assert grokctl("export", release, "--format", "hf", "--out", tmp_path / "hf").exit_code == 0

    for typed in (
        ("export", tmp_path / "ready", "--type", "q8_0"),
        ("reshard", tmp_path / "ready", "--devices", "2", "--precision", "int8"),
        ("export", tmp_path / "hf", "--split", "1GB"),
        ("reshard", tmp_path / "hf", "--devices", "2"),
    ):
        refused = grokctl(*typed, *home)
        verb, _, *options = typed
        command = " ".join(["grokctl", verb, "wide", *options, *map(str, home)])
        assert refused.hint == f"{command}  # what it was made from"
    shutil.copytree(release, tmp_path / "releases" / "wide")
    assert grokctl(*shlex.split(command, comments=True)[1:], "--dry-run").exit_code == 0


def test_a_manifest_without_tensors_is_damage(grokctl, release, tmp_path):
    assert grokctl("export", release, "--out", tmp_path / "out").exit_code == 0
    path = tmp_path / "out" / "grokctl-export.json"
    values = json.loads(path.read_text())
    values["files"] = [file for file in values["files"] if not file["name"].endswith(".gguf")]
    path.write_text(json.dumps(values))

    listed = grokctl("inspect", tmp_path / "out")
    other = grokctl("inspect", release, "--tensor", "nosuch")

    assert listed.exit_code == 20
    assert "names no file with tensors" in listed.error
    assert (other.exit_code, other.error.count("nosuch")) == (2, 1)
