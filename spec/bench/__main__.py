"""``python -m spec.bench``; see :mod:`spec.bench.cli`."""

import sys

from spec.bench.cli import main
from spec.runtime import ensure_tuned

if __name__ == "__main__":
    ensure_tuned()
    sys.exit(main())
