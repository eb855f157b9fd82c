"""The page in a real browser: what it shows is what the server says, whatever a model writes."""

import contextlib
import http.server
import json
import math
import threading
import time
import urllib.request
from dataclasses import replace

import pytest
from chromium import opened, requests_of
from serving import CONFIG, serving, small_engine, small_release

from grokctl.serving.guard import GuardOptions

By = pytest.importorskip("selenium.webdriver.common.by", reason="make browser").By
Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
HOSTILE = "<img src=x onerror=alert(1)></script><b>\u202e\u2066x\u2069 \U0001f30a the sea"


@contextlib.contextmanager
def slowed(engine, seconds=0.02):
    """Let every turn take a while."""
    turn = engine.scheduler.turn
    engine.scheduler.turn = lambda: (time.sleep(seconds), turn())
    try:
        yield
    finally:
        engine.scheduler.turn = turn


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return found


class Page:
    """The page in the eyes of a person."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.get(url)
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.refresh()
        requests_of(browser)

    def __getitem__(self, name):
        return self.browser.find_element(By.ID, name)

    def set(self, **values):
        for name, value in values.items():
            self.browser.execute_script(
                "arguments[0].value = arguments[1];"
                "arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
                self[name],
                str(value),
            )

    @property
    def text(self):
        return self["text"].get_property("value")

    @property
    def state(self):
        return self["state"].text

    @property
    def strip(self):
        return self.browser.execute_script(
            "return [...document.getElementById('strip').children].map((each) => each.textContent)"
        )

    def is_idle(self):
        return self["stop"].get_property("disabled")

    def complete(self, text=None, **settings):
        """Complete with the keyboard, and wait for the end."""
        self.set(**settings)
        if text is not None:
            self.set(text=text)
        self["text"].send_keys(Keys.CONTROL, Keys.ENTER)
        self.wait()

    def wait(self):
        wait_for(lambda: self.is_idle() and "Waiting" not in self.state)


@pytest.fixture
def page(browser, running):
    page = Page(browser, running.url)
    wait_for(lambda: "ready" in page.state)
    page.set(temperature=0, max_tokens=12, top_p=1)
    yield page
    said = [
        entry for entry in browser.get_log("browser") if entry["level"] in {"WARNING", "SEVERE"}
    ]
    assert said == []


def completed(running, **body):
    with running.client() as client:
        body = {"max_tokens": 12, "temperature": 0, **body}
        return client.post("/v1/completions", json=body).json()["choices"][0]


def test_a_completion_is_byte_for_byte_that_of_the_interface(page, running, browser):
    page.complete("the sea")

    expected = "the sea" + completed(running, prompt="the sea")["text"]
    assert page.text == expected
    shown = "".join(page.strip).replace("⏎\n", "\n").replace("⇥\t", "\t")
    assert "the sea" + shown == expected
    assert all(request["url"].startswith(running.url) for request in requests_of(browser))


def test_a_token_shows_what_it_could_have_been_and_another_is_gone_on_from(page, running, browser):
    page.complete("the sea")
    third = page["strip"].find_elements(By.TAG_NAME, "button")[2]
    third.click()
    bars = page["alternatives"].find_elements(By.TAG_NAME, "li")
    shares = [float(bar.find_element(By.TAG_NAME, "span").text.rstrip("%")) for bar in bars]
    requests_of(browser)

    bars[1].find_element(By.TAG_NAME, "button").click()
    page.wait()

    assert len(bars) >= 10
    assert sum(shares) <= 100.5
    (request,) = [each for each in requests_of(browser) if each["method"] == "POST"]
    sent = json.loads(request["postData"])["prompt"]
    whole = completed(running, prompt="the sea", logprobs=10, return_token_ids=True)
    prefix = [*whole["prompt_token_ids"], *whole["token_ids"][:2]]
    other = whole["logprobs"]["content"][2]["top_logprobs"][1]["id"]
    assert sent == [*prefix, other]
    after = completed(running, prompt=sent, echo=True)["text"]
    assert page.text == after


def test_more_goes_on_by_ids_and_steps_are_undone_and_done_again(page, browser):
    page.complete("the sea")
    once = page.text
    requests_of(browser)
    assert page["complete"].text == "More"
    page["complete"].click()
    page.wait()
    twice = page.text
    (request,) = [each for each in requests_of(browser) if each["method"] == "POST"]

    assert isinstance(json.loads(request["postData"])["prompt"], list)
    assert twice.startswith(once)
    assert len(twice) > len(once)
    for name, expected in (("undo", once), ("undo", "the sea"), ("redo", once), ("redo", twice)):
        page[name].click()
        assert page.text == expected
    page["retry"].click()
    page.wait()
    assert page.text == twice  # at temperature 0


def test_stop_frees_the_slot_at_once(page, running, engine):
    with slowed(engine):
        page.set(max_tokens=100, text="the sea")
        page["text"].send_keys(Keys.CONTROL, Keys.ENTER)
        wait_for(lambda: len(page.strip) > 2)
        page["text"].send_keys(Keys.ESCAPE)
        wait_for(lambda: not running.service.gauges().running, seconds=1)
    page.wait()

    assert "Stopped after" in page.state
    assert page.text.startswith("the sea")


def test_a_closed_tab_frees_its_slot(release, engine):
    with (
        serving(release, lambda _: engine) as running,
        slowed(engine, 0.05),
        opened() as browser,
    ):
        page = Page(browser, running.url)
        wait_for(lambda: "ready" in page.state)
        page.set(max_tokens=110, text="the sea")
        page["complete"].click()
        wait_for(lambda: running.service.gauges().running)
        browser.close()
        wait_for(lambda: not running.service.gauges().running, seconds=5)


def test_a_draft_outlives_a_reload(page, browser):
    page.set(text="a draft", max_tokens=7, stop_texts="\\n\\n")
    browser.refresh()

    assert page.text == "a draft"
    assert page["max_tokens"].get_property("value") == "7"
    assert page["stop_texts"].get_property("value") == "\\n\\n"


def test_hostile_text_is_text(page, browser):
    page.set(text=HOSTILE)
    page["score"].click()
    wait_for(lambda: "Scored" in page.state)
    page.complete(max_tokens=4)

    assert page.text.startswith(HOSTILE)
    assert browser.find_elements(By.TAG_NAME, "img") == []
    page["undo"].click()
    page["score"].click()
    wait_for(lambda: "Scored" in page.state)
    marks = page.strip
    assert "".join(marks).count("\U0001f30a") == 1  # four tokens of a byte each, shown together
    assert "\u202e" not in "".join(marks)
    assert "Perplexity" in page["result"].text


def test_a_score_is_that_of_the_interface(page, running):
    page.set(text="the sea is deep")
    page["score"].click()
    wait_for(lambda: "Scored" in page.state)

    columns = completed(running, prompt="the sea is deep", max_tokens=0, echo=True, logprobs=1)[
        "logprobs"
    ]
    values = columns["token_logprobs"][1:]
    perplexity = math.exp(-sum(values) / len(values))
    assert page["result"].text == f"Perplexity {perplexity:.2f} over {len(values)} tokens."


def test_the_keyboard_reaches_everything(page, browser):
    page.complete("the sea")
    page["text"].click()
    seen = []
    for _ in range(40):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(browser.switch_to.active_element.get_attribute("id"))
    buttons = {"complete", "retry", "undo", "score", "curl", "python", "max_tokens", "stop_texts"}
    assert buttons <= set(seen)
    strip = page["strip"].find_elements(By.TAG_NAME, "button")
    browser.execute_script("arguments[0].focus()", strip[0])
    strip[0].send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element == strip[1]
    assert page["details"].is_displayed()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_a_small_phone(page, browser, scheme):
    command = "Emulation.setEmulatedMedia"
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd(command, {"features": features})
    sizes = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    page.complete("the sea")
    page["strip"].find_elements(By.TAG_NAME, "button")[1].click()

    width = browser.execute_script("return document.documentElement.scrollWidth")
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd(command, {"features": []})
    assert width <= 360
    assert (colour == "rgb(255, 255, 255)") == (scheme == "light")


def test_a_key_is_asked_for_and_kept_in_the_tab(release, engine, browser):
    with serving(release, lambda _: engine, guard=GuardOptions(key="abc")) as running:
        page = Page(browser, running.url)
        wait_for(lambda: "needs a key" in page.state)
        page["key"].send_keys("wrong", Keys.ENTER)
        page["text"].click()
        wait_for(lambda: "needs a key" in page.state)
        page["key"].clear()
        page["key"].send_keys("abc", Keys.ENTER)
        page["text"].click()
        wait_for(lambda: "ready" in page.state)
        page.complete("the sea", max_tokens=3)
        assert len(page.text) > len("the sea")
        browser.refresh()
        wait_for(lambda: "ready" in page.state)
    browser.get_log("browser")


def test_the_page_is_there_before_the_model(release, engine, browser):
    loaded = threading.Event()

    def start(_):
        assert loaded.wait(60)
        return engine

    with serving(release, start, is_awaited=False) as running:
        wait_for(lambda: running.server._uvicorn.started)
        page = Page(browser, running.url)
        wait_for(lambda: "loading" in page.state)
        loaded.set()
        wait_for(lambda: "ready" in page.state)
    browser.get_log("browser")


def test_a_lost_connection_keeps_the_text(release, engine, browser):
    with serving(release, lambda _: engine) as running, slowed(engine, 0.05):
        page = Page(browser, running.url)
        wait_for(lambda: "ready" in page.state)
        page.set(max_tokens=100, text="the sea")
        page["complete"].click()
        wait_for(lambda: len(page.strip) > 2)
        for each in list(running.server._uvicorn.server_state.connections):
            running.on_loop(each.transport.abort)
        wait_for(page.is_idle)
        assert "connection was lost" in page.state
        assert len(page.text) > len("the sea")
    browser.get_log("browser")


def test_the_page_works_below_a_prefix(running, browser):
    class Proxy(http.server.BaseHTTPRequestHandler):
        def answer(self):
            length = int(self.headers.get("Content-Length", 0))
            body = self.rfile.read(length) or None
            kind = {"Content-Type": self.headers.get("Content-Type", "text/plain")}
            url = running.url + self.path.removeprefix("/below")
            with urllib.request.urlopen(
                urllib.request.Request(url, body, kind, method=self.command)
            ) as found:
                self.send_response(found.status)
                for name in ("content-type", "content-security-policy"):
                    if found.headers[name]:
                        self.send_header(name, found.headers[name])
                self.end_headers()
                self.wfile.write(found.read())

        do_GET = do_POST = answer  # noqa: N815 (of http.server)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        page = Page(browser, f"http://127.0.0.1:{proxy.server_port}/below/")
        wait_for(lambda: "ready" in page.state)
        page.complete("the sea", max_tokens=3, temperature=0)
        assert len(page.text) > len("the sea")
        proxy.shutdown()
    browser.get_log("browser")


def test_a_long_text_stalls_nothing(tmp_path_factory, browser):
    config = replace(CONFIG, sequence_len=8192, num_layers=1)
    release = small_release(tmp_path_factory.mktemp("long") / "long", config)
    engine = small_engine(release, slots=1)
    with serving(release, lambda _: engine) as running:
        page = Page(browser, running.url)
        wait_for(lambda: "ready" in page.state)
        browser.execute_script(
            "window.long = []; new PerformanceObserver((list) => list.getEntries().forEach("
            "(each) => window.long.push(each.duration))).observe({type: 'longtask'})"
        )
        page.set(text="the sea", max_tokens=8000, temperature=1)
        page["complete"].click()
        wait_for(lambda: not page.is_idle())
        wait_for(page.is_idle, seconds=200)
        tasks = browser.execute_script("return window.long")
        count = len(page.strip)
    assert count > 5000
    assert max(tasks, default=0) <= 200
    browser.get_log("browser")
