"""The page is served with a strict policy, cached by its content, and not at all if unwanted."""

import pytest
from serving import serving

from grokctl.serving.page import FILES


@pytest.mark.parametrize("path", FILES)
def test_files_of_the_page_have_a_strict_policy(client, path):
    response = client.get(path)
    again = client.get(path, headers={"if-none-match": response.headers["etag"]})

    assert response.status_code == 200
    assert response.headers["content-type"] == FILES[path][1]
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; ")
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-cache"
    assert (again.status_code, again.content) == (304, b"")
    assert client.head(path).content == b""


def test_a_server_may_have_no_page(release, engine):
    with (
        serving(release, lambda _: engine, has_page=False) as running,
        running.client() as client,
    ):
        for path in FILES:
            assert client.get(path).json()["error"]["code"] == "unknown_url"
