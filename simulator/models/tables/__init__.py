"""Names of keys, tensors and formats in files of other projects, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_names(file: str) -> Any:
    """Return the content of a file of this folder."""
    return json.loads(Path(__file__).with_name(f"{file}.json").read_text(encoding="utf-8"))
