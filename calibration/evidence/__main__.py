"""``python -m calibration.evidence``: see :mod:`calibration.evidence.command`."""

import sys

from calibration.evidence.command import main

if __name__ == "__main__":
    sys.exit(main())
