"""The library is found, or compiled once, and only where nobody else can put one."""

import os
import platform
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from users import OTHER, as_root, mode_of

from grokctl.native.binary import SWITCH, NoKernelError, candidates, open_library
from grokctl.native.build import (
    INSTALLED,
    Build,
    build_here,
    cache_folder,
    compiled,
    install,
    installed,
    kept,
    sources_key,
)
from grokctl.native.compiler import (
    BuildError,
    Compiler,
    compile_library,
    find_compiler,
    how_to_install,
)

here = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in {"x86_64", "aarch64"},
    reason="there is no kernel for this machine",
)
real = find_compiler(os.environ)
with_compiler = pytest.mark.skipif(real is None, reason="no C++ compiler")

GOOD = """#!/bin/sh
echo run >> "$(dirname "$0")/log"
sleep "${PAUSE:-0}"
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
echo library > "$out"
"""
BROKEN = """#!/bin/sh
echo "In file included from kernel.h:1:" >&2
echo "kernel.h:1:10: fatal error: cstdint: No such file or directory" >&2
echo "compilation terminated." >&2
exit 1
"""


def with_program(folder, text, name="c++"):
    """An environment whose path has a compiler: a script."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(text)
    program.chmod(0o755)
    return {"PATH": f"{folder}:/usr/bin:/bin"} if name == "c++" else {"PATH": str(folder)}


def only(folder):
    return {"PATH": str(folder)}


def runs(folder):
    """How often the script ran."""
    with suppress(FileNotFoundError):
        return len((folder / "log").read_text().splitlines())
    return 0


@pytest.fixture
def caches(tmp_path):
    return tmp_path / "home" / "cache" / "native"


@pytest.fixture
def small(tmp_path):
    """A build of one file."""
    source = tmp_path / "small.cc"
    source.write_text('extern "C" int answer() { return 42; }\n')
    return Build(sources={source: ("-fPIC",)}, includes=tmp_path, api="0.3")


def first(caches, environ, package):
    return next(candidates(caches, environ, package=package))


def tried(caches, environ, package=INSTALLED):
    """All candidates, and why there is no further one, with the fix."""
    found = []
    with pytest.raises(NoKernelError) as caught:
        found.extend(candidates(caches, environ, package=package))
    return found, str(caught.value), caught.value.fix


def reason(caches, environ, package):
    return tried(caches, environ, package)[1:]


@here
def test_without_a_compiler_the_reason_says_what_to_install(caches, tmp_path):
    (tmp_path / "bin").mkdir()

    why, fix = reason(caches, only(tmp_path / "bin"), tmp_path)

    assert "no C++ compiler" in why
    assert fix == "conda install --channel conda-forge gxx"
    assert not caches.exists()


@here
def test_the_command_that_installs_is_that_of_the_system(caches, tmp_path):
    environ = with_program(tmp_path / "bin", "", name="dnf")

    assert reason(caches, environ, tmp_path)[1] == "sudo dnf install gcc-c++"


@here
def test_a_compiler_that_fails_is_quoted_with_its_first_error(caches, tmp_path):
    environ = with_program(tmp_path / "bin", BROKEN)
    why, fix = reason(caches, environ, tmp_path)

    assert why == ("c++ failed: kernel.h:1:10: fatal error: cstdint: No such file or directory")
    assert fix == how_to_install(environ)
    assert list(cache_folder(caches).iterdir()) == []


@here
def test_a_compiled_library_is_kept_closed_to_others(caches, tmp_path):
    environ, begun = with_program(tmp_path / "bin", GOOD), []

    path = next(candidates(caches, environ, package=tmp_path, begin=begun.append))
    again = next(candidates(caches, environ, package=tmp_path, begin=begun.append))

    assert path == again
    assert [compiler.name for compiler in begun] == ["c++"]
    assert [mode_of(folder) for folder in (caches.parent, caches, path.parent)] == [0o700] * 3
    assert list(path.parent.iterdir()) == [path]


@here
def test_another_compiler_compiles_again_and_without_one_any_library_serves(caches, tmp_path):
    one = first(caches, with_program(tmp_path / "one", GOOD), tmp_path)
    two = first(caches, with_program(tmp_path / "two", GOOD), tmp_path)

    assert one != two
    (tmp_path / "none").mkdir()
    assert first(caches, only(tmp_path / "none"), tmp_path) in {one, two}


@here
def test_what_was_compiled_of_other_sources_is_not_used(caches, tmp_path, small):
    compiler = find_compiler(with_program(tmp_path / "bin", GOOD))
    folder = cache_folder(caches)

    stale = compiled(small, folder, compiler)

    changed = next(iter(small.sources))
    other = Build(sources={changed: ("-fPIC", "-O1")}, includes=small.includes, api="0.3")
    newer = Build(sources=small.sources, includes=small.includes, api="0.4")
    assert kept(small, folder, None) == stale
    assert kept(other, folder, None) is None
    assert kept(newer, folder, None) is None


@here
def test_a_library_that_was_cut_short_is_compiled_again(caches, tmp_path):
    environ = with_program(tmp_path / "bin", GOOD)
    path = first(caches, environ, tmp_path)
    path.write_bytes(b"lib")

    assert first(caches, environ, tmp_path) == path
    assert path.read_bytes() == b"library\n"


@here
@as_root
def test_no_library_is_loaded_that_another_user_could_have_put_there(caches, tmp_path):
    environ = with_program(tmp_path / "bin", GOOD)
    first(caches, environ, tmp_path)
    before = runs(tmp_path / "bin")
    os.chown(cache_folder(caches), OTHER, OTHER)
    (tmp_path / "none").mkdir()

    for each in (environ, only(tmp_path / "none")):
        why, _ = reason(caches, each, tmp_path)
        assert "cannot be used" in why
        assert f"belongs to user {OTHER}" in why
    assert runs(tmp_path / "bin") == before


@here
def test_no_library_is_loaded_where_all_can_write(caches, tmp_path):
    environ = with_program(tmp_path / "bin", GOOD)
    first(caches, environ, tmp_path)
    cache_folder(caches).chmod(0o777)

    why, _ = reason(caches, environ, tmp_path)

    assert "can be written by others; to begin a new one: rm -r" in why


WAITS = """
import os, sys
from pathlib import Path
from grokctl.native.binary import candidates
print(next(candidates(Path(sys.argv[1]), os.environ, package=Path("/nowhere"))))
"""


@here
def test_of_two_processes_one_compiles_and_the_other_waits(caches, tmp_path):
    program = tmp_path / "bin"
    environ = {**os.environ, **with_program(program, GOOD), "PAUSE": "0.2"}
    environ.pop(SWITCH, None)  # as `make sanitize` has it
    command = [sys.executable, "-c", WAITS, str(caches)]
    begun = [
        subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]

    told = {process.communicate(timeout=60)[0] for process in begun}

    assert len(told) == 1
    assert runs(program) == len(build_here().sources) + 1  # and the link
    assert len(list(cache_folder(caches).iterdir())) == 1


@here
def test_what_a_killed_process_left_is_deleted_when_it_is_old(caches, tmp_path, small):
    compiler = find_compiler(with_program(tmp_path / "bin", GOOD))
    folder = cache_folder(caches)
    compiled(small, folder, compiler)
    for name, age in (("old", 7200), ("new", 0)):
        (folder / f".work-{name}").mkdir()
        os.utime(folder / f".work-{name}", (time.time() - age,) * 2)
    next(folder.glob("*.so")).unlink()

    compiled(small, folder, compiler)

    assert [path.name for path in folder.glob(".work-*")] == [".work-new"]


@here
def test_a_home_keeps_the_last_libraries_only(caches, tmp_path, small):
    compiler = find_compiler(with_program(tmp_path / "bin", GOOD))
    folder, made = cache_folder(caches), []
    for number in range(6):
        build = Build(sources=small.sources, includes=small.includes, api=f"0.{number}")
        made.append(compiled(build, folder, compiler))
        os.utime(made[-1], (number, number))

    assert sorted(folder.iterdir()) == sorted(made[-4:])


def test_the_switch_turns_it_off_or_names_the_only_candidate(caches, tmp_path):
    assert tried(caches, {SWITCH: " OFF "}) == ([], f"{SWITCH}=off", f"unset {SWITCH}")

    found, why, fix = tried(caches, {SWITCH: str(tmp_path / "mine.so")})
    assert found == [tmp_path / "mine.so"]
    assert (why, fix) == (f"{SWITCH}={tmp_path}/mine.so: is no kernel", f"unset {SWITCH}")


@here
@pytest.mark.parametrize(
    ("of_sources", "api", "is_used"),
    [
        (None, None, True),
        (None, "0.0", True),  # JAX calls older ones
        (None, "0.9999", False),  # and does not start with newer ones
        (None, "1.0", False),
        ("0123456789abcdef", None, False),
    ],
)
def test_the_library_of_the_package_is_used_if_it_fits(tmp_path, of_sources, api, is_used):
    build = build_here()
    key = of_sources or sources_key(build.sources)
    path = tmp_path / f"{key}-{platform.machine()}-{api or build.api}.so"
    path.touch()

    assert installed(tmp_path) == (path if is_used else None)
    if is_used:
        assert tried(None, {}, tmp_path)[0] == [path]


@here
def test_installing_replaces_earlier_libraries_of_the_architecture(tmp_path):
    package = tmp_path / "built"
    package.mkdir()
    for name in ("old-x86_64-0.3.so", "old-riscv64-0.3.so"):
        (package / name).touch()
    compiler = find_compiler(with_program(tmp_path / "bin", GOOD))

    path = install(compiler, "x86_64", package)

    assert {each.name for each in package.iterdir()} == {path.name, "old-riscv64-0.3.so"}
    assert path.read_bytes() == b"library\n"


def test_without_a_home_nothing_is_compiled(tmp_path):
    found, why, _ = tried(None, with_program(tmp_path / "bin", GOOD), tmp_path)

    assert (found, why) == ([], "it is not installed, and may not be compiled here")
    assert runs(tmp_path / "bin") == 0


def test_a_compiler_is_looked_for_in_absolute_folders(tmp_path, monkeypatch):
    with_program(tmp_path / "bin", GOOD)
    monkeypatch.chdir(tmp_path)

    assert find_compiler({"PATH": "bin:."}) is None
    assert find_compiler({"PATH": f"bin:{tmp_path}/bin"}).command == (f"{tmp_path}/bin/c++",)


def test_cxx_names_the_compiler_with_arguments(tmp_path):
    environ = with_program(tmp_path / "bin", GOOD, name="mine")

    assert find_compiler({**environ, "CXX": "mine -m64"}).command == (
        f"{tmp_path}/bin/mine",
        "-m64",
    )
    assert find_compiler({**environ, "CXX": "'mine"}) is None


def test_zig_gets_processors_in_place_of_versions():
    flags = ("-O3", "-march=armv8.2-a+dotprod", "-mavx2")

    assert Compiler(("python", "-m", "ziglang", "c++")).spelled(flags) == [
        "-O3",
        "-mcpu=generic+dotprod",
        "-mavx2",
    ]
    assert Compiler(("g++",)).spelled(flags) == list(flags)


def test_a_changed_compiler_is_another(tmp_path):
    environ = with_program(tmp_path / "bin", GOOD)
    before = find_compiler(environ).identity
    with_program(tmp_path / "bin", GOOD + "# 13.1\n")

    assert find_compiler(environ).identity != before


@with_compiler
def test_a_real_compiler_makes_a_library(tmp_path, small):
    (tmp_path / "work").mkdir()

    path = compile_library(real, small.sources, tmp_path / "work", includes=tmp_path)

    with pytest.raises(NoKernelError, match="undefined symbol: grokctl_"):
        open_library(path)


@with_compiler
def test_what_needs_a_flag_that_a_real_compiler_does_not_know_is_left_out(tmp_path, small):
    (tmp_path / "work").mkdir()
    younger = tmp_path / "younger.cc"
    younger.write_text("#error of a processor that this compiler does not know\n")
    sources = {**small.sources, younger: ("-fPIC", "-mavx8192")}

    path = compile_library(real, sources, tmp_path / "work", includes=tmp_path)

    assert path.is_file()


@with_compiler
def test_a_real_compiler_says_what_it_does_not_like(tmp_path, small):
    (tmp_path / "work").mkdir()
    next(iter(small.sources)).write_text("int f() { return nothing; }\n")

    with pytest.raises(BuildError, match=r"not declared|undeclared"):
        compile_library(real, small.sources, tmp_path / "work", includes=tmp_path)


OLD = """#!/bin/sh
for each in "$@"; do
    case $each in -mamx*|-mavxvnni)
        echo "c++: error: unrecognized command-line option '$each'" >&2
        exit 1;;
    esac
done
exec REAL "$@" -O1
"""


@here
@with_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="of its instruction sets")
@pytest.mark.heavy
def test_an_old_compiler_leaves_out_what_it_does_not_know(tmp_path):
    environ = with_program(tmp_path / "bin", OLD.replace("REAL", real.command[0]))

    library = open_library(install(find_compiler(environ), "x86_64", tmp_path / "built"))

    assert library.force("portable")
    assert not library.force("amx")
    assert not library.force("avxvnni")
    assert library.force(None)


@pytest.mark.skipif(installed(INSTALLED) is None, reason="there is no kernel in this checkout")
def test_where_only_the_slow_form_runs_there_is_no_kernel():
    path = installed(INSTALLED)
    library = open_library(path)
    library.force("portable")  # as on a processor that has no other

    with pytest.raises(NoKernelError, match="no form for the instructions"):
        open_library(path)

    library.force(None)
    assert open_library(path).instruction_set == library.instruction_set


def test_what_is_no_library_is_refused_by_its_name(tmp_path):
    (tmp_path / "a.so").write_bytes(b"library")

    with pytest.raises(NoKernelError, match=r"a\.so cannot be loaded \(.*\)"):
        open_library(tmp_path / "a.so")
