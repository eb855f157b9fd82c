from dataclasses import replace

import pytest
from machines import DISK, GB, assert_verdict, on_disk, server

SITUATIONS_DISKS = [
    # machine, check, status, words of its detail, words of its fix
    pytest.param(
        on_disk(free=400 * GB),
        "room in home",
        "warn",
        "400.0 GB are free, expected 318.2 GB to download and 318.2 GB to reshard",
        "grokctl reshard --devices 1 --out DIR",
        id="room-for-the-download",
    ),
    pytest.param(
        on_disk(free=10 * GB),
        "room in home",
        "warn",
        "10.0 GB are free, expected 318.2 GB to download",
        "grokctl fetch --home DIR",
        id="full-disk",
    ),
    pytest.param(
        on_disk(is_writable=False, error="Read-only file system"),
        "home",
        "fail",
        "/data/grokctl cannot be written to (Read-only file system)",
        "grokctl fetch --home DIR",
        id="read-only",
    ),
    pytest.param(
        on_disk(file_system="nfs4", is_remote=True),
        "kind of home",
        "warn",
        "nfs4: on a network",
        "grokctl fetch --home DIR",
        id="nfs",
    ),
    pytest.param(
        on_disk(file_system="tmpfs"),
        "kind of home",
        "warn",
        "uses main memory",
        "grokctl fetch --home DIR",
        id="tmpfs",
    ),
    pytest.param(
        on_disk(file_system="overlay"),
        "kind of home",
        "warn",
        "deleted with the container",
        "grokctl fetch --home DIR",
        id="container",
    ),
    pytest.param(
        on_disk(file_system="vfat"),
        "kind of home",
        "fail",
        "vfat limits files to 4.3 GB: the largest released file has 3.2 GB, a device file 10.7",
        "grokctl fetch --home DIR",
        id="vfat",
    ),
    pytest.param(
        on_disk(read_rate=20e6),
        "speed of home",
        "warn",
        "takes 4.4 hours",
        "grokctl fetch --home DIR",
        id="slow-disk",
    ),
    pytest.param(
        server(disks=(DISK, replace(DISK, purpose="destination", free=GB, total=GB))),
        "room in destination",
        "warn",
        "1.0 GB are free, expected 318.2 GB to download",
        "grokctl fetch --to DIR",
        id="full-destination",
    ),
    pytest.param(
        server(disks=(replace(DISK, free=330 * GB), replace(DISK, purpose="destination"))),
        "room in home",
        "ok",
        "330.0 GB are free, 318.2 GB to reshard fit",
        "",
        id="download-elsewhere",
    ),
    pytest.param(
        server(disks=(DISK, replace(DISK, purpose="destination", is_writable=False))),
        "destination",
        "fail",
        "cannot be written to",
        "grokctl fetch --to DIR",
        id="read-only-destination",
    ),
]


@pytest.mark.parametrize(("machine", "name", "status", "detail", "fix"), SITUATIONS_DISKS)
def test_every_situation_of_disks_has_its_verdict_and_its_fix(machine, name, status, detail, fix):
    assert_verdict(machine, name, status, detail, fix)
