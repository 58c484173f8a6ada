"""``python -m spec.serve``. Exit status: 0 drained; 1 the engine failed; 2 a user's mistake; 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spec.serve.backend import choose, vllm_command
from spec.serve.options import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Serves until told to stop; returns the exit status, or becomes vLLM's server."""
    options = parse(arguments)
    try:
        backend, why = choose(options)
        print(f"backend: {backend} ({why})", file=sys.stderr, flush=True)
        if backend == "vllm":
            vllm_command(options).run()
        from spec.serve.start import serve

        return serve(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
