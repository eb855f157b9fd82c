"""Published figures of accelerators: memory, its bandwidth, and arithmetic."""

import re
from dataclasses import dataclass
from typing import Final

from grokctl.errors import invalid

_GB: Final = 10**9
_TERA: Final = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """One kind of accelerator."""

    slug: str
    """Name for the command line, such as `h100-80gb`."""
    label: str
    """For people, such as `H100 80GB`."""
    platform: str
    """`gpu` or `tpu`."""
    memory: int
    """Bytes: the nameplate in decimal gigabytes, of which drivers report the same or more."""
    bandwidth: float
    """Bytes a second of its memory."""
    flops: float
    """Dense bfloat16 operations a second, with float32 sums."""
    has_fast_links: bool
    """Whether accelerators of one host have faster links than PCIe."""
    compute_capability: tuple[int, int] | None = None
    """Of an NVIDIA GPU."""
    names: tuple[str, ...]
    """Its names in drivers and in JAX."""
    source: str
    """Document with the figures."""


PUBLISHED: Final = (
    Published(
        slug="a100-40gb",
        label="A100 40GB",
        platform="gpu",
        memory=40 * _GB,
        bandwidth=1555e9,
        flops=312 * _TERA,
        has_fast_links=True,
        compute_capability=(8, 0),
        names=("NVIDIA A100-SXM4-40GB",),
        source="NVIDIA A100 Tensor Core GPU Architecture, whitepaper, 2020 (SXM4)",
    ),
    Published(
        slug="a100-80gb",
        label="A100 80GB",
        platform="gpu",
        memory=80 * _GB,
        bandwidth=2039e9,
        flops=312 * _TERA,
        has_fast_links=True,
        compute_capability=(8, 0),
        names=("NVIDIA A100-SXM4-80GB",),
        source="NVIDIA A100 Tensor Core GPU, datasheet, 2021 (SXM)",
    ),
    Published(
        slug="h100-80gb",
        label="H100 80GB",
        platform="gpu",
        memory=80 * _GB,
        bandwidth=3350e9,
        flops=989 * _TERA,
        has_fast_links=True,
        compute_capability=(9, 0),
        names=("NVIDIA H100 80GB HBM3",),
        source="NVIDIA H100 Tensor Core GPU, datasheet, 2023 (SXM)",
    ),
    Published(
        slug="h200-141gb",
        label="H200 141GB",
        platform="gpu",
        memory=141 * _GB,
        bandwidth=4800e9,
        flops=989 * _TERA,
        has_fast_links=True,
        compute_capability=(9, 0),
        names=("NVIDIA H200",),
        source="NVIDIA H200 Tensor Core GPU, datasheet, 2024 (SXM)",
    ),
    Published(
        slug="b200-180gb",  # of the chip's 192 GB, systems are sold with 180
        label="B200 180GB",
        platform="gpu",
        memory=180 * _GB,
        bandwidth=8000e9,
        flops=2250 * _TERA,
        has_fast_links=True,
        compute_capability=(10, 0),
        names=("NVIDIA B200",),
        source="NVIDIA DGX B200, datasheet, 2024: 1,440 GB and 64 TB/s for eight",
    ),
    Published(
        slug="mi300x-192gb",
        label="MI300X 192GB",
        platform="gpu",
        memory=192 * _GB,
        bandwidth=5300e9,
        flops=1307 * _TERA,
        has_fast_links=True,
        names=("AMD Instinct MI300X", "AMD Instinct MI300X OAM"),
        source="AMD Instinct MI300X Accelerator, data sheet, 2023",
    ),
    Published(
        slug="l40s-48gb",
        label="L40S 48GB",
        platform="gpu",
        memory=48 * _GB,
        bandwidth=864e9,
        flops=362 * _TERA,
        has_fast_links=False,
        compute_capability=(8, 9),
        names=("NVIDIA L40S",),
        source="NVIDIA L40S GPU, datasheet, 2023",
    ),
    Published(
        slug="rtx-4090-24gb",
        label="RTX 4090 24GB",
        platform="gpu",
        memory=24 * _GB,
        bandwidth=1008e9,
        flops=165.2 * _TERA,
        has_fast_links=False,
        compute_capability=(8, 9),
        names=("NVIDIA GeForce RTX 4090",),
        source="NVIDIA Ada GPU Architecture, whitepaper, 2022",
    ),
    Published(
        slug="rtx-5090-32gb",
        label="RTX 5090 32GB",
        platform="gpu",
        memory=32 * _GB,
        bandwidth=1792e9,
        flops=209.5 * _TERA,
        has_fast_links=False,
        compute_capability=(12, 0),
        names=("NVIDIA GeForce RTX 5090",),
        source="NVIDIA RTX Blackwell GPU Architecture, whitepaper, 2025",
    ),
    Published(
        slug="tpu-v5e-16gb",
        label="TPU v5e 16GB",
        platform="tpu",
        memory=16 * _GB,
        bandwidth=819e9,
        flops=197 * _TERA,
        has_fast_links=True,
        names=("TPU v5 lite", "TPU v5e"),
        source="Google Cloud TPU v5e, documentation, 2024",
    ),
    Published(
        slug="tpu-v5p-95gb",
        label="TPU v5p 95GB",
        platform="tpu",
        memory=95 * _GB,
        bandwidth=2765e9,
        flops=459 * _TERA,
        has_fast_links=True,
        names=("TPU v5", "TPU v5p"),
        source="Google Cloud TPU v5p, documentation, 2024",
    ),
    Published(
        slug="tpu-v6e-32gb",
        label="TPU v6e 32GB",
        platform="tpu",
        memory=32 * _GB,
        bandwidth=1640e9,
        flops=918 * _TERA,
        has_fast_links=True,
        names=("TPU v6 lite", "TPU v6e"),
        source="Google Cloud TPU v6e, documentation, 2024",
    ),
)
"""By maker and age; of GPUs sold in several forms, the one on a board of eight."""


def find(name: str) -> Published:
    """The accelerator of a name.

    Args:
        name: A slug, or the beginning of its last words, such as `H100`, `4090` or `RTX4090`.

    Raises:
        InvalidValueError: None matches, or several do.
    """
    wanted = re.sub("[^0-9a-z]+", "-", name.casefold()).strip("-")
    same = [kind for kind in PUBLISHED if kind.slug == wanted]
    matches = same or [kind for kind in PUBLISHED if _begins(kind.slug.split("-"), wanted)]
    if len(matches) == 1:
        return matches[0]
    slugs = ", ".join(kind.slug for kind in matches or PUBLISHED)
    problem = "matches several" if matches else "expected one"
    raise invalid(
        "accelerator",
        name,
        f"{problem} of {slugs}",
        f"--accelerator {matches[0].slug if matches else 'h100-80gb'}",
    )


def _begins(words: list[str], wanted: str) -> bool:
    """Whether some of the last words begin like that, with dashes or without."""
    compact = wanted.replace("-", "")
    tails = ("".join(words[first:]) for first in range(len(words)))
    return bool(compact) and any(tail.startswith(compact) for tail in tails)


def match(device_name: str) -> Published | None:
    """The accelerator with a driver's name; None unless the name matches exactly.

    Similar names are other accelerators: an H100 for PCIe has less bandwidth, a 4090 D less
    arithmetic, a part of a GPU less of everything.
    """
    wanted = " ".join(device_name.casefold().split())
    for kind in PUBLISHED:
        if wanted in {known.casefold() for known in kind.names}:
            return kind
    return None
