"""Remove personal data and credentials from text."""

import ipaddress
import os
import pwd
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from grokctl.machine.environment import PUBLIC

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
    r"(?:[^\s:/]*:\S*@|[^\s/]*@)"  # a password may have any character
    r"|(?<![^\s=,;'\"(<\[])[^\s:@/=,;'\"]+:[^\s@]+@(?=[\w\[.-])"
)
_ACCOUNT: Final = re.compile(r"(?<![\w.+%-])[\w.+%-]+@(?=[\w\[])")
"""The user of a mail address or of an ssh target."""
_NAMES: Final = (
    r"[\w.-]*(?:(?<!max-)(?<!prompt-)token(?!izer|[_-]ids)|secret|passw|passphrase|pwd"
    r"|credential|cookie|passkey|signature|session[_-]?(?:id|key)|api[_-]?key|(?:access|private|ssh|signing|license|encryption)[_-]?key|auth(?!or))[\w.-]*"
)
_SHORT_NAMES: Final = (
    r"(?:[\w.-]*[_.-])?"
    r"(?:pass|pw|pat|otp|totp|mfa|pin|sig|sas|jwt|csrf|xsrf|sid|nonce|salt|dsn|creds?)"
)
"""Whole words of a name that are parts of harmless ones: `pass` of `bypass`, `pin` of `spin`."""
_VALUE: Final = r"(?:\"(?:[^\"\\]|\\.)*\"?|'[^']*'?|[^\s&;,\"']+)"
_ASSIGNED: Final = re.compile(
    rf"(?P<name>(?<![\w.-])(?:{_NAMES}|{_SHORT_NAMES}|[\w.-]*key|user(?:name)?|login))(?P<between>\"?'?\s*=\s*){_VALUE}"
    rf"|(?P<key>(?<![\w.-])(?:{_NAMES}|(?:[\w.-]*[_.-])?(?:pass|pw|otp|totp|pin|jwt|creds?)))(?P<colon>\"?'?:\s*){_VALUE}"
    rf"|(?P<option>(?<![\w-])--?{_NAMES})(?P<blank>\s+)(?![-\s]){_VALUE}",
    re.IGNORECASE,
)
_SPOKEN: Final = re.compile(
    rf"(?P<name>\b(?:password|passwd|passphrase|passcode|pwd)(?:\s+(?:is|was))?\s*:?\s+)(?![-\s]){_VALUE}"
    rf"|(?P<brief>\b(?:token|secret|key|pin|otp)(?:\s+(?:is|was))?\s*:?\s+)"
    r"(?:[0-9]{4,8}\b|(?=[^\s0-9]*[0-9])(?=[^\sa-z]*[a-z])[A-Za-z0-9+/=]{6,}(?![\w.-]))",
    re.IGNORECASE,
)
"""A secret in a sentence."""
_TYPED: Final = re.compile(
    rf"(?P<name>(?<![\w-])(?:-[uU]|--(?:proxy-)?user)[\s=]*)(?:\"[^\"]*:[^\"]*\"|'[^']*:[^']*'|[^\s:'\"]+:\S+)"
    rf"|(?P<program>\b(?:mysql\w*|mariadb[\w-]*|mongo\w*|sshpass|plink|redis-cli|ldap\w+|unzip|zip|7z\w?)"
    rf"\s(?:[^\n|;&]{{0,200}}?\s)?-[paPw])\s*(?![-\s]){_VALUE}"
)
"""A secret that programs take in an option without a name."""
_HOOKS: Final = re.compile(
    r"(?P<name>\b(?:hooks\.slack\.com|discord(?:app)?\.com/api/(?:v[0-9]+/)?webhooks"
    r"|[\w.-]*webhook\.office\.com|api\.telegram\.org)/)[^\s\"'<>]+",
    re.IGNORECASE,
)
"""Addresses that let whoever knows them write."""
_SECRET: Final = re.compile(rf"{_NAMES}|{_SHORT_NAMES}|[\w.-]*key", re.IGNORECASE)
_COOKIES: Final = re.compile(r"(?P<name>\b(?:set-)?cookie2?\"?'?\s*[:=]\s*)[^\n]+", re.IGNORECASE)
"""Of which one line has several."""
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
"""Variables of schedulers with names of hosts and people."""
_TOKENS: Final = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"eyJ[\w-]{5,}\.[\w-]+(?:\.[\w-]*)?"  # JSON web tokens
    r"|(?:hf|gh[a-z]|npm|r8|dop_v1|glpat|github_pat|pypi|nvapi|sk|pk|rk|xox[a-z]|ya29|AIza|whsec"
    r"|glsa|glc|sbp|pul|atlasv1|ATATT|SG|shp[a-z]{2}|hv[sbr]|dckr_pat|lin_api|figd|tskey|sq0[a-z]{3}|gsk)"
    r"(?:[_.-]|(?<=AIza))[\w.-]{6,}"
    r"|(?i:AGE-SECRET-KEY-)\w+"
    r"|(?:AKIA|ASIA|AROA|AIDA|ABIA|ACCA)[A-Z0-9]{12,}"
    r"|(?:ssh-[a-z0-9-]+|ecdsa-[\w-]+|sk-ssh-\S+)\s+AAAA[\w+/=]+(?:\s+\S+@\S+)?"
    r"|AAAA[BCE][\w+/=]{20,}"
    r"|[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"  # of a GPU or a machine
    r"|[0-9a-fA-F]{32,}"
    r")"
)
_WORD: Final = re.compile(r"(?<![A-Za-z0-9])[A-Za-z0-9]{15,}(?![A-Za-z0-9])")
_RANDOM: Final = re.compile(
    r"(?<![\w+-])(?=[\w+-]*[a-z])(?=[\w+-]*[A-Z])(?=[\w+-]*[0-9])[\w+-]{24,}={0,2}(?![\w+/-])"
    r"|(?<![\w+/])(?=[\w+/]*[a-z])(?=[\w+/]*[A-Z])(?=[\w+/]*[0-9])[\w+/]{40}(?![\w+/=-])"
)
"""Long words of capitals, small letters and digits: none of our own words looks like that."""
_HOME_FOLDER: Final = re.compile(
    r"(?P<before>/(?:(?:(?:export|nfs|net|mnt|gpfs|lustre|global|work|data)/)*(?:home[0-9]*/jusers|[a-z]{0,3}home|homes|u|j?users)[0-9]*"
    r"(?:/[a-z]{1,2}(?=/(?:[a-z]/)?(?:\w{3}|\[user\]))){0,2}+|var/home|Users"
    r"|afs/[\w.-]+/(?:users?|u|home|people)(?:/[a-z]{1,2}(?=/[\w\[])){0,2}+)/"
    r"|(?<![\w.])/fsx/"
    r"|(?<![A-Za-z])[A-Za-z]:\\+(?:Users|Documents and Settings)\\+)"
    r"(?!\[user\]|jusers/)[^/\\\s:,;'\"]+"
)
_HARDWARE_ADDRESS: Final = re.compile(r"(?<![\w:-])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![\w:-])")
_NUMBERS: Final = re.compile(
    r"(?<![\w.-])(?<!==)(?<!cu[0-9]{2} )[0-9]{1,3}(?:\.[0-9]{1,3}){3}(?![\w-]|\.[0-9])"
    r"|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}(?:[0-9]{1,3}(?:\.[0-9]{1,3}){3}|[0-9A-Fa-f]{0,4})"
    r"(?:%[\w.-]+)?(?![\w:])"
)
_LONGEST: Final = 8192
"""Characters of one text that are kept."""
_LONGEST_NAME: Final = 255
_COMMON_USERS: Final = frozenset({"", "root", "nobody"})
_COMMON_HOSTS: Final = frozenset({"", "localhost", "cpu", "gpu", "tpu", "jax", "linux"})
"""Host names that identify nobody, and occur in reports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Redaction:
    """Removes the private data of this machine and its user from text.

    Removes too much rather than too little, but never a part of a word.
    """

    home: Path
    """The user's home folder: becomes `~`."""
    root: Path | None = None
    """The home of grokctl: becomes `$GROKCTL_HOME`."""
    user: str = ""
    """The user's name: removed where it is a whole component of a path."""
    hosts: tuple[str, ...] = ()
    """The names of this host and of its proxies."""

    @classmethod
    def here(cls, root: Path) -> "Redaction":
        """The redaction of this process, with the home of grokctl."""
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:  # a container's user often has no name
            user = os.environ.get("USER", "")
        home = Path(os.path.expanduser("~"))  # noqa: PTH111  # pathlib raises where there is none
        hosts = (*_own_names(), *_proxies())
        return cls(home=home, root=root.absolute(), user=user, hosts=hosts)

    def __call__(self, text: str) -> str:
        """The text without private data and without terminal control codes."""
        text = _KEY_BLOCK.sub(GONE, text[:_LONGEST])
        text = _BLANK.sub(" ", _CONTROL.sub("", text))
        text = _LOGIN.sub(lambda match: f"{match['scheme'] or ''}{GONE}@", text)
        text = _HEADER.sub(rf"\g<name>{GONE}", text)
        text = _COOKIES.sub(rf"\g<name>{GONE}", text)
        text = _SCHEME.sub(rf"\g<name>{GONE}", text)
        text = _HOOKS.sub(rf"\g<name>{GONE}", text)
        text = _TYPED.sub(lambda match: f"{match['name'] or match['program'] + ' '}{GONE}", text)
        text = _ASSIGNED.sub(_without_value, text)
        text = _SPOKEN.sub(lambda match: f"{match['name'] or match['brief']}{GONE}", text)
        text = _PLACES.sub(rf"\g<name>{GONE}", text)
        text = _TOKENS.sub(GONE, text)
        text = _RANDOM.sub(GONE, text)
        text = _WORD.sub(lambda match: GONE if _is_random(match[0]) else match[0], text)
        text = _ACCOUNT.sub(f"{GONE}@", text)
        text = self._without_folders(text)
        text = _HARDWARE_ADDRESS.sub(_ADDRESS, text)
        return self._without_host(_NUMBERS.sub(_without_address, text))

    def variable(self, name: str, value: str) -> str:
        """The value of an environment variable, whose name may show that it is private."""
        if name in PUBLIC:
            return self(value)
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
        text = _HOME_FOLDER.sub(rf"\g<before>{_USER}", text)
        if self.user not in _COMMON_USERS:
            text = re.sub(rf"(?<=[/~]){re.escape(self.user)}(?=[/\s:,;'\")]|$)", _USER, text)
        return text

    def _without_host(self, text: str) -> str:
        for name in sorted(set(self.hosts) - _COMMON_HOSTS, key=len, reverse=True):
            # such as frontier7-ib0, and frontier7.example.org; with a number, no usual word begins
            # or ends so: node-frontier7 and frontier7b
            before = r"(?:[A-Za-z0-9]+-)*" if re.search("[0-9]", name) else ""
            after = r"(?:[A-Za-z]{1,4})?" if name[-1:].isdigit() else ""
            whole = (
                rf"(?<![\w.-]){before}{re.escape(name)}{after}"
                r"(?:-[A-Za-z]+[0-9]*)?(?:\.[\w.-]*\w)?(?![\w-])"
            )
            text = re.sub(whole, _HOST, text, flags=re.IGNORECASE)
        return text


