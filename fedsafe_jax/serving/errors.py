"""Errors that clients get, in the shape of OpenAI's API."""

from typing import Any

TYPES = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is not answered.

    Args:
      status: HTTP status.
      message: what was given and how to mend it, one line.
      param: field of the request, None for none.
      code: OpenAI's word for it, such as "context_length_exceeded"; None for none.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Returns the error as clients read it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        content = {
            "message": str(self),
            "type": TYPES.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": content}


def malformed(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns the error of a request that is wrong in itself, status 400."""
    return ApiError(400, message, param, code=code)
