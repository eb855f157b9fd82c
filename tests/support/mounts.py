"""File systems for the length of a test, where this user may mount."""

import os
import subprocess
from contextlib import contextmanager

import pytest


@contextmanager
def mounted(folder, *command):
    folder.mkdir(exist_ok=True)
    if subprocess.run([*command, folder], check=False, capture_output=True).returncode:
        pytest.skip("only root may mount here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def tmpfs(folder, options):
    return mounted(folder, "mount", "-t", "tmpfs", "-o", options, "tmpfs")


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@contextmanager
def dead(folder):
    """What is left of a network disk whose server is gone: whoever looks at it waits for ever."""
    folder.mkdir()
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        pytest.skip("no file systems of one's own here")
    command = ["mount", "-i", "-t", "fuse"]
    command += ["-o", f"fd={server},rootmode=40000,user_id=0,group_id=0", "none", str(folder)]
    try:
        if subprocess.run(command, check=False, capture_output=True, pass_fds=[server]).returncode:
            pytest.skip("only root may mount here")
        yield folder
    finally:
        os.close(server)  # ends the wait
        subprocess.run(["umount", "-l", folder], check=False, capture_output=True)
