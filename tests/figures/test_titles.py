"""Figures are labelled with names that people use, and no two devices, engines or models share one."""

from __future__ import annotations

import pytest
from simulator.figures.titles import device_title, engine_title, model_title

from simulator.engines.engine import list_engines
from simulator.figures.style import STYLES, label
from simulator.hardware.library import list_hardware
from simulator.models.library import list_models, load_model
from simulator.pruning import FAMILIES


def test_titles_tell_all_devices_engines_models_and_families_apart() -> None:
    for names, title in (
        (list_hardware(), device_title),
        (list_engines(), engine_title),
        (list_models(), model_title),
        (FAMILIES, label),
    ):
        titles = [title(name) for name in names]
        assert len(set(titles)) == len(titles)
        assert not any("_" in t for t in titles if "Nemotron" not in t)
    assert set(FAMILIES) <= set(STYLES)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("a100_sxm_80gb", "A100 80GB SXM"),
        ("a100_pcie_80gb", "A100 80GB PCIe"),
        ("h100_sxm", "H100 SXM"),
        ("rtx_4090", "RTX 4090"),
        ("mi300x", "MI300X"),
        ("rtx_4090@vllm", "RTX 4090 (vLLM kernels)"),
        ("rtx_4090 (anchored)", "RTX 4090 (anchored)"),
        ("gpu of mine", "gpu of mine"),
    ],
)
def test_a_device_has_the_words_that_people_say(name: str, title: str) -> None:
    assert device_title(name) == title


@pytest.mark.quick
def test_the_title_of_a_model_is_a_name_by_which_it_is_found() -> None:
    for name in list_models():
        assert load_model(model_title(name)).name == name or name.startswith("llama-2")  # published as "...-hf"
