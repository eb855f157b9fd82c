"""A headless Chromium of the system, and a small model behind the page that it opens."""

import pytest
from chromium import opened
from serving import serving, small_engine, small_release


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    return small_release(tmp_path_factory.mktemp("release") / "small")


@pytest.fixture(scope="session")
def engine(release):
    return small_engine(release)


@pytest.fixture(scope="module")
def browser():
    with opened("--window-size=1100,1100") as browser:
        yield browser


@pytest.fixture
def running(release, engine):
    with serving(release, lambda _: engine) as running:
        yield running