def _own_names() -> Iterator[str]:
    """The names by which this machine knows itself; asks no name server."""
    names = {socket.gethostname(), os.uname().nodename}
    for place in ("/etc/hostname", "/proc/sys/kernel/hostname"):
        with suppress(OSError, UnicodeError), Path(place).open(encoding="utf-8") as file:
            names.add(file.read(_LONGEST_NAME).strip())
    with suppress(OSError, UnicodeError), Path("/etc/hosts").open(encoding="utf-8") as file:
        for line in file.read(_LONGEST).splitlines():
            words = line.partition("#")[0].split()
            if names & set(words):
                names |= set(words[1:])
    for name in sorted(names):
        if not name.startswith(("localhost", "ip6-")):
            yield name
            yield name.partition(".")[0]


def _is_random(word: str) -> bool:
    """Whether a word is one that no person has chosen: its kinds of characters change often."""
    kinds = ["0" if c.isdigit() else "a" if c.islower() else "A" for c in word]
    changes = sum(before != after for before, after in pairwise(kinds))
    return "0" in kinds and 3 * changes >= len(word)


def _proxies() -> Iterator[str]:
    """Proxy hosts of the environment, as far as their names are specific."""
    for name, value in os.environ.items():
        if name.lower() in {"http_proxy", "https_proxy", "all_proxy"}:
            host = value.rpartition("@")[2].rpartition("//")[2].partition("/")[0].partition(":")[0]
            if "." in host:
                yield host


def _without_value(match: re.Match[str]) -> str:
    name = match["name"] or match["key"] or match["option"]
    return f"{name}{match['between'] or match['colon'] or match['blank']}{GONE}"


def _without_address(match: re.Match[str]) -> str:
    try:
        address = ipaddress.ip_address(match[0])
    except ValueError:  # a time, or a version
        return match[0]
    return match[0] if address.is_loopback or address.is_unspecified else _ADDRESS
