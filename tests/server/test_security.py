"""Keys, foreign pages, large bodies, headers."""

import dataclasses
import socket
from http.client import HTTPConnection
from urllib.parse import urlsplit

import httpx
import pytest

from foretoken.server.app import create_app
from foretoken.server.security import ApiKeys
from foretoken.server.settings import ServerSettings
from tests.server.conftest import MODEL_NAME, served

KEYS = ("first-key-123", "second-key-456")
MAX_BYTES = 2000


@pytest.fixture(scope="module")
def base_url(llm):
    """A server with keys, a small body limit and one origin that may call."""
    settings = ServerSettings(
        model_name=MODEL_NAME,
        port=0,
        api_keys=KEYS,
        max_body_bytes=MAX_BYTES,
        cors_origins=("https://app.example",),
        drain_s=2.0,
    )
    with served(create_app(llm, settings), settings) as running:
        yield running.base_url


@pytest.fixture(scope="module")
def http(base_url):
    with httpx.Client(base_url=base_url, timeout=30) as client:
        yield client


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def error_of(answer):
    return answer.json()["error"]


# -- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_any_key_opens(http, key):
    assert http.get("/stats", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        bearer("first-key-12"),
        bearer("first-key-1234"),
        bearer("FIRST-KEY-123"),
        {"Authorization": "first-key-123"},
        {"Authorization": "Basic first-key-123"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"X-Api-Key": "first-key-123"},
    ],
)
@pytest.mark.parametrize("path", ["/stats", "/metrics", "/v1/models", "/openapi.json", "/nowhere"])
def test_without_a_key_nothing_is_told(http, path, headers):
    answer = http.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert error_of(answer)["code"] == "invalid_api_key"
    assert error_of(answer)["type"] == "authentication_error"


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_probes_and_the_page_need_no_key(http, path):
    assert http.get(path).status_code == 200


def test_all_keys_are_compared_each_time(monkeypatch):
    """A comparison that stops at the first match tells by its time which key it was."""
    compared = []
    monkeypatch.setattr(
        "foretoken.server.security.hmac.compare_digest",
        lambda given, known: compared.append(known) or given == known,
    )
    keys = ApiKeys(None, keys=KEYS, open_paths=())
    assert keys._is_known("Bearer first-key-123")
    assert not keys._is_known("Bearer wrong")
    assert len(compared) == 2 * len(KEYS)
    assert len(set(map(len, compared))) == 1  # lengths do not differ with the keys'


# -- foreign pages -----------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example"])
def test_other_names_than_this_machines_are_refused(http, host):
    """DNS rebinding: a page's own name is made to point to loopback."""
    answer = http.get("/health", headers={"Host": host})
    assert answer.status_code == 403
    assert host in error_of(answer)["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:80", "[::1]"])
def test_names_of_this_machine_are_taken(http, host):
    assert http.get("/health", headers={"Host": host}).status_code == 200


def test_a_server_that_others_reach_has_names_that_it_does_not_know(llm):
    settings = ServerSettings(model_name=MODEL_NAME, host="0.0.0.0", port=0, drain_s=1.0)
    with served(create_app(llm, settings), settings) as running:
        answer = httpx.get(f"{running.base_url}/health", headers={"Host": "llm.example"})
        assert answer.status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1"])
def test_pages_of_other_sites_cannot_post(http, origin):
    headers = {**bearer(KEYS[0]), "Origin": origin, "Content-Type": "text/plain"}
    answer = http.post("/v1/completions", headers=headers, content="{}")
    assert answer.status_code == 403
    assert origin in error_of(answer)["message"]
    assert "access-control-allow-origin" not in answer.headers


def test_the_servers_own_page_can(http, base_url):
    headers = {**bearer(KEYS[0]), "Origin": base_url}
    answer = http.post("/v1/completions", headers=headers, content="{}")
    assert answer.status_code not in (401, 403)


