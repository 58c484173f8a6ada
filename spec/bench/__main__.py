import sys

from spec.bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
