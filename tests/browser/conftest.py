"""A headless Chromium of the system, and a small model behind the page that it opens."""

import contextlib
import json
import shutil

import pytest
from serving import serving, small_engine, small_release

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.timeout(300))


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    return small_release(tmp_path_factory.mktemp("release") / "small")


@pytest.fixture(scope="session")
def engine(release):
    return small_engine(release)


@contextlib.contextmanager
def opened(*arguments):
    """A browser whose log and requests are kept."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="make browser")
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no chromium: make browser")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", *arguments):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    browser = webdriver.Chrome(options=options, service=service)
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture(scope="module")
def browser():
    with opened("--window-size=1100,1100") as browser:
        yield browser


@pytest.fixture(scope="module")
def running(release, engine):
    with serving(release, lambda _: engine) as running:
        yield running


def requests_of(browser) -> list[dict]:
    """What the browser has asked for since the last time."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        event["params"]["request"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
