"""``python -m spec.audit``; see :mod:`spec.audit.cli`."""

import sys

from spec.audit.cli import main

if __name__ == "__main__":
    sys.exit(main())
