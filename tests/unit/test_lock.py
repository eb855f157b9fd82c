import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from itertools import product

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from places import PROJECT

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text("utf-8"))
GROUPS = PYPROJECT["dependency-groups"]
LOCK = (PROJECT / "requirements.lock").read_text("utf-8")
GROUP_LOCKS = {
    path.stem.removeprefix("requirements-"): path.read_text("utf-8")
    for path in PROJECT.glob("requirements-*.lock")
}
OF_ITS_OWN = "gpu"
"""The group that is installed alone, with the JAX of GPU machines, for Linux and newer Pythons."""
NEEDED = (
    *PYPROJECT["project"]["dependencies"],
    *PYPROJECT["build-system"]["requires"],
    *GROUPS["dev"],
)
PLATFORMS = (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"))
ENVIRONMENTS = [
    pytest.param(
        {
            "implementation_name": "cpython",
            "implementation_version": f"{python}.0",
            "os_name": "posix",
            "platform_machine": machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": system.capitalize(),
            "platform_version": "",
            "python_full_version": f"{python}.0",
            "python_version": python,
            "sys_platform": system,
        },
        id=f"{python}-{system}-{machine}",
    )
    for python, (system, machine) in product(("3.11", "3.12", "3.13"), PLATFORMS)
]


def pins(lock: str, environment: dict[str, str]) -> dict[str, Requirement]:
    """The pins for an environment, by name."""
    found: dict[str, Requirement] = {}
    for text in re.findall(r"^(\w.*?) \\$", lock, re.MULTILINE):
        pin = Requirement(text)
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in found, f"{pin.name} is pinned twice"
            found[pin.name] = pin
    return found


def version_of(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    assert specifier.operator == "==", pin
    return specifier.version


@cache
def needs(name: str, version: str) -> list[Requirement]:
    """The requirements in the metadata of a release.

    The lock pins some releases only for other Pythons. Here the installed release of that name
    stands in, with names and without versions; `make test-newest` reads the other metadata.
    """
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return []
    required = [Requirement(text) for text in found.requires or ()]
    if found.version != version:
        for requirement in required:
            requirement.specifier = type(requirement.specifier)()
    return required


def gaps(lock: str, needed: Iterable[str], environment: dict[str, str]) -> Iterator[str]:
    """The requirements that the pins for an environment leave open."""
    pinned = pins(lock, environment)
    pending = [(Requirement(text), "", "pyproject.toml") for text in needed]
    seen = set()
    while pending:
        requirement, extra, source = pending.pop()
        marker = requirement.marker
        if marker is not None and not marker.evaluate(environment | {"extra": extra}):
            continue
        pin = pinned.get(canonicalize_name(requirement.name))
        if pin is None:
            yield f"{source} requires {requirement}, which is not pinned"
            continue
        version = version_of(pin)
        if not requirement.specifier.contains(version, prereleases=True):
            yield f"{source} requires {requirement}, but {version} is pinned"
        if not requirement.extras <= pin.extras:
            yield f"{source} requires {requirement}, but its extra is not pinned"
        for asked in {(pin.name, extra) for extra in ("", *requirement.extras)} - seen:
            seen.add(asked)
            pending += [(needed, asked[1], pin.name) for needed in needs(pin.name, version)]


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_the_lock_alone_satisfies_every_requirement(environment):
    assert not list(gaps(LOCK, NEEDED, environment))


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.parametrize("group", sorted(GROUP_LOCKS.keys() - {OF_ITS_OWN}))
def test_the_lock_of_a_group_satisfies_it_and_agrees_with_the_lock_below(group, environment):
    added, below = pins(GROUP_LOCKS[group], environment), pins(LOCK, environment)

    assert not list(gaps(GROUP_LOCKS[group], GROUPS[group], environment))
    assert {name: version_of(added[name]) for name in added.keys() & below.keys()} == {
        name: version_of(below[name]) for name in added.keys() & below.keys()
    }


@pytest.mark.parametrize("environment", [each for each in ENVIRONMENTS if "3.11" not in each.id])
def test_the_lock_of_gpu_forms_satisfies_its_group_and_grokctl(environment):
    needed = (*PYPROJECT["project"]["dependencies"], *GROUPS[OF_ITS_OWN])

    assert not list(gaps(GROUP_LOCKS[OF_ITS_OWN], needed, environment))


def test_every_group_has_a_lock():
    assert GROUP_LOCKS.keys() == GROUPS.keys() - {"dev"}


def test_what_is_pinned_for_this_python_is_what_is_installed():
    pinned = pins(LOCK, default_environment())

    assert {name: metadata.version(name) for name in pinned} == {
        name: version_of(pin) for name, pin in pinned.items()
    }


@pytest.mark.parametrize("lock", [LOCK, *GROUP_LOCKS.values()], ids=["dev", *GROUP_LOCKS])
def test_locks_are_pins_with_hashes_and_nothing_else(lock):
    pin = r"[\w-]+(\[[\w, -]+\])?==[\w.]+( ; .+)?( \\\n    --hash=sha256:[0-9a-f]{64})+\n"

    assert re.fullmatch(f"({pin})+", lock)


@pytest.mark.parametrize(
    ("old", "new", "gap"),
    [
        pytest.param(
            r"^httpx\[socks\]",
            "httpx",
            "pyproject.toml requires httpx[socks]>=0.28, but its extra is not pinned",
            id="no extra",
        ),
        pytest.param(
            r"^socksio==\S+",
            "unknown==1",
            'httpx requires socksio==1.*; extra == "socks", which is not pinned',
            id="no requirement of an extra",
        ),
        pytest.param(
            r"^libtorrent==\S+",
            "libtorrent==2.2.0",
            "pyproject.toml requires libtorrent<2.2,>=2.1.1, but 2.2.0 is pinned",
            id="outside a specifier",
        ),
        pytest.param(
            r"^jaxlib(==\S+) ; python_full_version < '3.12'",
            r"jaxlib\1 ; python_full_version < '3.11'",
            "jax requires jaxlib",
            id="no branch for 3.11",
        ),
        pytest.param(
            r"^jaxlib(==\S+) ; python_full_version >= '3.12'",
            r"jaxlib\1 ; python_full_version >= '3.14'",
            "jax requires jaxlib",
            id="no branch for 3.12 and 3.13",
        ),
        pytest.param(
            r"^pluggy(==\S+)",
            r"pluggy\1 ; sys_platform != 'darwin'",
            "pytest requires pluggy",
            id="no branch for macOS",
        ),
    ],
)
def test_a_gap_in_the_lock_is_found(old, new, gap):
    lock, count = re.subn(old, new, LOCK, flags=re.MULTILINE)
    found = {line for param in ENVIRONMENTS for line in gaps(lock, NEEDED, dict(param.values[0]))}

    assert count == 1
    assert any(line.startswith(gap) for line in found), found
