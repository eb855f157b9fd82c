"""All tests here compile as users do."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _compiled_as_users_do(optimized: None) -> None:
    """Numbers and programs are those of XLA's optimiser."""
