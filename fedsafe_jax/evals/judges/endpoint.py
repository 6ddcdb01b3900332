"""An OpenAI-compatible endpoint of a judge or an attacker, asked through the `openai` client.

The client's own retries, redirects, headers and messages are off: hooks of its HTTP client decide
what is sent, and look at a reply before its body is read.
"""

import ipaddress
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from fedsafe_jax.data.refusals import spoken

KEY = "OPENAI_API_KEY"  # the environment variable, from which alone a key is read
TRIES = 3
LONGEST_WAIT = 60.0  # seconds between two tries, whatever Retry-After says
LARGEST_REPLY = 4 << 20  # bytes
TRIED_AGAIN = (408, 429)  # and from 500 on: what an endpoint says when it is busy
# Headers that are sent. The client adds others: of the machine it runs on, and of environment
# variables that belong to another host. By the last one it knows that the body is read in parts.
SENT = ("host", "accept", "connection", "content-type", "content-length", "user-agent") + (
    "x-stainless-raw-response",
)
NO_URL = "URL is none: expected http(s)://HOST[:PORT]/v1."
JUDGE = "judge"  # what a model is to whoever asks it, as messages name it
ADVICE = {
    401: f"the key in {KEY} is not accepted",
    403: f"the key in {KEY} may not use this model",
    404: "there is no such address or model; check the URL and the model",
}


class EndpointError(RuntimeError):
    """The endpoint cannot be used as it is named, or did not answer as a chat completion.

    No message holds a key, nor anything that the endpoint wrote.
    """


