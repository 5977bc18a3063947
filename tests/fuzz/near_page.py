"""Addresses of the page and files dropped on it, near good ones; see ``targets``."""

from __future__ import annotations

import base64
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from guard import check_line
from mutate import edit_bytes, few, json_text
from near_lines import PLAUSIBLE, WORDS

_QUERY: Mapping[str, str] = {
    "model": "llama-3.1-8b",
    "gpu": "h100_sxm,a100",
    "family": "depth,width",
    "sparsity": "0.25,0.5",
    "phase": "decode",
    "batch": "8",
    "seq": "512",
    "new": "16",
    "runtime": "cuda_graph",
    "dtype": "bf16",
    "detail": "width",
    "at": "0.5",
}


def make_query(rng: random.Random) -> bytes:
    pairs = list(_QUERY.items())
    for _ in range(few(rng)):
        at = rng.randrange(len(pairs))
        key, value = pairs[at]
        kind = rng.randrange(8)
        if kind <= 3:
            word = rng.choice(PLAUSIBLE if rng.random() < 0.5 else WORDS)
            pairs[at] = (key, quote(word, errors="surrogateescape") if rng.random() < 0.7 else word)
        elif kind == 4:
            pairs[at] = (rng.choice((*_QUERY, "x", "", "Model", "constructor")), value)
        elif kind == 5:
            pairs.insert(at, (key, rng.choice(PLAUSIBLE)))
        elif kind == 6:
            del pairs[at]
            pairs = pairs or [("", "")]
        else:
            pairs[at] = (
                key,
                value
                + rng.choice(("%", "%ff", "%00", "%0a", "%F0%9F", "+", "&", "=", "#", ";", "%2e%2e%2f", "," * 3000)),
            )
    raw = "&".join(f"{key}={value}" for key, value in pairs).encode("utf-8", "surrogateescape")
    return edit_bytes(raw, rng, 2) if rng.random() < 0.2 else raw


def read_address(path: Path) -> None:
    """Whatever the address says there is a state; it is the same from its own address, and what was bad is said line by line."""
    from simulator.errors import InputError
    from simulator.explore.state import read_query, strict_query, to_query

    text = path.read_bytes().decode("utf-8", "replace")
    state, problems = read_query(text)
    for line in problems:
        check_line(line)
    assert strict_query(to_query(state)) == state
    if not problems and path.stat().st_size % 16 == 0:
        _shown(state)
    if problems:
        raise InputError(problems[0])


def _shown(state: Any) -> None:
    """What the page shows of a state: numbers, or a reason."""
    from simulator.explore.answer import answer

    found = answer(state)
    assert found.refused or all(
        np.isfinite((r.speedup, r.speedup_lower, r.speedup_upper)).all() for r in found.table.records
    )


def make_dropped(rng: random.Random, configs: Sequence[Mapping[str, Any]]) -> bytes:
    """A dropped file, or a token that nobody made."""
    whole = json_text(dict(rng.choice(configs)), rng)
    if rng.random() < 0.7:
        return whole
    inner = rng.choice((whole, b"0", b"[]", b'{"file": 1, "config": {}}', b'{"file":"a","config":' + whole + b"}"))
    packed = zlib.compress(inner + b" " * rng.choice((0, 300_000)))
    token = b"dropped:" + base64.urlsafe_b64encode(packed)
    return edit_bytes(token, rng, 2) if rng.random() < 0.7 else token


def read_dropped(path: Path) -> None:
    from simulator.explore.dropped import PREFIX, read_token, token

    text = path.read_bytes().decode("utf-8", "replace")
    short = text if text.startswith(PREFIX) else token(text, "a\\b/../config.json")
    file, model = read_token(short)
    assert file.isprintable()
    assert "/" not in file
    assert model.parameters > 0
    assert json.dumps(file)
