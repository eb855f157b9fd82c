"""Keys, hosts and origins over all routes, which are generated from the server's own table."""

import pytest
from serving import serving

from grokctl.serving.app import ENDPOINTS
from grokctl.serving.guard import GuardOptions

KEY = "sk-test-0123456789"
OPEN = {"/health", "/v1/health", "/", "/app.js", "/core.js", "/style.css", "/icon.svg"}
UNKNOWN = [
    ("GET", "/nothing"),
    ("POST", "/v1/nothing"),
    ("GET", "/v1/completions"),
    ("GET", "/a//b"),
]
ROUTES = [
    *((each.method, each.path.replace("{name:path}", "miniature")) for each in ENDPOINTS),
    *UNKNOWN,
]
routes = pytest.mark.parametrize(("method", "path"), ROUTES)
ORIGIN = "https://notes.example"


@pytest.fixture(scope="module")
def closed(release, engine):
    guard = GuardOptions(key=KEY, hosts=("grok.example",), origins=(ORIGIN,))
    with serving(release, lambda _: engine, guard=guard) as running, running.client() as client:
        yield client


def ask(client, method, path, **headers):
    named = {
        name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()
    }
    return client.request(method, path, headers=named)


WRONG_KEYS = [
    {},
    {"authorization": "Bearer wrong"},
    {"authorization": f"Basic {KEY}"},
    {"authorization": "Bearer"},
    {"authorization": f"Bearer {KEY}x"},
    {"authorization": "Bearer \xe9"},
    {"api_key": "wrong"},
    {"x_api_key": ""},
]


@routes
def test_every_route_needs_the_key_but_those_that_probes_need(closed, method, path):
    for given in WRONG_KEYS:
        response = ask(closed, method, path, **given)

        if path in OPEN:
            assert response.status_code == 200
        else:
            assert response.status_code == 401, given
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert KEY not in response.text


@routes
def test_the_key_opens_every_route(closed, method, path):
    for given in ({"authorization": f"bearer {KEY}"}, {"api_key": KEY}, {"x_api_key": KEY}):
        assert ask(closed, method, path, **given).status_code not in {401, 403}, given


@routes
def test_other_names_of_this_machine_are_refused(closed, method, path):
    names = ("evil.grok.example", "127.0.0.1.evil.example", "localhost.", "", "[::1", "[::1]evil")
    for host in names:
        response = ask(closed, method, path, host=host, authorization=f"Bearer {KEY}")

        assert response.status_code in {400, 403}, host
        if response.status_code == 403:
            assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "host",
    ["localhost:evil.example", "localhost:1:2", "a@localhost", "localhost/evil", "2130706433"],
)
def test_what_is_no_name_is_refused(closed, host):
    assert ask(closed, "GET", "/health", host=host).status_code == 403


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "127.0.0.2", "[::1]:8080", "grok.example:443"],
)
def test_its_own_names_are_not(closed, host):
    assert ask(closed, "GET", "/health", host=host).status_code == 200


@routes
def test_pages_of_others_cannot_change_anything(closed, method, path):
    for origin in (f"{ORIGIN}.evil.example", "null", "http://localhost:1", "http://["):
        response = ask(closed, method, path, origin=origin, authorization=f"Bearer {KEY}")

        assert (response.status_code == 403) == (method not in {"GET", "HEAD"}), origin
        assert "access-control-allow-origin" not in response.headers


def test_the_server_s_own_page_may_ask(closed):
    own = str(closed.base_url).rstrip("/")
    for origin in (own, own.replace("http:", "https:")):  # behind a proxy
        response = ask(closed, "POST", "/tokenize", origin=origin, authorization=f"Bearer {KEY}")
        assert response.status_code == 415
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_an_allowed_origin_reads_answers_and_errors(closed, key):
    response = ask(closed, "POST", "/v1/nothing", origin=ORIGIN, authorization=f"Bearer {key}")

    assert response.status_code in {404, 401}
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-credentials" not in response.headers


@routes
def test_a_browser_asks_before_it_has_a_key(closed, method, path):
    asked = ask(closed, "OPTIONS", path, origin=ORIGIN, access_control_request_method=method)
    other = ask(closed, "OPTIONS", path, access_control_request_method=method)
    foreign = ask(closed, "OPTIONS", path, origin="https://evil.example")

    assert asked.status_code == other.status_code == 204
    assert asked.headers["access-control-allow-origin"] == ORIGIN
    assert "authorization" in asked.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in other.headers
    assert foreign.status_code == 403


def test_any_host_may_be_allowed(release, engine):
    guard = GuardOptions(hosts=None)
    with serving(release, lambda _: engine, guard=guard) as running, running.client() as client:
        assert ask(client, "GET", "/version", host="anything.example").status_code == 200
