"""Damaged checkpoints exit with 20, hostile ones with 21, and none of their code is executed."""

import json
import shutil

import pytest

VERBS = ("verify", "inspect", "reshard", "run", "score")
TENSOR = "ckpt-0/tensor00003_000"


def using(verb, root, tmp_path):
    """Arguments that make a verb open a checkpoint."""
    more = {
        "verify": ["--quick"],
        "inspect": [],
        "reshard": ["--devices", "1", "--out", tmp_path / "out"],
        "run": ["--token-ids", "1", "-n", "1", "--home", tmp_path],
        "score": ["--token-ids", "1", "--home", tmp_path],
    }
    return [verb, root, *more[verb]]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def remove(path):
    path.unlink()


def extend(path):
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path):
    path.write_bytes(b"")


def scribble(path):
    path.write_bytes(bytes(path.stat().st_size))


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


# --- 20: releases


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(truncate, "short", id="truncated"),
        pytest.param(remove, "missing", id="missing"),
        pytest.param(extend, "long", id="extended"),
        pytest.param(empty, "short", id="empty"),
        pytest.param(scribble, "malformed", id="zeros"),
        pytest.param(replace_by_folder, "", id="a folder"),
    ],
)
def test_every_verb_refuses_a_release_with_a_damaged_file(
    grokctl, two_layers, tmp_path, verb, damage, reason
):
    damage(two_layers / TENSOR)

    outcome = grokctl(*using(verb, two_layers, tmp_path))

    assert outcome.exit_code == 20
    assert f"1 of 27 files is damaged, first {TENSOR}: {reason}" in outcome.error
    assert not (tmp_path / "out").exists()


def test_all_damaged_files_are_listed_and_not_only_the_first(grokctl, two_layers):
    names = [f"tensor{index:05}_000" for index in (1, 4, 25)]
    for name in names:
        truncate(two_layers / "ckpt-0" / name)

    outcome = grokctl("verify", two_layers, "--quick")

    assert outcome.exit_code == 20
    assert "3 of 27 files" in outcome.error
    assert all(name in outcome.stdout for name in names)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(truncate, id="truncated"),
        pytest.param(remove, id="missing"),
        pytest.param(extend, id="extended"),
    ],
)
def test_a_release_with_a_torrent_is_offered_a_repair(grokctl, verified, damage):
    damage(verified / TENSOR)

    outcome = grokctl("verify", verified)

    assert outcome.exit_code == 20
    assert outcome.hint == f"grokctl verify {verified} --repair"


@pytest.mark.parametrize("name", [TENSOR, "tokenizer.model", "config.json"])
def test_one_flipped_bit_of_a_verified_release_is_found(grokctl, verified, flip_bit, name):
    flip_bit(verified / name)

    outcome = grokctl("verify", verified, "--json")

    assert outcome.exit_code == 20
    if outcome.result.get("damage"):
        assert name in {damage["file"] for damage in outcome.result["damage"]}
    else:
        assert name in outcome.error


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="no JSON"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"\xff\xfe", id="no text"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b"{}", id="no fields"),
        pytest.param(b" " * (2**20 + 1), id="too large"),
    ],
)
def test_every_verb_refuses_a_broken_config(grokctl, two_layers, tmp_path, verb, config):
    (two_layers / "config.json").write_bytes(config)

    outcome = grokctl(*using(verb, two_layers, tmp_path))

    assert outcome.exit_code == 20
    assert "config.json" in outcome.error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 10**9),
        ("num_layers", -1),
        ("emb_size", 0),
        ("emb_size", "64"),
        ("emb_size", True),
        ("key_size", 1.5),
        ("vocab_size", None),
        ("num_q_heads", 7),
        ("output_multiplier_scale", "Infinity"),
        ("num_selected_experts", 9),
        ("eos_token", 256),
    ],
)
def test_impossible_numbers_in_a_config_are_refused(grokctl, two_layers, field, value):
    path = two_layers / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))

    outcome = grokctl("inspect", two_layers)

    assert outcome.exit_code == 20
    assert "config.json" in outcome.error


def test_a_config_of_another_model_is_damage_and_no_crash(grokctl, two_layers):
    path = two_layers / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "emb_size": 128, "key_size": 16}))

    outcome = grokctl("verify", two_layers, "--quick", "--json")

    assert outcome.exit_code == 20
    (damage,) = outcome.result["damage"]
    assert (damage["file"], damage["reason"]) == ("config.json", "malformed")
    assert "emb_size is 128, the tensors have 64" in damage["detail"]


@pytest.mark.parametrize("verb", ["run", "score"])
@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"no model"], ids=["empty", "zeros", "text"])
def test_a_broken_tokenizer_is_corrupt(grokctl, home, tmp_path, verb, data):
    root = shutil.copytree(home / "releases" / "words", tmp_path / "words")
    (root / "tokenizer.model").write_bytes(data)
    option = {"run": "-p", "score": "--text"}[verb]

    outcome = grokctl(verb, root, option, "-", "--home", tmp_path, stdin="import")

    assert outcome.exit_code == 20
    assert "tokenizer.model" in outcome.error


