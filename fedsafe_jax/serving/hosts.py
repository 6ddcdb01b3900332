"""Which names clients may call a server by.

A page of a stranger may have its own name resolve to this machine (DNS rebinding): a browser then
takes the server here for the page's own, and lets its scripts ask and read. The name they ask for,
in the header Host, is the page's, and so is not one of these.
"""

import ipaddress
import re

from starlette.requests import Request

from fedsafe_jax.serving.errors import ApiError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
ANY = "*"


def allowed_hosts(host: str, others: tuple[str, ...] = ()) -> frozenset[str]:
    """Returns the names by which a server may be called; none for any.

    Args:
      host: the address that it listens at.
      others: further names; "*" for any.
    """
    if ANY in others or not (others or is_loopback(host)):
        return frozenset()
    return frozenset(name.strip("[]").lower() for name in (*LOOPBACK, host, *others))


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches an address, or name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(request: Request, hosts: frozenset[str]) -> None:
    """Checks the name that a request calls the server by.

    Raises:
      ApiError: 403, it is not one of `hosts`, unless those are none.
    """
    given = request.headers.getlist("host")
    name = _name(given[0]) if len(given) == 1 else ""
    if hosts and name not in hosts:
        shown = name[:100] or "no one name"
        raise ApiError(
            403,
            f"The request is for {shown}; this server answers to {', '.join(sorted(hosts))}. "
            "`fedsafe serve --allow_host=NAME` adds a name.",
            code="host_not_allowed",
        )


def _name(host: str) -> str:
    """The name in a header Host, such as "[::1]:8000", without brackets and port."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:]+))(?::\d*)?", host.strip().lower())
    return (match[1] or match[2]) if match else ""
