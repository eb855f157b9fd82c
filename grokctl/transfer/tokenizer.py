"""The tokenizer of a release: downloaded over https or given as a file, and checked."""

import time
from pathlib import Path
from typing import Final

from grokctl.checkpoint.release_files import read_config
from grokctl.errors import FetchError, GrokctlError, UsageError
from grokctl.model.tokenizer import Tokenizer
from grokctl.os_errors import refusal
from grokctl.paths import LARGEST_TOKENIZER, TOKENIZER, quoted, read_limited, write_atomically
from grokctl.transfer.sources import PinnedFile
from grokctl.transfer.web import Web, WebError

_LARGEST_VOCABULARY: Final = 2**24
_WITHIN_S: Final = 120.0


def has_tokenizer(root: Path) -> bool:
    """Whether a release has a tokenizer, so that it can read and write text."""
    return (root / TOKENIZER).is_file()


def fetch_tokenizer(root: Path, pinned: PinnedFile, web: Web) -> None:
    """Download a release's tokenizer.

    Raises:
        FetchError: It does not arrive within two minutes, or is not the published one.
    """
    hint = "grokctl fetch --tokenizer FILE"
    deadline = time.monotonic() + _WITHIN_S
    data = bytearray()
    try:
        with web.open_range(pinned.url, 0, pinned.nbytes, total=pinned.nbytes) as chunks:
            for chunk in chunks:
                data += chunk
                if time.monotonic() > deadline:
                    break
    except WebError as error:
        raise FetchError(f"{pinned.url}: {error}", hint) from error
    if len(data) < pinned.nbytes:
        raise FetchError(f"{pinned.url}: download took more than {_WITHIN_S:.0f} s", hint)
    pinned.refuse_other(data, pinned.url)
    write_atomically(root / TOKENIZER, bytes(data))


def read_tokenizer(path: Path, pinned: PinnedFile | None) -> bytes:
    """Read a tokenizer that the user gives.

    Raises:
        UsageError: It cannot be read.
        FetchError: It is not the pinned one or, without a pinned one, not a sentencepiece model.
    """
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_TOKENIZER + 1)
    except OSError as error:
        raise refusal(error, path) from error
    if len(data) > LARGEST_TOKENIZER:
        raise UsageError(
            f"{path}: expected a tokenizer of at most {LARGEST_TOKENIZER:,} bytes, found more"
        )
    if pinned is not None:
        pinned.refuse_other(data, str(path))
    else:
        _refuse_unfit(data, path, vocab_size=_LARGEST_VOCABULARY)
    return data


def put_tokenizer(root: Path, data: bytes, given: Path, *, force: bool) -> None:
    """Write the user's tokenizer into a release whose files have been downloaded.

    Args:
        root: The release.
        data: From `read_tokenizer`.
        given: The file that it was read from.
        force: Whether to replace a different tokenizer.

    Raises:
        UsageError: The release has a different tokenizer.
        FetchError: It has more pieces than the model's vocabulary.
    """
    _refuse_unfit(data, given, vocab_size=read_config(root).vocab_size)
    refuse_other(root, data, given, force=force)
    write_atomically(root / TOKENIZER, data)


def refuse_other(root: Path, data: bytes, given: Path, *, force: bool) -> None:
    """Refuse to replace a different tokenizer.

    Raises:
        UsageError: The release has a different tokenizer, and `force` is not set.
    """
    place = root / TOKENIZER
    if not force and place.is_file() and _differs(place, data):
        raise UsageError(
            f"{place}: exists and differs from {given}", f"ls -l {quoted(place)} {quoted(given)}"
        )


def _differs(place: Path, data: bytes) -> bool:
    return place.stat().st_size != len(data) or read_limited(place, LARGEST_TOKENIZER) != data


def _refuse_unfit(data: bytes, given: Path, *, vocab_size: int) -> None:
    try:
        Tokenizer(given, vocab_size=vocab_size, data=data)
    except GrokctlError as error:
        raise FetchError(str(error)) from error
