"""What tests download from: HTTP servers and proxies, and peers, on the loopback interface."""

import contextlib
import http.client
import http.server
import select
import socket
import threading
import time

import libtorrent


class Server(http.server.ThreadingHTTPServer):
    """A folder behind HTTP ranges; subclasses of `Handler` say how well."""

    daemon_threads = True

    def __init__(self, handler, root=None):
        super().__init__(("127.0.0.1", 0), handler)
        self.root = root
        self.asked = []
        self.sent = 0

    @property
    def port(self):
        return self.server_address[1]

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/"

    @property
    def name(self):
        """What grokctl calls a mirror here."""
        return f"mirror 127.0.0.1:{self.port}"

    def handle_error(self, *_):
        pass  # a client that hangs up is no error here


class Handler(http.server.BaseHTTPRequestHandler):
    """A good mirror."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.respond()

    def respond(self):
        self.server.asked.append(self.path)
        path = self.server.root / self.path.partition("?")[0].lstrip("/")
        if not path.is_file():
            self.answer(404)
            return
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        data = path.read_bytes()
        if first < len(data):
            self.send_part(data, first, min(last, len(data) - 1))
        else:
            self.answer(416)

    def send_part(self, data, first, last):
        self.answer(206, data[first : last + 1], content_range(data, first, last))

    def answer(self, status, body=b"", headers=None, length=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.server.sent += len(body)

    def answer_in_chunks(self, chunks, headers):
        """Answer without saying how much will come."""
        self.send_response(206)
        self.send_header("Transfer-Encoding", "chunked")
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in chunks:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            self.server.sent += len(chunk)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


def content_range(data, first, last):
    return {"Content-Range": f"bytes {first}-{last}/{len(data)}"}


class Trickling(Handler):
    """Promises all, and sends a byte now and then."""

    def send_part(self, data, first, last):
        part = data[first : last + 1]
        self.answer(206, part[:1], content_range(data, first, last), length=len(part))
        for place in range(1, len(part)):
            time.sleep(0.05)
            self.wfile.write(part[place : place + 1])


class HttpProxy(http.server.BaseHTTPRequestHandler):
    """Forwards GET, and whatever comes after CONNECT; the server's `asked` says for whom."""

    protocol_version = "HTTP/1.1"

    def do_CONNECT(self):
        self.server.asked.append(self.path)
        host, _, port = self.path.rpartition(":")
        with socket.create_connection((host, int(port))) as far:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            join(self.connection, far)
        self.close_connection = True

    def do_GET(self):
        address, _, path = self.path.removeprefix("http://").partition("/")
        self.server.asked.append(address)
        address = self.find(address)
        near = http.client.HTTPConnection(address, timeout=20)
        with contextlib.closing(near):
            wanted = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
            near.request("GET", f"/{path}", headers=wanted)
            response = near.getresponse()
            body = response.read()
        self.send_response(response.status)
        for name in ("Content-Range", "Location"):
            if name in response.headers:
                self.send_header(name, response.headers[name])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def find(self, address):
        """Where somebody is, whom only the proxy may know by name."""
        return address

    def log_message(self, *_):
        pass


def join(one, other):
    """Carry bytes between two sockets until one of them ends."""
    ends = {one: other, other: one}
    while ready := select.select(ends, [], [], 20)[0]:
        for end in ready:
            if not (data := end.recv(65536)):
                return
            ends[end].sendall(data)


@contextlib.contextmanager
def serving(handler, root=None):
    """A server with this handler, in a thread."""
    with Server(handler, root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def libtorrent_seeder(torrent, root, places, **settings):
    """A peer with none of grokctl's scruples; yields its port and its torrent's handle."""
    params = libtorrent.load_torrent_buffer(torrent)
    params.save_path = str(root)
    params.renamed_files = places
    params.flags = libtorrent.torrent_flags.seed_mode
    quiet = dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False)
    session = libtorrent.session({"listen_interfaces": "127.0.0.1:0", **quiet, **settings})
    handle = session.add_torrent(params)
    while not (port := session.listen_port()):
        session.wait_for_alert(100)
    try:
        yield port, handle
    finally:
        session.remove_torrent(handle)
