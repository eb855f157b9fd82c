"""The interactive loop on a real terminal with real keys."""

import os
import re
import select
import signal
import stat
import time

import pytest

PATIENCE_S = 1.0
_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r|[⠁-⣿] |\x07")
_TERMINAL = (
    "import fcntl, os, termios\n"
    "os.setsid()\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # so that Ctrl-C is a signal
    f"patch('interrupts:_PATIENCE_S', lambda _: {PATIENCE_S})\n"
    "patch('inference.model_runner:ModelRunner._run', delayed(SLOW))"
)


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, process, *arguments, slow=0.0, columns=100):
        self._leader, follower = os.openpty()
        self.process = process.start(
            *arguments,
            code=_TERMINAL.replace("SLOW", str(slow)),
            env=process.environment(TERM="xterm", COLUMNS=str(columns)),
            stdin=follower,
            stdout=follower,
            stderr=follower,
        )
        os.close(follower)
        self._seen = ""

    def until(self, *marks):
        """Read until the marks have appeared, one after the other; the output until then."""
        said = ""
        for mark in marks:
            while mark not in self._seen:
                assert self._read(), (mark, self._seen)
            before, self._seen = self._seen.split(mark, 1)
            said += before + mark
        return said

    def _read(self):
        """Read the available output; whether more may come."""
        readable, _, _ = select.select([self._leader], [], [], 30)
        assert readable, self._seen
        try:
            part = os.read(self._leader, 65536)
        except OSError:  # it has ended
            return False
        self._seen += _CODES.sub("", part.decode(errors="replace"))
        return bool(part)

    def type(self, keys):
        """Type keys; a line needs its line end."""
        os.write(self._leader, keys.encode())

    def say(self, line, *marks):
        """Type a line; the output from its echo to the marks and the next prompt."""
        self.type(line + "\r")
        self.until(line)
        return self.until(*marks, "\n> ")

    def end(self):
        """Read to the end; the exit code and the rest of the output."""
        while self._read():
            pass
        return self.process.wait(timeout=30), self._seen

    def close(self):
        """Kill the command and close the terminal."""
        self.process.kill()
        self.process.wait(timeout=30)
        os.close(self._leader)


@pytest.fixture
def converse(process, home, cut):
    """Start a conversation."""
    started = []

    def start(*arguments, **options):
        root = cut("words", 1).root
        given = ("run", root, "--home", home, "--ignore-eos", "--compute", "float32")
        started.append(Terminal(process, *given, *arguments, **options))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


