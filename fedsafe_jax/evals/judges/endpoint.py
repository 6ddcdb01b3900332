"""An OpenAI-compatible endpoint, which judges answers."""

import http.client
import ipaddress
import json
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from fedsafe_jax.data.refusals import spoken

KEY = "OPENAI_API_KEY"  # the environment variable, from which alone a key is read
TRIES = 3
LONGEST_WAIT = 60.0  # seconds between two tries, whatever Retry-After says
LARGEST_REPLY = 4 << 20  # bytes
TRIED_AGAIN = (408, 429)  # and from 500 on: what an endpoint says when it is busy
ADVICE = {
    401: f"the key in {KEY} is not accepted",
    403: f"the key in {KEY} may not use this model",
    404: "there is no such address or model; check the judge's URL and model",
}


class EndpointError(RuntimeError):
    """The judge's endpoint cannot be used as it is named, or did not answer as a chat completion.

    No message holds a key, nor anything that the endpoint wrote.
    """


class ChatEndpoint:
    """A chat model behind an OpenAI-compatible `/chat/completions`.

    Args:
      base_url: such as `http://localhost:8000/v1`.
      model: name sent with each request.
      api_key: bearer token; may be empty.
      timeout: seconds a whole request may take.

    Raises:
      EndpointError: see `check_url`, or the key has characters that no header has.
    """

    def __init__(self, base_url: str, model: str, api_key: str = "", timeout: float = 120.0):
        check_url(base_url, bool(api_key))
        if not (api_key.isascii() and api_key.isprintable()):
            raise EndpointError(f"{KEY} holds characters that no key has; set it again.")
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.model, self.timeout = model, timeout
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    @classmethod
    def from_environment(cls, base_url: str, model: str) -> "ChatEndpoint":
        """Returns an endpoint with the key of the environment.

        Raises:
          EndpointError: as the class.
        """
        return cls(base_url, model, os.environ.get(KEY, ""))

    def __call__(self, messages: Sequence[dict]) -> str:
        """Returns the reply to `[{"role", "content"}, ...]`, at temperature 0, without its thought.

        What may pass is tried `TRIES` times. A reply without text, such as of a model that
        declines, is "".

        Raises:
          EndpointError: no connection, an HTTP error, no end in time, or another shape of reply.
        """
        body = {"model": self.model, "messages": list(messages), "temperature": 0}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), self._headers)
        problem, wait = "", 0.0
        for number in range(TRIES):
            time.sleep(wait)
            wait = 2.0**number
            try:
                reply = _within(self.timeout, lambda: _post(request, self.timeout))
                if 200 <= reply.status < 300:
                    return spoken(_text_of(reply.content))
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = _reason(error)
                continue
            problem = f"HTTP {reply.status}"
            if 300 <= reply.status < 400:
                advice = "it points to another address, which is not followed; give that one"
                raise EndpointError(f"judge at {self.url}: {problem}; {advice}.")
            if reply.status < 500 and reply.status not in TRIED_AGAIN:
                advice = ADVICE.get(reply.status, "it does not take the request")
                raise EndpointError(f"judge at {self.url}: {problem}; {advice}.")
            wait = reply.wait or wait
        raise EndpointError(
            f"judge at {self.url}: {problem}, {TRIES} times; start the same command again when it "
            "answers."
        )


def check_url(base_url: str, with_key: bool) -> None:
    """Checks the base URL of an endpoint; messages hold no more of it than the host.

    Args:
      base_url: the URL.
      with_key: whether a key is sent there.

    Raises:
      EndpointError: it is not http(s), holds what may be a secret, or would carry the key over a
        network unencrypted.
    """
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port  # a port that is none is a ValueError
    except ValueError:
        host = None
    plain = base_url.isascii() and base_url.isprintable() and " " not in base_url
    if not host or not plain or parts.scheme not in ("http", "https"):
        raise EndpointError("the judge's URL is none: expected http(s)://HOST[:PORT]/v1.")
    if "@" in parts.netloc or any(c in base_url for c in "?#"):
        raise EndpointError(
            f"the judge's URL, of host {host}, has a user, a query or a fragment, which records "
            f"and errors would show: give the key in {KEY}, and the URL without it."
        )
    if with_key and parts.scheme == "http" and not _is_loopback(host):
        raise EndpointError(
            f"the judge's URL would send {KEY} to {host} unencrypted: use https, or a tunnel to "
            f"localhost; or unset {KEY}, if that server needs none."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _Reply(NamedTuple):
    """Status, body and the seconds of `Retry-After` (0 without it) of a reply."""

    status: int
    content: bytes
    wait: float


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go along, and whoever answers there would be believed."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        return None


def _post(request: urllib.request.Request, timeout: float) -> _Reply:
    """Sends one request; raises what urllib and http.client raise."""
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        response = opener.open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        content = response.read(LARGEST_REPLY + 1) if response.status < 300 else b""
        after = response.headers.get("Retry-After", "").strip()
        wait = min(float(after), LONGEST_WAIT) if after.isdecimal() and after.isascii() else 0.0
        return _Reply(response.status, content, wait)


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Returns what `work` returns, or raises what it raises, within a time.

    A socket's timeout is one of each read: a reply that drips would never end. So the work has a
    thread of its own, which is left alone when the time is over.

    Raises:
      TimeoutError: it has not ended.
    """
    ended: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            ended.put((work(), None))
        except Exception as error:
            ended.put((None, error))

    threading.Thread(target=run, name="judge", daemon=True).start()
    try:
        result, error = ended.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole reply within {seconds:g} s") from None
    if error is not None:
        raise error
    return result


def _text_of(content: bytes) -> str:
    """Returns the text of a chat completion; raises `ValueError` where it is none."""
    if len(content) > LARGEST_REPLY:
        raise ValueError(f"a reply of more than {LARGEST_REPLY >> 20} MiB")
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise ValueError("a reply that is no chat completion") from None
    if not isinstance(text, str | None):
        raise ValueError("a reply whose content is no text")
    return text or ""


def _reason(error: Exception) -> str:
    """Returns what went wrong, in words that are not the endpoint's own."""
    if isinstance(error, http.client.HTTPException):
        return f"a reply that is cut off or no HTTP ({type(error).__name__})"
    if isinstance(error, ValueError):
        return str(error)
    inner = getattr(error, "reason", error)  # of a URLError
    if isinstance(inner, TimeoutError):
        return str(inner)
    return getattr(inner, "strerror", None) or type(inner).__name__
