"""The settings of a libtorrent session."""

import resource
from typing import Final
from urllib.parse import unquote, urlsplit

import libtorrent as lt

from grokctl import __version__
from grokctl.system import usable_cores
from grokctl.transfer.swarm_types import NetworkOptions

_OPEN_FILES: Final = 4096
"""Enough for the 770 files of a release at once, and for the peers."""
_CONNECTIONS: Final = 400
_MOST_HASHING_THREADS: Final = 8
_DHT_ROUTERS: Final = (
    "dht.libtorrent.org:25401,router.bittorrent.com:6881,"
    "dht.transmissionbt.com:6881,router.utorrent.com:6881"
)
_ALERTS: Final = (
    lt.alert_category.error
    | lt.alert_category.status
    | lt.alert_category.storage
    | lt.alert_category.tracker
    | lt.alert_category.peer
)


def settings_pack(network: NetworkOptions) -> "lt.settings_pack":
    """The settings of a session on this network."""
    open_files = _raise_open_files()
    settings: lt.settings_pack = {
        "alert_mask": _ALERTS,
        "alert_queue_size": 20_000,
        "user_agent": f"grokctl/{__version__} libtorrent/{lt.version}",
        "listen_interfaces": _interfaces(network),
        "enable_dht": network.dht,
        "dht_bootstrap_nodes": _DHT_ROUTERS,
        "enable_lsd": network.lsd,
        "enable_upnp": False,
        "enable_natpmp": False,
        "enable_outgoing_utp": False,
        "mixed_mode_algorithm": 0,
        "connections_limit": min(network.connections or _CONNECTIONS, open_files // 2),
        "connection_speed": 200,
        "torrent_connect_boost": 100,
        "min_reconnect_time": 10,
        "max_out_request_queue": 1500,
        "file_pool_size": min(1000, open_files // 4),
        "hashing_threads": min(usable_cores(), _MOST_HASHING_THREADS),
        "allow_multiple_connections_per_ip": network.allows_shared_addresses,
        "max_metadata_size": 8 * 2**20,
        "no_connect_privileged_ports": True,
        "ssrf_mitigation": True,
        "validate_https_trackers": True,
        "stop_tracker_timeout": 1,
        "close_redundant_connections": not network.keeps_seeders,
    }
    if network.bind is not None:
        settings["outgoing_interfaces"] = network.bind
    if network.port:
        settings["max_retry_port_bind"] = 0
        settings["listen_system_port_fallback"] = False
    if network.proxy is not None:
        settings.update(_proxied(network.proxy))
    return settings


def _raise_open_files() -> int:
    """Raise this process's soft limit of open files as far as useful and allowed; return it.

    The usual limit of 1024 is for programs that call `select`. With it, libtorrent would open and
    close files all the time.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return _OPEN_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def _interfaces(network: NetworkOptions) -> str:
    port = 6881 if network.port is None else network.port
    if network.bind is None:
        return f"0.0.0.0:{port},[::]:{port}"
    return f"[{network.bind}]:{port}" if ":" in network.bind else f"{network.bind}:{port}"


def _proxied(url: str) -> "lt.settings_pack":
    """Settings that send all traffic through a SOCKS proxy, and refuse any other way."""
    parts = urlsplit(url)
    types = lt.proxy_type_t
    assert parts.scheme != "http", "libtorrent would look names up: see ProxyBridge"
    assert parts.hostname is not None
    assert parts.port is not None
    return {
        "proxy_type": int(types.socks5 if parts.username is None else types.socks5_pw),
        "proxy_hostname": parts.hostname,
        "proxy_port": parts.port,
        "proxy_username": unquote(parts.username or ""),
        "proxy_password": unquote(parts.password or ""),
        "proxy_hostnames": True,
        "proxy_peer_connections": True,
        "proxy_tracker_connections": True,
        "anonymous_mode": True,
        "listen_interfaces": "",
        "enable_dht": False,
        "enable_lsd": False,
        "enable_incoming_tcp": False,
        "enable_incoming_utp": False,
    }