def test_a_whole_conversation(converse, home):  # one process, because each loads a model
    history = home / "history"
    terminal = converse("-n", 4, "--seed", 40)

    greeting = terminal.until("\n> ")
    assert "completes" in greeting
    assert "no chat" in greeting
    assert "/help" in greeting

    assert "there is no text yet" in terminal.say("/retry")
    first = terminal.say("import", "seed 40")
    assert "import" in first  # what was typed begins the text
    assert "load" not in first
    assert "B/token" in first
    assert "with seed 41" in terminal.say("/retry", "B/token · seed 41")
    more = terminal.say("/more", "seed 42")
    assert "import" not in more
    stats = terminal.say("/stats")
    assert "measured now" in stats
    assert re.search(r"ended by +length", stats)

    shown = terminal.say("/set")
    assert re.search(r"temperature +0\.7", shown)
    assert re.search(r"seed +43", shown)
    assert re.search(r"temperature +0\.0", terminal.say("/set temperature 0"))
    assert re.search(r"top-k +5", terminal.say("/set top_k 5"))
    assert re.search(r"stop +'\\n\\n'", terminal.say('/set stop "\\n\\n"'))
    assert re.search(r"ignore-eos +off", terminal.say("/set ignore-eos off"))
    assert re.search(r"max-tokens +2", terminal.say("/set max-tokens 2"))
    assert "top-p 7: expected more than 0" in terminal.say("/set top-p 7")
    assert "temperature 'hot': expected a number" in terminal.say("/set temperature hot")
    for typed, shown in (
        ('logit-bias {"5": 2}', r'logit-bias +\{"5": 2.0\}'),
        ("stop-token-ids 99999", "expected a token id"),
        ('logit-bias {"5": 1, "5": 2}', "expected JSON"),
        ("logit-bias {}", "logit-bias +nothing"),
    ):
        assert re.search(shown, terminal.say(f"/set {typed}"))
    assert "the nearest is temperature" in terminal.say("/set temprature 1")
    assert "unknown command /foo" in terminal.say("/foo")
    terminal.type("/he\t\r")
    assert "another seed" in terminal.until("as Ctrl-D does", "\n> ")

    assert "/usr/bin" in terminal.say("//usr/bin", "B/token")
    assert "the same text again" in terminal.say("/retry", "B/token")
    assert "context 64" in terminal.say("word " * 70)
    terminal.type("\x1b[A\x1b[A\r")  # the line before the last one, edited by readline
    assert "the same text again" in terminal.until("B/token", "\n> ")

    for _ in range(2):
        terminal.type("half a li")
        terminal.until("half a li")
        terminal.type("\x03")
        assert "Ctrl-C again" not in terminal.until("\n> ")
    assert "half" not in terminal.say("import", "B/token")
    terminal.type("\x04")
    code, _ = terminal.end()

    lines = history.read_text().splitlines()
    assert code == 0
    assert lines[:2] == ["/retry", "import"]
    assert "half a li" not in lines
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_ctrl_c_ends_a_text_only_and_twice_at_the_prompt_everything(converse):
    terminal = converse("-n", 60, slow=0.05)

    terminal.until("\n> ")
    terminal.type("import\r")
    terminal.until("import", "import")
    terminal.type("\x03")
    assert "seed" in terminal.until("stopped · ", "\n> ")
    began = time.monotonic()
    terminal.say("/set max-tokens 30")
    terminal.say("import", "seed")  # takes longer than the watchdog's patience
    assert time.monotonic() - began > PATIENCE_S
    terminal.type("\x03")
    terminal.until("press Ctrl-C again", "\n> ")
    terminal.type("\x03")
    code, rest = terminal.end()

    assert code == 130
    assert "interrupted" in rest
    assert "Traceback" not in rest


def test_ctrl_c_ends_a_long_prompt_between_two_steps(converse):
    terminal = converse("-n", 4, "--context", 64, slow=0.4)

    terminal.until("\n> ")
    terminal.type("import\r")
    terminal.until("prefill")
    terminal.type("\x03")
    said = terminal.until("stopped", "\n> ")
    terminal.type("/quit\r")
    code, _ = terminal.end()

    assert said.count("import") <= 1  # with at most the token that was under way
    assert "length" not in said
    assert code == 0


def test_sigterm_ends_a_conversation_at_once(converse):
    terminal = converse()

    terminal.until("\n> ")
    terminal.process.send_signal(signal.SIGTERM)
    code, rest = terminal.end()

    assert code == 130
    assert "interrupted" in rest


def test_without_readline_and_without_a_history_it_works_all_the_same(process, cut, tmp_path):
    code = "import sys; sys.modules['readline'] = None"
    nowhere = tmp_path / "home"
    (nowhere / "history").mkdir(parents=True)
    leader, follower = os.openpty()

    with process.start(
        *("run", cut("words", 1).root, "-n", 1, "--home", nowhere),
        code=code,
        env=process.environment(TERM="dumb"),
        stdin=follower,
    ) as running:
        os.close(follower)
        os.write(leader, b"import\n\x04")
        stdout, stderr = running.communicate(timeout=60)
    os.close(leader)

    assert running.returncode == 0
    assert stdout.startswith("import")  # and no prompt: it is no result
    assert "> " in stderr


def test_without_a_tokenizer_token_ids_are_continued(process, home):
    root = home / "releases" / "two-layers"
    terminal = Terminal(process, "run", root, "--home", home, "-n", 2, "--ignore-eos")

    greeting = terminal.until("\n> ")
    said = terminal.say("1, 2,3", "B/token")
    wrong = terminal.say("a text")
    terminal.close()

    assert "token ids" in greeting
    assert re.search(r"\b[0-9]+ [0-9]+ \n", said)
    assert "line 'a text': expected token ids" in wrong
