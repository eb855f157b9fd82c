"""The tokenizer beside a release: from the web or from the user, and never an unproven one."""

import hashlib
import signal
import threading
from dataclasses import replace

import pytest
from servers import Handler, Trickling, content_range, serving

from grokctl.checkpoint.miniature import MINIATURE, train_tokenizer
from grokctl.checkpoint.torrent import build_metainfo
from grokctl.errors import FetchError, UsageError
from grokctl.events import Noted
from grokctl.fetch import fetch, seeding
from grokctl.model.config import GrokConfig
from grokctl.transfer.sources import PinnedFile
from grokctl.transfer.tokenizer import fetch_tokenizer, has_tokenizer
from grokctl.transfer.web import Web

DATA = bytes(range(256)) * 300


@pytest.fixture
def folder(tmp_path):
    """What the server has."""
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(DATA)
    return folder


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "got"
    root.mkdir()
    return root


def pinned_at(server, data=DATA, *, name="tokenizer.model"):
    digest = hashlib.sha256(data).hexdigest()
    return PinnedFile(url=server.url + name, nbytes=len(data), sha256=digest)


class Moved(Handler):
    def respond(self):
        if self.path == "/tokenizer.model":
            self.answer(302, headers={"Location": "/elsewhere"})
        else:
            self.path = "/tokenizer.model"
            super().respond()


class Ignorant(Handler):
    """Knows no ranges, which is fine for a whole file."""

    def send_part(self, data, first, last):
        del first, last
        self.answer(200, data)


