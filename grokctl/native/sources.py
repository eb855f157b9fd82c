"""The sources of the native library, and how a compiler is called for each."""

from pathlib import Path
from typing import Final

FOLDER: Final = Path(__file__).parent / "src"
FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-ffp-contract=off",  # every form rounds alike
    "-pthread",
    "-Wno-psabi",
)
"""Of every source."""
EVERYWHERE: Final = (
    "c_api",
    "expert",
    "forms",
    "handlers",
    "measure",
    "pool",
    "portable",
    "processor",
    "project",
)
"""Sources for any processor."""
_AVX2: Final = ("-mavx2", "-mfma")
_AVX512: Final = (
    *_AVX2,
    "-mavx512f",
    "-mavx512bw",
    "-mavx512dq",
    "-mavx512vl",
    "-mprefer-vector-width=512",
)
FORMS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "x86_64": {
        "avx2": _AVX2,
        "avxvnni": (*_AVX2, "-mavxvnni"),
        "avx512": _AVX512,
        "avx512vnni": (*_AVX512, "-mavx512vnni"),
        "amx": (*_AVX512, "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
    },
    "aarch64": {
        "neon_dotprod": ("-march=armv8.2-a+dotprod",),
        "neon_i8mm": ("-march=armv8.2-a+dotprod+i8mm",),
    },
}
"""Architecture -> source -> flags of its instruction set, which no other source may have."""


def flags_of(architecture: str) -> dict[Path, tuple[str, ...]]:
    """Every source for an architecture, with all flags."""
    own = FORMS.get(architecture, {})
    return {
        FOLDER / f"{name}.cc": (*FLAGS, *own.get(name, ())) for name in sorted({*EVERYWHERE, *own})
    }
