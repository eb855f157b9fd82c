"""`--json`: one object on stdout with the promised keys, and progress as JSON lines."""

import pytest

from grokctl.checkpoint.ready import open_ready

NUMBER = (int, float)
STATS = {
    "load_s": NUMBER,
    "compile_s": NUMBER,
    "first_token_s": NUMBER,
    "prefill_tokens_per_s": NUMBER,
    "decode_tokens_per_s": NUMBER,
    "cached_tokens": int,
    "bytes_per_token": int,
    "bandwidth_fraction": (float, type(None)),
    "kernel": str,
    "pages": str,
}


def assert_promised(values, promised):
    """Expect every promised key, with its type."""
    for key, kind in promised.items():
        assert isinstance(values[key], kind), (key, values[key])
        assert kind is bool or not isinstance(values[key], bool), (key, values[key])


def test_fetch_says_what_came(download, seeded):
    values = download.fetched.result

    promised = {
        "release": str,
        "infohash": str,
        "bytes": int,
        "downloaded_bytes": int,
        "seconds": NUMBER,
    }
    assert_promised(values, promised)
    assert values["release"] == str(download.root)
    assert values["infohash"] in seeded.magnet
    assert values["bytes"] == seeded.nbytes
    assert values["downloaded_bytes"] >= seeded.nbytes
    assert {"event": "finished", "stage": "fetch"} in download.fetched.events


def test_a_dry_fetch_says_what_would_come_and_writes_nothing(grokctl, seeded, tmp_path):
    root = tmp_path / "nothing"

    outcome = grokctl("fetch", seeded.torrent, "--to", root, "--dry-run", "--json")

    assert outcome.exit_code == 0
    assert_promised(outcome.result, {"release": str, "infohash": str, "bytes": int, "fits": bool})
    assert outcome.result["bytes"] == seeded.nbytes
    assert not root.exists()


def test_verify_says_that_all_is_well(download, seeded):
    values = download.verified.result

    promised = {
        "checkpoint": str,
        "ok": bool,
        "files": int,
        "bytes": int,
        "damage": list,
        "seconds": NUMBER,
    }
    assert_promised(values, promised)
    assert (values["ok"], values["damage"]) == (True, [])
    assert (values["files"], values["bytes"]) == (len(seeded.files), seeded.nbytes)
    assert {"event": "finished", "stage": "verify"} in download.verified.events


def test_verify_of_a_damaged_release_gives_its_whole_object_and_exit_20(grokctl, verified):
    (verified / "ckpt-0" / "tensor00003_000").unlink()
    with (verified / "ckpt-0" / "tensor00007_000").open("ab") as file:
        file.write(b"more")

    outcome = grokctl("verify", verified, "--json")

    assert outcome.exit_code == 20
    values = outcome.result
    assert values["ok"] is False
    assert {"checkpoint", "files", "bytes", "seconds"} <= values.keys()
    reasons = {damage["file"]: damage["reason"] for damage in values["damage"]}
    assert reasons["ckpt-0/tensor00003_000"] == "missing"
    assert reasons["ckpt-0/tensor00007_000"] == "long"


def test_verify_of_a_ready_checkpoint_gives_the_same_keys(grokctl, cut):
    root = cut("two-layers", 4).root

    outcome = grokctl("verify", root, "--json")

    assert outcome.exit_code == 0
    assert {"checkpoint", "ok", "files", "bytes", "damage", "seconds"} <= outcome.result.keys()
    assert outcome.result["files"] == 4
    assert outcome.events


@pytest.mark.parametrize("kind", ["release", "ready"])
def test_inspect_lists_tensors(grokctl, home, cut, kind):
    root = home / "releases" / "two-layers" if kind == "release" else cut("two-layers", 4).root

    outcome = grokctl("inspect", root, "--json")

    values = outcome.result
    assert outcome.exit_code == 0
    assert values["kind"] == kind
    assert values["config"]["num_layers"] == 2
    assert len(values["tensors"]) >= 26
    for tensor in values["tensors"]:
        assert_promised(tensor, {"file": str, "name": str, "shape": list, "dtype": str})


def test_reshard_says_what_it_wrote(cut):
    made = cut("two-layers", 4)
    values = made.outcome.result

    promised = {
        "ready": str,
        "devices": int,
        "mesh": str,
        "precision": str,
        "bytes": int,
        "peak_rss_bytes": int,
        "seconds": NUMBER,
    }
    assert_promised(values, promised)
    assert (values["devices"], values["mesh"], values["precision"]) == (4, "model=4", "int8")
    assert values["bytes"] == sum(path.stat().st_size for path in made.root.glob("device-*"))
    assert values["peak_rss_bytes"] > 2**20


def test_a_dry_reshard_says_the_size_that_comes_out_and_writes_nothing(
    grokctl, home, cut, tmp_path
):
    out = tmp_path / "nothing"

    outcome = grokctl(
        *("reshard", home / "releases" / "two-layers", "--devices", 4),
        *("--out", out, "--dry-run", "--json"),
    )

    assert outcome.exit_code == 0
    promised = {"ready": str, "devices": int, "mesh": str, "precision": str, "bytes": int}
    assert_promised(outcome.result, promised)
    assert outcome.result["bytes"] == cut("two-layers", 4).outcome.result["bytes"]
    assert list(tmp_path.iterdir()) == []


