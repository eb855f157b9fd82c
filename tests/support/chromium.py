"""A headless Chromium of the system, whose log and requests are kept."""

import contextlib
import json
import shutil

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


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


def requests_of(browser) -> list[dict]:
    """What the browser has asked for since the last time."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        event["params"]["request"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