def test_another_models_tokenizer_is_corrupt(grokctl, home, two_layers):
    shutil.copy(home / "releases" / "words" / "tokenizer.model", two_layers)

    outcome = grokctl("run", two_layers, "-p", "import", "--home", two_layers.parent)

    assert outcome.exit_code == 20
    assert "512" in outcome.error
    assert "256" in outcome.error


def test_a_torrent_that_the_magnet_did_not_name_is_corrupt(grokctl, verified):
    torrent = verified / "release.torrent"
    torrent.write_bytes(torrent.read_bytes().replace(b"5:words", b"5:swords"[:2] + b"sword"))

    outcome = grokctl("verify", verified)

    assert outcome.exit_code == 20
    assert "release.torrent" in outcome.error


def test_a_torrent_of_junk_is_corrupt(grokctl, verified):
    (verified / "release.torrent").write_bytes(b"d4:info")

    outcome = grokctl("verify", verified)

    assert outcome.exit_code == 20
    assert "release.torrent" in outcome.error


# --- 20: ready checkpoints


@pytest.mark.parametrize("verb", ["verify", "inspect", "run", "score"])
@pytest.mark.parametrize(
    ("damage", "word"),
    [
        pytest.param(remove, "missing", id="missing"),
        pytest.param(truncate, "short", id="truncated"),
        pytest.param(extend, "long", id="extended"),
        pytest.param(replace_by_folder, "not a regular file", id="a folder"),
    ],
)
def test_every_verb_refuses_a_damaged_device_file(grokctl, ready, tmp_path, verb, damage, word):
    damage(ready / "device-02-of-04.safetensors")

    outcome = grokctl(*using(verb, ready, tmp_path)[: 2 if verb == "verify" else None])

    assert outcome.exit_code == 20
    assert "device-02-of-04.safetensors" in outcome.error
    assert word in outcome.error
    assert outcome.hint.startswith("grokctl reshard two-layers --")
    assert "--force" in outcome.hint


def test_verify_lists_all_damage_to_a_ready_checkpoint(grokctl, ready, flip_bit):
    flip_bit(ready / "device-00-of-04.safetensors")
    remove(ready / "device-01-of-04.safetensors")
    truncate(ready / "device-02-of-04.safetensors")
    extend(ready / "device-03-of-04.safetensors")

    outcome = grokctl("verify", ready, "--json")
    quick = grokctl("verify", ready, "--quick", "--json")

    assert (outcome.exit_code, quick.exit_code) == (20, 20)
    reasons = [damage["reason"] for damage in outcome.result["damage"]]
    assert reasons == ["altered", "missing", "short", "long"]
    assert [damage["reason"] for damage in quick.result["damage"]] == reasons[1:]


def test_a_ready_checkpoint_is_not_repaired_but_cut_again(grokctl, ready, flip_bit):
    flip_bit(ready / "device-00-of-04.safetensors")

    outcome = grokctl("verify", ready, "--repair")

    assert outcome.exit_code == 2
    assert outcome.hint == f"grokctl reshard two-layers --mesh model=4 --out {ready} --force"


def test_verify_finds_one_flipped_bit_in_a_ready_checkpoint(grokctl, ready, flip_bit):
    flip_bit(ready / "device-01-of-04.safetensors")

    outcome = grokctl("verify", ready, "--json")

    assert outcome.exit_code == 20
    (damage,) = outcome.result["damage"]
    assert (damage["file"], damage["reason"]) == ("device-01-of-04.safetensors", "altered")


@pytest.mark.parametrize("verb", ["inspect", "run", "score", "verify"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"version": 2}, ["version 1", "version 2"], id="newer"),
        pytest.param({"version": "1"}, ["version 1"], id="version as text"),
        pytest.param({"format": "other"}, ["other"], id="another format"),
        pytest.param({"mesh": {"expert": 1, "model": 3}}, [], id="no mesh"),
        pytest.param({"mesh": {"expert": 1, "model": 8}}, [], id="another mesh"),
        pytest.param({"mesh": None}, [], id="mesh missing"),
        pytest.param({"precision": "int1"}, [], id="precision"),
        pytest.param({"config": {}}, [], id="config"),
        pytest.param({"tensors": {}}, [], id="no tensors"),
        pytest.param({"tensors": []}, [], id="tensors as list"),
        pytest.param({"files": []}, [], id="no files"),
        pytest.param(
            {"files": [{"name": "../escape", "bytes": 1, "sha256": "0" * 64}]}, [], id="escape"
        ),
        pytest.param({"source": None}, [], id="source"),
    ],
)
def test_every_verb_refuses_a_manifest_that_cannot_be_meant(
    grokctl, ready, tmp_path, verb, change, words
):
    path = ready / "grokctl.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    outcome = grokctl(*using(verb, ready, tmp_path)[: 2 if verb == "verify" else None])

    assert outcome.exit_code == 20
    assert "grokctl.json" in outcome.error
    for word in words:
        assert word in outcome.error


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"{", id="no JSON"),
        pytest.param(b"[" * 100_000, id="deep"),
        pytest.param(b"null", id="null"),
        pytest.param(b"\xff", id="no text"),
        pytest.param(b'{"format": ' + b"9" * 5000 + b"}", id="huge number"),
    ],
)
def test_a_manifest_that_is_none_is_corrupt(grokctl, ready, data):
    (ready / "grokctl.json").write_bytes(data)

    outcome = grokctl("inspect", ready)

    assert outcome.exit_code == 20
    assert "grokctl.json" in outcome.error


