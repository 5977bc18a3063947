"""Models of Transformers: every static family has the shapes that are predicted, and it runs."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

torch = pytest.importorskip("torch")
if find_spec("transformers") is None:  # not imported, which takes time
    pytest.skip("transformers is not installed; it comes with the extra transformers", allow_module_level=True)

from calibration.devices.protocol import Unsupported  # noqa: E402
from calibration.runners.hf import build, check  # noqa: E402
from simulator.errors import InputError  # noqa: E402
from simulator.models.changes import content_of  # noqa: E402
from simulator.models.library import load_model  # noqa: E402
from simulator.models.lower import lower  # noqa: E402
from simulator.pruning import prune  # noqa: E402

SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 128}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
LLAMA = {**content_of("llama-3.1-8b"), **SMALL, **HEADS}
QWEN = {**content_of("qwen2.5-0.5b"), **SMALL, **HEADS}
QWEN3 = {**content_of("qwen3-8b"), **SMALL, **HEADS}
MOE = {
    **content_of("qwen1.5-moe-a2.7b"),
    **SMALL,
    **HEADS,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}


def _built(content: dict[str, Any], text: str, dtype: str = "fp32") -> Any:
    config = load_model(content)
    dense = lower(config, phase="prefill", seq=8, engine="hf", dtype=dtype)
    pruned = prune(dense, text) if text else dense
    return build(config, content, pruned, dtype=dtype, device="cpu")


def _shapes(built: Any, layer: int) -> dict[str, tuple[int, ...]]:
    modules = built.model.model.layers[layer].named_modules()
    linear = {name: m for name, m in modules if isinstance(m, torch.nn.Linear)}
    return {name.split(".", 1)[1].replace("_proj", ""): (m.out_features, m.in_features) for name, m in linear.items()}


@pytest.mark.parametrize("content", [LLAMA, QWEN, QWEN3], ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("text", "layers", "first", "patched"),
    [
        ("", 4, {"q": (128, 64), "k": (64, 64), "down": (64, 96)}, ""),
        ("depth 0.25", 3, {"q": (128, 64), "k": (64, 64), "down": (64, 96)}, ""),
        ("width mlp=0.5", 4, {"q": (128, 64), "k": (64, 64), "gate": (48, 64), "down": (64, 48)}, ""),
        ("width attention=0.5", 4, {"q": (64, 64), "k": (32, 64), "o": (64, 64), "down": (64, 96)}, ""),
        ("width heads=0.5", 4, {"q": (64, 64), "k": (64, 64), "o": (64, 64)}, ""),
        ("width hidden=0.25", 4, {"q": (128, 48), "o": (48, 128), "down": (48, 96)}, ""),
        (
            "low_rank 0.5",
            4,
            {"q.0": (32, 64), "q.1": (128, 32), "down.0": (32, 96), "down.1": (64, 32)},
            "low rank in 4",
        ),
        ("width mlp=0.5 layers=0", 4, {"q": (128, 64), "down": (64, 48)}, "other widths of the MLP in 1 layers"),
        ("depth layers=0 unit=attention", 4, {"gate": (96, 64), "down": (64, 96)}, "no attention in 1 layers"),
        ("depth layers=0 unit=mlp", 4, {"q": (128, 64), "k": (64, 64)}, "no MLP in 1 layers"),
        ("unstructured 0.5", 4, {"q": (128, 64), "down": (64, 96)}, ""),
    ],
)
def test_a_pruned_model_has_the_predicted_shapes_and_runs(
    content: dict[str, Any], text: str, layers: int, first: dict[str, tuple[int, int]], patched: str
) -> None:
    built = _built(content, text)
    assert len(built.model.model.layers) == layers
    found = _shapes(built, -1 if "unit" in text else 0)  # a workload counts attention and MLPs, each from 0
    assert found.items() >= first.items()
    assert ("q" in found or "q.0" in found) == ("no attention" not in patched)
    assert built.patched.startswith(patched)
    assert bool(built.patched) == bool(patched)
    with torch.inference_mode():
        logits = built.model(torch.arange(8)[None], use_cache=True, logits_to_keep=1).logits
        tokens = built.model.generate(torch.arange(8)[None], max_new_tokens=3, do_sample=False)
    assert logits.shape == (1, 1, 128)
    assert torch.isfinite(logits).all()
    assert tokens.shape == (1, 11)


def test_fewer_and_narrower_experts_are_configured() -> None:
    assert _built(MOE, "experts 0.5").model.config.num_experts == 4
    narrow = _built(MOE, "width mlp=0.5").model.config
    assert (narrow.moe_intermediate_size, narrow.shared_expert_intermediate_size, narrow.num_experts) == (16, 32, 8)
    with pytest.raises(InputError, match="experts differ by layer"):
        _built(MOE, "experts 0.5 layers=0-1")


@pytest.mark.parametrize("text", ["dynamic_depth 0.5", "token 0.5", "kv_cache 0.5", "sparse_attention 0.5"])
def test_what_decides_during_a_pass_is_refused_before_a_model_is_made(text: str) -> None:
    config = load_model(LLAMA)
    w = prune(lower(config, phase="prefill", seq=256, engine="hf"), text)
    with pytest.raises(InputError, match="decides during a pass"):
        check(config, LLAMA, w)


def test_what_transformers_cannot_build_is_refused_by_name() -> None:
    phi = {**content_of("phi-3-mini-4k"), **SMALL, "num_attention_heads": 4, "num_key_value_heads": 4}
    with pytest.raises(InputError, match="Phi3DecoderLayer of Transformers has no"):
        _built(phi, "low_rank 0.5")
    with pytest.raises(Unsupported, match="sparse tensor cores"):
        _built(LLAMA, "semi_structured 0.5")
    with pytest.raises(InputError, match=r"refuses its config.json: .*not a multiple of the number of attention"):
        _built({**LLAMA, "num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 96}, "width hidden=0.3")
    config = load_model(LLAMA)
    with pytest.raises(InputError, match="cannot state its shapes"):
        check(config, {}, lower(config, engine="hf"))
