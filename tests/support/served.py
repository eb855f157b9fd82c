"""`grokctl serve` in a process of its own."""

import contextlib
import json
import signal
import subprocess
import threading
import time

MODEL = ("words", "--compute", "float32", "--slots", 2)


@contextlib.contextmanager
def server(process, home, *options, env=None, code=None, warms_up=False, root=MODEL[0]):
    """A server, and the values of its line once it is ready."""
    arguments = ("serve", root, *MODEL[1:], "--home", home, "--port", 0, "--json", *options)
    arguments += () if warms_up else ("--no-warm-up",)
    settings = {} if env is None else {"env": process.environment(**env)}
    with process.start(*arguments, code=code, **settings) as started:
        errors = []
        reader = threading.Thread(target=lambda: errors.extend(started.stderr))
        reader.start()
        try:
            line = started.stdout.readline()
            started.ready = json.loads(line) if line else None
            started.errors, started.reader = errors, reader
            yield started
        finally:
            if started.poll() is None:
                started.send_signal(signal.SIGINT)
                time.sleep(0.1)
                started.send_signal(signal.SIGINT)
            try:
                started.wait(60)
            except subprocess.TimeoutExpired:
                started.kill()
                raise
            reader.join(30)
