"""One libtorrent session with one torrent: its alerts become snapshots, notes and our errors."""

import os
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, Self
from urllib.parse import urlsplit

import libtorrent as lt

from grokctl.checkpoint.torrent import Metainfo
from grokctl.errors import FetchError, GrokctlError
from grokctl.machine.limits import limit_in
from grokctl.os_errors import reason_of, refusal
from grokctl.paths import CONFIG, PRIVATE, TOKENIZER
from grokctl.text import format_number, printable, shown_url
from grokctl.transfer.proxy_bridge import ProxyBridge
from grokctl.transfer.resume_data import infohash_of
from grokctl.transfer.sources import Endpoint
from grokctl.transfer.swarm_settings import settings_pack
from grokctl.transfer.swarm_types import NetworkOptions, Snapshot, Transfer

_FLAGS = lt.torrent_flags

_WANTED: Final = 4
_FIRST: Final = 7
"""libtorrent's priority of wanted files and pieces."""
_REQUESTED: Final = 1
"""libtorrent's state of a requested block; a block in a higher state has arrived."""
_QUIET_S: Final = 60.0
"""Seconds with few peers after which uTP is tried."""
_FEW_PEERS: Final = 5
_DISK_S: Final = 600.0
"""Seconds that a flush may take."""
_FASTEST: Final = 2**31 - 1
"""Bytes per second: the largest limit that libtorrent can hold."""


