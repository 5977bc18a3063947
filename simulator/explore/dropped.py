"""A dropped config.json as a token that fits in a URL: its shape keys, compressed, and the name of its file.

Use :func:`token` for a file's content and :func:`read_token` for a token. A token holds only the keys that the shapes
follow from, so that it stays short; what comes out of it is checked like any other configuration.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

from simulator.errors import InputError, one_line
from simulator.models.config import ModelConfig
from simulator.models.huggingface import MAX_FILE_BYTES, from_file, parse_config

PREFIX = "dropped:"
"""What a token begins with; no model's name does."""

MOST_TOKEN = 6000
"""Longest token, characters: browsers and proxies cut addresses of more than about 8000."""

_MOST_JSON = 200_000


class _Noted(Mapping[str, Any]):
    """A configuration that notes which of its keys are looked at, be it whether they are there."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data
        self.seen: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        self.seen[key] = self.data[key]
        return self.data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)


def token(text: str, file: str) -> str:
    """The token of a config.json: ``text`` is what the file holds, ``file`` its name; folders before it are dropped.

    InputError, one line that starts with the file's name: too large, no JSON, bad fields, or too much for an address.

    >>> tiny = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    >>> tiny |= {"num_attention_heads": 2, "vocab_size": 10, "torch_dtype": "bfloat16"}
    >>> read_token(token(json.dumps(tiny), "tiny.json"))[1].parameters
    824
    """
    name = _file_name(file.replace("\\", "/"))
    if len(text.encode("utf-8", "replace")) > MAX_FILE_BYTES:
        raise InputError(f"{name}: larger than {MAX_FILE_BYTES} bytes; expected a config.json")
    data = parse_config(text.removeprefix("\ufeff"), name)
    noted = _Noted(data if isinstance(data, Mapping) else {})
    from_file(noted if isinstance(data, Mapping) else data, PurePosixPath(name))
    packed = zlib.compress(json.dumps({"file": name, "config": noted.seen}, separators=(",", ":")).encode(), 9)
    out = PREFIX + base64.urlsafe_b64encode(packed).decode().rstrip("=")
    if len(out) > MOST_TOKEN:
        most = f"more than the {MOST_TOKEN} that an address can carry"
        raise InputError(f"{name}: its shape keys take {len(out)} characters, {most}")
    return out


def _file_name(path: str) -> str:
    return one_line(PurePosixPath(path).name, 100) or "config.json"


@lru_cache(maxsize=32)
def read_token(text: str) -> tuple[str, ModelConfig]:
    """The file name and the model of a token; refuses what :func:`token` did not make.

    >>> read_token("dropped:x")
    Traceback (most recent call last):
    simulator.errors.InputError: model 'dropped:x': not a dropped config.json that can be read
    """
    broken = InputError(f"model {one_line(text, 40)!r}: not a dropped config.json that can be read")
    packed = text.removeprefix(PREFIX)
    if len(text) > MOST_TOKEN:
        raise broken
    try:
        unpack = zlib.decompressobj()
        raw = unpack.decompress(base64.urlsafe_b64decode(packed + "=" * (-len(packed) % 4)), _MOST_JSON)
        whole = json.loads(raw)
        name, data = whole["file"], whole["config"]
    except (ValueError, KeyError, TypeError, zlib.error, RecursionError):
        raise broken from None
    if not unpack.eof or not isinstance(name, str):
        raise broken
    name = _file_name(name)
    return name, from_file(data, PurePosixPath(name))
