"""What a fetch leaves for the next one."""

import os

import pytest
from users import mode_of

from grokctl.transfer.destination import save_resume_data, take_resume_data


@pytest.mark.parametrize("is_final", [False, True])
@pytest.mark.parametrize("before", [None, 0o644])
def test_trackers_and_peers_are_read_by_nobody_else(tmp_path, is_final, before):
    (tmp_path / ".grokctl").mkdir()
    path = tmp_path / ".grokctl" / ("resume" if is_final else "resume.begun")
    if before is not None:  # by an earlier version
        path.touch(before)
    umask = os.umask(0)
    try:
        save_resume_data(tmp_path, b"passkey", is_final=is_final)
    finally:
        os.umask(umask)

    assert mode_of(path) == 0o600
    assert take_resume_data(tmp_path) == (b"passkey", is_final)
