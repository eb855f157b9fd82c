import os

from damaging import DOWN, GATE, NORM, PIECE, flip, found

from grokctl.errors import Reason
from grokctl.verify import verify


def test_a_quick_look_proves_nothing(root):
    verdict, is_written = verify(root, quick=True), (root / ".grokctl/receipt.json").exists()
    whole = verify(root)

    assert verdict.damage == ()
    assert verdict.verified is None
    assert verdict.hashed == 0
    assert (verdict.files, verdict.nbytes) == (whole.files, whole.nbytes)
    assert not is_written


def test_a_quick_look_sees_structure_and_no_content(root):
    flip(root / DOWN, 2 * PIECE)
    os.truncate(root / GATE, 1000)
    (root / NORM).unlink()

    damage = found(verify(root, quick=True))

    assert {name: item.reason for name, item in damage.items()} == {
        GATE: Reason.SHORT,
        NORM: Reason.MISSING,
    }
