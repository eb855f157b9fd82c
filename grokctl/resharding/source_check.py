"""What proves the source of a reshard while its files are read."""

from collections.abc import Sequence
from typing import Protocol, Self

from grokctl.checkpoint.receipt import Receipt
from grokctl.errors import Damage
from grokctl.events import Observer


class SourceCheck(Protocol):
    """Threads that hash the files of a source, as a context manager that ends them."""

    receipt: Receipt | None
    """Of a release, once it is proven."""
    identity: str | None
    """What the content is known by before all of it is there; None if it is there."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def include_all(self) -> None:
        """Hash also the files from which nothing is read: an earlier run has read them."""
        ...

    def follow(self, done: int, total: int, observe: Observer) -> None:
        """Hash as far as the reshard has come; wait if that is much farther.

        Args:
            done: Bytes written so far.
            total: Bytes that will be written.
            observe: Receives progress while it waits.
        """
        ...

    def finish(self, total: int, observe: Observer) -> Sequence[Damage]:
        """Hash the rest.

        Args:
            total: Bytes that were written.
            observe: Receives progress.

        Returns:
            The damage to a ready checkpoint.

        Raises:
            GrokctlError: A release is damaged, or the machine refuses to read a file.
        """
        ...
