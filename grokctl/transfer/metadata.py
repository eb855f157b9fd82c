"""The metadata of a magnet link from the swarm, or the hub to ask where no peer sends it."""

import time

from grokctl.errors import StalledError
from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit
from grokctl.paths import PRIVATE
from grokctl.text import format_number
from grokctl.transfer.destination import bare_torrent
from grokctl.transfer.download import stalled
from grokctl.transfer.hub_fetch import HubSource, hub_for, metadata_patience
from grokctl.transfer.sources import Endpoint, FetchOptions, FetchRequest, parse_endpoint, resolve
from grokctl.transfer.swarm import Swarm
from grokctl.transfer.swarm_types import NetworkOptions


class NoMetadataError(Exception):
    """No peer sends the metadata, and there is a hub to ask."""

    def __init__(self, hub: HubSource, stall: StalledError) -> None:
        super().__init__(str(stall))
        self.hub = hub
        self.stall = stall


def network_options(options: FetchOptions) -> NetworkOptions:
    """How a download may use the network."""
    return NetworkOptions(
        bind=options.bind,
        port=options.port,
        proxy=options.proxy,
        dht=options.dht and not options.is_local,
        lsd=options.lsd,
        connections=options.connections,
        allows_shared_addresses=bool(options.peers),
        keeps_seeders=bool(options.mirrors),
    )


def resolved_peers(options: FetchOptions) -> list[Endpoint]:
    """The addresses of the peers that the user names."""
    return resolve([parse_endpoint(peer) for peer in options.peers])


def metadata_alone(request: FetchRequest, observe: Observer) -> bytes:
    """A torrent with the metadata of the swarm, for a plan; raises as `receive_metadata` does."""
    with Swarm(network_options(request.options)) as swarm:
        torrent, _ = receive_metadata(swarm, request, resolved_peers(request.options), observe)
    return torrent


def receive_metadata(
    swarm: Swarm, request: FetchRequest, peers: list[Endpoint], observe: Observer
) -> tuple[bytes, list[Endpoint]]:
    """Receive the metadata from the swarm.

    Returns:
        A torrent, and the peers including new ones.

    Raises:
        NoMetadataError: No peer sends it, and there is a hub to ask.
        StalledError: No peer sends it, and there is none.
    """
    observe(Started(stage=Stage.METADATA, unit=Unit.NOTHING))
    infohash, timeout_s = request.origin.infohash, metadata_patience(request)
    deadline = time.monotonic() + timeout_s
    swarm.join_for_metadata(
        infohash, trackers=request.trackers, peers=peers, folder=request.root / PRIVATE / "metadata"
    )
    while (info := swarm.metadata()) is None:
        now = swarm.poll(min(1.0, timeout_s))
        detail = f"waiting for metadata: {format_number(now.peers, 'peer')}"
        observe(Advanced(stage=Stage.METADATA, detail=detail))
        if time.monotonic() > deadline:
            stall = stalled("metadata", request, swarm, now)
            hub = hub_for(request)
            if hub is None:
                raise stall
            raise NoMetadataError(hub, stall)
    met = swarm.leave()
    observe(Finished(stage=Stage.METADATA))
    return bare_torrent(info, request.trackers), list(dict.fromkeys([*peers, *met]))
