"""One small engine for all servers of a module: it loads and compiles once."""

import pytest
from serving import serving, small_engine, small_release


@pytest.fixture(scope="package")
def release(tmp_path_factory):
    return small_release(tmp_path_factory.mktemp("release") / "small")


@pytest.fixture(scope="package")
def engine(release):
    return small_engine(release)


@pytest.fixture(scope="module")
def running(release, engine):
    with serving(release, lambda _: engine) as running:
        yield running


@pytest.fixture(scope="module")
def client(running):
    with running.client() as client:
        yield client
