"""The command line sets environment variables for JAX and OpenSSL; nothing below it sets any."""

import ast
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

import grokctl
from grokctl.cli.environment import certificates_named, gpu_memory_claimed, jax_prepared
from grokctl.machine import network
from grokctl.machine.jax_variables import _reason_in, doubtful, start_failure
from grokctl.model.memory_share import MEMORY_SHARE, SHARE_VARIABLES
from grokctl.system import usable_cores

PACKAGE = Path(grokctl.__file__).parent
WRITERS = {"putenv", "unsetenv", "setdefault", "update", "pop", "popitem", "clear"}


def is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def writes_of(path: Path) -> list[int]:
    """The lines of a module that change `os.environ`."""
    lines = []
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Subscript(value=value, ctx=ast.Store() | ast.Del()) if is_environ(value):
                lines.append(node.lineno)
            case ast.Call(func=ast.Attribute(value=value, attr=name)) if name in WRITERS:
                if is_environ(value) or name in {"putenv", "unsetenv"}:
                    lines.append(node.lineno)
            case ast.AugAssign(target=target) if is_environ(target):
                lines.append(node.lineno)
    return lines


def test_one_module_of_the_command_line_sets_variables_and_no_other_module_does():
    writers = {
        path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if writes_of(path)
    }

    assert writers == {"cli/environment.py"}


@pytest.fixture
def no_bundle(monkeypatch, tmp_path):
    """A system whose certificate authorities are where libtorrent does not look."""
    bundle = tmp_path / "bundle.pem"
    bundle.touch()
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setattr(network, "BUILT_IN_CA_BUNDLES", ())
    monkeypatch.setattr(network, "_OTHER_CA_BUNDLES", (str(bundle),))
    nowhere = SimpleNamespace(cafile=None)
    monkeypatch.setattr(network.ssl, "get_default_verify_paths", lambda: nowhere)
    return str(bundle)


def test_openssl_is_told_of_certificates_that_it_does_not_find(no_bundle):
    with certificates_named():
        assert os.environ["SSL_CERT_FILE"] == no_bundle
    assert "SSL_CERT_FILE" not in os.environ


@pytest.mark.usefixtures("no_bundle")
def test_certificates_that_the_user_named_are_kept(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/the/users.pem")

    with certificates_named():
        assert os.environ["SSL_CERT_FILE"] == "/the/users.pem"
    assert os.environ["SSL_CERT_FILE"] == "/the/users.pem"


def test_fetch_names_them_to_the_session(grokctl, no_bundle, tmp_path, loopback, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "grokctl.transfer.sources.FetchOptions.__post_init__",
        lambda _: seen.append(os.environ.get("SSL_CERT_FILE")),
    )

    grokctl("fetch", "nothing.torrent", "--to", tmp_path / "x", *loopback)

    assert seen[-1] == no_bundle


@pytest.mark.parametrize("name", SHARE_VARIABLES)
def test_jax_may_take_the_planned_share_of_a_gpu_or_what_the_user_chose(monkeypatch, name):
    for variable in SHARE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    with gpu_memory_claimed():
        assert os.environ[SHARE_VARIABLES[0]] == str(MEMORY_SHARE)
    assert SHARE_VARIABLES[0] not in os.environ  # no process that we start later inherits it

    monkeypatch.setenv(name, "0.5")
    with gpu_memory_claimed():
        assert [os.environ.get(variable) for variable in SHARE_VARIABLES].count("0.5") == 1
        assert str(MEMORY_SHARE) not in os.environ.values()


@pytest.mark.parametrize("verb", ["run", "score", "bench"])
def test_the_commands_that_start_an_engine_claim_it(grokctl, monkeypatch, verb):
    for variable in SHARE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    seen = []

    def opened(*_, **__):
        seen.append(os.environ.get(SHARE_VARIABLES[0]))
        raise KeyboardInterrupt

    monkeypatch.setattr("grokctl.session.job._open_job", opened)
    given = [] if verb == "bench" else ["--token-ids", "1"]

    outcome = grokctl(verb, *given)

    assert outcome.exit_code == 130
    assert seen == [str(MEMORY_SHARE)]
    assert SHARE_VARIABLES[0] not in os.environ


# --- threads


@pytest.mark.parametrize("verb", ["run", "score", "bench"])
def test_threads_are_those_of_xla_and_of_the_kernel(grokctl, monkeypatch, verb):
    seen = []

    def opened(request, **_):
        seen.append((request.threads, os.environ.get("PJRT_NPROC")))
        raise KeyboardInterrupt

    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.setattr("grokctl.session.job._open_job", opened)
    given = [] if verb == "bench" else ["--token-ids", "1"]

    grokctl(verb, *given, "--threads", 1)
    grokctl(verb, *given)

    assert seen == [(1, "1"), (None, None)]
    assert "PJRT_NPROC" not in os.environ


def test_there_are_no_more_threads_than_usable_cores(grokctl):
    cores = usable_cores()

    outcome = grokctl("run", "-p", "x", "--threads", cores + 1)

    assert outcome.exit_code == 2
    assert outcome.error == (f"--threads {cores + 1}: expected 1 to {cores}, the usable cores")


# --- what JAX reads


def test_what_changes_the_results_of_jax_is_set_aside_for_a_run_and_comes_back(monkeypatch):
    names = ("JAX_ENABLE_X64", "JAX_USE_SHARDY_PARTITIONER", "JAX_NUMPY_RANK_PROMOTION")
    for name in (*names, "JAX_PLATFORMS", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "cpu" if name == "JAX_PLATFORMS" else "1")

    with jax_prepared():
        assert not os.environ.keys() & set(names)
        assert os.environ["JAX_PLATFORMS"] == "cpu"
        assert os.environ["NCCL_DEBUG"] == "1"
    assert all(os.environ[name] == "1" for name in names)


def test_only_what_may_stop_jax_costs_a_trial():
    fine = {"JAX_NUM_CPU_DEVICES": "8", "JAX_ENABLE_X64": "perhaps", "XLA_FLAGS": " ", "HOME": "x"}
    bad = {
        "JAX_NUM_CPU_DEVICES": "x",
        "XLA_FLAGS": "--a",
        "LIBTPU_INIT_ARGS": "-b",
        "JAX_NEW": "new",
    }

    assert doubtful(fine | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}) == ()
    assert doubtful({"JAX_LOG_COMPILES": "1", "JAX_LOGGING_LEVEL": "DEBUG"}) == ()
    assert doubtful(bad) == tuple(sorted(bad))
    assert start_failure({**os.environ, "JAX_NEW": "new"}) is None


