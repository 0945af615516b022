"""`python -m ep_prune`: the command line."""

import sys

from ep_prune.cli import main

if __name__ == "__main__":
    sys.exit(main())
