"""File systems for the length of a test, where this user may mount."""

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