@pytest.mark.parametrize(
    "wrong",
    [
        "LOG_COMPILES=maybe",
        "LOGGING_LEVEL=foo",
        "TRACEBACK_FILTERING=foo",
        "NUM_CPU_DEVICES=1.5",
        "CPU_COLLECTIVES_IMPLEMENTATION=1",
        "OPTIMIZATION_LEVEL=7",
        "ENABLE_COMPILATION_CACHE=2",
        "PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=true",
    ],
)
def test_a_value_of_the_wrong_type_is_doubtful_whatever_the_flag(wrong):
    name, _, value = wrong.partition("=")

    assert doubtful({f"JAX_{name}": value}) == (f"JAX_{name}",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("XLA_FLAGS", "--xla_gpu_no_such_flag=1"),
        ("XLA_FLAGS", "no-such-file"),
        ("XLA_FLAGS", "--help"),
        ("JAX_NUM_CPU_DEVICES", "many"),
        ("JAX_LOG_COMPILES", "maybe"),
        ("JAX_OPTIMIZATION_LEVEL", "7"),
        ("JAX_DUMP_IR_TO", "/proc/nothere"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "most"),
    ],
)
def test_a_variable_with_which_jax_does_not_start_is_named(grokctl, monkeypatch, name, value):
    monkeypatch.setenv(name, value)

    outcome = grokctl("run", "--token-ids", "1")

    assert outcome.exit_code == 40
    assert f"{name}={value}: JAX does not start with it: " in outcome.error
    assert "Flags:" not in outcome.error
    assert outcome.hint == f"unset {name}"


def test_the_line_that_tells_why_is_the_one_that_is_shown():
    usage = "usage: --help\nFlags:\n\t--xla_a=false\tbool\tEnable a: an Error: none.\n"
    ended = (
        "F1130 12:27:55.8   21202 flags.cc:220] Check failed: Parse(a, b) Flag parsing failed.\n"
    )
    value = "E1130 12:27:55.7   21202 flags.cc:93] Couldn't interpret value perhaps for flag a.\n"
    raised = (
        "Traceback:\n  x = y\nValueError: bad a\n-----\nFor simplicity, JAX has removed frames.\n"
    )

    assert _reason_in(ended + usage) == "Flag parsing failed."
    assert _reason_in(value + ended + usage) == "Couldn't interpret value perhaps for flag a."
    assert _reason_in(raised) == "ValueError: bad a"
    assert _reason_in("") == "ends without a word"
