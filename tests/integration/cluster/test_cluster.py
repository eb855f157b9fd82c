"""Two real processes of eight CPU devices as one run: under Open MPI, under Slurm, and by hand."""

import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from cuts import cut
from golden import FLOAT32_BOUND
from patching import patched
from places import DATA, PROJECT
from slurm import Slurm, find_daemon, free_ports

from grokctl.checkpoint.miniature import MINIATURE, write_miniature
from grokctl.checkpoint.ready import ReadyCheckpoint, open_ready
from grokctl.checkpoint.refusal import write_refusal
from grokctl.checkpoint.release import Release, open_release
from grokctl.cluster.channel import Channel
from grokctl.cluster.launcher import Launch
from grokctl.cluster.rendezvous import meet, open_channels
from grokctl.errors import Damage, ExitCode, PeerError, Reason
from grokctl.events import ignore
from grokctl.infer import infer
from grokctl.inference.engine import Engine
from grokctl.inference.generation import Request
from grokctl.inference.plan import EngineOptions
from grokctl.integrity.published import verify_ready
from grokctl.model.placement import MeshShape
from grokctl.model.precision import Compute
from grokctl.model.sampling import Sampling

WORDS = replace(MINIATURE, num_layers=2)
DOCUMENT = PROJECT / "docs" / "cluster.md"
SCHEMA = DATA / "kubernetes.json"
"""Of a Job and a Service of Kubernetes 1.35 in its strict form, as far as they reach."""
MESHES = ("expert=2,model=8", "model=16")
PROMPT = [3, 17, 250, 9, 77, 5]
TOKENS = 6
GREEDY = ("--temperature", 0, "--ignore-eos", "--compute", "float32")
HOT = Sampling(temperature=3.0, seed=5, presence_penalty=1.0, logit_bias=((9, 2.0),))
DRAWN = (
    *("--temperature", 3, "--seed", 5, "--top-p", 1, "--presence-penalty", 1),
    *("--logit-bias", "9=2", "--ignore-eos", "--compute", "float32"),
)
FEW = """
for name in ("_CANDIDATES", "_FEWEST_CANDIDATES"):  # so that whole rows are needed, too
    patch(f"inference.compiled_steps:{name}", lambda _: 20)
"""
SHORTEST_S = 20
"""The least that --cluster-timeout takes."""
SLACK_S = 15
"""What starting Python and JAX may take here, beside other work."""
_CALMED = ("GROKCTL_JOB_SECRET", "JAX_NUM_CPU_DEVICES", "COLUMNS", "NO_COLOR", "FORCE_COLOR")

PROGRAM = """
import json, sys
from pathlib import Path
import numpy as np
from grokctl.cluster.process_group import joined
from grokctl.events import ignore
from grokctl.interrupts import leave
from grokctl.cluster.launcher import find_launch
from grokctl.model.sampling import Sampling
from grokctl.session.job import JobRequest, open_job
from grokctl.model.precision import Compute
from grokctl.paths import Home
import os
out, *checkpoints = sys.argv[1:]

def mapped():
    found, name = {}, None
    for line in open("/proc/self/smaps"):
        first, *rest = line.split()
        if not first.endswith(":"):
            name = rest[-1].rsplit("/", 1)[-1] if rest and "device-" in rest[-1] else None
        elif name and first in ("Size:", "Rss:"):
            sizes = found.setdefault(name, {})
            sizes[first] = sizes.get(first, 0) + int(rest[0]) * 1024
    return found

with joined(
    find_launch(os.environ), bound_s=60, report=print, note=ignore, verbose=False
) as cluster:
    for number, checkpoint in enumerate(checkpoints):
        request = JobRequest(
            home=Home(Path(".")), checkpoint=checkpoint, compute=Compute.FLOAT32, context=32
        )
        job = open_job(request, cluster=cluster)
        engine = job.start(ignore)
        if cluster.rank:
            engine.follow()
        else:
            logits = np.empty((len(PROMPT), engine.config.vocab_size), np.float32)
            engine.score(PROMPT, logits_out=logits)
            sampling = Sampling(temperature=0)
            text = engine.generate(
                PROMPT, sampling=sampling, max_tokens=TOKENS, ignore_eos=True
            )
            list(text)
            np.savez(f"{out}-{number}.npz", logits=logits, ids=text.result.ids)
            cluster.release()
        Path(f"{out}-{number}-{cluster.rank}.json").write_text(json.dumps(mapped()))
leave(0)
""".replace("PROMPT", str(PROMPT)).replace("TOKENS", str(TOKENS))