class Swarm:
    """One libtorrent session with at most one torrent, as a context manager.

    Between calls only libtorrent's own threads run: `poll` turns alerts into snapshots, notes and
    errors on the caller's thread.

    Raises:
        FetchError: The address or port that the user named cannot be listened on.
        HardwareError: A limit of this process keeps libtorrent from starting.
    """

    def __init__(self, network: NetworkOptions) -> None:
        self.trackers: dict[str, str] = {}
        """Announce URL -> its last answer."""
        self.banned: list[str] = []
        """Addresses of peers that sent bad data."""
        self._network = network
        self._handle: lt.torrent_handle | None = None
        self._failure: GrokctlError | None = None
        self._notes: list[str] = []
        self._resume: bytes | None = None
        self._is_resume_requested = False
        self._seen: set[type[lt.alert]] = set()
        self._reserved: set[int] = set()
        self._quiet_since = time.monotonic()
        self._uses_utp = False
        self._bridge: ProxyBridge | None = None
        if network.proxy is not None and urlsplit(network.proxy).scheme == "http":
            self._bridge = ProxyBridge(network.proxy, bind=network.bind)
            network = replace(network, proxy=self._bridge.url, bind=None)
        self._session: lt.session | None = None
        try:
            self._session = _opened(network)
        except BaseException:
            self._close_bridge()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # dropping the last reference tells the trackers and joins libtorrent's threads
        self._handle = None
        self._session = None
        self._close_bridge()

    def _close_bridge(self) -> None:
        if self._bridge is not None:
            self._bridge.close()

    @property
    def session(self) -> lt.session:
        """The open session."""
        assert self._session is not None
        return self._session

    @property
    def handle(self) -> lt.torrent_handle:
        """The torrent that was added last."""
        assert self._handle is not None
        return self._handle

    def port(self, *, timeout_s: float) -> int:
        """The port that the session listens on.

        Raises:
            FetchError: It does not listen on any within `timeout_s` seconds.
        """
        deadline = time.monotonic() + timeout_s
        while not (port := self.session.listen_port()):
            if time.monotonic() > deadline:
                raise FetchError(f"{self._network.bind or 'this machine'}: no port to listen on")
            self.poll(0.1)
        return port

    # --- the torrent

    def join_for_metadata(
        self, infohash: str, *, trackers: Sequence[str], peers: Sequence[Endpoint], folder: Path
    ) -> None:
        """Join a swarm by its infohash alone, to receive the metadata and no payload.

        Args:
            infohash: 40 hexadecimal digits.
            trackers: Announce URLs.
            peers: The first peers to connect to.
            folder: One that does not exist; libtorrent wants a path, and writes nothing.
        """
        params = lt.add_torrent_params()
        params.info_hashes = lt.info_hash_t(lt.sha1_hash(bytes.fromhex(infohash)))
        params.save_path = str(folder)
        params.trackers = list(trackers)
        params.peers = list(peers)
        params.flags = _FLAGS.upload_mode | _FLAGS.default_dont_download
        self._add(params)

    def metadata(self) -> bytes | None:
        """The raw info dictionary, once a peer has sent it."""
        info = self.handle.torrent_file()
        return None if info is None else bytes(info.info_section())

    def add(self, transfer: Transfer) -> None:
        """Begin a transfer, with our own path for every file.

        Raises:
            FetchError: libtorrent refuses the torrent, or reads other files in it than we do.
        """
        try:
            params = lt.load_torrent_buffer(transfer.torrent)
        except RuntimeError as error:
            raise FetchError(f"torrent {transfer.metainfo.infohash}: {error}") from error
        assert params.ti is not None
        _refuse_disagreement(params.ti, transfer.metainfo)
        params.save_path = str(transfer.root)
        # relative to save_path, even if it looks absolute
        params.part_file_dir = PRIVATE
        params.renamed_files = dict(transfer.places)
        params.trackers = list(transfer.trackers)
        params.url_seeds = list(transfer.web_seeds)
        params.peers = list(transfer.peers)
        params.dht_nodes = []
        params.download_limit = rate_limit(transfer.max_download)
        params.upload_limit = rate_limit(transfer.max_upload)
        params.flags = _FLAGS.seed_mode if transfer.is_complete else 0
        if transfer.is_in_order:
            params.flags |= _FLAGS.sequential_download
        params.file_priorities = _priorities(transfer)
        if not transfer.is_complete:
            claims = transfer.claims
            params.have_pieces = [p in claims.have for p in range(transfer.metainfo.num_pieces)]
            params.unfinished_pieces = dict(claims.unfinished)
            params.total_uploaded = claims.uploaded
        self._add(params)
        for peer in transfer.peers:
            self.handle.connect_peer(peer)

    def leave(self) -> list[Endpoint]:
        """Leave the torrent; its files stay.

        Returns:
            Peers that answered: the first to connect to the next time.
        """
        peers = [
            peer.ip for peer in self.handle.get_peer_info() if peer.flags & peer.local_connection
        ]
        self._seen.discard(lt.torrent_removed_alert)
        self.session.remove_torrent(self.handle)
        self._wait_for(lt.torrent_removed_alert, timeout_s=5)
        self._handle = None
        return peers

    def _add(self, params: lt.add_torrent_params) -> None:
        try:
            self._handle = self.session.add_torrent(params)
        except RuntimeError as error:
            raise FetchError(f"torrent: refused by libtorrent: {error}") from error

    # --- progress

    def poll(self, timeout_s: float) -> Snapshot:
        """Wait for alerts, and return the progress.

        Args:
            timeout_s: Seconds to wait at most.

        Raises:
            DiskFullError: The disk is full.
            FetchError: A file could not be read or written for another reason, or libtorrent
                has given up.
        """
        self._process_alerts(timeout_s)
        if self._failure is not None:
            raise self._failure
        snapshot = self._snapshot()
        self._try_utp(snapshot)
        return snapshot

    def take_notes(self) -> list[str]:
        """News for the user since the last call, a line each."""
        notes, self._notes = self._notes, []
        return notes

    def limit_download(self, rate: float | None) -> None:
        """Receive at most this many bytes per second from the swarm."""
        self.handle.set_download_limit(rate_limit(rate))

    def _snapshot(self) -> Snapshot:
        if self._handle is None:
            return Snapshot()
        status = self._handle.status()
        states = lt.torrent_status.states
        is_checking = status.state in {states.checking_files, states.checking_resume_data}
        return Snapshot(
            done=status.total_wanted_done,
            downloaded=status.total_payload_download,
            uploaded=status.all_time_upload,
            rate=status.download_payload_rate,
            upload_rate=status.upload_payload_rate,
            peers=status.num_peers,
            seeders=status.num_seeds,
            is_checking=is_checking,
            has_wanted=status.is_finished and not is_checking and not self._reserved,
            has_everything=status.is_seeding,
        )

    def _try_utp(self, snapshot: Snapshot) -> None:
        """Connect by uTP too when TCP finds few peers: those behind NAT may need it.

        It is off at first because libtorrent prefers it, at a fifteenth of the speed.
        """
        now = time.monotonic()
        if snapshot.peers >= _FEW_PEERS or self._uses_utp or self._network.proxy:
            self._quiet_since = now
        elif now - self._quiet_since > _QUIET_S:
            self._uses_utp = True
            self.session.apply_settings({"enable_outgoing_utp": True})

    # --- pieces that mirrors bring

    @property
    def reserved(self) -> frozenset[int]:
        """Pieces that are not requested from the swarm."""
        return frozenset(self._reserved)

    def have(self) -> list[bool]:
        """Whether each piece is on disk."""
        return self.handle.status(lt.torrent_handle.query_pieces).pieces

    def requested_blocks(self) -> dict[int, int]:
        """Piece that was requested from the swarm -> number of its blocks that have arrived."""
        return {
            piece["piece_index"]: sum(block["state"] > _REQUESTED for block in piece["blocks"])
            for piece in self.handle.get_download_queue()
        }

    def reserve(self, pieces: Collection[int]) -> None:
        """Stop requesting pieces from the swarm."""
        for piece in pieces:
            self.handle.piece_priority(piece, 0)
        self._reserved.update(pieces)

    def unreserve(self, pieces: Collection[int]) -> None:
        """Request pieces from the swarm again, unless they have arrived."""
        for piece in pieces:
            self.handle.piece_priority(piece, _WANTED)
        self._reserved.difference_update(pieces)

    def write_piece(self, piece: int, data: bytes) -> None:
        """Write a piece that came from a mirror; `have` tells when it is on disk."""
        self.handle.add_piece(piece, data, lt.add_piece_flags_t.overwrite_existing)

    # --- disk and resume data

    def flush(self) -> None:
        """Write everything that was received to the operating system.

        Raises:
            DiskFullError: The disk is full.
            FetchError: It could not be written, or not within ten minutes.
        """
        if self._is_resume_requested:
            # its flush was requested earlier, and must not be taken for this one
            self._require(lt.cache_flushed_alert, timeout_s=_DISK_S)
        self._seen.discard(lt.cache_flushed_alert)
        self.handle.flush_cache()
        self._require(lt.cache_flushed_alert, timeout_s=_DISK_S)

    def request_resume_data(self) -> None:
        """Begin to gather resume data that includes the blocks of incomplete pieces.

        libtorrent's own flag does not flush incomplete pieces, and then claims nothing of them:
        with pieces of 16 MB and many peers, an interruption would cost gigabytes.
        """
        self._is_resume_requested = True
        self._seen.discard(lt.cache_flushed_alert)
        self.handle.flush_cache()

    def take_resume_data(self) -> bytes | None:
        """The resume data that arrived since the last call."""
        data, self._resume = self._resume, None
        return data

    def resume_data(self, *, timeout_s: float) -> bytes | None:
        """Resume data as of now; None while the torrent is being checked, or after a timeout."""
        if self._handle is None or self._snapshot().is_checking:
            return None
        self._seen -= {lt.save_resume_data_alert, lt.save_resume_data_failed_alert}
        self.request_resume_data()
        self._wait_for(
            lt.save_resume_data_alert, lt.save_resume_data_failed_alert, timeout_s=timeout_s
        )
        return self.take_resume_data()

    # --- alerts

    def _require(self, kind: type[lt.alert], *, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._wait_for(kind, timeout_s=0.2) and self._failure is None:
            if time.monotonic() > deadline:
                raise FetchError(f"disk: still busy after {timeout_s:.0f} s")
        if self._failure is not None:
            raise self._failure

    def _wait_for(self, *kinds: type[lt.alert], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while not self._seen & set(kinds):
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._process_alerts(min(left, 0.2))
        return True

    def _process_alerts(self, timeout_s: float) -> None:
        self.session.wait_for_alert(int(timeout_s * 1000))
        for alert in self.session.pop_alerts():
            self._seen.add(type(alert))
            self._process(alert)

    def _process(self, alert: lt.alert) -> None:
        match alert:
            case lt.cache_flushed_alert() if self._is_resume_requested:
                self._is_resume_requested = False
                self.handle.save_resume_data()
            case lt.save_resume_data_alert():
                self._resume = lt.write_resume_data_buf(alert.params)
            case lt.tracker_reply_alert():
                self.trackers[alert.url] = format_number(alert.num_peers, "peer")
            case lt.tracker_error_alert():
                reason = alert.failure_reason() or alert.error.message()
                self.trackers[alert.url] = printable(reason)
            case lt.peer_ban_alert():
                address = str(alert.endpoint[0])
                self.banned.append(address)
                self._notes.append(f"peer {address} sent bad data and is banned")
            case lt.listen_failed_alert() if self._network.bind or self._network.port:
                where = f"{alert.address}:{alert.port}"
                self._failure = FetchError(f"{where}: {alert.error.message()}")
            case _:
                self._failure = self._failure or _failure_in(alert)  # later ones follow from it
                self._notes.extend(_notes_in(alert))


def _opened(network: NetworkOptions) -> lt.session:
    """A session; libtorrent has only words for a limit of this process.

    Raises:
        HardwareError: A limit keeps it from starting its threads.
    """
    try:
        return lt.session(settings_pack(network))
    except RuntimeError as error:
        raise limit_in(str(error)) or FetchError(f"libtorrent: {error}") from error


def _refuse_disagreement(info: lt.torrent_info, metainfo: Metainfo) -> None:
    """Refuse a torrent that libtorrent and our own checks read differently."""
    layout = info.layout()
    theirs = [
        (layout.file_size(index), bool(layout.file_flags(index) & layout.flag_pad_file))
        for index in range(layout.num_files())
    ]
    ours = [(file.length, file.is_pad) for file in metainfo.files]
    same_hash = infohash_of(info.info_hashes(), metainfo) == metainfo.infohash
    if theirs != ours or info.piece_length() != metainfo.piece_length or not same_hash:
        raise FetchError(
            f"torrent {metainfo.infohash}: libtorrent reads {len(theirs)} files, grokctl reads "
            f"{len(ours)} different ones"
        )


def _priorities(transfer: Transfer) -> list[int]:
    """The priority of each file; pads have one only when every file is wanted."""
    wanted, files = set(transfer.wanted), transfer.metainfo.files
    if transfer.is_in_order:
        first = {index for index, place in transfer.places.items() if place in {CONFIG, TOKENIZER}}
        own = (_FIRST if file.index in first else _WANTED for file in files)
        return [
            priority if file.is_pad or file.index in wanted else 0
            for file, priority in zip(files, own, strict=True)
        ]
    if all(file.is_pad or file.index in wanted for file in files):
        return [_WANTED] * len(files)
    return [_WANTED if file.index in wanted else 0 for file in files]


def _failure_in(alert: lt.alert) -> GrokctlError | None:
    """The error that ends a transfer; libtorrent itself only pauses, or stops requesting."""
    match alert:
        case lt.torrent_error_alert():
            return _torrent_failure(alert.error.value(), alert.error.message())
        case lt.file_error_alert():
            return _disk_failure(alert.filename(), alert.error.value(), alert.error.message())
        case _:
            return None


def _torrent_failure(code: int, reason: str) -> GrokctlError:
    """The error that stopped a torrent: the system's, by its words, or libtorrent's own."""
    message = f"torrent: {printable(reason)}"
    if code > 0 and reason == os.strerror(code):
        error = refusal(OSError(code, reason), kind=FetchError)
        return type(error)(f"torrent: {reason_of(OSError(code, reason))}", error.hint)
    return FetchError(message)


def _disk_failure(file: str, code: int, reason: str) -> GrokctlError:
    return refusal(OSError(code, reason, printable(file, limit=4096)), kind=FetchError)


def _notes_in(alert: lt.alert) -> list[str]:
    """Harmless surprises that the user should know about."""
    match alert:
        case lt.fastresume_rejected_alert():
            return ["files changed since the last fetch: checking them"]
        case lt.url_seed_alert():
            reason = alert.error_message() or alert.error.message()
            return [f"web seed {printable(shown_url(alert.server_url()))}: {printable(reason)}"]
        case _:
            return []


def rate_limit(rate: float | None) -> int:
    """Bytes per second for libtorrent, whose numbers have 32 bits; -1 for no limit."""
    return -1 if rate is None else max(1, int(min(rate, _FASTEST)))
