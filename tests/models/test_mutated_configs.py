"""Configurations near a valid one of today's types are read or refused in one line; what is read
can be timed and written."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from simulator.errors import InputError
from simulator.models.library import from_hf_config
from simulator.models.lower import lower
from simulator.models.write import config_content, content_of
from simulator.pruning import prune_model

pytestmark = pytest.mark.quick

NAMES = (
    *("bamba-9b", "deepseek-v3.2", "ernie-4.5-21b-a3b", "gemma-3n-e4b", "gemma-4-26b-a4b"),
    *("glm-4.7-flash", "granite-4.0-h-tiny", "hunyuan-a13b", "jamba-1.5-mini", "lfm2-1.2b"),
    *("kimi-linear-48b-a3b", "minimax-m2", "nemotron-3-puzzle-75b-a9b", "nemotron-nano-12b-v2"),
    *("olmoe-1b-7b", "qwen3.5-35b-a3b"),
)
TIMES = 25  # mutations of each configuration
WRONG = (None, True, -1, 0, 1, 3, 2**40, 1e308, 0.5, "", "x", [], {}, [1], ["x"], {"x": 1})


def places(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of each value of objects in a configuration."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            yield (*path, key)
            yield from places(value, (*path, key))
    elif isinstance(content, list):
        for i, value in enumerate(content[:3]):
            yield from places(value, (*path, i))


def mutate(content: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Return a copy with one to three values of other types or sizes, or missing."""
    out = copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        *outer, key = draw.choice(list(places(out)))
        inside: Any = out
        for name in outer:
            inside = inside[name]
        value = inside[key]
        way = draw.randrange(4)
        if way == 0:
            del inside[key]
        elif way == 1 and isinstance(value, list | str):
            inside[key] = value[:-1] if draw.random() < 0.5 else value + value[:1]
        elif way == 2 and isinstance(value, int):
            inside[key] = value * draw.choice((-1, 2, 3, 7, 10**6)) + draw.choice((0, 1))
        else:
            inside[key] = copy.deepcopy(draw.choice(WRONG))
    return out


@pytest.mark.parametrize("name", NAMES)
def test_a_mutated_configuration_is_read_or_refused_in_one_line(name: str) -> None:
    draw, content, read = random.Random(name), dict(content_of(name)), 0
    refusals: list[str] = []
    for _ in range(TIMES):
        mutant = mutate(content, draw)
        try:
            dense = from_hf_config(mutant, name)
            lower(dense, phase="decode", batch=1, seq=64, engine="vllm")
            pruned = prune_model(dense, "depth layers=0-7")
            written = config_content(mutant, dense, pruned)
        except InputError as error:
            refusals.append(str(error))
            continue
        assert from_hf_config(json.loads(json.dumps(written)), name).layers == pruned.layers
        read += 1
    assert 0 < read < TIMES
    assert all("\n" not in line and len(line) < 4000 for line in refusals)
