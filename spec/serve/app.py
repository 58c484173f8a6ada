"""The application: which path does what."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI
from fastapi import Request as HttpRequest
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from spec.serve import errors, schemas
from spec.serve.answers import Answer, ChatAnswer, CompletionAnswer, Head, Json, Shown
from spec.serve.errors import ApiError
from spec.serve.gate import Gate, Keys
from spec.serve.log import RequestLog
from spec.serve.plan import Limits, chat_requests, completion_requests
from spec.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    SwapRequest,
    TokenizeRequest,
)
from spec.serve.respond import respond, submit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from spec.request import Request
    from spec.serve.drafts import Drafts, Loaded
    from spec.serve.metrics import Metrics
    from spec.serve.texts import Texts
    from spec.serve.worker import Worker

PAGE = Path(__file__).parent / "page"
# The page needs nothing from elsewhere, and nothing from elsewhere may frame or script it.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Policy:
    """What the operator decided."""

    keys: Keys = field(default_factory=Keys)
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()  # Host headers let in; empty: all
    most_bytes: int = 4 * 2**20
    request_seconds: float = 600.0


@dataclass
class Service:
    """Everything the handlers use."""

    name: str  # of the model, in /v1/models
    target: str
    worker: Worker
    texts: Texts
    base_limits: Limits
    metrics: Metrics
    drafts: Drafts
    log: RequestLog
    policy: Policy = field(default_factory=Policy)
    draining: Callable[[], bool] = lambda: False
    began: int = field(default_factory=lambda: int(time.time()))

    @property
    def limits(self) -> Limits:
        """With the draft length of the draft that is in use now."""
        return replace(self.base_limits, adaptive=self.drafts.current.length == "auto")

    def fingerprint(self) -> str:
        """Changes with whatever may change the text of a seed: the target, and the draft."""
        current = self.drafts.current
        parts = (self.target, current.name, current.length, self.drafts.version)
        return "fp_" + sha256(repr(parts).encode()).hexdigest()[:10]

    def head(self, prefix: str) -> Head:
        return Head(self.name, prefix, self.fingerprint())

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for a model that is not here."""
        if name not in (None, self.name):
            raise ApiError(
                404, f"the model '{name}' is not here: this server has '{self.name}'", param="model",
                code="model_not_found",
            )  # fmt: skip


