"""Variables that a report lists, and those that it hides."""

import jax
import pytest

from grokctl.diagnosis.redaction import GONE, Redaction
from grokctl.machine.environment import _SECRET, PUBLIC, surroundings


def test_every_flag_of_jax_is_listed_whatever_its_name():
    flags = {name.upper() for name in jax.config.values if name.startswith("jax_")}

    assert {name for name in flags if _SECRET.search(name)} <= PUBLIC
    assert surroundings(dict.fromkeys(flags, "1")).variables.keys() == flags


@pytest.mark.parametrize("name", ["GROKCTL_SECRET", "JAX_API_TOKEN", "NCCL_PASSWORD", "HF_TOKEN"])
def test_a_secret_of_the_users_own_is_not(name):
    assert surroundings({name: "opensesame"}).variables == {}


def test_the_address_of_the_hub_is_listed_without_its_login():
    listed = surroundings({"HF_ENDPOINT": "https://me:opensesame@hub.example"}).variables

    assert listed == {"HF_ENDPOINT": "https://hub.example"}


def test_a_report_shows_the_values_of_flags_and_hides_those_of_secrets(tmp_path):
    redact = Redaction.here(tmp_path)

    assert {redact.variable(name, "true") for name in PUBLIC} == {"true"}
    assert redact.variable("JAX_API_KEY", "true") == GONE
