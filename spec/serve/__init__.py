"""An OpenAI-compatible server with speculative decoding: ``python -m spec.serve --target DIR --draft DIR``.

A call's way through the files: ``gate`` (keys, sizes, log) → ``app`` (paths) → ``protocol`` (what clients may send) →
``plan`` with ``texts`` (to engine requests) → ``worker`` (the engine's thread) → ``respond`` with ``answers`` (back on
the wire). Beside it: ``options``, ``backend`` and ``start`` (from the command line to a running server), ``selftest``
and ``drafts`` (which draft serves), ``metrics``, ``log``, ``errors``, and ``page/`` (the chat page).
"""

from __future__ import annotations
