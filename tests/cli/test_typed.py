"""What people type: each does what is meant, or names in one line what does."""

import os
import shlex

import pytest

from grokctl import __version__


@pytest.mark.parametrize("arguments", [["version"], ["-V"], ["--version"]], ids=" ".join)
def test_the_version_has_three_spellings(grokctl, arguments):
    outcome = grokctl(*arguments)

    assert (outcome.exit_code, outcome.stdout) == (0, f"grokctl {__version__}\n")


@pytest.mark.parametrize("verb", ["run", "fetch", None])
def test_help_is_a_command_too(grokctl, verb):
    words = [] if verb is None else [verb]

    assert grokctl("help", *words).stdout == grokctl(*words, "--help").stdout


def test_help_for_a_command_that_does_not_exist_is_a_usage_error(grokctl):
    outcome = grokctl("help", "nosuch")

    assert outcome.exit_code == 2
    assert "nosuch" in outcome.error


@pytest.mark.parametrize("verb", ["inspect", "verify", "reshard"])
def test_home_may_come_before_the_verb(grokctl, tmp_path, verb):
    before = grokctl("--home", tmp_path, verb)

    assert before.exit_code == 2
    assert str(tmp_path) in before.error
    assert before == grokctl(verb, "--home", tmp_path)


def test_the_later_home_counts(grokctl, tmp_path):
    outcome = grokctl("--home", tmp_path / "a", "inspect", "--home", tmp_path / "b")

    assert str(tmp_path / "b") in outcome.error


def test_a_text_in_the_place_of_a_checkpoint_is_shown_its_own(grokctl, home):
    outcome = grokctl("run", "the answer is", "--home", home)

    assert outcome.exit_code == 2
    assert outcome.error == "the answer is: expected a checkpoint, found a text"
    assert outcome.hint == f"grokctl run -p 'the answer is' --home {home}"


def test_so_is_one_of_a_reshard(grokctl, two_layers):
    outcome = grokctl("reshard", two_layers, "--devices", 8, "--max-memory", 4)

    assert outcome.exit_code == 2
    assert outcome.hint == f"grokctl reshard {two_layers} --devices 8 --max-memory 4GB"


def test_a_text_after_the_checkpoint_is_shown_its_own_place(grokctl, home):
    outcome = grokctl("run", "two-layers", "it's the answer", "--home", home)

    assert outcome.exit_code == 2
    assert shlex.split(outcome.hint)[1:5] == ["run", "two-layers", "-p", "it's the answer"]


def test_a_second_argument_elsewhere_is_refused(grokctl, home):
    outcome = grokctl("inspect", "two-layers", "three-layers", "--home", home)

    assert outcome.error == "three-layers: unexpected argument"
    assert outcome.hint.endswith(" inspect --help")


@pytest.mark.parametrize("typed", ["bf16", "bfloat16", "BFloat16"])
def test_a_stored_dtype_has_the_spellings_that_people_know(grokctl, two_layers, typed):
    outcome = grokctl("reshard", two_layers, "--devices", 1, "--precision", typed, "--dry-run")

    assert outcome.exit_code == 0
    assert "bf16" in outcome.stdout


@pytest.mark.parametrize("typed", ["fp32", "float32", "F32"])
def test_so_has_a_dtype_of_computation(grokctl, two_layers, typed):
    outcome = grokctl("run", two_layers, "--token-ids", 9999, "--compute", typed)

    assert outcome.exit_code == 2
    assert "9999" in outcome.error  # the dtype was taken


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["doctor", "--devices", 8, "--memory", 80], "--memory 80GB"),
        (["doctor", "--devices", 8, "--memory", "80.5"], "--memory 80.5GB"),
        (["fetch", "--max-download", 20], "--max-download 20MB"),
        (["fetch", "--max-upload", 999], "--max-upload 999MB"),
    ],
    ids=str,
)
def test_a_size_without_its_unit_is_an_error_with_the_likely_one(grokctl, arguments, hint):
    outcome = grokctl(*arguments)

    assert outcome.exit_code == 2
    assert outcome.error.endswith(f"expected a unit, such as {hint.split()[1]}")
    assert outcome.hint.startswith(f"grokctl {arguments[0]} ")
    assert outcome.hint.endswith(f" {hint}")


def test_a_number_of_devices_that_was_not_typed_is_said(grokctl):
    assumed = grokctl("doctor", "--accelerator", "H100")
    typed = grokctl("doctor", "--accelerator", "H100", "--devices", 8)

    assert assumed.stderr == "planned for up to 16 devices; --devices N plans for exactly N\n"
    assert typed.stderr == ""


@pytest.mark.parametrize("verb", ["run", "fetch"])
def test_long_helps_list_their_options_in_groups(grokctl, verb):
    lines = grokctl(verb, "--help").stdout.splitlines()

    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert len(titles) >= 4
    assert sum(line.lstrip().startswith("-") for line in lines) > 20


@pytest.mark.parametrize("typed", ["٢GB", "1_000MB", "+5MB", "nan", "0x10MB"])
def test_a_size_has_plain_digits(grokctl, typed):
    outcome = grokctl("fetch", "--max-download", typed)

    assert outcome.exit_code == 2
    assert "expected a size" in outcome.error


def test_logits_never_replace_the_text_that_they_are_of(grokctl, two_layers, tmp_path):
    text, link = tmp_path / "text", tmp_path / "link"
    text.write_text("1 2")
    link.symlink_to(text)

    for place in (text, link):
        outcome = grokctl("score", two_layers, "--text", text, "--logits", place)

        assert outcome.exit_code == 2
        assert "is the text of this command" in outcome.error
    assert text.read_text() == "1 2"


def test_nothing_is_written_between_the_tensors_of_a_release(grokctl, two_layers):
    out = two_layers / "ckpt-0" / "ready"

    outcome = grokctl("reshard", two_layers, "--devices", 1, "--out", out)

    assert outcome.exit_code == 2
    assert "lies between the tensors of a release" in outcome.error
    assert not out.exists()


@pytest.mark.parametrize("path", ["~nosuch-user/x", "~nosuch-user"])
def test_a_user_that_does_not_exist_is_no_folder(grokctl, path):
    outcome = grokctl("fetch", "m.torrent", f"--to={path}", "--dry-run")

    assert outcome.exit_code == 2
    assert "no such user" in outcome.error


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "is not a regular file"),
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/nonexistent/x"), "is a symbolic link to no file"),
    ],
    ids=["folder", "pipe", "link"],
)
@pytest.mark.parametrize("verb", [["verify", "--quick"], ["inspect"], ["reshard", "--devices", 1]])
def test_a_configuration_that_is_no_file_blames_no_tensor(grokctl, two_layers, verb, make, words):
    config = two_layers / "config.json"
    config.unlink()
    make(config)

    outcome = grokctl(*verb, two_layers)

    assert outcome.exit_code == 20
    assert outcome.error.startswith("config.json: ")
    assert words in outcome.error
