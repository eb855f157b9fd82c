"""What processes learn of each other, with a store in place of JAX's."""

import json
from types import SimpleNamespace

import pytest

from grokctl.cli.context import followed
from grokctl.cluster.exchange import Exchange
from grokctl.cluster.launcher import Launch
from grokctl.screen.console import Console
from grokctl.system import machine_id


class Store(dict):
    """As much of JAX's key-value store as an exchange needs."""

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key, _within):
        return self[key]


def exchange(rank=0, count=2):
    launch = Launch(host="127.0.0.1", port=61500, count=count, rank=rank)
    made = Exchange(launch, bound_s=60, note=print)
    made._store = Store()
    return made


@pytest.mark.parametrize(
    ("others", "machines"),
    [
        pytest.param([None], 1, id="two-processes-on-one"),
        pytest.param(["elsewhere"], 2, id="one-on-each"),
        pytest.param([None, "elsewhere", "elsewhere"], 2, id="two-on-each"),
    ],
)
def test_machines_are_counted_once(others, machines):
    made = exchange(count=1 + len(others))
    for rank, other in enumerate(others, start=1):
        made._store[f"grokctl/1 machine/{rank}"] = json.dumps({"id": other or machine_id()})

    assert made.machines() == machines


@pytest.mark.parametrize(
    ("own", "is_noted"),
    [
        pytest.param(("mine", None), True, id="another"),
        pytest.param((None, 7), True, id="another-kind"),
        pytest.param(("theirs", None), False, id="the-same"),
        pytest.param((None, None), False, id="none"),
    ],
)
def test_a_rank_says_that_its_own_prompt_is_ignored(monkeypatch, capsys, own, is_noted):
    console = Console()
    console.step_back("rank 1", verbose=False)
    cluster = SimpleNamespace(rank=1, share=lambda _: {"prompt": ["theirs", None]})
    monkeypatch.setattr("grokctl.session.complete.follow", lambda *_: None)

    assert followed(console, None, cluster, own)

    said = capsys.readouterr().err
    assert said.startswith("rank 1: the prompt of this rank is ignored") is is_noted