def preflight(http, origin):
    headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    return http.options("/v1/completions", headers=headers)


def test_an_origin_that_is_allowed(http):
    answer = preflight(http, "https://app.example")
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    headers = {**bearer(KEYS[0]), "Origin": "https://app.example"}
    answer = http.post("/v1/completions", headers=headers, content="{}")
    assert answer.status_code not in (401, 403)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"


def test_other_origins_are_not(http):
    answer = preflight(http, "https://evil.example")
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def test_cors_is_off_by_default(server):
    with httpx.Client(base_url=server.base_url) as http:
        answer = preflight(http, "https://app.example")
    assert answer.status_code >= 400
    assert not [name for name in answer.headers if name.startswith("access-control")]


# -- bodies ------------------------------------------------------------------------------------


def test_a_body_of_the_allowed_size_is_read(http):
    answer = http.post("/v1/completions", headers=bearer(KEYS[0]), content=b"x" * MAX_BYTES)
    assert answer.status_code == 400


def test_a_larger_one_is_refused(http):
    answer = http.post("/v1/completions", headers=bearer(KEYS[0]), content=b"x" * (MAX_BYTES + 1))
    assert answer.status_code == 413
    assert error_of(answer)["code"] == "request_too_large"
    assert str(MAX_BYTES) in error_of(answer)["message"]


def test_what_arrives_is_counted_not_what_is_announced(http):
    """Without Content-Length; more than the limit in small pieces."""

    def pieces():
        for _ in range(MAX_BYTES // 100 + 1):
            yield b"x" * 100

    answer = http.post("/v1/completions", headers=bearer(KEYS[0]), content=pieces())
    assert answer.status_code == 413


def test_nothing_is_read_of_a_body_that_is_announced_too_large(base_url):
    address = urlsplit(base_url)
    connection = HTTPConnection(address.hostname, address.port, timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Authorization", f"Bearer {KEYS[0]}")
    connection.putheader("Content-Length", str(10**12))
    connection.endheaders()
    answer = connection.getresponse()  # although not a byte of the body was sent
    assert answer.status == 413
    connection.close()


def test_a_body_that_never_ends_is_cut_off(base_url):
    address = urlsplit(base_url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as sock:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        sock.sendall(f"{head}Authorization: Bearer {KEYS[0]}\r\n\r\n".encode())
        received = b""
        try:
            while not received:
                sock.sendall(b"400\r\n" + b"x" * 0x400 + b"\r\n")
                sock.settimeout(0.02)
                try:
                    received = sock.recv(100)
                except TimeoutError:
                    sock.settimeout(10)
        except ConnectionError:  # it was closed while we were still sending
            pass
        assert not received or received.startswith(b"HTTP/1.1 413")


# -- headers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/health", "/stats", "/nowhere"])
def test_browsers_are_told_what_not_to_do(http, path):
    headers = http.get(path, headers=bearer(KEYS[0])).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy  # nothing from elsewhere
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers


def test_headers_come_once(http):
    answer = http.get("/")
    names = [name.lower() for name, _ in answer.headers.raw]
    assert len(names) == len(set(names))


def test_refusals_have_them_too(http):
    answer = http.get("/stats")
    assert answer.status_code == 401
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_no_page_of_documentation_loads_scripts_from_elsewhere(server):
    for path in ("/docs", "/redoc"):
        assert httpx.get(server.base_url + path).status_code == 404


def test_settings_are_one_value(llm):
    """Two applications on one model, one with keys: neither changes the other."""
    open_settings = ServerSettings(model_name=MODEL_NAME, port=0, drain_s=1.0)
    locked = dataclasses.replace(open_settings, api_keys=KEYS)
    with served(create_app(llm, open_settings), open_settings) as running:
        assert httpx.get(f"{running.base_url}/stats").status_code == 200
    with served(create_app(llm, locked), locked) as running:
        assert httpx.get(f"{running.base_url}/stats").status_code == 401
