"""The endpoint of a judge: whom the key is sent to, what is tried again, what ends in one line."""

import gzip
import json
import re
import socketserver
import threading
import time

import pytest

from fedsafe_jax.config import ConfigError, default_config
from fedsafe_jax.evals.judges import endpoint as judges
from fedsafe_jax.evals.judges.endpoint import ChatEndpoint, EndpointError
from fedsafe_jax.validation import validate

KEY = "sk-planted-not-a-key"


def completion(content) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def whole(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A reply as it goes over the wire."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def whole_request(connection) -> bytes:
    """Reads a request to its end: a connection closed before that is reset, reply and all."""
    received = b""
    while (end := received.find(b"\r\n\r\n")) < 0:
        received += connection.recv(65536)
    (length,) = re.findall(rb"(?i)content-length: (\d+)", received)
    while len(received) < end + 4 + int(length):
        received += connection.recv(65536)
    return received


@pytest.fixture()
def serve(monkeypatch):
    """Starts servers that give raw replies in turn, the last one for ever; waits become numbers."""
    waits, servers, time_sleep = [], [], time.sleep
    monkeypatch.setattr(judges.time, "sleep", waits.append)

    def start(*replies, drip: float = 0.0):
        requests: list[bytes] = []

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                requests.append(whole_request(self.request))
                reply = replies[min(len(requests), len(replies)) - 1]
                if not drip:
                    self.request.sendall(reply)
                    return
                for byte in reply:
                    time_sleep(drip)
                    try:
                        self.request.sendall(bytes([byte]))
                    except OSError:
                        return

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}/v1", requests

    start.waits = waits
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


GOOD = whole(completion("Rating: [[7]]"))


def test_no_redirect_is_followed(serve):
    """The key would go along, and whoever answers there would be believed."""
    other, seen = serve(GOOD)
    for status in ("301 M", "302 F", "303 S", "307 T", "308 P"):
        url, _ = serve(whole(b"", status, f"Location: {other}/steal?{KEY}"))
        with pytest.raises(
            EndpointError, match=f"HTTP {status[:3]}; it points to another"
        ) as error:
            ChatEndpoint(url, "m", KEY)([])
        assert KEY not in str(error.value)
    assert not seen and not any(serve.waits)


@pytest.mark.parametrize(
    ("status", "headers", "waits"),
    [
        ("429 Busy", ("Retry-After: 7",), [0, 7, 7]),
        ("429 Busy", ("Retry-After: 99999999",), [0, 60, 60]),
        ("429 Busy", ("Retry-After: nan",), [0, 1, 2]),
        ("503 Down", ("Retry-After: -5",), [0, 1, 2]),
        ("500 Oh", (), [0, 1, 2]),
    ],
)
def test_what_may_pass_is_tried_again(serve, status, headers, waits):
    busy = whole(b"", status, *headers)
    url, requests = serve(busy, busy, GOOD)
    assert ChatEndpoint(url, "m", KEY)([]) == "Rating: [[7]]"
    assert serve.waits == waits and len(requests) == 3
    assert all(f"Authorization: Bearer {KEY}".encode() in request for request in requests)
    url, requests = serve(busy)
    with pytest.raises(EndpointError, match=f"HTTP {status[:3]}, 3 times; start the same command"):
        ChatEndpoint(url, "m", KEY)([])
    assert len(requests) == 3


@pytest.mark.parametrize(("status", "advice"), [("401", "not accepted"), ("404", "no such")])
def test_what_does_not_pass_is_not_tried_again(serve, status, advice):
    url, requests = serve(whole(KEY.encode(), f"{status} {KEY}"))
    with pytest.raises(EndpointError, match=f"HTTP {status}; .*{advice}") as error:
        ChatEndpoint(url, "m", KEY)([])
    assert KEY not in str(error.value) and len(requests) == 1


