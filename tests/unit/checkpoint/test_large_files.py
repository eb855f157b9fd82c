"""Files that are too large for what they are: a sentence, and no memory."""

import os
import time
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest

from grokctl.checkpoint.proving import read_torrent
from grokctl.checkpoint.ready import read_manifest
from grokctl.checkpoint.receipt import (
    Receipt,
    Stamp,
    look_for_receipt,
    read_receipt,
    unread_receipt,
)
from grokctl.checkpoint.refusal import read_refusal
from grokctl.checkpoint.torrent import read_metainfo
from grokctl.checkpoint.trust import read_source
from grokctl.checkpoint.unfinished import read_unfinished
from grokctl.errors import GrokctlError
from grokctl.events import ignore
from grokctl.inference.generation import Request
from grokctl.model.config import GrokConfig
from grokctl.model.sampling import Sampling
from grokctl.model.tokenizer import Tokenizer
from grokctl.os_errors import NotAFileError, TooLargeError
from grokctl.paths import read_limited
from grokctl.resharding.partial import opened_partial
from grokctl.resharding.replaced import READY
from grokctl.resharding.writers import Journal
from grokctl.session.prompts import read_prompts
from grokctl.transfer.destination import take_resume_data
from grokctl.transfer.sources import parse_source
from grokctl.transfer.tokenizer import read_tokenizer, refuse_other

LARGE = 2**30


@contextmanager
def little_memory(most: int = 2**21):
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most


@pytest.fixture
def holes(tmp_path):
    """A way to make a file of a billion zeros that lie on no disk."""

    def make(name: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.truncate(LARGE)
        return path

    return make


def test_a_file_may_have_as_many_bytes_as_it_can_and_no_more(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)

    for most in (10, 11, LARGE):
        with little_memory():
            assert read_limited(path, most) == b"x" * 10
    with pytest.raises(TooLargeError, match="expected at most 9 bytes, found 10") as raised:
        read_limited(path, 9)
    assert raised.value.filename == str(path)


def test_a_file_that_grows_or_hides_its_size_is_read_no_further():
    with pytest.raises(TooLargeError, match="expected at most 10 bytes, found 11"):
        read_limited(Path("/proc/self/status"), 10)
    assert b"VmRSS" in read_limited(Path("/proc/self/status"), 2**20)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "it"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()

    with pytest.raises(NotAFileError):
        read_limited(path, 10)


READERS = {
    ".grokctl/source.json": lambda path: read_source(path.parents[1]),
    ".grokctl/resume": lambda path: take_resume_data(path.parents[1]),
    ".grokctl/resume.begun": lambda path: take_resume_data(path.parents[1]),
    "tokenizer.model": lambda path: Tokenizer(path, vocab_size=10),
    "grokctl.json": lambda path: read_manifest(path.parent),
    "config.json": GrokConfig.read,
    "x.torrent": read_metainfo,
    "y.torrent": read_torrent,
    "z.torrent": lambda path: parse_source(str(path)),
}


@pytest.mark.parametrize("name", READERS)
def test_a_billion_zeros_are_a_sentence_and_cost_no_memory(holes, name):
    path = holes(name)

    with little_memory(), pytest.raises(GrokctlError) as raised:
        READERS[name](path)

    said = f"{raised.value} {raised.value.hint}"
    assert path.name.removesuffix(".begun") in said
    assert "expected at most" in said
    assert "found 1,073,741,824" in said
    assert len(said) < 400


def test_a_receipt_of_a_billion_zeros_is_not_believed(holes):
    root = holes(".grokctl/receipt.json").parents[1]

    with little_memory():
        assert read_receipt(root) is None
        reason = unread_receipt(root)

    assert reason is not None
    assert "expected at most" in reason
    assert "found 1,073,741,824" in reason


@pytest.mark.parametrize(
    ("whole", "value"),
    [("[%s0]", "[],"), ('{%s"":0}', '"":[],'), ('{"files":{"x":[%s0]}}', "[],")],
    ids=["a-list", "an-object", "a-stamp"],
)
def test_a_receipt_of_a_million_values_is_not_parsed(tmp_path, whole, value):
    path = tmp_path / ".grokctl/receipt.json"
    path.parent.mkdir()
    path.write_text(whole % (value * 2**20))

    with little_memory(2**24):  # as bytes it has 6 MB, as values 60
        receipt, reason = look_for_receipt(tmp_path)

    assert receipt is None
    assert reason.endswith("found a damaged one")


@pytest.mark.parametrize("place", [".grokctl/receipt.json", ".grokctl", "."])
def test_a_receipt_that_others_can_write_is_not_even_read(tmp_path, place):
    path = tmp_path / ".grokctl/receipt.json"
    path.parent.mkdir()
    path.write_bytes(b" " * 2**23)
    (tmp_path / place).chmod(0o777)

    with little_memory(2**20):
        assert read_receipt(tmp_path) is None
        assert unread_receipt(tmp_path).endswith("can be written by others")


def test_a_receipt_of_ten_thousand_files_with_the_longest_names_is_read(tmp_path):
    names = [f"{number:05}{'x' * 250}" for number in range(10_000)]
    at = "2024-03-17T12:00:00Z"
    receipt = Receipt(
        infohash="0" * 40,
        verified_at=at,
        stamps={name: Stamp(*range(5)) for name in names},
        earlier=dict.fromkeys(names, at),
    )
    receipt.write(tmp_path)

    assert read_receipt(tmp_path) == receipt


def test_a_tokenizer_that_the_user_gives_is_refused_by_its_size(holes):
    path = holes("tokenizer.model")

    with little_memory(2**28), pytest.raises(GrokctlError, match="at most 67,108,864 bytes"):
        read_tokenizer(path, None)
    with little_memory(), pytest.raises(GrokctlError, match="exists and differs"):
        refuse_other(path.parent, b"x", path, force=False)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (".grokctl/refusal.json", read_refusal),
        (".grokctl/unfinished.json", read_unfinished),
    ],
)
def test_records_of_ours_that_are_too_large_are_none(holes, name, read):
    path = holes(name)

    with little_memory():
        assert read(path.parents[1]) is None


def test_a_journal_without_a_line_is_begun_again(holes):
    folder = holes(".out.partial/journal").parent
    folder.chmod(0o700)
    (folder / "device-00-of-01.safetensors").touch()

    with little_memory(2**26), opened_partial(folder, READY, ignore) as partial:
        journal = Journal(partial, files=1)
        journal.close()

    assert journal.entries == []


def test_a_file_of_prompts_has_a_limit_in_all(monkeypatch, tmp_path):
    monkeypatch.setattr("grokctl.session.prompts._MOST_BYTES", 100)
    path = tmp_path / "prompts.jsonl"
    request = Request(prompt=(), sampling=Sampling(temperature=0), max_tokens=1)
    line = '{"prompt": "x"}\n'
    path.write_text(line * (100 // len(line)))
    assert read_prompts(str(path), request)

    path.write_text(line * (100 // len(line) + 1))

    with pytest.raises(GrokctlError, match="longer than 100 bytes") as raised:
        read_prompts(str(path), request)
    assert raised.value.hint == f"split -C 100M {path}"


def test_a_blank_file_of_prompts_ends_soon(holes):
    path = holes("prompts.jsonl")
    request = Request(prompt=(), sampling=Sampling(temperature=0), max_tokens=1)
    began = time.thread_time()

    with little_memory(2**24), pytest.raises(GrokctlError, match="longer than 1,048,576 bytes"):
        read_prompts(str(path), request)

    assert time.thread_time() - began < 5
