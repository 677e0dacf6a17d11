"""``python -m snnkernels`` is the ``snnkernels`` command."""

import sys

from snnkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