@pytest.mark.parametrize(
    "reply",
    [
        whole(completion(5)),
        whole(completion([{"type": "text", "text": "[[7]]"}])),
        whole(b"[]"),
        whole(b"null"),
        whole(b'{"choices": []}'),
        whole(b'{"choices": [null]}'),
        whole(b"[" * 200_000),
        whole(b"9" * 5000),
        whole(b"\xff\xfe"),
        whole(completion("x" * 5_000_000)),
        GOOD[:-10],
        b"",
        b"HTTP/1.1 2",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"NOT HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
    ids=lambda reply: repr(reply[-20:]),
)
def test_any_reply_is_text_or_one_line(serve, reply):
    url, requests = serve(reply)
    with pytest.raises(EndpointError, match=r"judge at http://127.0.0.1:\d+/v1.*3 times") as error:
        ChatEndpoint(url, "m", KEY)([])
    assert len(str(error.value)) < 250 and "\n" not in str(error.value) and len(requests) == 3


@pytest.mark.parametrize("nothing", [None, "", "<think>So"])
def test_a_model_that_declines_says_nothing(serve, nothing):
    url, requests = serve(whole(completion(nothing)))
    assert ChatEndpoint(url, "m")([]) == "" and len(requests) == 3
    url, requests = serve(whole(completion(nothing)), GOOD)
    assert ChatEndpoint(url, "m")([]) == "Rating: [[7]]" and len(requests) == 2


def test_the_client_sends_and_says_no_more_than_it_must(serve, monkeypatch, caplog):
    """It has variables, headers of the machine, retries and a log of its own."""
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: {KEY}\nX-Mine: {KEY}")
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    url, requests = serve(whole(completion("So."), f"200 {KEY}"), whole(b"", f"404 {KEY}"))
    caplog.set_level(0)
    asked = ChatEndpoint(url, "m")
    assert asked([{"role": "user", "content": "q"}]) == "So."
    with pytest.raises(EndpointError):
        asked([])
    head, _, body = requests[0].partition(b"\r\n\r\n")
    names = {line.split(b":")[0].lower().decode() for line in head.split(b"\r\n")[1:]}
    assert names <= {*judges.SENT, "accept-encoding"} and KEY.encode() not in requests[0]
    messages = [{"role": "user", "content": "q"}]
    assert json.loads(body) == {"model": "m", "messages": messages, "temperature": 0}
    assert KEY not in caplog.text


def test_a_packed_reply_is_not_unpacked(serve):
    packed = gzip.compress(completion("Rating: [[7]]"))
    url, requests = serve(whole(packed, "200 OK", "Content-Encoding: gzip"), GOOD)
    assert ChatEndpoint(url, "m")([]) == "Rating: [[7]]"
    assert b"accept-encoding: identity" in requests[0].lower()


@pytest.mark.parametrize("dripping", [GOOD, b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 90])
def test_a_reply_that_drips_ends_in_time(serve, dripping):
    """Each byte comes before a socket's own timeout, which begins anew with it."""
    url, _ = serve(dripping, drip=0.1)
    started = time.monotonic()
    with pytest.raises(EndpointError, match=r"no whole reply within 0.5 s, 3 times"):
        ChatEndpoint(url, "m", timeout=0.5)([])
    assert time.monotonic() - started < 4


def test_nobody_there(serve):
    with pytest.raises(EndpointError, match=r"127.0.0.1:9/v1/\S+: Connection refused, 3 times"):
        ChatEndpoint("http://127.0.0.1:9/v1", "m", timeout=2)([])


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/hostname",
        "ftp://127.0.0.1/v1",
        "data:,x",
        "notaurl",
        "",
        "http://",
        "http:///v1",
        "http://h:port/v1",
        "http://[::1/v1",
        "http://h/v1\r\nX: y",
        "http://h/v 1",
        f"http://user:{KEY}@127.0.0.1/v1",
        f"http://{KEY}@127.0.0.1/v1",
        f"https://127.0.0.1/v1?key={KEY}",
        f"https://127.0.0.1/v1#{KEY}",
    ],
)
def test_urls_that_are_none_or_hold_a_secret_are_refused_first(url):
    with pytest.raises(EndpointError) as error:
        ChatEndpoint(url, "m")
    assert KEY not in str(error.value) and "\n" not in str(error.value)
    config = default_config()
    if url:
        config.eval.judges = (f"chat:m@{url}#mt_bench",)
        with pytest.raises(ConfigError, match=r"eval\.judges: ") as error:
            validate(config)
        assert KEY not in str(error.value)


def test_a_key_goes_unencrypted_to_this_machine_alone(monkeypatch):
    for url in ("http://localhost:8000/v1", "http://127.0.0.2/v1", "http://[::1]:80/v1"):
        ChatEndpoint(url, "m", KEY)
    ChatEndpoint("https://example.org/v1", "m", KEY)
    ChatEndpoint("http://example.org/v1", "m")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    config = default_config()
    config.eval.judges = ("chat:m@http://localhost.example.org/v1#mt_bench",)
    with pytest.raises(ConfigError, match="localhost.example.org unencrypted: use https") as error:
        validate(config)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("key", [KEY + "\n", KEY + "\r\nX: y", KEY + "\u2019"])
def test_a_key_that_is_none_is_not_shown(key):
    with pytest.raises(EndpointError, match="OPENAI_API_KEY holds characters") as error:
        ChatEndpoint("https://example.org/v1", "m", key)
    assert KEY not in str(error.value)
