"""What a request must be before it is read: whose it is, its name for the server, type and size."""

import asyncio
import hmac
from typing import Any, NamedTuple

from starlette.requests import ClientDisconnect, Request

from fedsafe_jax.serving import fields
from fedsafe_jax.serving.errors import ApiError
from fedsafe_jax.serving.hosts import check_host

# A client that is still sending does not read: what is too long is read and thrown away, up to this
# many times the limit, so that it gets its answer and not a broken connection.
DRAINED = 16


class Limits(NamedTuple):
    """What one request may be.

    Attributes:
      body_bytes: size of its body.
      prompt_tokens: tokens of a prompt.
      seconds: time until it is answered, or its stream has ended.
      api_key: what it must bring; "" for nothing.
      hosts: names that it may call the server by; none for any.
    """

    body_bytes: int = 4 << 20
    prompt_tokens: int = 1 << 20
    seconds: float = 600.0
    api_key: str = ""
    hosts: frozenset[str] = frozenset()


def check_caller(request: Request, limits: Limits) -> None:
    """Checks the name that a request calls the server by, and its key.

    Raises:
      ApiError: 403 for the name, 401 for the key.
    """
    check_host(request, limits.hosts)
    if not limits.api_key:
        return
    kind, _, key = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(key.strip().encode("latin-1"), limits.api_key.encode())
    if kind.lower() != "bearer" or not is_right:
        raise ApiError(
            401, "Wrong or no API key; send 'Authorization: Bearer KEY'.", code="invalid_api_key"
        )


async def read_content(request: Request, limits: Limits) -> dict[str, Any]:
    """Reads the JSON object of a request, once its caller is checked.

    Raises:
      ApiError: as `check_caller`; 415 for another type, 413 for too large a body, 408 for one that
        does not come, 400 for no JSON object or a client that left.
    """
    check_caller(request, limits)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Any web page may have a browser send other types to this machine, unasked.
        raise ApiError(415, "Send JSON, with the header 'Content-Type: application/json'.")
    try:
        async with asyncio.timeout(limits.seconds):
            body = await _read_body(request, limits.body_bytes)
    except TimeoutError:
        raise ApiError(408, "The body did not come in time.", code="timeout") from None
    except ClientDisconnect:
        raise ApiError(400, "The client left.") from None  # to nobody
    return fields.read_json(body)


async def _read_body(request: Request, most: int) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= most:
            parts.append(part)
        else:
            parts.clear()
        if size > DRAINED * most:
            break
    if size > most:
        raise ApiError(
            413, f"The body is larger than {most} bytes; send less.", code="request_too_large"
        )
    return b"".join(parts)