class ChatEndpoint:
    """A chat model behind an OpenAI-compatible `/chat/completions`.

    Args:
      base_url: such as `http://localhost:8000/v1`.
      model: name sent with each request.
      api_key: bearer token; may be empty.
      timeout: seconds a whole request may take.
      temperature: temperature of the replies.
      role: what the model is to whoever asks it, as messages name it.

    Raises:
      EndpointError: see `check_url`, or the key has characters that no header has.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        api_key: str = "",
        *,
        timeout: float = 120.0,
        temperature: float = 0.0,
        role: str = JUDGE,
    ):
        check_url(base_url, bool(api_key), role)
        if not (api_key.isascii() and api_key.isprintable()):
            raise EndpointError(f"{KEY} holds characters that no key has; set it again.")
        self.url = base_url.rstrip("/") + "/chat/completions"  # as messages name it
        self.model, self.timeout, self.temperature = model, timeout, temperature
        self._named = f"{role} at {self.url}"
        self._client = _client(base_url, api_key, timeout, role)

    @classmethod
    def from_environment(cls, base_url: str, model: str) -> "ChatEndpoint":
        """Returns an endpoint with the key of the environment.

        Raises:
          EndpointError: as the class.
        """
        return cls(base_url, model, os.environ.get(KEY, ""))

    def __call__(self, messages: Sequence[dict]) -> str:
        """Returns the reply to `[{"role", "content"}, ...]`, without its thought.

        What may pass is tried `TRIES` times, and so is a reply without text, such as of a model
        that declines: "" where it stays so.

        Raises:
          EndpointError: no connection, an HTTP error, no end in time, or another shape of reply.
        """
        import httpx2
        import openai

        failures = (openai.OpenAIError, httpx2.HTTPError, httpx2.StreamError, OSError, ValueError)
        problem, wait = "", 0.0
        for number in range(TRIES):
            time.sleep(wait)
            wait = 2.0**number
            try:
                content = _within(self.timeout, lambda: self._post(messages))
                if text := spoken(_text_of(content)):
                    return text
                problem = ""
            except (*failures, _Status) as error:
                status = next((e for e in _chain(error) if isinstance(e, _Status)), None)
                if status is None:
                    problem = _reason(error, self.timeout)
                    continue
                problem, wait = self._passing(status), status.wait or wait
        if not problem:
            return ""
        raise EndpointError(
            f"{self._named}: {problem}, {TRIES} times; start the same command again when it "
            "answers."
        )

    def _passing(self, status: "_Status") -> str:
        """Returns what a status says that may pass; raises `EndpointError` for another one."""
        code, problem = status.code, f"HTTP {status.code}"
        if 300 <= code < 400:
            advice = "it points to another address, which is not followed; give that one"
            raise EndpointError(f"{self._named}: {problem}; {advice}.") from None
        if code < 500 and code not in TRIED_AGAIN:
            advice = ADVICE.get(code, "it does not take the request")
            raise EndpointError(f"{self._named}: {problem}; {advice}.") from None
        return problem

    def _post(self, messages: Sequence[dict]) -> bytes:
        """Asks once; raises what the client raises, `_Status` or `_BadReply`."""
        ends = time.monotonic() + self.timeout
        completions = self._client.chat.completions.with_streaming_response
        content = bytearray()
        with completions.create(
            model=self.model, messages=list(messages), temperature=self.temperature
        ) as response:
            for part in response.iter_bytes():
                content += part
                if len(content) > LARGEST_REPLY:
                    raise _BadReply(f"a reply of more than {LARGEST_REPLY >> 20} MiB")
                if time.monotonic() > ends:
                    raise TimeoutError  # nobody waits any more
        return bytes(content)


class _Status(Exception):
    """A reply that is no success, with the seconds of its `Retry-After`, 0 without it."""

    def __init__(self, code: int, wait: float):
        super().__init__(code)
        self.code, self.wait = code, wait


class _BadReply(ValueError):
    """A reply that cannot be used; the message is our own."""


def _client(base_url: str, api_key: str, timeout: float, role: str) -> Any:
    """Returns an `openai` client that sends and believes no more than it must."""
    import httpx2
    import openai

    # Their lines at this level quote the endpoint.
    for name in ("httpx2", "httpcore2", "openai"):
        logging.getLogger(name).setLevel(logging.WARNING)

    def send_no_more(request: Any) -> None:
        for name in set(request.headers) - set(SENT):
            del request.headers[name]
        request.headers["Accept-Encoding"] = "identity"
        if api_key:
            request.headers["Authorization"] = f"Bearer {api_key}"

    def look(response: Any) -> None:
        """Raises before the body of what is no success, or is packed, is read."""
        if not 200 <= response.status_code < 300:
            after = response.headers.get("Retry-After", "").strip()
            whole = after.isdecimal() and after.isascii()
            wait = min(float(after), LONGEST_WAIT) if whole else 0.0
            raise _Status(response.status_code, wait)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _BadReply("a reply that is packed, which was not asked for")

    try:
        return openai.OpenAI(
            # The client takes none for a mistake; it is not sent.
            api_key=api_key or "none",
            base_url=base_url,
            max_retries=0,
            timeout=timeout,
            http_client=openai.DefaultHttpxClient(
                # The key would go along, and whoever answers there would be believed.
                follow_redirects=False,
                event_hooks={"request": [send_no_more], "response": [look]},
                timeout=timeout,
            ),
        )
    except httpx2.InvalidURL:
        raise EndpointError(f"the {role}'s {NO_URL}") from None


def check_url(base_url: str, with_key: bool, role: str = JUDGE) -> None:
    """Checks the base URL of an endpoint; messages hold no more of it than the host.

    Args:
      base_url: the URL.
      with_key: whether a key is sent there.
      role: as in `ChatEndpoint`.

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
        raise EndpointError(f"the {role}'s {NO_URL}")
    if "@" in parts.netloc or any(c in base_url for c in "?#"):
        raise EndpointError(
            f"the {role}'s URL, of host {host}, has a user, a query or a fragment, which records "
            f"and errors would show: give the key in {KEY}, and the URL without it."
        )
    if with_key and parts.scheme == "http" and not _is_loopback(host):
        raise EndpointError(
            f"the {role}'s URL would send {KEY} to {host} unencrypted: use https, or a tunnel to "
            f"localhost; or unset {KEY}, if that server needs none."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def _text_of(content: bytes) -> str:
    """Returns the text of a chat completion; raises `_BadReply` where it is none."""
    try:
        text = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise _BadReply("a reply that is no chat completion") from None
    if not isinstance(text, str | None):
        raise _BadReply("a reply whose content is no text")
    return text or ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and its causes: the client wraps what its parts raise."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: Exception, seconds: float) -> str:
    """Returns what went wrong, in words that are not the endpoint's own."""
    causes = list(_chain(error))
    for cause in causes:
        if isinstance(cause, _BadReply):
            return str(cause)
        if isinstance(cause, TimeoutError):
            return f"no whole reply within {seconds:g} s"
        if isinstance(cause, OSError):
            return cause.strerror or type(cause).__name__
    return f"a reply that is cut off or no HTTP ({type(causes[-1]).__name__})"
