"""Several GPUs: what one holds and computes, and what they say to each other."""

from __future__ import annotations

from typing import Any

import pytest
from model_shapes import PUBLISHED

from simulator.errors import InputError
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.workload import ROLES, Kind, Part

WIDE = ["llama-2-70b", "llama-3.1-70b", "qwen3-32b", "gemma-2-9b", "opt-66b", "pythia-6.9b"]


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_tensor_parallel_shares_the_matrices_evenly(name: str, devices: int, phase: str) -> None:
    one, part = (lower(load_model(name), phase=phase, batch=2, seq=64, devices=n) for n in (1, devices))
    for kind in Kind:
        assert part.flops[part.kind == kind].sum() * devices == one.flops[one.kind == kind].sum()


def test_shapes_of_llama_2_70b_on_eight() -> None:
    w = lower(load_model("llama-2-70b"), batch=4, seq=128, devices=8)
    gemm = w.take(w.kind == Kind.GEMM)
    shapes = {ROLES[r]: (int(n), int(k)) for r, n, k in zip(gemm.role, gemm.n, gemm.k, strict=True)}
    expected = {"q": (1024, 8192), "k": (128, 8192), "v": (128, 8192), "o": (8192, 1024)}
    expected |= {"gate": (3584, 8192), "up": (3584, 8192), "down": (8192, 3584), "lm_head": (4000, 8192)}
    assert shapes == expected
    reduce = w.take(w.is_role("all_reduce"))
    assert [Part(p) for p in reduce.part] == [Part.EMBEDDING, Part.ATTENTION, Part.MLP]
    assert reduce.count.tolist() == [1, 80, 80]
    assert (reduce.read_bytes == 512 * 8192 * 2).all()
    assert (reduce.batch == 8).all()
    names = [ROLES[c] for c in w.role]
    assert names[names.index("o") + 1] == names[names.index("down") + 1] == "all_reduce"
    gather = w.take(w.is_role("all_gather"))
    assert (gather.read_bytes.tolist(), gather.batch.tolist()) == ([4 * 32000 * 2], [8])


def test_few_key_value_heads_are_replicated() -> None:
    w = lower(load_model("llama-2-70b"), phase="decode", batch=1, seq=100, devices=16)
    attention = w.take(w.is_role("attention"))
    assert (attention.heads.tolist(), attention.kv_heads.tolist()) == ([4], [1])
    assert w.n[w.is_role("k")].tolist() == [128]


def test_parameters_of_one_device() -> None:
    p = PUBLISHED["llama-2-70b"]
    norms = p.hidden * (2 * p.layers + 1)  # whole on each device
    w = lower(load_model("llama-2-70b"), seq=8, devices=8)
    assert w.parameters == (p.parameters - norms) / 8 + norms


SHAPE = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 12}
FOUR = {"model_type": "llama", "num_key_value_heads": 4, "vocab_size": 90, **SHAPE}


@pytest.mark.parametrize(
    ("model", "devices", "parallel", "reason"),
    [
        ("smollm2-135m", 2, "tensor", "smollm2-135m has attention heads 9"),
        ("llama-2-13b", 16, "tensor", "attention heads 40"),
        ("qwen2.5-7b", 7, "tensor", "MLP width 18944"),
        (FOUR, 6, "tensor", "llama has 4 key/value heads; one number must divide the other"),
        ("llama-2-70b", 81, "pipeline", "80 layers; a pipeline takes at most one device a layer"),
    ],
)
def test_what_does_not_divide_is_refused(model: Any, devices: int, parallel: str, reason: str) -> None:
    with pytest.raises(InputError, match=f"devices {devices}: .*{reason}"):
        lower(load_model(model), devices=devices, parallel=parallel)


def test_pipeline_sends_and_nothing_else() -> None:
    model = load_model("llama-2-70b")
    one, four = lower(model, batch=2, seq=64), lower(model, batch=2, seq=64, devices=4, parallel="pipeline")
    send = four.take(four.is_role("send"))
    assert (send.count.tolist(), send.read_bytes.tolist(), send.batch.tolist()) == ([3], [128 * 8192 * 2], [2])
    rest = four.take(~four.is_role("send"))
    assert rest.flops.tolist() == one.flops.tolist()
    assert rest.role.tolist() == one.role.tolist()
    assert (four.meta.devices, four.meta.parallel, one.meta.parallel) == (4, "pipeline", "none")
    steps = lower(model, phase="generate", batch=2, seq=64, new_tokens=5, devices=4, parallel="pipeline")
    assert steps.count[steps.is_role("send")].tolist() == [3, 15]
