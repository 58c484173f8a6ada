"""``python -m spec.serve``. Exit status: 0 drained; 2 a user's mistake; 130 interrupted; else it failed."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from spec import loading
from spec.runtime import ensure_tuned
from spec.serve.backend import model_name, vllm_command
from spec.serve.choice import choose
from spec.serve.log import RequestLog
from spec.serve.options import parse
from spec.serve.start import address, bind, serve
from spec.serve.supervise import Outcome, supervise


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop; returns the exit status."""
    ensure_tuned(None if arguments is None else list(arguments))
    options = parse(arguments)
    try:
        loading.draft_length(options.draft_length)
        loading.check_names(options.target, options.draft)
        listener = bind(options.host, options.port)  # before minutes of loading
        options.port = listener.getsockname()[1]
        backend, why = choose(options)
        _say(f"backend: {backend} ({why})")
        if backend == "vllm":
            listener.close()
            outcome = serve_vllm(options)
            if outcome.ready or outcome.status in (0, 130) or options.backend == "vllm":
                return outcome.status
            _say(f"backend: torch (vLLM's server ended with status {outcome.status} before it was ready)")
            listener = bind(options.host, options.port)
        return serve(options, listener)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def serve_vllm(options: Namespace) -> Outcome:
    """vLLM's server, until it ends."""
    command = vllm_command(options)
    log = RequestLog()
    here = "127.0.0.1" if options.host == "0.0.0.0" else "::1" if options.host == "::" else options.host

    def ready() -> None:
        log.write(
            "ready", url=address(options.host, options.port), model=model_name(options), backend="vllm",
            draft=options.draft, draft_length=options.draft_length,
        )  # fmt: skip

    health = address(here, options.port) + "/health"
    outcome = supervise(command.argv, command.environment, health, ready, options.drain_timeout)
    log.write("stopped", reason="drained" if outcome.status in (0, 130) else "vLLM ended", status=outcome.status)
    return outcome


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
