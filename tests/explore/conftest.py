"""A model whose name is markup."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

MARKUP = "<img src=x onerror=alert(1)>$\\frac{$ & [a](b) \"'"


@pytest.fixture
def hostile_model(tmp_path: Path) -> Path:
    """A folder whose name is markup, as far as a file system allows, with a config.json."""
    folder = tmp_path / MARKUP
    folder.mkdir()
    shape = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    config = {"model_type": "llama", "vocab_size": 1000, "torch_dtype": "bfloat16", **shape}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
