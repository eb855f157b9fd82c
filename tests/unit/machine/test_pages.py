"""How mapped files lie in memory is read from /proc, whatever the paths are."""

import mmap
import os

from grokctl.machine.memory import pages_of_files

SMAPS = """\
7f0000000000-7f0000800000 r--s 00000000 fe:00 17      /a home/device-00-of-01.safetensors
Size:               8192 kB
Rss:                8192 kB
FilePmdMapped:      6144 kB
VmFlags: rd sh
7f0000700000-7f0000800000 rw-p 00000000 00:00 0
Rss:                1024 kB
FilePmdMapped:         0 kB
VmFlags: rd
7f0000800000-7f0000900000 r--s 00000000 fe:00 18      /a home/other.bin
Rss:                1024 kB
FilePmdMapped:      1024 kB
VmFlags: rd mr mw me ms sd
7f0000a00000-7f0000c00000 r--s 00000000 fe:00 19      /b/device-01-of-01.safetensors
Rss:                2048 kB
FilePmdMapped:      garbage
"""


def test_only_the_named_files_count(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/smaps").write_text(SMAPS)

    assert pages_of_files(".safetensors", tmp_path) == (10 * 2**20, 6 * 2**20)
    assert pages_of_files(".bin", tmp_path) == (2**20, 2**20)
    assert pages_of_files(".gguf", tmp_path) == (0, 0)
    assert pages_of_files(".safetensors", tmp_path / "nowhere") == (0, 0)


def test_what_is_touched_counts(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"1" * 2**22)
    handle = os.open(path, os.O_RDONLY)
    with mmap.mmap(handle, 0, access=mmap.ACCESS_READ) as memory:
        before = pages_of_files("mine.safetensors")[0]
        assert sum(memory[:: mmap.PAGESIZE]) > 0

        nbytes, huge = pages_of_files("mine.safetensors")
    os.close(handle)

    assert (before, nbytes) == (0, 2**22)
    assert 0 <= huge <= nbytes
