"""``python -m spec.audit``; see :mod:`spec.audit.cli`."""

import sys

from spec.audit.cli import main
from spec.runtime import ensure_tuned

if __name__ == "__main__":
    ensure_tuned()
    sys.exit(main())
