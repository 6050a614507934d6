"""`python -m seqpar`: see `seqpar.cli`."""

import sys

from seqpar.cli import main

if __name__ == "__main__":
    sys.exit(main())
