"""Documents name files, functions, commands and messages that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from places import PROJECT
from typer.main import get_command

from grokctl.cli.app import app

PACKAGE = PROJECT / "grokctl"
PAGES = [
    PROJECT / "README.md",
    PROJECT / "CHANGELOG.md",
    *sorted((PROJECT / "docs").rglob("*.md")),
]
OUTSIDE = re.compile(r"(?:tests|benchmarks|docs)(?:/[\w.-]+)*/?")
PACKAGES = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
MODULES = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
OF_THE_MODEL = {"moe/linear_1"}
"""In the reference code."""

pages = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix()
)


def test_the_pages_are_found():
    assert len(PAGES) > 15


@pages
def test_paths_and_functions_exist(page):
    names = set(re.findall(r"`([^`\n]+)`", page.read_text("utf-8"))) - OF_THE_MODEL

    missing = [name for name in names if not is_there(name)]

    assert not missing


@pages
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        place, _, heading = target.partition("#")
        path = page.parent / place if place else page
        assert path.exists(), target
        assert not heading or heading in headings(path), target


@pages
def test_commands_have_the_options_that_pages_use(page):
    commands = get_command(app).commands
    lines = [line.partition(" #")[0] for line in code(page)]
    calls = [call for line in lines for call in re.findall(r"\bgrokctl ([a-z]+\b[^|`&]*)", line)]
    for call in calls:
        verb, *words = call.split()
        assert verb in commands, call
        known = {option for param in commands[verb].params for option in param.opts}
        used = {word.partition("=")[0].rstrip(".,;:)") for word in words if word.startswith("-")}
        assert used - known - {"-", "--help", "-h"} == set(), call


@pages
def test_targets_of_make_exist(page):
    targets = re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text("utf-8"), re.MULTILINE)

    used = set(re.findall(r"(?:`|^ {4}|; )make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE))

    assert used <= set(targets)


def test_the_readme_quotes_messages_that_are_printed():
    table = (PROJECT / "README.md").read_text("utf-8").partition("## Troubleshooting")[2]
    cells = re.findall(r"^\| (.*?) \|", table.partition("## ")[0], re.MULTILINE)
    messages = [message for cell in cells for message in re.findall(r"`([^`]+)`", cell)]
    assert len(messages) > 10

    for message in messages:
        for part in re.split("…", message):
            words = part.strip(" :,")
            assert not words or any(words in text for text in printed()), message


def is_there(name: str) -> bool:
    """Whether a text in backticks exists, if it is a path or a name of ours."""
    if OUTSIDE.fullmatch(name):
        return (PROJECT / name).exists()
    parts = re.split("[/.]", name)
    is_qualified = parts[0] == "grokctl"
    parts = parts[is_qualified:]
    known = PACKAGES | MODULES if is_qualified else PACKAGES if "/" in name else MODULES
    is_ours = name.startswith("grokctl/") or (parts[:1] and parts[0] in known)
    if not is_ours or len(parts) <= (not is_qualified) or not all(map(is_name, parts)):
        return True
    folder = PACKAGE
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    if not parts:
        return True
    return defines(folder / f"{parts[0]}.py", tuple(part for part in parts[1:] if part != "py"))


def is_name(text: str) -> bool:
    return text.isidentifier()


@cache
def defines(file: Path, names: tuple[str, ...]) -> bool:
    """Whether a module exists, and defines a function or class in it, or a method in that."""
    if not file.is_file():
        return False
    body: list[ast.stmt] = ast.parse(file.read_text("utf-8")).body
    for name in names:
        found = [node for node in body if getattr(node, "name", None) == name]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def code(page: Path) -> list[str]:
    """The lines of code blocks, and the spans of code in all others."""
    lines = page.read_text("utf-8").splitlines()
    blocks = [line for line in lines if line.startswith("    ")]
    spans = [span for line in lines for span in re.findall(r"`([^`]+)`", line)]
    return blocks + spans


@cache
def headings(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@cache
def printed() -> tuple[str, ...]:
    """Every text in the source."""
    return tuple(
        node.value
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
