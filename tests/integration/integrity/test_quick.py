import os

from damaging import DOWN, GATE, NORM, PIECE, flip, found

from grokctl.errors import Reason
from grokctl.verify import verify


def test_a_quick_look_proves_nothing(root):
    verdict = verify(root, quick=True)

    assert verdict.damage == ()
    assert verdict.verified is None
    assert verdict.hashed == 0
    assert verdict.files == 14
    assert verdict.nbytes == sum(path.stat().st_size for path in (root / "ckpt-0").iterdir())
    assert not (root / ".grokctl/receipt.json").exists()


def test_a_quick_look_sees_structure_and_no_content(root):
    flip(root / DOWN, 2 * PIECE)
    os.truncate(root / GATE, 1000)
    (root / NORM).unlink()

    damage = found(verify(root, quick=True))

    assert {name: item.reason for name, item in damage.items()} == {
        GATE: Reason.SHORT,
        NORM: Reason.MISSING,
    }