def environment(**changes: str) -> dict[str, str]:
    """A process of a cluster has as many devices as it needs, and no cluster around it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _CALMED and not name.startswith(("SLURM_", "OMPI_"))
    }
    return {**kept, "JAX_PLATFORMS": "cpu", **changes}


@dataclass
class Rank:
    """A process that was started by hand, and what came of it."""

    process: "subprocess.Popen[str]"
    began: float = field(default_factory=time.monotonic)
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0

    @property
    def code(self) -> int:
        return self.process.returncode

    @property
    def error(self) -> str:
        """The one sentence that says what went wrong."""
        assert "Traceback" not in self.stderr, self.stderr
        found = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert len(found) == 1, self.stderr
        return found[0].removeprefix("error: ")

    def wait(self, timeout: float = 120) -> "Rank":
        out, err = self.process.communicate(timeout=timeout)
        self.stdout += out
        self.stderr += err
        self.seconds = time.monotonic() - self.began
        return self


@pytest.fixture
def by_hand():
    """A way to start ranks of a run, each with arguments, code and environment of its own."""
    started: list[Rank] = []
    port = free_ports(1)[0]
    address = f"127.0.0.1:{port}"

    def start(
        rank: int,
        *arguments: object,
        count: int = 2,
        code: str = "",
        terminal: int | None = None,
        **changes: str,
    ) -> Rank:
        entry = ["-c", patched(code)] if code else ["-m", "grokctl"]
        told = ("--coordinator", address, "--num-processes", count, "--process-id", rank)
        out = subprocess.PIPE if terminal is None else terminal
        process = subprocess.Popen(
            [sys.executable, *entry, *map(str, (*arguments, *told))],
            env=environment(**changes),
            stdin=subprocess.DEVNULL if terminal is None else terminal,
            stdout=out,
            stderr=out,
            text=True,
        )
        started.append(Rank(process))
        return started[-1]

    start.port = port
    yield start
    for rank in started:
        rank.process.kill()  # nothing, if it has ended
        for stream in (rank.process.stdout, rank.process.stderr):
            if stream is not None:
                stream.close()
        rank.process.wait()


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Release:
    root = tmp_path_factory.mktemp("release") / "words"
    write_miniature(root, WORDS)
    return open_release(root)


@pytest.fixture(scope="module")
def ready(release, tmp_path_factory) -> dict[str, ReadyCheckpoint]:
    """Cut for one device, and for sixteen in both ways."""
    folder = tmp_path_factory.mktemp("ready")
    return {
        mesh: cut(release, MeshShape.parse(mesh), folder / MeshShape.parse(mesh).slug)
        for mesh in ("model=1", *MESHES)
    }


@pytest.fixture(scope="module")
def parts(release, tmp_path_factory) -> list[Path]:
    """The same for two hosts that share no disk: homes with half of the files each."""
    homes = []
    for number in range(2):
        home = tmp_path_factory.mktemp(f"host-{number}")
        devices = frozenset(range(8 * number, 8 * number + 8))
        cut(release, MeshShape(2, 8), home / "ready" / "words", devices=devices)
        homes.append(home)
    return homes


@dataclass(frozen=True)
class Alone:
    """What one process computes."""

    logits: np.ndarray
    ids: list[int]
    drawn: list[int]
    """The same prompt at `HOT`."""


def compute(engine: Engine) -> Alone:
    logits = np.empty((len(PROMPT), engine.config.vocab_size), np.float32)
    engine.score(PROMPT, logits_out=logits)
    text = engine.generate(
        PROMPT, sampling=Sampling(temperature=0), max_tokens=TOKENS, ignore_eos=True
    )
    hot = engine.generate(PROMPT, sampling=HOT, max_tokens=TOKENS, ignore_eos=True)
    list(text), list(hot)
    return Alone(logits, list(text.result.ids), list(hot.result.ids))


def start_alone(ready: ReadyCheckpoint, **options: object) -> Engine:
    return infer(
        ready,
        EngineOptions(mesh=ready.mesh, compute=Compute.FLOAT32, context=32, **options),
        tokenizer=ready.tokenizer,
    )


@pytest.fixture(scope="module")
def alone(ready) -> dict[str, Alone]:
    """One device, and one process with sixteen."""
    return {mesh: compute(start_alone(checkpoint)) for mesh, checkpoint in ready.items()}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if not (find_daemon("slurmctld") and find_daemon("slurmd") and shutil.which("srun")):
        pytest.skip("Slurm is not installed: apt-get install slurmctld slurmd slurm-client")
    with Slurm(tmp_path_factory.mktemp("slurm") / "here") as here:
        yield here


@pytest.fixture(scope="module")
def mpirun() -> list[str]:
    if shutil.which("mpirun") is None:
        pytest.skip("Open MPI is not installed: apt-get install openmpi-bin")
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    return ["mpirun", *root, "-n", "2", "--oversubscribe", "--bind-to", "none"]


@pytest.fixture(params=["mpirun", "srun"])
def launched(request) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """A way to run Python in two processes of a launcher."""
    if request.param == "mpirun":
        command, around = request.getfixturevalue("mpirun"), {}
    else:
        around = request.getfixturevalue("slurm").environment
        command = ["srun", "--nodes=2", "--ntasks=2", "--kill-on-bad-exit=1"]

    def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, sys.executable, *map(str, arguments)],
            env=environment(**around),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )

    return run


# --- the same as in one process


def test_logits_tokens_and_mapped_files_of_two_processes_under_a_launcher(
    launched, ready, alone, tmp_path
):
    out = tmp_path / "out"

    done = launched("-c", PROGRAM, out, *(ready[mesh].root for mesh in MESHES))

    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    for number, mesh in enumerate(MESHES):
        with np.load(f"{out}-{number}.npz") as found:
            for expected in (alone["model=1"], alone[mesh]):
                assert np.abs(found["logits"] - expected.logits).max() <= FLOAT32_BOUND
                assert found["ids"].tolist() == expected.ids
        for rank in range(2):
            mapped = json.loads(Path(f"{out}-{number}-{rank}.json").read_text())
            own = {layout.name for layout in ready[mesh].layouts[8 * rank : 8 * rank + 8]}
            here = {name: each for name, each in mapped.items() if name in own}
            assert set(here) == own
            # those of the mesh before have the same names
            assert set(mapped) == own
            for name, sizes in here.items():
                room = sum(
                    -(-(each.root / name).stat().st_size // 4096) * 4096
                    for each in (ready[mesh] for mesh in MESHES[: number + 1])
                )
                assert 0 < sizes["Rss:"] <= sizes["Size:"] <= room


def test_rank_0_alone_talks_and_each_host_has_only_its_own_files(by_hand, parts, alone, tmp_path):
    parts = [parts[0], shutil.copytree(parts[1], tmp_path / "host-1")]
    damage = Damage("device-09-of-16.safetensors", Reason.ALTERED)
    write_refusal(parts[1] / "ready" / "words", [damage])  # rank 0 says it
    prompt = ("--token-ids", ",".join(map(str, PROMPT)), "-n", TOKENS, *DRAWN)
    arguments = ("run", *prompt, "--json", "--context", 32)

    secret = secrets.token_hex()
    first, second = (
        by_hand(
            rank, *arguments, code=FEW, GROKCTL_HOME=str(parts[rank]), GROKCTL_JOB_SECRET=secret
        )
        for rank in range(2)
    )

    assert (first.wait().code, second.wait().code) == (0, 0), first.stderr + second.stderr
    assert "no job secret" not in first.stderr
    notes = [
        event["message"]
        for event in map(json.loads, first.stderr.splitlines())
        if event["event"] == "noted"
    ]
    (said,) = [note for note in notes if note.startswith("rank")]
    assert said.startswith("rank 1: words: verify found 1 damaged file on ")
    assert notes.count("words: not proven: made from a release that was not proven") == 1
    (line,) = first.stdout.splitlines()
    assert json.loads(line)["tokens"] == alone["model=1"].drawn
    assert (second.stdout, second.stderr) == ("", "")
    for home in parts:
        part = open_ready(home / "ready" / "words")
        verdict = verify_ready(part, rehash=True)
        assert verdict.damage == ()
        names = sorted(path.name for path in part.root.glob("device-*"))
        assert len(names) == 8
        assert verdict.hashed == sum((part.root / file.name).stat().st_size for file in part.files)


@pytest.mark.slow
def test_many_prompts_from_stdin_of_rank_0_are_answered_under_mpirun(mpirun, ready):
    root = ready[MESHES[0]].root
    prompts = [[3 + number] for number in range(3)]
    lines = "".join(
        json.dumps({"token_ids": ids, "max_tokens": 3, "seed": 4}) + "\n" for ids in prompts
    )
    requests = [
        Request(
            prompt=tuple(ids),
            sampling=Sampling(temperature=0.7, top_p=0.95, seed=4),
            max_tokens=3,
            ignore_eos=True,
        )
        for ids in prompts
    ]
    expected = dict(start_alone(ready["model=1"], slots=2).generate_many(requests))

    options = ("--batch", 2, "--ignore-eos", "--compute", "float32", "--context", 32)
    arguments = ("-m", "grokctl", "run", root, "--prompts-file", "-", *options)
    done = subprocess.run(
        [*mpirun, sys.executable, *map(str, arguments)],
        env=environment(),
        input=lines,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {each["index"]: each["tokens"] for each in found} == {
        index: list(generation.ids) for index, generation in expected.items()
    }


def test_a_release_is_scored_over_the_usual_mesh(by_hand, release, alone, tmp_path):
    logits = tmp_path / "logits.npy"
    ids = ",".join(map(str, PROMPT))
    scoring = ("score", release.root, "--token-ids", ids, "--compute", "float32")
    scoring = (*scoring, "--context", 32, "--logits", logits, "-v")

    ranks = [by_hand(rank, *scoring).wait if rank else by_hand(0, *scoring) for rank in range(2)]
    second = ranks[1]()
    first = ranks[0].wait()

    assert (first.code, second.code) == (0, 0), first.stderr
    assert np.abs(np.load(logits) - alone["model=1"].logits).max() <= FLOAT32_BOUND
    assert MESHES[0] in first.stderr
    assert "no job secret: " in first.stderr
    assert "rank 1: " in second.stderr
    assert second.stdout == ""


@pytest.mark.slow
def test_bench_measures_both_and_rank_0_says_it(by_hand, ready):
    measuring = ("bench", ready[MESHES[0]].root, "--prompt-tokens", 4, "--batch", 2, "-n", 3)
    measuring = (*measuring, "--context", 32, "--json")

    first, second = (rank.wait() for rank in [by_hand(rank, *measuring) for rank in range(2)])

    assert (first.code, second.code) == (0, 0), first.stderr
    (row,) = json.loads(first.stdout)["rows"]
    assert row["batch"] == 2
    assert row["decode_tokens_per_s"] > 0
    assert second.stdout == ""


def test_a_person_at_the_terminal_of_rank_0_uses_both(by_hand, ready):
    leader, follower = os.openpty()
    arguments = ("run", ready[MESHES[0]].root, "-n", 2, *GREEDY, "--context", 32)
    first = by_hand(0, *arguments, terminal=follower, TERM="dumb")
    second = by_hand(1, *arguments)
    os.close(follower)

    def read_until(mark: str) -> str:
        said = ""
        while mark not in said:
            said += os.read(leader, 65536).decode(errors="replace")
        return said

    read_until("\n> ")
    os.write(leader, b"the\r")
    once = read_until("\n> ")
    os.write(leader, b"/retry\r")
    again = read_until("\n> ")
    os.write(leader, b"/quit\r")

    assert second.wait().code == 0
    assert first.process.wait(timeout=SLACK_S) == 0
    assert (second.stdout, second.stderr) == ("", "")
    os.close(leader)
    engine = start_alone(ready["model=1"])
    text = engine.generate(
        engine.plan.encode("the"),
        sampling=Sampling(temperature=0),
        max_tokens=2,
        ignore_eos=True,
    )
    list(text)
    assert f"the{text.result.text}" in once
    assert f"the{text.result.text}" in again


def test_a_terminal_is_given_back_as_it_was_when_another_rank_is_lost(by_hand, ready):
    leader, follower = os.openpty()
    before = termios.tcgetattr(follower)
    arguments = ("run", ready[MESHES[0]].root, "-n", 2, *GREEDY, "--context", 32)
    first = by_hand(0, *arguments, terminal=follower, TERM="xterm")
    second = by_hand(1, *arguments)
    said = b""
    while not said.endswith(b"> ") or termios.tcgetattr(follower) == before:
        if select.select([leader], [], [], 0.1)[0]:
            said += os.read(leader, 65536)

    second.process.send_signal(signal.SIGTERM)

    assert first.process.wait(timeout=SLACK_S) == ExitCode.PEER
    assert termios.tcgetattr(follower) == before
    assert b"\r\n" in os.read(leader, 65536).partition(b"error: ")[0]
    os.close(leader)
    os.close(follower)


# --- recipes


def recipe(kind: str) -> str:
    """The only block of its kind in the document."""
    (text,) = re.findall(rf"```{kind}\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    return text


@pytest.fixture
def as_documented(ready, tmp_path) -> dict[str, str]:
    """The checkpoint that the document names, and grokctl on the path."""
    home = tmp_path / "home"
    (home / "ready").mkdir(parents=True)
    (home / "ready" / "grok-1-int8-2x8").symlink_to(ready[MESHES[0]].root)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment(GROKCTL_HOME=str(home), PATH=path) | (root if os.geteuid() == 0 else {})


def assert_completed(said: str) -> None:
    """One text, and one line about it."""
    assert "error" not in said
    assert said.count("B/token · seed ") == 1


def test_the_sbatch_file_of_the_document_runs(slurm, as_documented, tmp_path):
    script = tmp_path / "grokctl.sbatch"
    # there are none here, and Slurm would refuse
    script.write_text(recipe("sh").replace("#SBATCH --gpus-per-node=8\n", ""))
    around = as_documented | slurm.environment

    done = subprocess.run(
        ["sbatch", "--parsable", str(script)],
        env=around,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    job = done.stdout.strip()
    until = time.monotonic() + 120
    while "JobState=COMPLETED" not in (state := slurm.ask("scontrol", "show", "job", job)):
        assert "JobState=FAILED" not in state, (tmp_path / f"grokctl-{job}.txt").read_text()
        assert time.monotonic() < until, state
        time.sleep(0.2)

    assert_completed((tmp_path / f"grokctl-{job}.txt").read_text())


@pytest.mark.usefixtures("mpirun")
def test_the_mpirun_line_of_the_document_runs(as_documented):
    line = recipe("console").replace("node1,node2", "localhost:2")

    done = subprocess.run(
        ["sh", "-c", line],
        env=as_documented,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert_completed(done.stderr)


def test_the_objects_for_kubernetes_are_what_its_schema_allows():
    definitions = json.loads(SCHEMA.read_text())["$defs"]
    documents = list(yaml.safe_load_all(recipe("yaml")))

    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        schema = {"$ref": f"#/$defs/{document['kind']}", "$defs": definitions}
        jsonschema.validate(document, schema)
    document["spec"]["completionMod"] = document["spec"].pop("completionMode")
    with pytest.raises(jsonschema.ValidationError, match="completionMod"):
        jsonschema.validate(document, schema)


# --- meeting


def come(ranks: list[int], *, count: int, within_s: float, port: int) -> list[str]:
    """What each of some ranks says, or nothing where it may go on."""

    def try_to_meet(rank: int) -> str:
        launch = Launch(host="127.0.0.1", port=port, count=count, rank=rank)
        try:
            met = meet(launch, None, within_s=within_s, note=ignore)
        except PeerError as error:
            return str(error)
        for channel in met.services + met.orders:
            channel.close()
        return ""

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(try_to_meet, ranks))


def reach(port: int, said: bytes) -> socket.socket:
    """A connection to rank 0, which may not be there yet."""
    until = time.monotonic() + 4 * SLACK_S
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", port), timeout=SLACK_S)
        except ConnectionRefusedError:
            assert time.monotonic() < until
            time.sleep(0.01)
        else:
            connection.sendall(said)
            return connection


@contextmanager
def seat(port: int, *, count: int) -> Iterator[tuple[Channel, Channel]]:
    """The connections of a rank 1 that is no more than these, to a rank 0 that may not be there."""
    reach(port, b"").close()
    launch = Launch(host="127.0.0.1", port=port, count=count, rank=1)
    channels = open_channels(launch, None, until=time.monotonic() + SLACK_S)
    try:
        yield channels
    finally:
        for channel in channels:
            channel.close()


def test_all_who_come_go_on_whatever_strangers_say():
    port = free_ports(1)[0]

    with ThreadPoolExecutor(1) as pool, ExitStack() as stack:
        first = pool.submit(come, [0, 1, 2], count=4, within_s=SLACK_S, port=port)
        said = [b"", b"GET / HTTP/1.1\r\n\r\n", b"grokctl 3", b"grokctl 9 of 4\n", b"\xff" * 9999]
        for words in said * 20:
            stack.enter_context(closing(reach(port, words)))
        assert come([3], count=4, within_s=SLACK_S, port=port) == [""]
        assert first.result() == ["", "", ""]


def test_everybody_who_has_come_says_who_has_not():
    port = free_ports(1)[0]

    said = come([0, 2], count=4, within_s=2, port=port)

    assert said == [f"ranks 1, 3: have not come to 127.0.0.1:{port} within 2 s"] * 2


def test_who_cannot_reach_rank_0_says_why():
    port = free_ports(1)[0]

    (said,) = come([1], count=2, within_s=1, port=port)

    reason = "(Connection refused)"
    assert said == f"rank 1: rank 0 cannot be reached at 127.0.0.1:{port} within 1 s {reason}"


def test_a_rank_that_has_come_twice_is_named():
    said = come([0, 1, 1], count=3, within_s=SLACK_S, port=free_ports(1)[0])

    assert said == ["rank 1 has come twice"] * 3


def test_a_rank_that_is_lost_while_others_are_waited_for_is_named_at_once():
    port = free_ports(1)[0]

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(come, [0], count=4, within_s=SHORTEST_S, port=port)
        with seat(port, count=4):
            pass
        said = first.result()

    assert said == ["rank 1 was lost before all had come"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n", "something else answers", id="a web server"),
        pytest.param(b"\0" * 9999, "something else answers", id="garbage"),
        pytest.param(b"grokctl " + b"x" * 9999, "something else answers", id="without an end"),
        pytest.param(b"", "within 1 s (it does not answer)", id="silence"),
    ],
)
def test_what_listens_in_place_of_rank_0_is_not_taken_for_it(answer, said):
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        port = listener.getsockname()[1]
        asking = pool.submit(come, [1], count=2, within_s=1, port=port)
        connection, _ = listener.accept()
        with connection:
            connection.sendall(answer)
            (found,) = asking.result()

    assert found.startswith(f"rank 1: rank 0 cannot be reached at 127.0.0.1:{port} ")
    assert said in found


def test_ranks_that_count_differently_say_both(by_hand, ready):
    arguments = ("run", ready["model=16"].root, "--token-ids", 1)

    first, second = by_hand(0, *arguments), by_hand(1, *arguments, count=4)

    for rank in (first.wait(), second.wait()):
        assert rank.code == ExitCode.PEER
        assert rank.error == "number of processes: rank 0 has 2, rank 1 has 4"


def test_as_many_processes_as_cannot_share_a_mesh_wait_for_nobody(by_hand, ready):
    alone = by_hand(0, "run", ready["model=16"].root, "--token-ids", 1, count=3).wait()

    assert alone.code == ExitCode.PLACEMENT
    assert alone.error == "3 processes cannot share a mesh, possible are 2, 4, 8, 16"


def test_ctrl_c_at_rank_0_is_told_to_those_who_wait_with_it(by_hand, ready):
    first = by_hand(0, "run", ready["model=16"].root, "--token-ids", 1, count=4)
    with seat(by_hand.port, count=4) as channels:
        assert "no job secret" in first.process.stderr.readline()
        assert "waiting for 3 more of 4" in first.process.stderr.readline()

        first.process.send_signal(signal.SIGINT)

        assert [channel.receive() for channel in channels] == [b"rank 0: was interrupted"] * 2
    assert first.wait(timeout=SLACK_S).code == ExitCode.INTERRUPTED


# --- what ends a run


def start_decoding(by_hand, ready) -> tuple[Rank, Rank]:
    """Two ranks in the middle of a text that would be long."""
    prompt = ("--token-ids", 3, "-n", 250, *GREEDY, "--cluster-timeout", SHORTEST_S)
    arguments = ("run", ready[MESHES[0]].root, *prompt)
    first, second = (by_hand(rank, *arguments, PYTHONUNBUFFERED="1") for rank in range(2))
    said = first.process.stdout.read(12)  # several tokens: steps follow each other now
    assert said, first.wait().stderr + second.wait().stderr
    with pytest.raises(ConnectionRefusedError):  # JAX's service is at no port
        socket.create_connection(("127.0.0.1", by_hand.port))
    return first, second


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_while_decoding_ends_the_other_and_is_named(by_hand, ready, victim):
    ranks = start_decoding(by_hand, ready)

    ranks[victim].process.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    other = ranks[1 - victim].wait(timeout=SHORTEST_S + SLACK_S)

    assert time.monotonic() - killed < SHORTEST_S
    assert other.code == ExitCode.PEER
    assert other.error.startswith(f"rank {victim} was lost")


@pytest.mark.slow
def test_a_rank_that_stops_answering_ends_the_other_and_is_named(by_hand, ready):
    first, second = start_decoding(by_hand, ready)

    second.process.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    first.wait(timeout=SHORTEST_S + SLACK_S)

    assert time.monotonic() - stopped < SHORTEST_S
    assert first.code == ExitCode.PEER
    assert first.error.startswith("rank 1 was lost")


def test_sigterm_ends_all_ranks_soon_and_says_which_one_got_it(by_hand, ready):
    first, second = start_decoding(by_hand, ready)

    second.process.send_signal(signal.SIGTERM)

    assert second.wait(timeout=SLACK_S).code == ExitCode.INTERRUPTED
    assert first.wait(timeout=SLACK_S).code == ExitCode.PEER
    assert first.error == "rank 1: was interrupted"


def test_a_rank_that_never_comes_is_named_and_waited_for_no_longer_than_said(by_hand, ready):
    lonely = by_hand(0, "run", ready["model=16"].root, "--token-ids", 1, "--cluster-timeout", 20)

    lonely.wait()

    assert lonely.code == ExitCode.PEER
    assert re.fullmatch(r"rank 1: has not come to 127\.0\.0\.1:\d+ within 20 s", lonely.error)
    assert lonely.seconds < SHORTEST_S + 4 * SLACK_S  # it starts JAX first


@pytest.mark.slow
def test_a_coordinator_that_cannot_be_reached_is_named_with_the_reason(by_hand, ready):
    lost = by_hand(1, "run", ready["model=16"].root, "--token-ids", 1, "--cluster-timeout", 20)

    lost.wait()

    assert lost.code == ExitCode.PEER
    assert "rank 0 cannot be reached at 127.0.0.1:" in lost.error
    assert "Connection refused" in lost.error
    assert lost.seconds < SHORTEST_S + 4 * SLACK_S


def test_a_coordinator_that_no_name_server_knows_is_named_too():
    launch = Launch(host="nowhere.invalid", port=61440, count=2, rank=1)

    with pytest.raises(PeerError, match=r"rank 0 cannot be reached at nowhere\.invalid:61440"):
        meet(launch, None, within_s=0, note=ignore)


def test_a_port_that_is_taken_is_a_sentence_and_no_crash(by_hand, ready):
    asking = by_hand(0, "run", ready["model=16"].root, "--token-ids", 1, code=TAKE_PORT)

    asking.wait()

    assert asking.code == ExitCode.PEER
    assert "cannot be opened (Address already in use)" in asking.error
    assert "--process-id 0 --coordinator 127.0.0.1:" in asking.stderr


TAKE_PORT = """
import socket, sys
taken = socket.create_server(("", int(sys.argv[sys.argv.index("--coordinator") + 1].split(":")[1])))
"""
NEWER = "patch(':__version__', lambda _: '999')"


def test_ranks_of_different_versions_say_both(by_hand, ready):
    arguments = ("run", ready["model=16"].root, "--token-ids", 1)

    first, second = by_hand(0, *arguments), by_hand(1, *arguments, code=NEWER)

    for rank in (first.wait(), second.wait()):
        assert rank.code == ExitCode.PEER
        assert re.fullmatch(r"grokctl: rank 0 has \S+, rank 1 has 999", rank.error)


def test_ranks_with_different_meshes_say_both(by_hand, ready):
    arguments = ("run", ready["model=16"].root, "--token-ids", 1, "--mesh")

    ranks = [by_hand(rank, *arguments, mesh) for rank, mesh in enumerate(MESHES)]

    for rank in ranks:
        assert rank.wait().code == ExitCode.PEER
        assert rank.error == "mesh: rank 0 has expert=2,model=8, rank 1 has model=16"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("other", "source: rank 0 has words, rank 1 has other", id="name"),
        pytest.param("words", r"norms and routers: rank 0 has \w+, rank 1 has \w+", id="weights"),
    ],
)
def test_ranks_with_different_checkpoints_say_what_differs(by_hand, parts, tmp_path, name, said):
    write_miniature(tmp_path / name, WORDS, seed=7)
    theirs = open_release(tmp_path / name)
    last = frozenset(range(8, 16))
    cut(theirs, MeshShape(2, 8), tmp_path / "ready" / "words", devices=last)
    arguments = ("run", "--token-ids", 1)

    first = by_hand(0, *arguments, GROKCTL_HOME=str(parts[0]))
    second = by_hand(1, *arguments, GROKCTL_HOME=str(tmp_path))

    for rank in (first.wait(), second.wait()):
        assert rank.code == ExitCode.PEER
        assert re.fullmatch(said, rank.error)


def test_a_wait_for_another_rank_is_said(by_hand, ready):
    arguments = ("run", ready["model=16"].root, "--token-ids", 1, "-n", 1, "--context", 32)

    first = by_hand(0, *arguments)
    second = by_hand(1, *arguments, code=LATE)

    assert (first.wait().code, second.wait().code) == (0, 0), first.stderr + second.stderr
    assert "waiting for 1 more of 2 processes at 127.0.0.1:" in first.stderr
    assert "waiting for rank 1: its weights\n" in first.stderr
    assert second.stderr == ""


LATE = """
def late(start):
    def starting(*arguments, **options):
        engine = start(*arguments, **options)
        time.sleep(4.5)
        return engine
    return starting
