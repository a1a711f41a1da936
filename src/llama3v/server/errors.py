"""What a client is told when a request fails: OpenAI's shape, constant texts.

A text says what is wrong with the request and never what an exception said: those carry addresses, paths and pieces of
other people's data.
"""

from typing import Any


class ApiError(Exception):
    """A refusal, as the client sees it.

    Args:
        status: of HTTP.
        message: one constant sentence, with numbers and names of fields at most.
        code: for programs. param: the field of the request that is wrong.
        retry_after: seconds, for refusals that pass by.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})

    def body(self) -> dict[str, Any]:
        """The response, in OpenAI's shape."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def refused(message: str, *, code: str | None = None, param: str | None = None) -> ApiError:
    """400: the request itself is wrong."""
    return ApiError(400, message, code=code, param=param)


def internal_error() -> ApiError:
    """500: a defect of ours. What it was stands in the log."""
    return ApiError(500, "The server failed to answer this request.", code="internal_error")


def deadline_exceeded() -> ApiError:
    """504: it took too long."""
    return ApiError(504, "The request took longer than this server allows and was stopped.", code="deadline_exceeded")
