"""``python -m calibration.evidence``: see :mod:`calibration.evidence.pages`."""

import sys

from calibration.evidence.pages import main

if __name__ == "__main__":
    sys.exit(main())
