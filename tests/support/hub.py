"""A hub on 127.0.0.1 that speaks the routes of the real one: list, redirects, ranges, limits."""

import contextlib
import hashlib
import json
import threading
from urllib.parse import parse_qs, unquote, urlsplit

from servers import Handler, Server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "xai-org/grok-1"
_LARGE = (".model",)


def blob_of(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class Hub(Server):
    """A repository of files; its attributes say how well it serves them."""

    def __init__(self, files):
        """Files by their path in the repository."""
        super().__init__(HubHandler)
        self.files = dict(files)
        self.promised = {path: self.entry(path) for path in self.files}
        """What it says about them, whatever it sends."""
        self.page = 1000
        """Files on a page of the list."""
        self.busy = 0
        """Requests that it answers with 429 from now on."""
        self.retry_after = {"Retry-After": "1"}
        self.uses = 1000
        """Times that a signed address is good for."""
        self.lies = {}
        """Path -> offsets of bytes that are wrong when they are sent the next time."""
        self.always_lies = False
        self.cuts = 0
        """Answers that it cuts off in the middle."""
        self.gone = set()
        """Paths that it lists and does not have."""
        self.delay = threading.Event()
        self.parts = []
        """Path, first and last byte of each range that was sent."""
        self._signed = {}
        self._lock = threading.Lock()

    @property
    def endpoint(self):
        return self.url.rstrip("/")

    @property
    def mirror(self):
        """What `--mirror` takes."""
        return f"{self.url}{NAME}/resolve/main/"

    def entry(self, path):
        """What the list says about a file."""
        data = self.files[path]
        if path.rpartition("/")[2].startswith("tensor") or path.endswith(_LARGE):
            large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            return {"type": "file", "oid": "f" * 40, "size": len(data), "path": path, "lfs": large}
        return {"type": "file", "oid": blob_of(data), "size": len(data), "path": path}

    def sign(self, path):
        """A new address of a file, good for some times."""
        with self._lock:
            key = str(len(self._signed))
            self._signed[key] = [path, self.uses]
        return f"{self.url}cdn/{key}?X-Signature=abc&Expires=1"

    def use(self, key):
        """The path behind a signed address; None if it has expired."""
        with self._lock:
            path, left = self._signed.get(key, ("", 0))
            if left:
                self._signed[key][1] -= 1
            return path if left else None

    def take(self, counter):
        """Whether it still misbehaves; each time once less."""
        with self._lock:
            left = getattr(self, counter)
            if left:
                setattr(self, counter, left - 1)
            return left > 0

    def sent_of(self, path):
        """Bytes of a file that were sent."""
        return sum(last + 1 - first for name, first, last in self.parts if name == path)


class HubHandler(Handler):
    """The routes: revision, tree, resolve, and the store that resolve redirects to."""

    def respond(self):
        hub, parts = self.server, urlsplit(self.path)
        hub.asked.append(self.path)
        if hub.take("busy"):
            self.answer(429, headers=hub.retry_after)
            return
        path = unquote(parts.path)
        api = f"/api/models/{NAME}"
        if path.startswith(f"{api}/revision/"):
            self.answer(200, json.dumps({"sha": COMMIT, "siblings": []}).encode())
        elif path == f"{api}/tree/{COMMIT}":
            self.list_page(parse_qs(parts.query))
        elif path.startswith(f"/{NAME}/resolve/{COMMIT}/"):
            self.resolve(path.removeprefix(f"/{NAME}/resolve/{COMMIT}/"))
        elif path.startswith("/cdn/"):
            self.store(path.removeprefix("/cdn/"))
        else:
            self.answer(404)

    def list_page(self, query):
        hub = self.server
        assert query["recursive"] == ["true"]
        folders = sorted({path.partition("/")[0] for path in hub.promised if "/" in path})
        entries = [{"type": "directory", "oid": "d" * 40, "size": 0, "path": f} for f in folders]
        entries += hub.promised.values()
        first = int(query.get("cursor", ["0"])[0])
        headers = {}
        if first + hub.page < len(entries):
            following = f"?recursive=true&cursor={first + hub.page}"
            # as mirrors of the hub pass it on: with the first hub's own address
            address = f"https://huggingface.invalid/api/models/{NAME}/tree/{COMMIT}{following}"
            headers = {"Link": f'<{address}>; rel="next"'}
        self.answer(200, json.dumps(entries[first : first + hub.page]).encode(), headers)

    def resolve(self, path):
        hub = self.server
        if path not in hub.files or path in hub.gone:
            self.answer(404)
            return
        self.answer(302, headers={"Location": hub.sign(path), "X-Repo-Commit": COMMIT})

    def store(self, key):
        hub = self.server
        path = hub.use(key)
        if path is None:
            self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            return
        data = hub.files[path]
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        if first >= len(data):
            self.answer(416)
            return
        last = min(last, len(data) - 1)
        part = bytearray(data[first : last + 1])
        for offset in hub.lies.get(path, ()):
            if first <= offset <= last:
                part[offset - first] ^= 1
                if not hub.always_lies:
                    hub.lies = {**hub.lies, path: tuple(o for o in hub.lies[path] if o != offset)}
        hub.parts.append((path, first, last))
        hub.delay.wait(0.0)
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        if hub.take("cuts"):
            self.answer(206, bytes(part[: len(part) // 2]), headers, length=len(part))
            self.close_connection = True
            return
        self.answer(206, bytes(part), headers)


@contextlib.contextmanager
def hub_of(files):
    """A hub with these files, in a thread."""
    with Hub(files) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def files_in(root, folder="ckpt-0"):
    """The files of a release, as a repository has them."""
    return {
        path.relative_to(root)
        .as_posix()
        .replace("ckpt-0/", f"{folder}/" if folder else ""): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
