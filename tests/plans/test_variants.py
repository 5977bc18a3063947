"""Variants of sublayers as texts and layers."""

from __future__ import annotations

import pytest
from shaped import Layer, cut, layer, sublayer_of
from tables import tables_of

from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.plans.variants import (
    ALIGNMENT,
    generated,
    joined,
    part_of,
    text_of,
    variant,
)
from simulator.pruning import prune_model

pytestmark = pytest.mark.quick

DENSE = layer(32, 8, 14336)
ROUTED = layer(32, 4, experts={"experts": 128, "active": 8.0, "inner": 768})


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
def test_texts_are_read_back(sublayer: str, dense: Layer, text: str) -> None:
    assert text_of(sublayer, variant(sublayer, text, dense), dense) == text
    # fewer experts than a token uses are all used
    assert sublayer_of(variant("mlp", "experts=4", ROUTED), "mlp").active == 4.0


@pytest.mark.parametrize(
    ("sublayer", "text", "message"), tables_of("plans/mistakes.yaml")["variants"]
)
def test_variants_that_do_not_fit_are_one_line(sublayer: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        variant(sublayer, text, DENSE)
    assert "\n" not in str(error.value)


def test_parts_joined_are_the_layer() -> None:
    both = cut(cut(DENSE, "attention", kv_heads=2), "mlp", inner=512)
    assert joined(part_of("attention", both), part_of("mlp", both)) == both
    with pytest.raises(InputError, match="the layer has no attention"):
        variant("attention", "kv=4", both.without("attention"))


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_generated_widths_are_aligned_and_shared_by_the_devices(devices: int) -> None:
    model = load_model("llama-3.1-8b")
    *narrower, none = generated("mlp", model.usual, devices)
    widths = [sublayer_of(one, "mlp").inner for one in narrower]
    assert widths[0] == 14336
    assert none == model.usual.without("mlp")
    assert len(set(widths)) == len(widths) > 5
    assert all(width % (ALIGNMENT * devices) == 0 for width in widths)
    *narrower, none = generated("attention", model.usual, devices)
    groups = [sublayer_of(one, "attention").kv_heads for one in narrower]
    assert groups == [many for many in (8, 4, 2, 1) if many % devices == 0]
    assert none == model.usual.without("attention")
    latent = load_model("deepseek-v2-lite")
    dense = latent.layers[1]
    texts = [text_of("attention", one, dense) for one in generated("attention", dense)]
    assert texts == ["dense", "none"]


def test_a_fraction_removes_what_the_family_width_removes() -> None:
    model = load_model("llama-3.1-8b")
    (dense, *_), pruned = model.layers, prune_model(model, "width mlp=0.3 attention=0.25")
    assert variant("mlp", "0.3", variant("attention", "25%", dense)) == pruned.layers[0]
    with pytest.raises(InputError, match="a fraction to remove"):
        variant("mlp", "1.3", dense)
