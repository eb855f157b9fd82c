"""Nodes of the memory are read from /sys, whatever it holds."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.machine.nodes import cores_of, nodes


def node(root, name, cores, memory="Node 0 MemTotal:       1024 kB\n"):
    folder = root / "sys/devices/system/node" / name
    folder.mkdir(parents=True)
    (folder / "cpulist").write_text(cores)
    if memory:
        (folder / "meminfo").write_text(memory)


def test_nodes_have_their_cores_and_their_memory(tmp_path):
    mine = os.sched_getaffinity(0)
    node(tmp_path, "node10", "9000-9001\n", memory="")
    node(tmp_path, "node2", ",".join(map(str, sorted(mine))) + "\n")

    two, ten = nodes(tmp_path)

    assert (two.number, two.usable, two.memory) == (2, len(mine), 2**20)
    assert (ten.number, ten.cores, ten.usable, ten.memory) == (10, "9000-9001", 0, None)


def test_what_is_no_node_with_cores_is_left_out(tmp_path):
    node(tmp_path, "node0", "")  # memory alone, as of an accelerator or of CXL
    node(tmp_path, "nodes", "0")
    node(tmp_path, "node1", "garbage")

    assert nodes(tmp_path) == ()
    assert nodes(tmp_path / "nowhere") == ()


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("0", {0}),
        ("0-2,5\n", {0, 1, 2, 5}),
        ("3-1", set()),
        ("0-99999999", set()),
        ("-1", set()),
        ("", set()),
    ],
)
def test_a_list_of_cores_is_what_the_kernel_writes(text, cores):
    assert cores_of(text) == cores


@given(st.text())
def test_no_list_is_too_odd(text):
    assert all(isinstance(core, int) for core in cores_of(text))
