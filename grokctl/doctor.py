"""Say what a machine can do with Grok-1, and the one line that mends what it cannot."""

from dataclasses import dataclass

from grokctl.checks import Check, Status
from grokctl.plans import Hardware, Plan


@dataclass(frozen=True, slots=True)
class Group:
    """Checks that belong together."""

    title: str
    checks: tuple[Check, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """Something that can be done now, or why not."""

    name: str
    """`download`, `reshard` or `run`."""
    status: Status
    """OK, WARN (yes, but), FAIL (no), SKIP (done, or not to be known)."""
    detail: str
    """Such as `yes, about 9 minutes` or what is missing, with both numbers."""
    command: str = ""
    """To paste."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found, what would fit, and what to do next."""

    groups: tuple[Group, ...]
    hardware: Hardware
    """What plans are for: this machine's, or what was asked about."""
    is_here: bool
    """Whether that is this machine's."""
    plans: tuple[Plan, ...]
    abilities: tuple[Ability, ...]

    @property
    def is_ok(self) -> bool:
        """Whether no check failed, and hardware that was asked about can run something."""
        fails = any(c.status is Status.FAIL for group in self.groups for c in group.checks)
        return not fails and (self.is_here or any(plan.fits for plan in self.plans))
