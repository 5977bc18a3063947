"""Variants of sublayers as texts and blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.errors import InputError
from simulator.models.config import Block
from simulator.models.library import load_model
from simulator.plans.variants import (
    ALIGNMENT,
    generated,
    joined,
    part_of,
    text_of,
    variant,
    without,
)

pytestmark = pytest.mark.quick

DENSE = Block(32, 8, 14336)
ROUTED = Block(32, 4, 0, experts=128, active=8.0, expert_inner=768)


@pytest.mark.parametrize(
    ("sublayer", "dense", "text"),
    [
        *(
            ("attention", DENSE, text)
            for text in ("dense", "none", "linear", "kv=4", "heads=16", "heads=16 kv=4")
        ),
        *(("mlp", DENSE, text) for text in ("dense", "none", "linear", "7168")),
        *(
            ("mlp", ROUTED, text)
            for text in ("dense", "none", "experts=64", "width=512", "experts=64 width=512")
        ),
    ],
)
def test_texts_are_read_back(sublayer: str, dense: Block, text: str) -> None:
    assert text_of(sublayer, variant(sublayer, text, dense), dense) == text
    # fewer experts than a token uses are all used
    assert variant("mlp", "experts=4", ROUTED).active == 4.0


@pytest.mark.parametrize(
    ("sublayer", "text", "message"),
    [
        ("attention", "kv=3", "divides the 32 query heads"),
        ("attention", "kv=16", "at most heads=32 kv=8"),
        ("attention", "kv=4 kv=2", "expected dense, none, linear"),
        ("mlp", "20000", "a width up to 14336"),
    ],
)
def test_variants_that_do_not_fit_are_one_line(sublayer: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        variant(sublayer, text, DENSE)
    assert "\n" not in str(error.value)


def test_parts_joined_are_the_layer() -> None:
    both = replace(DENSE, kv_heads=2, inner=512)
    assert joined(part_of("attention", both), part_of("mlp", both)) == both
    with pytest.raises(InputError, match="no attention"):
        variant("attention", "kv=4", without("attention", both))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_generated_widths_are_aligned_and_shared_by_the_devices(devices: int) -> None:
    model = load_model("llama-3.1-8b")
    widths = [block.inner for block in generated("mlp", model, model.usual, devices)]
    assert widths[0] == 14336
    assert widths[-1] == 0
    assert len(set(widths)) == len(widths) > 5
    assert all(width % (ALIGNMENT * devices) == 0 for width in widths)
    groups = [block.kv_heads for block in generated("attention", model, model.usual, devices)]
    assert all(many % devices == 0 for many in groups)
    latent = load_model("deepseek-v2-lite")
    texts = [
        text_of("attention", b, latent.layout[1])
        for b in generated("attention", latent, latent.layout[1])
    ]
    assert texts == ["dense", "none"]
