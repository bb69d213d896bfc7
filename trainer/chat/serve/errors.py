"""A request that is refused, in the shape of an OpenAI error."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse


class RequestError(Exception):
    """A request that is refused, with the HTTP status and the fields of an OpenAI error body."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON to send."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def refusal(error: RequestError) -> JSONResponse:
    """An error as the OpenAI client expects it."""
    again = {"Retry-After": "2"}
    headers = {429: again, 503: again, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
