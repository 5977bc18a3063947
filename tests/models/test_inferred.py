"""Types that no table has: their models follow from the modules that Transformers builds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from tables import tables_of

import simulator
from simulator.codes import Kind
from simulator.errors import InputError
from simulator.models import library, traced
from simulator.models.architectures import ARCHITECTURES
from simulator.models.library import from_hf_config
from simulator.models.model import Model

CASES = tables_of("models/cases.yaml")
TYPES: Mapping[str, dict[str, Any]] = CASES["inferred"]
SMALL = TYPES["llama"]

needs_transformers = pytest.mark.usefixtures("_transformers")


@pytest.fixture
def _transformers() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")


@needs_transformers
@pytest.mark.parametrize("kind", TYPES)
def test_a_model_without_its_table_has_the_same_work(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"model_type": kind, **TYPES[kind]}
    known = from_hf_config(content)
    monkeypatch.setattr(library, "ARCHITECTURES", {})
    inferred = from_hf_config(content)
    assert inferred.parameters == known.parameters
    assert "no table has" in inferred.found
    for phase in ("prefill", "decode"):
        ours, theirs = (
            simulator.lower(model, phase=phase, batch=3, seq=128, engine="vllm")
            for model in (inferred, known)
        )
        assert ours.flops.sum() == theirs.flops.sum()
        # some elementwise kernels are not known, which weigh much in so small a model
        assert ours.bytes.sum() == pytest.approx(theirs.bytes.sum(), rel=0.03)


@pytest.fixture
def recurrent(_transformers: None) -> Model:
    """A type with attention and MLPs of known kinds, and recurrences of an unknown kind."""
    own = {"lru_width": 128, "attention_window_size": 64, "head_dim": 32}
    return from_hf_config({"model_type": "recurrent_gemma", **SMALL, **own})


def test_modules_of_an_unknown_kind_are_products(recurrent: Model) -> None:
    assert recurrent.architecture not in ARCHITECTURES
    assert "of no known kind" in recurrent.found
    w = simulator.lower(recurrent, phase="prefill", seq=64)
    assert w.parameters == recurrent.parameters
    stored = sum(n * k * many for layer in recurrent.products for n, k, many in layer.values())
    products = (w.kind == Kind.GEMM) & (w.layer >= 0)
    assert w.flops[products].sum() == pytest.approx(2 * 64 * stored, rel=0.001)
    faster = simulator.predict(model=recurrent, prune="depth 0.3", hardware="h100", engine="hf")
    assert faster.speedup > 1.2
    with pytest.raises(InputError, match="modules are of no known kind"):
        simulator.predict(model=recurrent, prune="width attention=0.5", hardware="h100")


BAD: Mapping[str, tuple[dict[str, Any], str]] = {
    **CASES["wrong_inferred"],
    "list": ({"block_types": ["x"] * 5000}, "block_types: expected at most 1,000 entries"),
}


@needs_transformers
@pytest.mark.parametrize("case", BAD)
def test_bad_configurations_are_one_line(case: str) -> None:
    keys, message = BAD[case]
    with pytest.raises(InputError, match=message) as error:
        from_hf_config({"model_type": "recurrent_gemma", **keys})
    assert "\n" not in str(error.value)


@needs_transformers
def test_building_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "MAX_SECONDS", -1.0)
    with pytest.raises(InputError, match="building takes over"):
        from_hf_config({"model_type": "recurrent_gemma"})


@needs_transformers
def test_unknown_types_name_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no decoder of Transformers .* nearest .* is llama$"):
        from_hf_config({"model_type": "llamma", **SMALL})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("kind", "reason"), [("bert", "encoder"), ("whisper", "speech"), ("rwkv", "recurrent net")]
)
def test_other_networks_are_refused_with_a_reason(kind: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"'{kind}' is not supported \\({reason}"):
        from_hf_config({"model_type": kind, **SMALL})


@pytest.mark.quick
def test_without_transformers_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "find_spec", lambda name: None)
    expected = r'needs the extra "transformers" .*\[transformers\]"; the nearest .* is qwen3$'
    with pytest.raises(InputError, match=expected):
        from_hf_config({"model_type": "qwen33", **SMALL})
