"""Every flag of the dense decoders is read as Transformers builds it, and what it adds is lowered
and pruned."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from tables import tables_of

from calibration.evidence import models
from calibration.evidence.models import Case
from simulator.capacity import cache_bytes
from simulator.models.library import from_hf_config
from simulator.models.lower import lower
from simulator.pruning import prune_model
from simulator.workload import WorkloadBatch

BASES = tables_of("models/configs.yaml")["bases"]
FULL, GROUPED, DORY = (BASES[f"flags_{name}"] for name in ("full", "grouped", "dory"))

FLAGS: list[tuple[str, dict[str, Any]]] = tables_of("models/configs.yaml")["flags"]
NAMES = [f"{kind}-{','.join([*flags][-2:])}" for kind, flags in FLAGS]


def read(model_type: str, **keys: Any) -> Any:
    return from_hf_config({**keys, "model_type": model_type})


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(("kind", "flags"), FLAGS, ids=NAMES)
def test_flags_are_read_as_transformers_builds_them(kind: str, flags: dict[str, Any]) -> None:
    compared = models.compare(models.build(Case(kind, "flags", {"model_type": kind, **flags})))
    assert compared.kind == "exact", (compared.result, compared.lines)


@pytest.mark.quick
@pytest.mark.parametrize(("kind", "flags"), FLAGS, ids=NAMES)
def test_pruned_models_have_the_parameters_of_their_rows(kind: str, flags: dict[str, Any]) -> None:
    model = read(kind, **flags)
    for pruning in ("width attention=0.5 mlp=0.5", "width heads=0.5", "low_rank 0.5"):
        pruned = prune_model(model, pruning)
        assert pruned.parameters < model.parameters
        for phase in ("prefill", "decode"):
            assert lower(pruned, phase=phase, seq=8, engine="vllm").parameters == pruned.parameters


@pytest.mark.quick
def test_two_softmaxes_attend_twice_to_one_cache() -> None:
    plain, two = (read(kind, **GROUPED) for kind in ("llama", "diffllama"))
    settings: dict[str, Any] = {"phase": "decode", "batch": 2, "seq": 7}
    once, twice = (lower(model, **settings) for model in (plain, two))
    assert twice.flops[twice.is_attention].sum() == 2 * once.flops[once.is_attention].sum()
    assert cache_bytes(WorkloadBatch.of([twice])) == cache_bytes(WorkloadBatch.of([once]))
    assert two.parameters - plain.parameters == 4 * 4 * 16  # four vectors of a head per layer


@pytest.mark.quick
def test_a_mask_is_made_from_all_cached_values() -> None:
    w = lower(read("doge", **GROUPED), phase="decode", batch=3, seq=7)
    row = w.is_role("mask_values")
    assert w.m[row].tolist() == [3 * 8]
    assert (w.n[row].tolist(), w.k[row].tolist()) == ([2], [2 * 16])


@pytest.mark.quick
def test_repeated_layers_compute_and_cache_again() -> None:
    looped = read("dory", **DORY)
    once = read("dory", **{**DORY, "n_recurrent_loops": 1})
    assert (len(once.layers), len(looped.layers)) == (8, 8 + 2 * 3)
    assert looped.parameters == once.parameters
    assert looped.windows[:8] == once.windows[:5] + once.windows[2:5]
    a, b = (lower(model, phase="decode", seq=7) for model in (once, looped))
    share = {"q": 14 / 8, "down": 14 / 8, "lm_head": 1}
    for role, expected in share.items():
        assert b.flops[b.is_role(role)].sum() == expected * a.flops[a.is_role(role)].sum()
    caches = [cache_bytes(WorkloadBatch.of([w])) for w in (a, b)]
    assert np.allclose(caches[1], caches[0] * 14 / 8)


@pytest.mark.quick
def test_heads_have_their_own_rows_and_projections() -> None:
    w = lower(read("apertus1p5_text", **GROUPED, output_vocab_size=60), phase="prefill", seq=8)
    assert w.n[w.is_role("lm_head")].tolist() == [60]
    w = lower(read("modernbert-decoder", **FULL), phase="prefill", batch=2, seq=8, engine="vllm")
    row = w.is_role("embedding_out")
    assert (w.m[row].tolist(), w.n[row].tolist(), w.k[row].tolist()) == ([2], [64], [64])
    # the first layer has no norm before its attention
    assert w.layers[w.is_role("attention_norm")].sum() == 3
