"""Where the tests, their data and the project lie."""

from pathlib import Path
from typing import Final

TESTS: Final = Path(__file__).parents[1]
PROJECT: Final = TESTS.parent
DATA: Final = TESTS / "data"
TWO_LAYERS: Final = DATA / "two-layers"
"""The small golden release; read only."""