patch("session.job:start", late)
time.sleep(5)
"""


@pytest.mark.slow
def test_hosts_with_each_others_files_are_told_which_they_need(by_hand, parts):
    first, second = (
        by_hand(rank, "run", "--token-ids", 1, GROKCTL_HOME=str(parts[1 - rank]))
        for rank in range(2)
    )

    codes = sorted((first.wait().code, second.wait().code))
    said = first.stderr + second.stderr
    assert codes in ([ExitCode.USAGE, ExitCode.PEER], [ExitCode.USAGE, ExitCode.USAGE])
    assert "expected the files of devices" in said
    assert "--only-devices" in said


def test_what_is_wrong_on_one_host_is_said_on_all(by_hand, parts, tmp_path):
    broken = shutil.copytree(parts[1], tmp_path / "broken")
    (broken / "ready" / "words" / "device-09-of-16.safetensors").unlink()
    arguments = ("run", "--token-ids", 1)

    first = by_hand(0, *arguments, "--json", GROKCTL_HOME=str(parts[0]))
    second = by_hand(1, *arguments, "--json", GROKCTL_HOME=str(broken))

    assert second.wait().code == ExitCode.CORRUPT
    assert second.stdout == ""
    assert first.wait().code == ExitCode.PEER
    assert first.error == f"rank 1: {second.error}"
    assert json.loads(first.stdout)["error"] == first.error


@pytest.mark.slow
def test_usage_errors_of_rank_0_end_the_others_too(by_hand, ready):
    arguments = ("run", ready["model=16"].root)

    second = by_hand(1, *arguments, "--token-ids", 1)
    first = by_hand(0, *arguments, "--token-ids", 9999).wait()

    assert first.code == ExitCode.USAGE
    assert second.wait().code == ExitCode.PEER
    assert second.error == f"rank 0: {first.error}"


def test_a_mesh_that_processes_cannot_share_is_refused(by_hand, ready):
    ranks = [
        by_hand(rank, "run", ready["model=1"].root, "--token-ids", 1, "--devices", 1)
        for rank in range(2)
    ]

    codes = {rank.wait().code for rank in ranks}

    assert ExitCode.PLACEMENT in codes
    assert "2 processes cannot share" in ranks[0].stderr


def test_what_another_rank_says_and_is_no_json_is_a_sentence(by_hand, ready):
    arguments = ("run", ready["model=16"].root, "--token-ids", 1)

    first, second = by_hand(0, *arguments), by_hand(1, *arguments, code=BABBLE)

    for rank in (first.wait(), second.wait()):
        assert rank.code == ExitCode.PEER
        assert rank.error == "rank 1: expected a JSON object, found '{'"


BABBLE = """
import types
half = lambda json: types.SimpleNamespace(dumps=lambda facts: "{", loads=json.loads)
patch("cluster.exchange:json", half)
"""


def test_who_lacks_devices_is_named_once(by_hand, ready):
    arguments = ("run", ready[MESHES[0]].root, "--token-ids", 1)

    first = by_hand(0, *arguments, JAX_NUM_CPU_DEVICES="8")
    second = by_hand(1, *arguments, JAX_NUM_CPU_DEVICES="4")

    said = "rank 1: has 4 devices, the mesh needs 8 of each of 2 processes"
    assert [first.wait().error, second.wait().error] == [said, said]
    assert {first.code, second.code} <= {ExitCode.HARDWARE, ExitCode.PEER}


def test_why_jax_ends_a_process_is_said_without_its_stack_trace(by_hand, ready):
    arguments = ("run", ready["model=16"].root, "--token-ids", 1)

    first, second = by_hand(0, *arguments, code=ABORT), by_hand(1, *arguments)

    assert (first.wait().code, second.wait().code) == (ExitCode.PEER, ExitCode.PEER)
    assert first.error == "JAX ended the process: ABORTED: it has its reasons"
    assert second.error == "rank 0 was lost"


def test_a_rank_is_named_although_its_loss_looks_like_a_fault_of_the_hardware(by_hand, ready):
    arguments = ("run", ready["model=16"].root, "--token-ids", 1)

    soon = ABORT + 'patch("session.job:_open_job", delayed(1))'

    first, second = by_hand(0, *arguments, code=soon), by_hand(1, *arguments, code=NO_DEVICES)

    assert (first.wait().code, second.wait().code) == (ExitCode.PEER, ExitCode.PEER)
    assert second.error == "rank 0 was lost"


NO_DEVICES = """
from grokctl.errors import HardwareError
def refused(accelerators):
    def start(processes):
        accelerators(processes)
        raise HardwareError("JAX does not start: refused") from RuntimeError("refused")
    return start
