"""Take the picture of the page of `grokctl serve`: `make browser` installs what it needs.

A server of a miniature, and Chromium without a window: docs/serve.png.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By

from grokctl.checkpoint.miniature import MINIATURE, write_miniature

PICTURE = Path(__file__).parent / "serve.png"
TEXT = "Once upon a time"
PLACE = 5
"""Of the token that is looked at."""


def wait_for(find: Callable[[], Any]) -> Any:
    for _ in range(600):
        with contextlib.suppress(IndexError):
            if found := find():
                return found
        time.sleep(0.05)
    raise TimeoutError


def take(url: str, path: Path) -> None:
    """Complete a text, look at a token, and keep what is seen."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=900,1140"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
    browser = webdriver.Chrome(options=options, service=service)
    try:
        browser.get(url)
        state = browser.find_element(By.ID, "state")
        wait_for(lambda: "ready" in state.text)
        browser.find_element(By.ID, "text").send_keys(TEXT)
        browser.execute_script("document.getElementById('text').rows = 5")
        settings = {"max_tokens": 40, "seed": 1}
        for name, value in settings.items():
            browser.execute_script(f"document.getElementById('{name}').value = {value}")
        browser.find_element(By.ID, "complete").click()
        wait_for(lambda: "a second" in state.text and "kept" in state.text)
        wait_for(lambda: browser.find_elements(By.CSS_SELECTOR, "#strip button")[PLACE]).click()
        browser.execute_script("window.scrollTo(0, 0)")
        browser.save_screenshot(str(path))
    finally:
        browser.quit()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        write_miniature(home / "releases" / "miniature", MINIATURE)
        command = [sys.executable, "-m", "grokctl", "serve", "miniature", "--home", name]
        command += ["--port", "0", "--json", "--no-warm-up"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
            assert server.stdout is not None
            take(json.loads(server.stdout.readline())["url"], PICTURE)
            server.terminate()


if __name__ == "__main__":
    main()
