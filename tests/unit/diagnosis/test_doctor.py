from machines import EIGHT, EMPTY, HERE, problems

from grokctl.doctor import doctor


def test_nothing_is_wrong_with_a_machine_that_has_everything():
    found = doctor(EIGHT, EMPTY, question=HERE)

    assert not problems(found)
    assert [group.title for group in found.groups] == [
        "accelerators",
        "processor and memory",
        "disks",
        "software",
        "surroundings",
        "network",
    ]
    assert all(group.checks for group in found.groups)
    assert found.is_here
    assert found.hardware.count == 8
