"""Keys, and web pages of other origins."""

import json

import pytest

from jaxspec.serving.access import Access
from jaxspec.serving.connections import Limits
from tests.serving import servers

KEY = {"Authorization": "Bearer secret"}
BODY = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
PAGE = {"Origin": "https://chat.example"}


@pytest.fixture(scope="module")
def guarded():
    access = Access("secret", origins=("https://chat.example",))
    with servers.serve(limits=Limits(), access=access) as (port, _):
        yield port


@pytest.fixture(scope="module")
def plain():
    with servers.serve(limits=Limits(), access=Access("secret", open_metrics=True)) as (
        port,
        _,
    ):
        yield port


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer secre"},
        {"Authorization": "Bearer secrets"},
        {"Authorization": "bearer SECRET"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearer secr\u00e9t".encode().decode("latin-1")},
    ],
)
def test_nothing_is_told_without_the_key(guarded, header):
    status, text = servers.post(guarded, "/v1/completions", BODY, headers=header)
    assert status == 401 and json.loads(text)["error"]["code"] == "invalid_api_key"
    for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/nothing"):
        assert servers.get(guarded, path, header)[0] == 401


def test_with_the_key(guarded):
    assert servers.post(guarded, "/v1/completions", BODY, headers=KEY)[0] == 200
    assert servers.get(guarded, "/metrics", KEY)[0] == 200


def test_what_supervises_needs_no_key(guarded, plain):
    for path in ("/health", "/ready"):
        assert servers.get(guarded, path)[0] == 200
    assert servers.get(plain, "/metrics")[0] == 200
    assert servers.get(plain, "/v1/models")[0] == 401


def exchange(port, method, **headers):
    lines = [f"{method} /v1/models HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return servers.exchange(port, ("\r\n".join(lines) + "\r\n\r\n").encode()).decode().lower()


ASKED = dict(
    Access_Control_Request_Method="POST",
    Access_Control_Request_Headers="authorization,content-type,x-stainless-lang",
)


def test_pages_of_named_origins_may_read(guarded):
    """The browser asks first, and has no key then."""
    asked = exchange(guarded, "OPTIONS", Origin="https://chat.example", **ASKED)
    assert asked.startswith("http/1.1 200")
    assert "access-control-allow-origin: https://chat.example" in asked
    assert "access-control-allow-headers: authorization,content-type,x-stainless-lang" in asked
    read = exchange(guarded, "GET", Origin="https://chat.example", **KEY)
    assert "access-control-allow-origin: https://chat.example" in read


@pytest.mark.parametrize(("server", "origin"), [("guarded", "evil"), ("plain", "chat")])
def test_other_pages_may_not(request, server, origin):
    port = request.getfixturevalue(server)
    for method, more in (("OPTIONS", ASKED), ("GET", KEY)):
        found = exchange(port, method, Origin=f"https://{origin}.example", **more)
        assert "access-control-allow-origin" not in found


@pytest.mark.parametrize("key", ["", " ", "schlüssel"])
def test_keys_that_cannot_be_sent(key):
    with pytest.raises(ValueError, match="the API key must be ASCII and not empty"):
        Access(key)
