"""lm-evaluation-harness, unchanged, against the trained miniature; `make clients` installs it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from places import PROJECT
from serving import small_engine

from grokctl.checkpoint.release import open_release
from grokctl.checkpoint.trained import TRAINED
from grokctl.inference.generation import PromptOutput, PromptScores, Request
from grokctl.inference.stream import Stream
from grokctl.model.sampling import Sampling

CLIENTS = Path(os.environ.get("GROKCTL_CLIENTS", PROJECT / ".venv-clients")) / "bin"
TASKS = Path(__file__).parent / "tasks"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def release():
    return open_release(TRAINED)


@pytest.fixture(scope="module")
def engine(release):
    return small_engine(release)


def ran(tmp_path, name, *arguments):
    """Run a client of the environment for clients, which reaches nothing but this machine."""
    program = CLIENTS / name
    if not program.exists():
        pytest.skip(f"no {name}: make clients")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment = {**kept, **OFFLINE, "HF_HOME": str(tmp_path), "OPENAI_API_KEY": "none"}
    done = subprocess.run(
        [program, *map(str, arguments)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=850,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def evaluated(tmp_path, running, output):
    """Results and samples of the three tasks."""
    model = (
        f"model=miniature,base_url={running.url}/v1/completions,tokenizer_backend=remote,"
        "max_length=512,num_concurrent=2,timeout=300"
    )
    tasks = "words_choice,words_open,words_rolling"
    flags = ("--model", "local-completions", "--model_args", model, "--tasks", tasks)
    flags += ("--include_path", TASKS, "--batch_size", 2, "--log_samples", "--output_path", output)
    ran(tmp_path, "lm_eval", *flags)
    (results,) = output.rglob("results_*.json")
    samples = {
        task: [
            json.loads(line)
            for path in output.rglob(f"samples_{task}_*.jsonl")
            for line in path.read_text().splitlines()
        ]
        for task in tasks.split(",")
    }
    return json.loads(results.read_text())["results"], samples


def logprobs_of(engine, ids):
    """Of each token after the first, by the engine itself."""
    request = Request(
        prompt=tuple(ids), sampling=Sampling(), max_tokens=0, of_prompt=PromptOutput.SCORES
    )
    events = list(Stream(engine.scheduler, request).events())
    return [
        float(value)
        for event in events
        if isinstance(event, PromptScores)
        for value in event.logprobs
    ]


def test_an_evaluation_gives_the_scores_of_the_engine_also_from_kept_prefixes(
    tmp_path, running, engine
):
    found = [evaluated(tmp_path, running, tmp_path / f"run{number}") for number in range(2)]

    (results, samples), (again, _) = found
    assert again == results
    assert results["words_choice"]["acc,none"] == 1  # a third, by chance
    encode = engine.tokenizer.encode
    checked = 0
    for sample in samples["words_choice"]:
        for choice, ((response,),) in zip(
            sample["doc"]["choices"], zip(sample["resps"], strict=True), strict=True
        ):
            whole, context = encode(sample["doc"]["text"] + choice), encode(sample["doc"]["text"])
            expected = sum(logprobs_of(engine, whole)[len(context) - 1 :])
            assert float(response[0]) == pytest.approx(expected, abs=1e-4)
            checked += 1
    assert checked == 24
