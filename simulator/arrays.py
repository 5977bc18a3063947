"""Types of arrays, for all packages."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
"""An array of any type: numbers in float32 or float64, codes, names."""

FloatArray = NDArray[np.float64]
"""Numbers in SI units, unless a name states another unit."""

IndexArray = NDArray[np.intp]
"""Indices into the rows of another array."""

BoolArray = NDArray[np.bool_]
"""One truth value per row."""