@pytest.mark.parametrize("verb", ["run", "score"])
def test_the_device_file_of_another_mesh_is_refused(grokctl, home, ready, tmp_path, verb):
    other = tmp_path / "other"
    mesh = ["--mesh", "expert=2,model=2", "--out", other]
    assert grokctl("reshard", home / "releases" / "two-layers", *mesh).exit_code == 0
    name = "device-01-of-04.safetensors"
    padded = (other / name).read_bytes()[: (ready / name).stat().st_size]
    (ready / name).write_bytes(padded.ljust((ready / name).stat().st_size, b"\0"))

    outcome = grokctl(*using(verb, ready, tmp_path))

    assert outcome.exit_code == 20
    assert name in outcome.error
    assert "model=4" in outcome.error


def test_two_devices_files_cannot_change_places(grokctl, ready, tmp_path):
    first, second = ready / "device-00-of-04.safetensors", ready / "device-01-of-04.safetensors"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)

    run = grokctl(*using("run", ready, tmp_path))
    verify = grokctl("verify", ready)

    assert (run.exit_code, verify.exit_code) == (20, 20)
    assert "device-00-of-04.safetensors" in run.error


# --- 21: attacks


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", ["system", "eval", "runstring", "nested", "memo", "extra"])
def test_no_verb_executes_an_unsafe_pickle(grokctl, two_layers, tmp_path, attack, verb, kind):
    (two_layers / TENSOR).write_bytes(attack.of(kind))

    outcome = grokctl(*using(verb, two_layers, tmp_path))

    assert outcome.exit_code == 21
    assert f"1 of 27 files is an unsafe pickle, first {TENSOR}: unsafe" in outcome.error
    assert "nothing was executed" in outcome.hint
    assert not attack.canary.exists()
    assert not (tmp_path / "out").exists()


def test_an_attack_hides_behind_no_damage(grokctl, two_layers, attack):
    (two_layers / "ckpt-0" / "tensor00000_000").unlink()
    (two_layers / "ckpt-0" / "tensor00025_000").write_bytes(attack.of("system"))

    outcome = grokctl("verify", two_layers, "--quick", "--json")

    assert outcome.exit_code == 21
    assert [damage["reason"] for damage in outcome.result["damage"]] == ["missing", "unsafe"]
    assert not attack.canary.exists()


def test_an_attack_in_a_release_with_a_torrent_is_refused_by_a_full_verify(
    grokctl, verified, attack
):
    (verified / TENSOR).write_bytes(attack.of("system"))

    outcome = grokctl("verify", verified, "--json")

    assert outcome.exit_code == 21
    reasons = {damage["file"]: damage["reason"] for damage in outcome.result["damage"]}
    assert reasons[TENSOR] == "unsafe"
    assert not attack.canary.exists()


def test_an_attack_as_tokenizer_or_config_is_only_damage(grokctl, two_layers, tmp_path, attack):
    (two_layers / "tokenizer.model").write_bytes(attack.of("system"))

    tokenizer = grokctl("run", two_layers, "-p", "x", "--home", tmp_path)
    (two_layers / "config.json").write_bytes(attack.of("system"))
    config = grokctl("verify", two_layers, "--quick")

    assert (tokenizer.exit_code, config.exit_code) == (20, 20)
    assert not attack.canary.exists()


def test_names_in_a_pickle_cannot_write_to_the_terminal(grokctl, two_layers):
    evil = b"\x1b]0;owned\x07\nerror: all is well"
    name = b"\x8c" + bytes([len(evil)]) + evil
    (two_layers / TENSOR).write_bytes(b"\x80\x04" + name + name + b"\x93.")

    outcome = grokctl("verify", two_layers, "--quick")

    assert outcome.exit_code == 21
    assert "\x1b" not in outcome.stdout + outcome.stderr
    assert outcome.error
