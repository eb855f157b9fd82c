"""The files of a release at a hub, with the hash that the hub names for each of them."""

import json
import re
import time
from dataclasses import dataclass
from typing import Any, Final, Self
from urllib.parse import quote, urlsplit

from grokctl.checkpoint.hub_record import HubFile, HubPromise
from grokctl.checkpoint.release_files import LARGEST_EXTRA, is_document, is_tensor_file
from grokctl.errors import FetchError
from grokctl.events import Advanced, Finished, Observer, Stage, Started, Unit
from grokctl.paths import CKPT
from grokctl.text import format_clock, printable, shown_url
from grokctl.transfer.web import AbsentError, BusyError, RefusedError, Web, WebError

_FOLDER: Final = re.compile(
    r"(?P<endpoint>https?://[^?#]+?)/(?P<name>[\w.-]+/[\w.-]+)/resolve/(?P<revision>[^/?#]+)/?"
)
_NEXT: Final = re.compile(r'<([^<>]*)>\s*;\s*rel="?next"?')
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_SHA256: Final = re.compile("[0-9a-f]{64}")
_PATH: Final = re.compile(r"[\w.+/ -]{1,500}")
_LARGEST_PAGE: Final = 8 * 2**20
_MOST_PAGES: Final = 20
_MOST_NBYTES: Final = 2**44
_LAYOUTS: Final = (CKPT, "ckpt", "")
"""Folders of the tensors in a repository: today's, that of the first upload, and none."""
_RETRY_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Hub:
    """A repository of a hub that speaks as Hugging Face's does."""

    endpoint: str
    """Such as `https://huggingface.co`; may have credentials."""
    name: str
    """Such as `xai-org/grok-1`."""
    revision: str

    @classmethod
    def at(cls, folder: str) -> Self | None:
        """The hub of a mirror's address, `ENDPOINT/OWNER/NAME/resolve/REVISION`; None if none."""
        match = _FOLDER.fullmatch(folder)
        if match is None:
            return None
        return cls(match["endpoint"], match["name"], match["revision"])

    @property
    def url(self) -> str:
        """Of the repository."""
        return f"{self.endpoint}/{self.name}"

    @property
    def shown(self) -> str:
        """The same without credentials."""
        return shown_url(self.url)

    @property
    def api(self) -> str:
        """The address of what it says about the repository."""
        return f"{self.endpoint}/api/models/{self.name}"


def ask_hub(web: Web, hub: Hub, *, patience_s: float, observe: Observer) -> HubPromise:
    """Ask a hub for the files of a release, again after failures that may pass.

    Args:
        web: For the requests.
        hub: Whom to ask.
        patience_s: Seconds without a usable answer; the pauses that it asks for do not count.
        observe: Receives what is waited for.

    Raises:
        FetchError: It refuses, has no such release, or does not answer.
    """
    observe(Started(stage=Stage.METADATA, unit=Unit.NOTHING))
    deadline, pause = time.monotonic() + patience_s, _RETRY_S
    while True:
        try:
            promise = _list(web, hub)
        except (AbsentError, RefusedError) as error:
            raise FetchError(f"hub {hub.shown}: {error}", f"curl -I {hub.shown}") from error
        except WebError as error:
            asked = error.wait_s if isinstance(error, BusyError) else 0.0
            deadline += asked
            if time.monotonic() + pause > deadline:
                message = f"hub {hub.shown}: no list of files for {format_clock(patience_s)}"
                raise FetchError(f"{message} ({error})", f"curl -I {hub.shown}") from error
            until = time.monotonic() + max(pause, asked)
            while (left := until - time.monotonic()) > 0:
                detail = f"{error}; asking again in {format_clock(left)}"
                observe(Advanced(stage=Stage.METADATA, detail=detail))
                time.sleep(min(left, 0.25))
            pause = min(2 * pause, 30.0)
        else:
            observe(Finished(stage=Stage.METADATA))
            return promise


def _list(web: Web, hub: Hub) -> HubPromise:
    """The promise of a hub.

    Raises:
        WebError: It cannot be had.
    """
    about, _ = _read(web, f"{hub.api}/revision/{quote(hub.revision, safe='')}")
    commit = about.get("sha") if isinstance(about, dict) else None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise RefusedError(f"names no commit for {printable(hub.revision, limit=60)}")
    tree = f"{hub.api}/tree/{commit}"
    entries: list[Any] = []
    query = "recursive=true"
    for _ in range(_MOST_PAGES):
        page, link = _read(web, f"{tree}?{query}")
        if not isinstance(page, list):
            raise RefusedError("sends no list of files")
        entries += page
        following = _NEXT.search(link)
        if following is None:
            break
        query = urlsplit(following[1]).query  # other mirrors name the first hub's address
    else:
        raise RefusedError(f"lists more than {_MOST_PAGES} pages of files")
    return HubPromise(url=hub.shown, commit=commit, files=_release_of(entries))


def _read(web: Web, url: str) -> tuple[Any, str]:
    data, link = web.read(url, _LARGEST_PAGE)
    try:
        return json.loads(data), link
    except (ValueError, RecursionError) as error:
        raise RefusedError("answers with something other than JSON") from error


def _release_of(entries: list[Any]) -> tuple[HubFile, ...]:
    """The files of a release among those of a repository, by place.

    Raises:
        RefusedError: There are no tensors, or one has no sha256.
    """
    files = [file for entry in entries if (file := _file_of(entry)) is not None]
    tensors = [file for file in files if file.place.startswith(f"{CKPT}/")]
    folders = {file.path.rpartition("/")[0] for file in tensors}
    layout = next((folder for folder in _LAYOUTS if folder in folders), None)
    if layout is None:
        raise RefusedError(f"has no tensorNNNNN_000 in {CKPT}/ or ckpt/")
    chosen = {
        file.place: file
        for file in files
        if file not in tensors or file.path.rpartition("/")[0] == layout
    }
    if unnamed := [file.path for file in chosen.values() if not file.sha256 and file in tensors]:
        raise RefusedError(f"names no sha256 for {unnamed[0]}")
    if sum(file.nbytes for file in chosen.values()) > _MOST_NBYTES:
        raise RefusedError("lists more bytes than any release has")
    return tuple(chosen[place] for place in sorted(chosen))


def _file_of(entry: Any) -> HubFile | None:
    """A file that belongs to a release; None for any other, such as code and hidden files.

    Raises:
        RefusedError: The entry makes no sense.
    """
    try:
        if entry["type"] != "file":
            return None
        path, nbytes, blob = entry["path"], entry["size"], entry["oid"]
        large = entry.get("lfs") or {}
        sha256 = large.get("oid", "").removeprefix("sha256:")
        is_fine = type(nbytes) is int and nbytes >= 0 and bool(_COMMIT.fullmatch(blob))
        is_fine &= not large or (bool(_SHA256.fullmatch(sha256)) and large["size"] == nbytes)
    except (KeyError, TypeError, AttributeError) as error:
        raise RefusedError("lists a file in another form") from error
    name = path.rpartition("/")[2]
    is_tensor = is_tensor_file(name)
    is_small = "/" not in path and is_document((name,)) and nbytes <= LARGEST_EXTRA
    if not (is_tensor or is_small):
        return None
    if not (is_fine and _PATH.fullmatch(path)) or ".." in path.split("/"):
        raise RefusedError(f"lists {printable(path, limit=80)!r} in another form")
    place = f"{CKPT}/{name}" if is_tensor else name
    blob = "" if sha256 else blob  # of a large file, it is the hash of what stands for it in git
    return HubFile(path=path, place=place, nbytes=nbytes, sha256=sha256, blob=blob)
