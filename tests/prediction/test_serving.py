"""Tokens/s, the time to the first token and per further token, the largest batch, and engines in
tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tables import tables_of

import simulator
from simulator.capacity import memory
from simulator.engines.engine import list_engines, load_engine
from simulator.errors import InputError
from simulator.prediction.advise import advise
from simulator.prediction.explain import explanations, waterfall
from simulator.prediction.requests import dense_seconds
from simulator.prediction.result import Results
from simulator.prediction.table import speedup
from simulator.pruning import prune
from simulator.request import Request

FAMILIES = ["depth", "width", "token", "kv_cache", "dynamic_depth", "low_rank"]


def table(**asked: Any) -> Results:
    """A table of some families, and what is asked."""
    usual = {
        "models": ["llama-3.1-8b"],
        "hardware": ["h100"],
        "family": FAMILIES,
        "sparsity": [0.25],
    }
    return simulator.table(**{**usual, "phase": ["decode"], **asked})


def close(value: float, wanted: float) -> bool:
    return math.isclose(value, wanted, rel_tol=1e-9)


@pytest.mark.parametrize("engine", ["", *list_engines()])
def test_one_prefill_has_a_first_token_and_a_decode_has_the_others(engine: str) -> None:
    for r in table(phase=["prefill"], batch=[1, 8], engine=[engine]):
        assert (r.tokens_per_s, r.tpot_s, r.dense_tokens_per_s, r.dense_tpot_s) == (None,) * 4
        assert close(r.ttft_s, r.pruned_s)
        assert close(r.dense_ttft_s, r.dense_s)
    for r in table(phase=["decode"], batch=[1, 8], engine=[engine]):
        assert (r.ttft_s, r.dense_ttft_s) == (None, None)
        assert close(r.tpot_s, r.pruned_s)
        assert close(r.tokens_per_s, r.batch / r.pruned_s)
        assert close(r.dense_tokens_per_s, r.batch / r.dense_s)


@pytest.mark.parametrize("engine", ["", *list_engines()])
@pytest.mark.parametrize("dense_s", [None, 0.9])
def test_first_and_further_tokens_make_up_the_whole(engine: str, dense_s: float | None) -> None:
    options: dict[str, Any] = {"seq": [700], "batch": [6], "engine": [engine]}
    steps: dict[str, Any] = {"new_tokens": 40}
    for phase in ("generate", "serve"):
        if dense_s is not None:
            plain, *_ = table(phase=[phase], **options, **steps)
            steps["dense_s"] = dense_s * plain.dense_s
        for r in table(phase=[phase], **options, **steps):
            for whole, seconds in (
                (r.ttft_s + 40 * r.tpot_s, r.pruned_s),
                (r.dense_ttft_s + 40 * r.dense_tpot_s, r.dense_s),
            ):
                # a first token also waits for the server, which computes other requests at that
                # time
                assert close(whole, seconds) or (
                    phase == "serve" and seconds < whole < seconds + 0.2
                )
            assert close(r.tokens_per_s, 6 * 40 / r.pruned_s)
            assert close(r.dense_tokens_per_s / r.tokens_per_s, 1.0 / r.speedup)
        steps = {"new_tokens": 40}


def test_a_generate_is_one_prefill_and_then_decodes() -> None:
    for engine in ("", "vllm", "hf"):
        (r,) = table(family=["depth"], phase=["generate"], seq=[700], new_tokens=3, engine=[engine])
        (prefill,) = table(family=["depth"], phase=["prefill"], seq=[700], engine=[engine])
        steps = [
            table(family=["depth"], phase=["decode"], seq=[700 + t], engine=[engine])[0]
            for t in range(3)
        ]
        assert r.dense_ttft_s == pytest.approx(prefill.dense_s, rel=1e-6)
        assert r.dense_tpot_s == pytest.approx(np.mean([s.dense_s for s in steps]), rel=2e-3)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm"])
def test_waiting_for_other_prompts_takes_time_from_the_further_tokens(
    engine: str, tmp_path: Path
) -> None:
    text = Path(simulator.__file__).parent.joinpath("engines", f"{engine}.yaml").read_text()
    found = []
    for wait in (0.0, 0.5, 1.0):
        path = tmp_path / f"{wait}.yaml"
        waits = ("prefill_wait", "first_wait")
        lines = [line for line in text.splitlines() if not line.startswith(waits)]
        path.write_text(
            "\n".join(
                [*lines, *(f"{name}: {{value: {wait}, source: serving}}" for name in waits), ""]
            )
        )
        found += table(
            family=["depth"], phase=["serve"], batch=[32], engine=[str(path)], new_tokens=64
        )
    none, half, all_of_them = found
    assert none.dense_s == half.dense_s == all_of_them.dense_s
    assert none.tokens_per_s == all_of_them.tokens_per_s
    server, passes = load_engine(engine).each_request.value, 8 if engine == "sglang" else 32
    alone = none.dense_ttft_s - server  # SGLang computes four waiting prompts together
    assert close(half.dense_ttft_s - server, alone * (1.0 + 0.5 * (passes - 1)))
    assert close(all_of_them.dense_ttft_s - server, passes * alone)
    assert all_of_them.dense_tpot_s < half.dense_tpot_s < none.dense_tpot_s


@pytest.mark.parametrize("phase", ["prefill", "decode", "generate"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "gemma-2-9b", "opt-13b"])
@pytest.mark.parametrize("setting", tables_of("prediction/cases.yaml")["largest batches"])
def test_the_largest_batch_fits_and_one_more_does_not(
    phase: str, model: str, setting: dict[str, Any]
) -> None:
    setting, hw = {**setting, "new_tokens": 64}, simulator.load_hardware("h100")
    for r in table(
        models=[model],
        family=["depth", "width", "unstructured"],
        phase=[phase],
        batch=[1, 9],
        **setting,
    ):
        for largest, pruned in ((r.dense_largest_batch, False), (r.pruned_largest_batch, True)):
            assert largest >= 1
            fits = []
            limit = (
                load_engine(setting.get("engine", "vllm")).limit(hw.memory_bytes, hw.name)
                if phase != "prefill"
                else None
            )
            bound = limit is not None and largest == limit.sequences  # by the engine, not by memory
            for batch in (largest, largest + 1 + 10**6 * bound):
                w = simulator.lower(model, phase=phase, batch=batch, seq=r.seq, **setting)
                fits.append(memory(prune(w, r.family, r.sparsity) if pruned else w, hw).fits)
            assert fits == [True, False], (r.family, largest)
        assert r.pruned_largest_batch >= r.dense_largest_batch - (r.family == "unstructured")


def test_a_measured_time_reaches_every_answer() -> None:
    rows = table(family=["depth", "width"], sparsity=[0.25, 0.5], dense_s=0.0074)
    for r in rows:
        assert r.dense_s == pytest.approx(0.0074, rel=0.02)
        assert r.dense_tpot_s == r.dense_s
    (e,) = explanations("llama-3.1-8b", ["h100"], family="depth", sparsity=0.25, dense_s=0.0074)
    assert e.result.speedup == rows[0].speedup
    assert e.steps[-1].speedup == pytest.approx(e.result.speedup, rel=1e-12)
    assert math.prod(step.factor for step in e.steps) == pytest.approx(e.result.speedup, rel=1e-12)
    (a,) = advise("llama-3.1-8b", ["h100"], 1.2, ["depth"], dense_s=0.0074).advice
    dense = simulator.lower("llama-3.1-8b")
    pruned, hw = prune(dense, "depth", a.result.sparsity), simulator.load_hardware("h100")
    assert a.result.speedup == pytest.approx(
        speedup(dense, pruned, hw, dense_s=0.0074).speedup, rel=1e-9
    )
    assert waterfall(dense, pruned, hw, dense_s=0.0074)[-1].speedup == pytest.approx(
        a.result.speedup, rel=1e-9
    )


@pytest.mark.parametrize(
    "more",
    [
        {"batch": [1, 2]},
        {"seq": [128, 256]},
        {"phase": ["prefill", "decode"]},
        {"hardware": ["h100", "a100"]},
        {"engine": ["vllm", "hf"]},
        {"models": ["llama-3.1-8b", "llama-3.2-1b"]},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_measured_time_is_of_one_setting(more: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=r"dense time: belongs to one request; expected one .*, got 2"
    ):
        table(**more, dense_s=0.01)


def test_tokens_a_second_are_a_time() -> None:
    def spent(rate: float | None, *request: Any) -> float:
        return dense_seconds(
            rate, Request(**dict(zip(("phase", "batch", "seq", "new_tokens"), request)))
        )

    assert spent(100.0, "decode", 8, 2048, 128) == 8 / 100
    assert spent(4096.0, "prefill", 2, 2048, 0) == 1.0
    assert spent(64.0, "serve", 4, 99, 32) == spent(64.0, "generate", 4, 7, 32) == 2.0
    for r in table(phase=["serve"], batch=[16], new_tokens=32):
        assert close(spent(r.dense_tokens_per_s, "serve", 16, 2048, 32), r.dense_s)
    for bad in (None, 0.0, -3.0, math.nan, math.inf):
        with pytest.raises(InputError, match="expected a positive number"):
            spent(bad, "decode", 1, 1, 1)
