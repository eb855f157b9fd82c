"""Who a process is among those of a run, as launchers and people tell it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokctl.cluster.launcher import Launch, find_launch, first_host
from grokctl.errors import UsageError

MPIRUN = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "2416246784.0;tcp://10.0.0.1,192.168.0.1:36823",
}
SRUN = {
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_JOB_ID": "5",
    "SLURM_PROCID": "1",
}
BATCH_SCRIPT = {"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}


def by_hand(coordinator="here:1234", count=2, rank=1):
    return find_launch({}, coordinator=coordinator, num_processes=count, process_id=rank)


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="nothing"),
        pytest.param(BATCH_SCRIPT, id="a batch script, which is no step"),
        pytest.param(SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, id="srun of one"),
        pytest.param(MPIRUN | {"OMPI_COMM_WORLD_SIZE": "1"}, id="mpirun of one"),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "many"}, id="no number"),
    ],
)
def test_a_process_that_nobody_put_beside_others_is_alone(environment):
    assert find_launch(environment) is None


def test_mpirun_tells_who_is_who_and_where_it_runs_itself():
    launch = find_launch(MPIRUN)

    port = 61440 + (2416246784 >> 12) % 4096
    assert launch == Launch(host="10.0.0.1", port=port, count=2, rank=1)


def test_mpirun_over_ipv6_names_an_address_in_brackets():
    uri = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fd00::1,fd00::2]:36823"}

    assert find_launch(MPIRUN | uri).address == "[fd00::1]:61441"


def test_srun_has_rank_0_on_its_first_node():
    assert find_launch(SRUN) == Launch(host="gpu007", port=61445, count=2, rank=1)


def test_mpirun_counts_inside_of_a_slurm_allocation():
    assert find_launch(SRUN | MPIRUN).host == "10.0.0.1"


@pytest.mark.parametrize("launcher", [MPIRUN, SRUN], ids=["mpirun", "srun"])
def test_the_coordinator_can_be_elsewhere(launcher):
    port = find_launch(launcher | {"JAX_COORDINATOR_PORT": "6000"})
    address = find_launch(launcher | {"JAX_COORDINATOR_ADDRESS": "there:6001"})

    assert port.port == 6000
    assert address.address == "there:6001"


def test_an_mpirun_that_does_not_say_where_rank_0_is_says_what_helps():
    newer = {name: value for name, value in MPIRUN.items() if "uri" not in name}

    with pytest.raises(UsageError) as raised:
        find_launch(newer)

    assert "JAX_COORDINATOR_ADDRESS" in raised.value.hint


@pytest.mark.parametrize("told", [None, "", "-1", "2", "1\n", "one", "99999999999999999999"])
@pytest.mark.parametrize(
    ("launcher", "name"), [(MPIRUN, "OMPI_COMM_WORLD_RANK"), (SRUN, "SLURM_PROCID")]
)
def test_who_is_not_told_which_one_he_is_is_no_second_rank_0(launcher, name, told):
    environment = {key: value for key, value in launcher.items() if key != name}

    with pytest.raises(UsageError, match=f"{name} .*: expected 0 to 1"):
        find_launch(environment if told is None else environment | {name: told})


@pytest.mark.parametrize("port", ["0", "-1", "65536", "999999999", "6000\n", "http"])
@pytest.mark.parametrize("launcher", [MPIRUN, SRUN], ids=["mpirun", "srun"])
def test_what_is_no_port_is_refused_with_one_that_is(launcher, port):
    with pytest.raises(UsageError, match="JAX_COORDINATOR_PORT") as raised:
        find_launch(launcher | {"JAX_COORDINATOR_PORT": port})

    assert raised.value.hint == "export JAX_COORDINATOR_PORT=61500"


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(MPIRUN | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://\n:5"}, id="mpirun"),
        pytest.param(MPIRUN | {"OMPI_MCA_orte_hnp_uri": f"{'9' * 5000}.0;tcp://a:5"}, id="huge"),
        pytest.param(SRUN | {"SLURM_STEP_NODELIST": "\n"}, id="srun"),
        pytest.param(SRUN | {"SLURM_STEP_NODELIST": " n1"}, id="space"),
    ],
)
def test_what_is_no_name_of_a_host_is_refused(changed):
    with pytest.raises(UsageError, match=r"the address of rank 0|the nodes of this run"):
        find_launch(changed)


def test_a_person_tells_more_than_a_launcher():
    launch = find_launch(SRUN, coordinator="a.example:7000", num_processes=4, process_id=3)

    assert launch == Launch(host="a.example", port=7000, count=4, rank=3, is_by_hand=True)


def test_one_process_by_hand_is_alone():
    assert by_hand(count=1, rank=0) is None


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"coordinator": None}, id="no coordinator"),
        pytest.param({"count": None}, id="no number"),
        pytest.param({"rank": None}, id="no rank"),
        pytest.param({"rank": 2}, id="a rank too many"),
        pytest.param({"rank": -1}, id="negative"),
        pytest.param({"count": 0, "rank": 0}, id="nobody"),
        pytest.param({"coordinator": "here"}, id="no port"),
        pytest.param({"coordinator": "here:0"}, id="port 0"),
        pytest.param({"coordinator": "here:65536"}, id="large port"),
        pytest.param({"coordinator": "http://here:1"}, id="an address of the web"),
        pytest.param({"coordinator": "::1:7000"}, id="IPv6 without brackets"),
    ],
)
def test_what_cannot_be_meant_by_hand_is_refused_with_an_example(options):
    with pytest.raises(UsageError) as raised:
        by_hand(**options)

    assert "--coordinator HOST:PORT" in raised.value.hint


@given(
    first=st.integers(0, 999), last=st.integers(0, 999), rest=st.sampled_from(["", ",a", ",b[1-2]"])
)
def test_the_first_of_a_list_of_nodes_keeps_its_zeros(first, last, rest):
    assert first_host(f"n{first:03}{rest}") == f"n{first:03}"
    assert first_host(f"n[{first:03}-{last:03}]{rest}") == f"n{first:03}"
    assert first_host(f"n[{first:03},{last:03}]-ib{rest}") == f"n{first:03}-ib"


def test_no_nodes_are_no_first_node():
    with pytest.raises(UsageError, match="nodes"):
        first_host("")
