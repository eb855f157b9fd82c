import os
from collections.abc import Callable

import pytest
from damaging import DOWN, PIECE, UP, flip, flip_unseen, found

from grokctl.checkpoint.receipt import read_receipt
from grokctl.events import Advanced, Noted, Stage, Started
from grokctl.verify import verify


def test_any_number_of_threads_finds_the_same(root):
    for offset in range(0, 20 * PIECE, 3 * PIECE):
        flip(root / "ckpt-0/tensor00000_000" if offset % 2 else root / DOWN, offset % 150_000)
    os.truncate(root / UP, 70_000)

    verdicts = [verify(root, jobs=jobs, rehash=True) for jobs in (1, 4, None)]

    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert len(verdicts[0].damage) >= 3


def test_progress_is_in_bytes_never_backwards_and_complete(seeded):
    events = []

    verify(seeded.root, observe=events.append)

    done = [
        event.done
        for event in events
        if isinstance(event, Advanced) and event.stage is Stage.VERIFY
    ]
    assert done == sorted(done)
    assert done[-1] == seeded.metainfo.total
    assert Started(stage=Stage.VERIFY, total=seeded.metainfo.total) in events


def interrupted_at(share: float) -> Callable[[object], None]:
    total = 0

    def interrupt(event):
        nonlocal total
        if isinstance(event, Started) and event.stage is Stage.VERIFY:
            total = event.total
        is_over = isinstance(event, Advanced) and event.stage is Stage.VERIFY
        if is_over and event.done > share * total:
            raise KeyboardInterrupt

    return interrupt


def test_a_verification_that_is_interrupted_at_once_leaves_no_proof(root):
    with pytest.raises(KeyboardInterrupt):
        verify(root, observe=interrupted_at(0))

    assert read_receipt(root) is None


def test_an_interrupted_verification_goes_on_where_it_stopped(seeded):
    with pytest.raises(KeyboardInterrupt):
        verify(seeded.root, jobs=1, observe=interrupted_at(0.5))
    first = read_receipt(seeded.root)

    again = verify(seeded.root)

    assert 0 < len(first.stamps) < len(seeded.files())
    assert again.spared == len(first.stamps)
    assert again.hashed <= 0.5 * seeded.metainfo.total + 9 * PIECE  # the largest file
    assert again.verified is not None
    assert verify(seeded.root).hashed == 0


def test_what_an_interrupted_verification_did_not_hash_is_not_proven(seeded):
    flip(seeded.root / "ckpt-0/tensor00013_000", -1 + seeded.files()["ckpt-0/tensor00013_000"][1])
    with pytest.raises(KeyboardInterrupt):
        verify(seeded.root, jobs=1, observe=interrupted_at(0.5))

    assert set(found(verify(seeded.root))) == {"ckpt-0/tensor00013_000"}


def test_an_interrupted_rehash_takes_back_what_it_did_not_prove(root):
    verify(root)
    flip_unseen(root / DOWN, 2 * PIECE)
    with pytest.raises(KeyboardInterrupt):
        verify(root, rehash=True, jobs=1, observe=interrupted_at(0.4))

    assert set(found(verify(root))) == {DOWN}


def test_a_receipt_tells_when_each_file_was_proven(seeded, monkeypatch):
    monkeypatch.setattr("grokctl.integrity.content_check.now", lambda: "2024-03-17T12:00:00Z")
    verify(seeded.root)
    monkeypatch.setattr("grokctl.integrity.content_check.now", lambda: "2025-01-01T00:00:00Z")
    os.utime(seeded.root / DOWN, ns=(1, 1))

    again = verify(seeded.root)

    receipt = read_receipt(seeded.root)
    assert receipt == again.verified.receipt
    assert again.since == receipt.since == receipt.proven_at(UP) == "2024-03-17T12:00:00Z"
    assert receipt.verified_at == receipt.proven_at(DOWN) == "2025-01-01T00:00:00Z"


def test_a_receipt_that_cannot_be_kept_is_no_reason_to_stop(root):
    (root / ".grokctl/receipt.json").mkdir(parents=True)
    events = []

    verdict = verify(root, observe=events.append)

    assert verdict.verified is not None
    assert any(isinstance(e, Noted) and "receipt: cannot be written" in e.message for e in events)
