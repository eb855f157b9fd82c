"""Every hint that is a command parses, and means the checkpoint, home and plan that were typed."""

import shlex

import pytest
import typer

from grokctl.checkpoint.torrent import build_metainfo
from grokctl.cli.app import app
from grokctl.cli.hints import remember, to_paste
from grokctl.parse import read_ranges, read_size
from grokctl.transfer.destination import chosen_options
from grokctl.transfer.sources import FetchOptions

PLACEHOLDERS = {"DIR", "FILE", "CHECKPOINT", "HOST:PORT", "NAME", "TEXT", "N", "…", "X"}
PIECE = 16384

WRONG = [
    # what is typed, and what the hint has beside it
    ("run two-layers 'hello there'", ["-p", "hello there", "two-layers"]),
    ("run two-layers one two", ["-p", "one two", "two-layers"]),
    ("run two-layers -n 2 it's", None),
    ("run 'a/b and more'", ["-p", "a/b and more"]),
    ("run 'a; b | c # d' -n 3", ["-p", "a; b | c # d", "-n", "3"]),
    ("run -n 2 -- two-layers", ["-n", "2", "two-layers", "-p"]),
    ("run two-layers --json", ["two-layers", "-p", "--json"]),
    ("run nosuch", None),
    ("score two-layers", ["two-layers", "--text"]),
    ("score two-layers --text a --token-ids 1,2", ["two-layers", "--text", "a"]),
    ("score nosuch", None),
    ("verify two-layers --dry-run", ["two-layers", "--repair"]),
    ("verify two-layers --quick --repair", ["two-layers", "--repair"]),
    ("verify READY --torrent-file TORRENT", ["READY"]),
    ("inspect nosuch", None),
    ("inspect /no/such", None),
    ("reshard two-layers --devices 3 --dry-run", ["two-layers", "--devices", "--mesh"]),
    ("reshard two-layers --mesh model=3", ["two-layers", "--devices", "--mesh"]),
    ("reshard two-layers --devices=4 --max-memory 4", ["two-layers", "--devices=4", "4GB"]),
    ("reshard two-layers --devices 4 --compress lz4 --dry-run", ["two-layers", "zstd"]),
    ("reshard two-layers --devices 4 --only-devices 0-9 --dry-run", ["two-layers"]),
    ("reshard two-layers --devices 4 --out HOME/releases/two-layers", ["two-layers", "--out"]),
    ("fetch TORRENT --to HOME/new --layers 0-9 --dry-run", ["TORRENT", "--layers", "0-1"]),
    (
        "fetch TORRENT --to HOME/new --only nosuch --no-dht --dry-run",
        ["TORRENT", "--only", "--no-dht"],
    ),
    ("fetch TORRENT --max-download 20", ["TORRENT", "--max-download", "20MB"]),
    ("fetch nosuch.torrent", None),
    ("fetch TORRENT --to HOME/releases/two-layers --no-dht --dry-run", ["--no-dht", "--force"]),
    ("verify --repair --no-dht --dry-run", ["--repair", "--no-dht"]),  # there are several
]


@pytest.fixture
def places(home, cut):
    """What stands for the capital words of the table."""
    torrent = home.parent / "two-layers.torrent"
    root = home / "releases" / "two-layers"
    files = [f"ckpt-0/{path.name}" for path in sorted((root / "ckpt-0").iterdir())]
    torrent.write_bytes(build_metainfo(root, files, name="two-layers", piece_length=PIECE))
    return {"HOME": str(home), "READY": str(cut("two-layers", 1).root), "TORRENT": str(torrent)}


def test_a_download_is_continued_with_its_rate_and_its_files():
    options = FetchOptions(
        only=("tensor0000*",),
        layers=frozenset({2, 0}),
        max_download=900,
        bind="127.0.0.1",
        source_trackers=False,
    )

    words = list(chosen_options(options))
    _, again = parsed(["fetch", *words])

    assert again["only"] == ["tensor0000*"]
    assert read_ranges(again["layers"], "--layers", "0") == {0, 2}
    assert read_size(again["max_download"], "--max-download", unit="MB") == 900
    assert (again["bind"], again["no_trackers"]) == ("127.0.0.1", True)


def test_the_command_with_a_variable_is_the_one_that_was_typed():
    commands = typer.main.get_command(app).commands
    remember(["run", "x", "-n", "2"], commands)

    assert to_paste("JAX_PLATFORMS=cpu grokctl run …") == "JAX_PLATFORMS=cpu grokctl run x -n 2"
    assert to_paste("CHECKPOINT /a/b") == "grokctl run /a/b -n 2"
    assert to_paste("--mesh model=4") == "grokctl run x -n 2 --mesh model=4"
    remember(["run", "-n", "2", "--", "x"], commands)
    assert to_paste("CHECKPOINT /a/b  # its source") == "grokctl run /a/b -n 2  # its source"
    remember(["run", "-n2", "--devices=8"], commands)
    assert to_paste("--mesh model=4 -n 3  # fewer") == "grokctl run --mesh model=4 -n 3  # fewer"


def parsed(words):
    """The options of a command line as typer reads them."""
    group = typer.main.get_command(app)
    context = group.make_context("grokctl", list(words), resilient_parsing=False)
    verb, command, rest = group.resolve_command(context, context._protected_args + context.args)
    return verb, command.make_context(verb, rest, parent=context).params


@pytest.mark.parametrize(("typed", "kept"), WRONG, ids=[typed for typed, _ in WRONG])
def test_a_hint_can_be_pasted_and_means_the_same(grokctl, places, typed, kept):
    def placed(text):
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    words = [placed(word) for word in shlex.split(typed.replace("it's", "it"))]

    outcome = grokctl(words[0], "--home", places["HOME"], *words[1:])

    assert outcome.exit_code not in {0, 1}, outcome.stderr
    command, *rest = shlex.split(outcome.hint, comments=True)
    assert not PLACEHOLDERS & set(rest)
    if kept is not None:
        assert command == "grokctl"
        assert {placed(word) for word in kept} <= set(rest)
    if command == "grokctl":
        _, options = parsed(rest)
        assert str(options["home"]) == places["HOME"]
        assert bool(options.get("dry_run")) == ("--dry-run" in words)
