"""Take out of a text what says who somebody is, or lets others in as them."""

import ipaddress
import os
import pwd
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

GONE: Final = "[redacted]"
_USER: Final = "[user]"
_HOST: Final = "[host]"
_ADDRESS: Final = "[address]"

_CONTROL: Final = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]")
_BLANK: Final = re.compile(r"[\x09-\x0d\x1c-\x1f\x85\u2028\u2029]+")
_KEY_BLOCK: Final = re.compile(
    r"-----BEGIN [A-Z0-9 ]*KEY( BLOCK)?-----.*?(-----END [A-Z0-9 ]*KEY( BLOCK)?-----|\Z)", re.DOTALL
)
_LOGIN: Final = re.compile(
    r"(?P<scheme>(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:[^\s:/]*:\S*@|[^\s/]*@)"  # a password holds anything
    r"|(?<![^\s=,;'\"(<\[])[^\s:@/=,;'\"]+:[^\s@]+@(?=[\w\[.-])"
)
_ACCOUNT: Final = re.compile(r"(?<![\w.+%-])[\w.+%-]+@(?=[\w\[])")
"""Of a mail address, or of what ssh is told."""
_NAMES: Final = (
    r"[\w.-]*(?:(?<!max-)(?<!prompt-)token(?!izer|[_-]ids)|secret|passw|passphrase|pwd"
    r"|credential|cookie|signature|session[_-]?(?:id|key)|api[_-]?key|(?:access|private|ssh|signing|license|encryption)[_-]?key|auth(?!or))[\w.-]*"
)
_VALUE: Final = r"(?:\"(?:[^\"\\]|\\.)*\"?|'[^']*'?|[^\s&;,\"']+)"
_ASSIGNED: Final = re.compile(
    rf"(?P<name>(?<![\w.-])(?:{_NAMES}|[\w.-]*key|user(?:name)?|login))(?P<between>\"?'?\s*=\s*){_VALUE}"
    rf"|(?P<said>(?<![\w.-])(?:{_NAMES}))(?P<colon>\"?'?:\s*){_VALUE}"
    rf"|(?P<option>(?<![\w-])--?{_NAMES})(?P<blank>\s+)(?![-\s]){_VALUE}",
    re.IGNORECASE,
)
_SECRET: Final = re.compile(rf"{_NAMES}|[\w.-]*key", re.IGNORECASE)
_HEADER: Final = re.compile(r"(?P<name>authorization\"?'?\s*[:=]\s*)[^\"'\n]+", re.IGNORECASE)
_SCHEME: Final = re.compile(
    r"(?P<name>\b(?:[Bb]earer|[Bb]asic|BEARER|BASIC)\s+)"
    r"(?=\S*[0-9=]|\S[\w+/]*[A-Z])[\w+/=.~-]{6,}"
)
_PLACES: Final = re.compile(
    r"(?P<name>(?<![\w.-])[A-Z][A-Z0-9_]*(?:NODELIST|NODENAME|NODEID|HOST|HOSTS|HOSTNAMES?|ADDR"
    r"|ADDRESS|ADDRESSES|HOSTID|COMM_ID|USER|USERNAME|LOGNAME|ACCOUNT|JOB_NAME)=)\S.*",
    re.DOTALL,
)
"""Variables of schedulers that name hosts and people."""
_TOKENS: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"eyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*)?"  # JSON web tokens
    r"|(?:hf|gh[a-z]|npm|r8|dop_v1|glpat|github_pat|pypi|nvapi|sk|pk|rk|xox[a-z]|ya29|AIza|whsec)"
    r"(?:[_.-]|(?<=AIza))[\w.-]{6,}"
    r"|(?:AKIA|ASIA|AROA|AIDA|ABIA|ACCA)[A-Z0-9]{12,}"
    r"|(?:ssh-[a-z0-9-]+|ecdsa-[\w-]+|sk-ssh-\S+)\s+AAAA[\w+/=]+(?:\s+\S+@\S+)?"
    r"|AAAA[BCE][\w+/=]{20,}"
    r"|[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"  # of a GPU or a machine
    r"|[0-9a-fA-F]{32,}"
    r")"
)
_RANDOM: Final = re.compile(
    r"(?<![\w+-])(?=[\w+-]*[a-z])(?=[\w+-]*[A-Z])(?=[\w+-]*[0-9])[\w+-]{24,}={0,2}(?![\w+/-])"
    r"|(?<![\w+/])(?=[\w+/]*[a-z])(?=[\w+/]*[A-Z])(?=[\w+/]*[0-9])[\w+/]{40}(?![\w+/=-])"
)
"""Long, with capitals, small letters and digits in one piece: no word of ours looks like that."""
_SOMEBODYS: Final = re.compile(r"(?P<before>/(?:home|Users)/)(?!\[user\])[^/\s:,;'\"]+")
_HARDWARE_ADDRESS: Final = re.compile(r"(?<![\w:-])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![\w:-])")
_NUMBERS: Final = re.compile(
    r"(?<![\w.-])(?<!==)(?<!cu[0-9]{2} )[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])"
    r"|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9A-Fa-f]{0,4})"
    r"(?:%[\w.-]+)?(?![\w:])"
)
_LONGEST: Final = 8192
"""Characters of one text that are looked at, and shown."""
_NOBODYS: Final = frozenset({"", "root", "nobody"})
_ANYBODYS: Final = frozenset({"", "localhost", "cpu", "gpu", "tpu", "jax", "linux"})
"""Names of hosts that say nothing, and are words of a report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redaction:
    """What is private here, so that a text can be read by strangers.

    Better too much than too little, but never a part of a word.
    """

    home: Path
    """Of the user: becomes `~`."""
    root: Path | None = None
    """Home of grokctl: becomes `$GROKCTL_HOME`."""
    user: str = ""
    """Goes where it is a whole component of a path."""
    hosts: tuple[str, ...] = ()
    """This one, and those that it sends its traffic through."""

    @classmethod
    def here(cls, root: Path) -> "Redaction":
        """For this process, with the home of grokctl."""
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # a container's user often has no name
            user = os.environ.get("USER", "")
        home = Path(os.path.expanduser("~"))  # noqa: PTH111  # pathlib raises where there is none
        own = socket.gethostname()
        hosts = (own, own.partition(".")[0], *_proxies())
        return cls(home=home, root=root.absolute(), user=user, hosts=hosts)

    def __call__(self, text: str) -> str:
        """The text without anything private, and without codes that a terminal would obey."""
        text = _KEY_BLOCK.sub(GONE, text[:_LONGEST])
        text = _BLANK.sub(" ", _CONTROL.sub("", text))
        text = _LOGIN.sub(lambda found: f"{found['scheme'] or ''}{GONE}@", text)
        text = _HEADER.sub(rf"\g<name>{GONE}", text)
        text = _SCHEME.sub(rf"\g<name>{GONE}", text)
        text = _ASSIGNED.sub(_without_value, text)
        text = _PLACES.sub(rf"\g<name>{GONE}", text)
        text = _TOKENS.sub(GONE, text)
        text = _RANDOM.sub(GONE, text)
        text = _ACCOUNT.sub(f"{GONE}@", text)
        text = self._without_folders(text)
        text = _HARDWARE_ADDRESS.sub(_ADDRESS, text)
        return self._without_host(_NUMBERS.sub(_without_address, text))

    def variable(self, name: str, value: str) -> str:
        """The value of an environment variable, whose name may say that it is private."""
        if value and (_SECRET.fullmatch(name) or name.lower() == "no_proxy"):
            return GONE
        return self(f"{name}={value}").partition("=")[2]

    def _without_folders(self, text: str) -> str:
        folders = {str(self.home): "~"}
        if self.root is not None:
            folders[str(self.root)] = "$GROKCTL_HOME"
        for folder in sorted(folders, key=len, reverse=True):
            if folder.startswith("/") and folder != "/":
                name = folders[folder]
                text = re.sub(rf"(?<![\w./~-]){re.escape(folder)}(?![\w.-])", lambda _: name, text)  # noqa: B023
        text = _SOMEBODYS.sub(rf"\g<before>{_USER}", text)
        if self.user not in _NOBODYS:
            text = re.sub(rf"(?<=[/~]){re.escape(self.user)}(?=[/\s:,;'\")]|$)", _USER, text)
        return text

    def _without_host(self, text: str) -> str:
        for name in sorted(set(self.hosts) - _ANYBODYS, key=len, reverse=True):
            whole = rf"(?<![\w.-]){re.escape(name)}(?:\.[\w.-]*\w)?(?![\w-])"
            text = re.sub(whole, _HOST, text, flags=re.IGNORECASE)
        return text


def _proxies() -> Iterator[str]:
    """Hosts that the environment names as proxies, and that say whose they are."""
    for name, value in os.environ.items():
        if name.lower() in {"http_proxy", "https_proxy", "all_proxy"}:
            host = value.rpartition("@")[2].rpartition("//")[2].partition("/")[0].partition(":")[0]
            if "." in host:
                yield host


def _without_value(found: re.Match[str]) -> str:
    name = found["name"] or found["said"] or found["option"]
    return f"{name}{found['between'] or found['colon'] or found['blank']}{GONE}"


def _without_address(found: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(found[0])
    except ValueError:  # a time, or a version
        return found[0]
    return found[0] if address.is_loopback or address.is_unspecified else _ADDRESS