def make_app(service: Service) -> FastAPI:
    """The ASGI application; its life is the engine thread's."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()

    app = FastAPI(title="spec.serve", lifespan=life, docs_url=None, redoc_url=None)
    app.state.service = service
    errors.install(app)
    for router in (_probes, _openai, _admin):
        app.include_router(router)
    app.mount("/page", StaticFiles(directory=PAGE))
    policy = service.policy
    app.add_middleware(
        Gate, keys=policy.keys, hosts=policy.hosts, most_bytes=policy.most_bytes, log=service.log,
        metrics=service.metrics,
    )  # fmt: skip
    if policy.cors_origins:
        app.add_middleware(
            _Cors, allow_origins=list(policy.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"], expose_headers=["Retry-After", "x-request-id"],
        )  # fmt: skip
    return app


class _Cors(CORSMiddleware):
    """Its refusals in the format of all others."""

    def preflight_response(self, request_headers: Headers) -> Response:
        given = super().preflight_response(request_headers)
        if given.status_code < 400:
            return given
        return ApiError(given.status_code, bytes(given.body).decode(), headers={"Vary": "Origin"}).response()


def _service(http: HttpRequest) -> Service:
    service: Service = http.app.state.service
    return service


_probes, _openai, _admin = APIRouter(), APIRouter(), APIRouter(prefix="/admin")
_GENERATION = (400, 401, 404, 408, 413, 429, 500, 503)
_READY: dict[int | str, dict[str, Any]] = {
    200: {"model": schemas.Status}, 503: {"model": schemas.Status, "description": "The engine takes no requests"},
}  # fmt: skip


@_probes.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)


@_probes.get("/health/live", responses=schemas.answers(schemas.Status))
async def live() -> Json:
    """The process answers."""
    return {"status": "ok"}


@_probes.get("/health", responses=_READY)
@_probes.get("/health/ready", responses=_READY)
async def ready(http: HttpRequest) -> Response:
    """The engine takes requests; 503 while it does not."""
    service = _service(http)
    state = "draining" if service.draining() else "ok" if service.worker.alive else "engine is not running"
    return JSONResponse({"status": state}, 200 if state == "ok" else 503)


@_probes.get("/metrics", response_class=PlainTextResponse)
async def metrics(http: HttpRequest) -> Response:
    """Prometheus text."""
    return Response(_service(http).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@_openai.get("/v1/models", responses=schemas.answers(schemas.Models, 401))
async def models(http: HttpRequest) -> Json:
    return {"object": "list", "data": [_card(_service(http))]}


@_openai.get("/v1/models/{name:path}", responses=schemas.answers(schemas.Model, 401, 404))
async def model(http: HttpRequest, name: str) -> Json:
    _service(http).check_model(name)
    return _card(_service(http))


@_openai.post("/v1/completions", responses=schemas.answers(schemas.Completion, *_GENERATION, stream=True))
async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
    service = _service(http)
    service.check_model(body.model)
    requests, echoes = await completion_requests(body, service.texts, service.limits)
    answer = CompletionAnswer(service.texts, echoes, _shown(body))
    return await _run(http, service, requests, answer, service.head("cmpl"), body)


@_openai.post("/v1/chat/completions", responses=schemas.answers(schemas.ChatCompletion, *_GENERATION, stream=True))
async def chat(http: HttpRequest, body: ChatRequest) -> Response:
    service = _service(http)
    service.check_model(body.model)
    requests = await chat_requests(body, service.texts, service.limits)
    answer = ChatAnswer(service.texts, _shown(body))
    return await _run(http, service, requests, answer, service.head("chatcmpl"), body)


@_openai.post("/tokenize", responses=schemas.answers(schemas.Tokens, 400, 401, 404, 413))
async def tokenize(http: HttpRequest, body: TokenizeRequest) -> Json:
    service = _service(http)
    service.check_model(body.model)
    if body.messages is not None:
        ids = await service.texts.encode_chat(body.messages, body.add_generation_prompt)
    else:
        ids = await service.texts.encode(body.prompt or "", body.add_special_tokens)
    names = await service.texts.names(ids) if body.return_token_strs else {}
    strings = [names[id] for id in ids] if body.return_token_strs else None
    return {"count": len(ids), "max_model_len": service.limits.context, "tokens": ids, "token_strs": strings}


@_openai.post("/detokenize", responses=schemas.answers(schemas.Text, 400, 401, 404, 413))
async def detokenize(http: HttpRequest, body: DetokenizeRequest) -> Json:
    service = _service(http)
    service.check_model(body.model)
    return {"prompt": await service.texts.decode(body.tokens)}


@_admin.get("/draft", responses=schemas.answers(schemas.DraftState, 401, 403))
async def draft(http: HttpRequest) -> Json:
    """The draft in use, and the one that a rollback would bring back."""
    drafts = _service(http).drafts
    return {"version": drafts.version, "current": _named(drafts.current), "previous": _named(drafts.previous)}


@_admin.post("/draft", responses=schemas.answers(schemas.DraftState, 400, 401, 403, 409, 503))
async def swap(http: HttpRequest, body: SwapRequest) -> Json:
    """A new draft takes over, between two steps; nothing is dropped."""
    drafts = _service(http).drafts
    await drafts.swap(body.draft, None if body.draft_length is None else str(body.draft_length))
    return await draft(http)


@_admin.post("/draft/rollback", responses=schemas.answers(schemas.DraftState, 401, 403, 409, 503))
async def rollback(http: HttpRequest) -> Json:
    """The draft before takes over again."""
    await _service(http).drafts.rollback()
    return await draft(http)


async def _run(
    http: HttpRequest, service: Service, requests: list[Request], answer: Answer, head: Head, body: Sampling
) -> Response:
    job = submit(service.worker, requests, body)
    return await respond(http, job, answer, head, body, service.policy.request_seconds, service.log.with_text)


def _shown(body: Sampling) -> Shown:
    return Shown(bool(body.return_token_ids), bool(body.return_tokens_as_token_ids))


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.name, "object": "model", "created": service.began, "owned_by": "onpolicy", "root": service.target,
        "max_model_len": service.limits.context, "draft": _named(service.drafts.current),
    }  # fmt: skip


def _named(loaded: Loaded | None) -> Json | None:
    return None if loaded is None else {"draft": loaded.name, "draft_length": loaded.length}
