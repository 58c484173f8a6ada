"""Every error in OpenAI's format, ``{"error": {"message", "type", "param", "code"}}``, with its status.

What went wrong is said, never with what text: error bodies and logs hold no prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request

_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 408: "timeout_error",
    429: "rate_limit_error",
}  # fmt: skip


class ApiError(Exception):
    """An answer that is an error: status, message with the remedy, and the field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """What is sent, in a stream as well."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, self.headers)


def install(app: FastAPI) -> None:
    """Errors of the framework and of the handlers become :class:`ApiError` answers."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    async def http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return ApiError(error.status_code, str(error.detail), headers=error.headers).response()

    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"internal error ({type(error).__name__}); the server's log has the details").response()

    app.add_exception_handler(ApiError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def from_validation(problems: Any) -> ApiError:
    """400 for the first of pydantic's problems, without the value that caused it.

    Of a union's branches the one is named that got furthest into the value: it is the one that was meant.
    """
    field = problems[0]["loc"][:2]
    first = max((p for p in problems if p["loc"][:2] == field), key=lambda problem: _depth(problem["loc"]))
    param = _path(first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    named, colon, rest = message.partition(": ")
    if param is None and colon and named in _field_names():  # of a rule on several fields
        param, message = named, rest
    if first["type"] == "extra_forbidden":
        message = "unknown field; remove it"
    if first["type"] == "json_invalid":
        param, message = None, "the body is not valid JSON"
    return ApiError(400, f"{param}: {message}" if param else message, param=param)


def _depth(location: Sequence[str | int]) -> tuple[int, list[int]]:
    return len(location), [part for part in location if isinstance(part, int)]


def _path(location: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "content", "list[TextPart]", 1, "text") -> messages[0].content[1].text.

    pydantic writes the branches of a union between the fields: a name below the first is kept if it is a field's.
    """
    path = ""
    for part in location[1:] if location[:1] == ("body",) else location:
        if isinstance(part, int):
            path += f"[{part}]" if path else ""
        elif not path:
            path = part
        elif part in _field_names():
            path += f".{part}"
    return path or None


@cache
def _field_names() -> frozenset[str]:
    from spec.serve import protocol

    models = [m for m in vars(protocol).values() if isinstance(m, type) and issubclass(m, BaseModel)]
    return frozenset(field.alias or name for m in models for name, field in m.model_fields.items())