patch("session.job:accelerators", refused)
"""
ABORT = """
import os
def open_job(*arguments, **options):
    os.write(2, b"client.h:80] absl::Status: ABORTED: it has its reasons\\n")
    os.write(2, b"    @  0x7f6f  (unknown)\\n")
    os.abort()
patch("session.job:_open_job", lambda _: open_job)
"""


@pytest.mark.slow
def test_a_rank_that_is_lost_as_soon_as_all_have_come_is_named(by_hand, ready):
    arguments = ("run", ready["model=16"].root, "--token-ids", 1, "--cluster-timeout", SHORTEST_S)
    first = by_hand(0, *arguments)
    with seat(by_hand.port, count=2) as channels:
        assert [channel.receive() for channel in channels] == [b"begin"] * 2
    lost = time.monotonic()

    first.wait()

    assert time.monotonic() - lost < SHORTEST_S
    assert first.code == ExitCode.PEER
    assert first.error == f"rank 1 was lost as soon as all had come to 127.0.0.1:{by_hand.port}"


@pytest.mark.slow
def test_a_rank_that_comes_to_a_run_that_has_begun_does_not_disturb_it(by_hand, ready):
    first, second = start_decoding(by_hand, ready)

    late = ("--token-ids", 1, "--cluster-timeout", SHORTEST_S)
    third = by_hand(1, "run", ready[MESHES[0]].root, *late).wait()

    assert third.code == ExitCode.PEER
    assert "(Connection refused)" in third.error
    assert (first.wait().code, second.wait().code) == (0, 0)


@pytest.mark.slow
def test_a_reader_who_has_enough_is_no_failure_of_any_rank(by_hand, ready):
    first, second = start_decoding(by_hand, ready)

    first.process.stdout.close()

    assert second.wait().code == 0
    assert second.stderr == ""
    assert first.process.wait(timeout=SLACK_S) == 0


@pytest.mark.slow
def test_what_is_lost_after_the_result_was_printed_spoils_nothing(by_hand, ready):
    arguments = ("run", ready[MESHES[0]].root, "--token-ids", 1, "-n", 1, "--context", 32)

    first = by_hand(0, *arguments, "--json", code=LAST)
    second = by_hand(1, *arguments)

    assert first.wait().code == 0
    assert len(json.loads(first.stdout)["tokens"]) == 1
    assert second.wait().code == ExitCode.PEER


LAST = """
import os
patch("cluster.process_group:Cluster.release", lambda _: lambda cluster: os.abort())
"""


@pytest.mark.slow
def test_a_full_disk_at_rank_0_is_said_by_the_others_in_words(by_hand, ready):
    arguments = ("run", ready[MESHES[0]].root, "--token-ids", 1, "-n", 1, "--context", 32)
    full = "import sys; sys.stdout = open('/dev/full', 'w')"

    first, second = by_hand(0, *arguments, code=full), by_hand(1, *arguments)

    assert (first.wait().code, second.wait().code) == (ExitCode.DISK_FULL, ExitCode.PEER)
    assert second.error == "rank 0: No space left on device"