def test_run_says_what_it_wrote(grokctl, home, cut):
    outcome = grokctl(
        *("run", cut("words", 1).root, "-p", "The import statement", "-n", 3, "--seed", 7),
        *("--home", home, "--json"),
    )

    values = outcome.result
    assert outcome.exit_code == 0
    promised = {
        "prompt_tokens": int,
        "tokens": list,
        "text": str,
        "finish_reason": str,
        "ended_by": (str, int, type(None)),
        "seed": int,
        "stats": dict,
    }
    assert_promised(values, promised)
    assert_promised(values["stats"], STATS)
    assert values["prompt_tokens"] > 0
    assert all(type(token) is int for token in values["tokens"])
    assert values["finish_reason"] in {"stop", "length", "context"}
    assert values["seed"] == 7


def test_score_gives_tokens_nll_and_perplexity(grokctl, home, cut):
    outcome = grokctl(
        *("score", cut("words", 1).root, "--text", "-", "--home", home, "--json"),
        stdin="The import statement",
    )

    assert outcome.exit_code == 0
    assert_promised(outcome.result, {"tokens": int, "nll": float, "perplexity": float})
    assert outcome.result["perplexity"] > 1


def test_demo_says_the_same_on_every_mesh_and_keeps_what_the_other_verbs_can_use(
    process, grokctl, tmp_path
):
    kept = tmp_path / "kept"

    outcome = process.run("demo", "--json", "--keep", kept)
    verified = grokctl("verify", "miniature", "--home", kept / "home", "--json")

    values = outcome.result
    assert outcome.exit_code == 0
    assert_promised(
        values,
        {"ok": bool, "steps": list, "prompt": str, "texts": dict, "precisions": list},
    )
    assert values["ok"] is True
    assert values["texts"].keys() == {"4", "8", "16"}
    assert len(set(values["texts"].values())) == 1
    assert values["prompt"] == "This function returns the number of"
    assert values["texts"]["8"].startswith(" arguments for the\nfunction.")
    for step in values["steps"]:
        assert_promised(step, {"name": str, "result": str, "seconds": NUMBER})
        assert step["seconds"] >= 0
    loads = [event for event in outcome.events if event == {"event": "finished", "stage": "load"}]
    assert len(loads) == 4
    int8, int4 = values["precisions"]
    ready = {path.name: open_ready(path) for path in (kept / "home" / "ready").iterdir()}
    assert (int8["precision"], int8["nbytes"]) == ("int8", ready["miniature-int8-4"].nbytes)
    assert (int4["precision"], int4["nbytes"]) == ("int4", ready["miniature-int4-4"].nbytes)
    assert int8["perplexity"] == pytest.approx(104.25, abs=0.05)
    assert int4["perplexity"] == pytest.approx(104.81, abs=0.05)
    assert verified.result["ok"] is True
    assert sorted(ready) == [
        *("miniature-int4-4", "miniature-int8-16", "miniature-int8-4", "miniature-int8-8"),
    ]
    assert all(checkpoint.source.proven for checkpoint in ready.values())


def test_every_line_on_stderr_is_json_when_all_goes_well(grokctl, home, cut):
    reshard = cut("two-layers", 1).outcome
    release = grokctl(
        *("score", home / "releases" / "two-layers", "--token-ids", "1,2,3"),
        *("--home", home, "--json"),
    )

    assert [event["event"] for event in reshard.events].count("finished") == 2
    assert release.exit_code == 0
    assert all("event" in event for event in release.events)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(["verify", "nowhere"], 2, id="verify"),
        pytest.param(["verify", "{release}"], 2, id="no torrent"),
        pytest.param(["inspect", "nowhere"], 2, id="inspect"),
        pytest.param(["inspect", "{release}", "--tensor", "zz"], 2, id="nothing matches"),
        pytest.param(["reshard", "{release}"], 2, id="reshard"),
        pytest.param(["reshard", "{release}", "--devices", "3"], 30, id="mesh"),
        pytest.param(["run", "{release}"], 2, id="run"),
        pytest.param(["run", "{release}", "--token-ids", "1", "--devices", "3"], 30, id="run mesh"),
        pytest.param(["score", "{release}"], 2, id="score"),
        pytest.param(["fetch", "nowhere.torrent"], 2, id="fetch"),
        pytest.param(["demo", "--keep", "{release}"], 2, id="demo"),
    ],
)
def test_an_error_is_one_object_too(grokctl, home, arguments, code):
    release = str(home / "releases" / "two-layers")

    outcome = grokctl(*(text.format(release=release) for text in arguments), "--json")

    assert outcome.exit_code == code
    values = outcome.result
    assert values.keys() == {"ok", "error", "hint", "exit_code"}
    assert (values["ok"], values["exit_code"]) == (False, code)
    assert (values["error"], values["hint"]) == (outcome.error, outcome.hint)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["reshard", "x", "--devices", "many"], id="no number"),
        pytest.param(["reshard", "x", "--devices", "8", "--jobs", "0"], id="out of range"),
        pytest.param(["reshard", "x", "--devices", "8", "--precision", "int3"], id="no choice"),
        pytest.param(["verify", "--colour"], id="no such option"),
        pytest.param(["verify", "a", "b"], id="too many"),
        pytest.param(["run", "-n"], id="no value"),
    ],
)
def test_words_that_cannot_be_parsed_are_one_object_too(grokctl, arguments):
    outcome = grokctl(*arguments[:1], "--json", *arguments[1:])

    assert outcome.exit_code == 2
    values = outcome.result
    assert (values["ok"], values["exit_code"]) == (False, 2)
    assert values["error"] == outcome.error
