"""What goes wrong with a request, as clients of OpenAI's interface expect to read it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from grokctl.errors import GrokctlError, InvalidValueError, UsageError

TOO_MANY: Final = "too_many"
"""The code of a refusal for want of room."""
_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}
"""By status; every other is an `invalid_request_error`."""


@dataclass(eq=False)
class WireError(Exception):
    """A request that cannot be answered, with the status and the body that say so."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    """The field of the body that is wrong."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the answer, or of an event in a stream."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(message: str, *, param: str | None = None, code: str | None = None) -> WireError:
    """A request that is wrong, and stays so."""
    return WireError(400, message, code, param)


def unsupported(name: str, found: str, supported: str) -> WireError:
    """A field that would change the answer, and does not."""
    message = f"{name}: expected {supported}, found {found}: this server has nothing else"
    return bad_request(message, param=name, code="unsupported_parameter")


def of_usage(error: UsageError, *, param: str | None = None) -> WireError:
    """The answer to a value that the library refuses; its hints are for a command line."""
    if isinstance(error, InvalidValueError):
        param = error.name or param
    return bad_request(str(error), param=param)


def internal(request_id: str) -> WireError:
    """A bug, or a failure whose words are for the log of this server alone."""
    message = f"internal error; the server's log has it as {request_id}"
    return WireError(500, message, headers={"x-should-retry": "false"})


def of_failure(error: GrokctlError, request_id: str) -> WireError:
    """The answer after the engine could not fulfil a request."""
    return of_usage(error) if isinstance(error, UsageError) else internal(request_id)


def unavailable(message: str, code: str, *, retry_after_s: int, **headers: str) -> WireError:
    """A server that cannot answer now."""
    return WireError(503, message, code, headers={"Retry-After": str(retry_after_s), **headers})
