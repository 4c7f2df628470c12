"""Makes `python -m qcomm` run the command line."""

import sys

from qcomm.cli import main

if __name__ == "__main__":
    sys.exit(main())
