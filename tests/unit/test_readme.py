import re

import pytest
from places import PROJECT

from grokctl.model.precision import Precision
from grokctl.planning.plans import Plan, hardware_for, plans

README = PROJECT / "README.md"
ROW = re.compile(r"\| (?:(\d+) x )?(\d+) GB(?: of RAM)? \| ([\d.,]+ GB \| [^|]*=.*) \|")
ROWS = [match.groups() for line in README.read_text().splitlines() if (match := ROW.match(line))]


def test_the_hardware_table_is_there():
    assert len(ROWS) == 8


@pytest.mark.parametrize(("devices", "memory", "said"), ROWS)
def test_the_hardware_table_says_what_doctor_computes(devices, memory, said):
    size = int(memory) * 10**9
    hardware = (
        hardware_for(devices=int(devices), memory=size)
        if devices
        else hardware_for(accelerator="cpu", memory=size)
    )
    found = {
        plan.precision: plan
        for plan in plans(hardware)
        if (plan.mesh.size, plan.mesh.expert) == (int(devices or 1), 1)
    }
    int8, int4 = found[Precision.INT8], found[Precision.INT4]
    needs = int8.needs

    parts = " + ".join(map(gigabytes, (needs.weights, needs.cache, needs.workspace)))
    assert said == " | ".join(
        (
            f"{gigabytes(int8.memory)} GB",
            f"{parts} = {gigabytes(needs.total)} GB",
            verdict(int8),
            f"{gigabytes(int4.needs.total)} GB",
            verdict(int4),
        )
    )


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.1f}"


def verdict(plan: Plan) -> str:
    """Also what is left, where that is little: it is untested."""
    if not plan.fits:
        return f"lacks {gigabytes(plan.missing)} GB"
    left = plan.memory - plan.needs.total
    return f"fits, {gigabytes(left)} GB left" if left < plan.memory / 10 else "fits"
