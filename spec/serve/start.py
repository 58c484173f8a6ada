"""From options to a running server of our own engine: load, test, listen, drain."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from argparse import Namespace
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from spec import loading
from spec.serve.backend import model_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spec.drafters.base import Drafter
    from spec.models.base import LanguageModel
    from spec.serve.app import Policy, Service
    from spec.serve.log import RequestLog
    from spec.serve.metrics import Metrics
    from spec.serve.plan import Limits
    from spec.serve.slices import Check
    from spec.serve.worker import Worker
    from spec.verify import Mode

_GOODBYE = 3  # seconds for requests that the drain's end cuts short to be told so
_MOST_CHOICES = 128  # of one call
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(options: Namespace, listener: socket.socket) -> int:
    """Serves on a bound socket until SIGTERM, SIGINT or a failure of the engine; 0 or 1.

    Raises ValueError or OSError, with the remedy, for what cannot start.
    """
    if sys.platform == "linux":  # hot swaps: the kernels of a draft being loaded run beside the engine thread's
        os.environ.setdefault("NUMBA_THREADING_LAYER", "threadsafe")
    service = make_service(options)

    import uvicorn

    from spec.serve.app import make_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if not self.should_exit:
                _announce(service, listener)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            late = asyncio.get_running_loop().call_later(options.drain_timeout, service.worker.cancel_all)
            await super().shutdown(sockets)
            late.cancel()

    server = Server(
        uvicorn.Config(
            make_app(service), log_level="warning", access_log=False, server_header=False, ws="none",
            timeout_graceful_shutdown=options.drain_timeout + _GOODBYE,
        )
    )  # fmt: skip
    service.draining = lambda: server.should_exit

    def failed(error: BaseException) -> None:
        service.log.write("engine_failed", error=repr(error))
        server.should_exit = True

    service.worker.on_failure = failed
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it once more after the drain
    server.run(sockets=[listener])
    service.log.write("stopped", reason="engine failed" if service.worker.failure else "drained")
    return 1 if service.worker.failure else 0


def make_service(options: Namespace) -> Service:
    """Loads and tests the models, and puts the parts together. Raises ValueError or OSError with the remedy."""
    from spec.constraint import Grammars
    from spec.engine import Engine
    from spec.serve import app
    from spec.serve.drafts import Drafts, Loaded
    from spec.serve.log import RequestLog
    from spec.serve.metrics import Metrics
    from spec.serve.texts import Texts
    from spec.serve.worker import Worker

    parts = load(options)
    drafter = parts.tested_drafter(options.draft, options.audit_at_start)
    engine = Engine(
        parts.target, drafter, tokenizer=parts.tokenizer, draft_length=loading.draft_length(options.draft_length),
        mode=options.mode, max_running=options.max_running, shares_target=True,  # with checks and audits
    )  # fmt: skip
    name = model_name(options)
    metrics = Metrics(name, lambda: engine.load, lambda: parts.target.cache_usage)
    worker = Worker(
        engine, max_running=options.max_running, max_waiting=options.max_waiting, on_result=metrics.observe,
        on_gap=metrics.gap,
    )  # fmt: skip
    log = RequestLog(options.log_text)
    if options.audit_share:
        _audit_live(worker, options.audit_share, metrics, log)
    limits = _limits(options, parts)
    tokenizer = loading.open_tokenizer(options.target)  # not the engine's: for another thread
    grammars = Grammars(tokenizer, limits.vocabulary, limits.end_tokens)
    return app.Service(
        name=name,
        target=options.target,
        worker=worker,
        texts=Texts(tokenizer, limits.context, grammars),
        base_limits=limits,
        metrics=metrics,
        drafts=Drafts(
            worker,
            Loaded(options.draft, drafter, options.draft_length),
            parts.open_candidate,
            partial(parts.checks, audit_tokens=options.audit_at_start),
            metrics.swapped,
        ),
        log=log,
        policy=_policy(options),
    )


@dataclass(frozen=True)
class _Parts:
    """What is loaded once, and how drafters for it are."""

    target: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    models: loading.ModelOptions
    drafting: loading.DrafterOptions
    mode: Mode
    hub_drafts: frozenset[str]  # that may be swapped in

    def open_drafter(self, name: str | None) -> Drafter | None:
        """Raises ValueError or OSError with the remedy."""
        return loading.open_drafter(name, self.target, self.tokenizer, self.models, self.drafting)

    def open_candidate(self, name: str | None) -> Drafter | None:
        """For a swap: whoever may do that may not make the server fetch things. Raises as :meth:`open_drafter`."""
        loading.check_names(self.target.name, name)
        for model in loading.draft_models(name):
            if not Path(model).is_dir() and model not in self.hub_drafts:
                raise ValueError(
                    f"'{model}' is no directory on the server's machine: name a hub id with --allowed-draft at start"
                )
        return self.open_drafter(name)

    def tested_drafter(self, name: str | None, audit_tokens: int = 0) -> Drafter | None:
        """The start-up self-test, of the target too. Raises ValueError where it fails."""
        from spec.serve.selftest import check_drafter
        from spec.serve.slices import SelfTestFailed, run

        drafter = self.open_drafter(name)
        try:
            if drafter is not None:
                check_drafter(drafter, self.target.vocab_size)
            run(self.checks(drafter, audit_tokens))
        except SelfTestFailed as error:
            raise ValueError(f"start-up self-test: {error}") from None
        return drafter

    def checks(self, drafter: Drafter | None, audit_tokens: int) -> Check[None]:
        """Of the target with a drafter: greedy text, and an audit of ``audit_tokens`` sampled tokens at most."""
        from spec.serve.audit import TEXTS, smoke_audit
        from spec.serve.selftest import greedy_check

        yield from greedy_check(self.target, drafter)
        prompts = [list(self.tokenizer(text)["input_ids"]) for text in TEXTS]
        yield from smoke_audit(self.target, drafter, self.mode, prompts, audit_tokens)


def load(options: Namespace) -> _Parts:
    """Target, tokenizer, and how drafters are loaded. Raises ValueError or OSError with the remedy."""
    import transformers

    from spec.allocator import keep_freed_memory

    keep_freed_memory()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = loading.open_tokenizer(options.target)
    models = loading.ModelOptions(options.dtype, options.device, options.cache_tokens)
    target = loading.open_target(options.target, models, options.quantization)
    drafting = loading.DrafterOptions(options.drafting, options.draft_quantization)
    allowed = frozenset((*options.allowed_draft, *loading.draft_models(options.draft)))
    return _Parts(target, tokenizer, models, drafting, options.mode, allowed)


def _audit_live(worker: Worker, share: float, metrics: Metrics, log: RequestLog) -> None:
    from spec.serve.audit import LiveAudit

    audit = LiveAudit(worker, share, metrics.audit(), log)
    worker.on_arrival = audit.arrived


def _limits(options: Namespace, parts: _Parts) -> Limits:
    from spec.engine import ending_tokens
    from spec.serve.plan import Limits

    return Limits(
        vocabulary=parts.target.vocab_size,
        # The cache hands out whole blocks of 16.
        context=min(parts.target.max_positions, options.cache_tokens // 16 * 16, options.max_model_len or sys.maxsize),
        default_tokens=options.default_max_tokens,
        samples=min(_MOST_CHOICES, options.max_running + options.max_waiting),
        end_tokens=tuple(ending_tokens(parts.target, parts.tokenizer)),
        adaptive=False,
    )


def _policy(options: Namespace) -> Policy:
    from spec.serve.app import Policy
    from spec.serve.gate import Keys

    local = options.host in _LOOPBACK
    return Policy(
        keys=Keys(options.api_key, options.admin_key),
        cors_origins=tuple(options.cors_origin),
        # A page of another site must not reach a local server under a name of its own (DNS rebinding).
        hosts=tuple(options.allowed_host) or ((*_LOOPBACK, "[::1]") if local else ()),
        most_bytes=options.max_body,
        request_seconds=options.request_timeout,
    )


def bind(host: str, port: int) -> socket.socket:
    """Reserves the address; nobody is answered before the server listens. Raises ValueError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot bind {host}:{port} ({error.strerror}): choose another --port or --host") from None
    return listener


def address(host: str, port: int) -> str:
    """The URL of a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def _announce(service: Service, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    if host not in _LOOPBACK and service.policy.keys.api is None:
        service.log.write("warning", message="open to the network without a key: set --api-key or SPEC_API_KEY")
    current = service.drafts.current
    service.log.write(
        "ready", url=address(host, port), model=service.name, draft=current.name, draft_length=current.length,
        max_model_len=service.base_limits.context,
    )  # fmt: skip
