"""Text that ships with Python: topics of its documentation, docstrings, and sources."""

import ast
import hashlib
import inspect
import pydoc_data.topics
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(sysconfig.get_paths()["stdlib"])
TABLES = {
    "distutils",
    "encodings",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}
"""Folders left out: tests, tables of characters, and what later versions of Python lack."""
HELD_OUT = 20
"""One file in so many is held out, whole, for measurements."""
LARGEST_FILE = 400_000


@dataclass(frozen=True, slots=True)
class Document:
    """One text."""

    name: str
    """Of its file. What is made of one file has one name, so that it is held out together."""
    kind: str
    """`topic`, `docstrings` or `source`."""
    text: str

    @property
    def is_held_out(self) -> bool:
        """Whether training must not see it: by the hash of its name."""
        return hashlib.sha256(self.name.encode()).digest()[0] % HELD_OUT == 0


def documents() -> list[Document]:
    """All texts, in an order that depends on their names alone."""
    found = [
        Document(f"topics/{name}", "topic", text.strip() + "\n")
        for name, text in sorted(pydoc_data.topics.topics.items())
    ]
    for path in sorted(LIBRARY.rglob("*.py")):
        name = path.relative_to(LIBRARY)
        if TABLES.intersection(name.parts) or path.stat().st_size > LARGEST_FILE:
            continue
        text = path.read_text(encoding="utf-8", errors="replace").replace("\x0c", "")
        found.append(Document(name.as_posix(), "source", text))
        prose = "\n\n".join(_docstrings(text))
        if prose:
            found.append(Document(name.as_posix(), "docstrings", prose + "\n"))
    return found


def digest(texts: list[Document]) -> str:
    """sha256 of all names and texts: another Python has other ones."""
    total = hashlib.sha256()
    for document in texts:
        total.update(f"{document.name}\0{document.kind}\0{document.text}\0".encode())
    return total.hexdigest()


def _docstrings(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text and len(text) > len("a word"):
                yield inspect.cleandoc(text).strip()
