"""`python -m fusco.testing.gpu`; what it runs must not be in here, or ranks could not find it."""

import sys

from fusco.testing.gpu.runner import main

if __name__ == "__main__":
    sys.exit(main())