class Truncating(Handler):
    def send_part(self, data, first, last):
        headers = content_range(data, first, last)
        self.answer(206, data[first : last // 2], headers, length=last + 1 - first)
        self.close_connection = True


@pytest.mark.parametrize("handler", [Handler, Moved, Ignorant])
def test_the_published_tokenizer_is_fetched(folder, root, handler):
    with serving(handler, folder) as server, Web() as web:
        fetch_tokenizer(root, pinned_at(server), web)

    assert (root / "tokenizer.model").read_bytes() == DATA
    assert [path.name for path in root.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        pytest.param(bytes(len(DATA)), "expected .* sha256 .*, found", id="another-of-that-size"),
        pytest.param(DATA[:-1], "has 76,799 bytes, expected 76,800", id="shorter"),
        pytest.param(DATA + b"x", "has 76,801 bytes, expected 76,800", id="longer"),
        pytest.param(b"", "416", id="empty"),
        pytest.param(None, "404", id="missing"),
    ],
)
def test_a_tokenizer_that_is_not_the_published_one_is_not_kept(folder, root, served, reason):
    if served is None:
        (folder / "tokenizer.model").unlink()
    else:
        (folder / "tokenizer.model").write_bytes(served)

    with (
        serving(Handler, folder) as server,
        Web() as web,
        pytest.raises(FetchError, match=reason) as caught,
    ):
        fetch_tokenizer(root, pinned_at(server), web)

    assert server.url in str(caught.value)
    assert list(root.iterdir()) == []


def test_a_tokenizer_that_breaks_off_is_not_kept_and_the_hint_is_to_bring_one(folder, root):
    with (
        serving(Truncating, folder) as server,
        Web() as web,
        pytest.raises(FetchError, match="closed the connection") as caught,
    ):
        fetch_tokenizer(root, pinned_at(server), web)

    assert "--tokenizer" in caught.value.hint
    assert list(root.iterdir()) == []


def test_a_tokenizer_that_trickles_is_not_waited_for(folder, root, monkeypatch):
    monkeypatch.setattr("grokctl.transfer.tokenizer._WITHIN_S", 0.2)

    with (
        serving(Trickling, folder) as server,
        Web() as web,
        pytest.raises(FetchError, match="took more than"),
    ):
        fetch_tokenizer(root, pinned_at(server), web)

    assert not has_tokenizer(root)


def test_an_interrupt_ends_the_wait_for_a_tokenizer(folder, root):
    may_end = threading.Event()

    class Silent(Handler):
        def send_part(self, *_):
            while not may_end.is_set():  # a signal may fall where Python can raise nothing
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                may_end.wait(2)

    # a shell that starts the tests in the background has them ignore interrupts
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with serving(Silent, folder) as server, Web() as web:
            with pytest.raises(KeyboardInterrupt):
                fetch_tokenizer(root, pinned_at(server), web)
            may_end.set()
    finally:
        signal.signal(signal.SIGINT, before)

    assert list(root.iterdir()) == []


@pytest.fixture
def published(models, folder):
    """What the server has is the tokenizer of the small release."""
    data = (models / "fits.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data)
    return data


@pytest.fixture
def official(swarm, folder, published, monkeypatch):
    """The small release is Grok-1 for a while, and its tokenizer lies on a server here."""
    monkeypatch.setattr("grokctl.transfer.sources.GROK_1_INFOHASH", swarm.metainfo.infohash)
    with serving(Handler, folder) as server:
        monkeypatch.setattr(
            "grokctl.transfer.sources.GROK_1_TOKENIZER", pinned_at(server, published)
        )
        yield server


def test_grok_1_comes_with_its_tokenizer_which_is_fetched_once(swarm, official, published, root):
    first = fetch(swarm.magnet, root, swarm.options())
    second = fetch(swarm.magnet, root, swarm.options())

    assert (first.has_tokenizer, second.has_tokenizer) == (True, True)
    assert official.asked == ["/tokenizer.model"]
    assert (root / "tokenizer.model").read_bytes() == published


def test_a_tokenizer_that_cannot_be_had_holds_nothing_up_and_is_asked_for_again(
    swarm, official, published, folder, root
):
    (folder / "tokenizer.model").write_bytes(bytes(len(published)))
    notes = []

    def observe(event):
        if isinstance(event, Noted):
            notes.append(event.message)

    without = fetch(swarm.magnet, root, swarm.options(), observe=observe)
    (folder / "tokenizer.model").write_bytes(published)
    later = fetch(swarm.magnet, root, swarm.options(), observe=observe)

    assert without.is_complete
    assert not without.has_tokenizer
    (note,) = [note for note in notes if "without the tokenizer" in note]
    assert "sha256" in note
    assert later.has_tokenizer
    assert later.downloaded == 0
    assert len(official.asked) == 2


def test_a_given_tokenizer_is_taken_where_the_web_is_out_of_reach(
    swarm, official, published, root, tmp_path
):
    given = tmp_path / "brought.model"
    given.write_bytes(published)

    fetched = fetch(swarm.magnet, root, swarm.options(tokenizer=given))

    assert fetched.has_tokenizer
    assert official.asked == []
    assert (root / "tokenizer.model").read_bytes() == published


def test_a_given_tokenizer_that_is_not_grok_1s_is_refused_before_anybody_is_asked(
    swarm, official, published, tmp_path
):
    given = tmp_path / "brought.model"
    given.write_bytes(published[::-1])
    nobody = swarm.options(tokenizer=given, peers=(), stall_timeout_s=0.5)

    with pytest.raises(FetchError, match=r"brought\.model: expected .* sha256") as caught:
        fetch(swarm.magnet, tmp_path / "got", nobody)

    assert caught.type is FetchError
    assert official.asked == []
    assert not (tmp_path / "got").exists()


def test_a_given_tokenizer_that_is_not_there_is_said_before_anybody_is_asked(swarm, tmp_path):
    nobody = swarm.options(tokenizer=tmp_path / "nothing", peers=(), stall_timeout_s=0.5)

    with pytest.raises(UsageError, match="nothing: No such file"):
        fetch(swarm.magnet, tmp_path / "got", nobody)

    assert not (tmp_path / "got").exists()


@pytest.fixture(scope="module")
def vocabulary(swarm):
    return GrokConfig.read(swarm.root / "config.json").vocab_size


@pytest.fixture(scope="module")
def models(vocabulary, tmp_path_factory):
    """Tokenizers: one that fits, another one, and one that is too large."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"fits": vocabulary, "another": vocabulary - 8, "large": vocabulary + 8}
    for name, size in sizes.items():
        model = train_tokenizer(replace(MINIATURE, vocab_size=size))
        (folder / f"{name}.model").write_bytes(model)
    (folder / "garbage.model").write_bytes(b"garbage")
    (folder / "empty.model").touch()
    return folder


def test_a_release_without_a_tokenizer_takes_one_that_fits(swarm, models, tmp_path):
    root = tmp_path / "got"
    given = models / "fits.model"

    without = fetch(swarm.magnet, root, swarm.options())
    with_it = fetch(swarm.magnet, root, swarm.options(tokenizer=given))
    again = fetch(swarm.magnet, root, swarm.options(tokenizer=given))

    assert not without.has_tokenizer
    assert (with_it.has_tokenizer, again.has_tokenizer) == (True, True)
    assert with_it.downloaded == again.downloaded == 0
    assert (root / "tokenizer.model").read_bytes() == given.read_bytes()


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        pytest.param("garbage", "no sentencepiece model", id="garbage"),
        pytest.param("empty", "no sentencepiece model", id="empty"),
        pytest.param("large", "the model has", id="too-large"),
    ],
)
def test_what_is_not_this_models_tokenizer_is_refused(
    swarm, models, name, reason, is_first, tmp_path
):
    root = tmp_path / "got"
    if not is_first:
        fetch(swarm.magnet, root, swarm.options())

    with pytest.raises(FetchError, match=reason) as caught:
        fetch(swarm.magnet, root, swarm.options(tokenizer=models / f"{name}.model"))
    rest = fetch(swarm.magnet, root, swarm.options())

    assert caught.type is FetchError
    assert f"{name}.model" in str(caught.value)
    assert not rest.has_tokenizer
    swarm.assert_arrived(root)


def test_another_tokenizer_is_replaced_only_by_force(swarm, models, tmp_path):
    root = tmp_path / "got"
    first, second = models / "fits.model", models / "another.model"
    fetch(swarm.magnet, root, swarm.options(tokenizer=first))

    with pytest.raises(UsageError, match=r"tokenizer\.model: exists"):
        fetch(swarm.magnet, root, swarm.options(tokenizer=second))
    kept = (root / "tokenizer.model").read_bytes()
    fetch(swarm.magnet, root, swarm.options(tokenizer=second, force=True))

    assert kept == first.read_bytes()
    assert (root / "tokenizer.model").read_bytes() == second.read_bytes()


def test_a_link_for_a_tokenizer_is_replaced_and_not_followed(swarm, models, tmp_path):
    root, victim = tmp_path / "got", tmp_path / "victim"
    fetch(swarm.magnet, root, swarm.options())
    victim.write_bytes(b"precious")
    (root / "tokenizer.model").symlink_to(victim)
    given = models / "fits.model"

    fetch(swarm.magnet, root, swarm.options(tokenizer=given, force=True))

    assert victim.read_bytes() == b"precious"
    assert (root / "tokenizer.model").read_bytes() == given.read_bytes()


@pytest.mark.parametrize("force", [False, True], ids=["", "force"])
def test_a_torrents_own_tokenizer_is_not_replaced(swarm, models, force, tmp_path):
    source = tmp_path / "source"
    (source / "ckpt-0").mkdir(parents=True)
    names = ["config.json", "tokenizer.model"]
    names += [name for name in swarm.files if name.startswith("ckpt-0/")]
    for name in names:
        origin = models / "fits.model" if name == "tokenizer.model" else swarm.root / name
        (source / name).write_bytes(origin.read_bytes())
    torrent = build_metainfo(source, names, name="x", piece_length=16384)
    path = tmp_path / "x.torrent"
    path.write_bytes(torrent)

    with seeding(source, torrent) as (host, port):
        options = swarm.options(peers=(f"{host}:{port}",))
        fetch(str(path), tmp_path / "got", options)
        another = replace(options, tokenizer=models / "another.model", force=force)
        with pytest.raises(UsageError, match=r"tokenizer\.model"):
            fetch(str(path), tmp_path / "got", another)

    own = (tmp_path / "got/tokenizer.model").read_bytes()
    assert own == (models / "fits.model").read_bytes()
