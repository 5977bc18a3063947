"""A service: concurrency by memory and by limits, and numbers that equal single predictions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tables import tables_of

import simulator
from simulator import Request, serve
from simulator.capacity import memory
from simulator.errors import InputError
from simulator.prediction.prunings import Pruning
from simulator.prediction.requests import on
from simulator.prediction.service import EQUAL, LIMITS, MEMORY, OperatingPoint, Service
from simulator.prediction.service_sentences import equal_memory, failing_text, of_service, ranked
from simulator.prediction.table import table

pytestmark = pytest.mark.quick
MODEL, NEW = "llama-3.1-8b", {"new_tokens": 256}


def one(
    prune: Any = "depth 0.25", model: str = MODEL, hardware: str = "h100", **more: Any
) -> Service:
    (service,) = serve(model, hardware, prune=prune, **{**NEW, **more}).services
    return service


def at(service: Service, kind: str, pruning: int = 1) -> OperatingPoint:
    return service.kinds[kind][pruning]


def close(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-9)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm", "hf"])
def test_at_equal_concurrency_it_is_a_speedup_of_phase_serve(engine: str) -> None:
    service = one(["depth 0.25", "width mlp=0.5"], concurrency=24, seq=1000, engine=engine)
    found = table(
        MODEL,
        "h100",
        phase="serve",
        batch=24,
        seq=1000,
        prune=["depth 0.25", "width mlp=0.5"],
        engine=engine,
        **NEW,
    )
    dense = at(service, EQUAL, 0)
    for r, point in zip(found, service.kinds[EQUAL][1:]):
        assert (point.pruning, point.prune, point.concurrency) == (r.pruning, r.prune, 24)
        for ours, theirs in (
            ("request_s", "pruned_s"),
            ("request_lower", "pruned_lower"),
            ("request_upper", "pruned_upper"),
            ("ttft_s", "ttft_s"),
            ("tpot_s", "tpot_s"),
            ("tokens_per_s", "tokens_per_s"),
            ("ratio", "speedup"),
            ("ratio_lower", "speedup_lower"),
            ("ratio_upper", "speedup_upper"),
        ):
            assert close(getattr(point, ours), getattr(r, theirs)), ours
        assert close(dense.tpot_s, r.dense_tpot_s)
        assert close(dense.ttft_s, r.dense_ttft_s)
        assert close(dense.request_s, r.dense_s)


def test_intervals_hold_their_values_and_first_tokens_are_less_certain_than_requests() -> None:
    service = one(["depth 0.25"], concurrency=24)
    for p in service.points:
        for name in ("request_s", "ttft_s", "tpot_s", "tokens_per_s"):
            stem = name if name == "tokens_per_s" else name.removesuffix("_s")
            assert getattr(p, f"{stem}_lower") < getattr(p, name) < getattr(p, f"{stem}_upper")
        wide, narrow = (
            getattr(p, f"{n}_upper") / getattr(p, f"{n}_lower") for n in ("ttft", "request")
        )
        assert wide > narrow
    # nothing to wait for, and no server
    lonely = one(["depth 0.25"], concurrency=1, engine="compile")
    for p in lonely.kinds[EQUAL]:
        assert close(p.ttft_upper / p.ttft_s, p.request_upper / p.request_s)
    surer = one(["depth 0.25"], concurrency=24, level=0.5)
    assert at(surer, EQUAL).ttft_upper < at(service, EQUAL).ttft_upper


@pytest.mark.parametrize("devices", [1, 2])
def test_the_largest_concurrency_fits_and_one_more_does_not(devices: int) -> None:
    hw, setting = simulator.load_hardware("h100"), {**NEW, "devices": devices}
    texts = ["depth 0.25", "width 0.25", "kv_cache 0.5"]
    service = one(texts, seq=4096, **setting)
    for i, point in enumerate(service.kinds[MEMORY]):
        fits = []
        for c in (point.concurrency, point.concurrency + 1):
            (request,) = on([Request(model=MODEL, phase="serve", batch=c, seq=4096, **setting)], hw)
            w = simulator.lower(request)
            fits.append(
                memory(w if i == 0 else Pruning.read(texts[i - 1]).apply(w, request), hw).fits
            )
        assert fits == [True, False], point
        assert point.limited_by == "memory"
        assert point.largest_concurrency == point.concurrency


def test_smaller_models_and_caches_leave_memory_for_more_requests() -> None:
    texts = ["kv_cache 0.25", "kv_cache 0.5", "depth 0.1", "depth 0.25", "depth 0.5"]
    service = one(texts, seq=4096)
    dense, *pruned = service.kinds[MEMORY]
    quarter, half, *depth = pruned
    assert dense.concurrency < quarter.concurrency < half.concurrency
    assert close(half.weights_bytes, dense.weights_bytes)
    assert half.cache_bytes < quarter.cache_bytes < dense.cache_bytes
    most = [dense.concurrency, *(p.concurrency for p in depth)]
    assert most == sorted(set(most))
    for p in pruned:  # more sequences serve at least as much as equally many
        same = at(service, EQUAL, pruned.index(p) + 1)
        assert p.tokens_per_s >= same.tokens_per_s
        assert p.tpot_s >= same.tpot_s
        assert close(p.ratio, p.tokens_per_s / dense.tokens_per_s)
    bigger = one("depth 0.25", hardware="h200", seq=4096)
    assert at(bigger, MEMORY, 0).concurrency > dense.concurrency


def test_shared_errors_cancel_in_the_ratio_at_equal_memory() -> None:
    point, dense = (at(one("depth 0.25", seq=4096), MEMORY, i) for i in (1, 0))
    apart = math.hypot(*(math.log(p.request_upper / p.request_lower) for p in (point, dense)))
    assert math.log(point.ratio_upper / point.ratio_lower) < 0.6 * apart


def test_the_engine_limits_small_models() -> None:
    service = one("depth 0.5", model="llama-3.2-1b", seq=64)
    dense, pruned = service.kinds[MEMORY]
    assert (dense.concurrency, dense.limited_by, pruned.concurrency) == (1024, "engine", 1024)
    assert (
        "as many sequences run (1,024, the limit of the engine), and each request takes 0."
        in of_service(service)[1]
    )
    assert (
        at(one("depth 0.5", model="llama-3.2-1b", seq=64, engine="hf"), MEMORY, 0).limited_by
        == "memory"
    )


def test_tighter_limits_leave_fewer_requests_and_hold_where_they_are_said_to() -> None:
    found: list[list[int]] = []
    for tpot in (0.08, 0.04, 0.02, 0.015, 0.012):
        service = one(["depth 0.25", "width 0.25"], tpot_s=tpot)
        points = service.kinds[LIMITS]
        found.append([p.concurrency for p in points])
        for p, full in zip(points, service.kinds[MEMORY]):
            if p.concurrency:
                assert p.tpot_s <= tpot
                assert p.probability >= 0.5
                assert p.concurrency <= full.concurrency
    assert (np.diff(found, axis=0) <= 0).all()
    assert (np.diff(found, axis=0) < 0).any(axis=0).all()


def test_both_limits_hold_together_and_confidence_costs_requests() -> None:
    ttft, tpot = (
        one("depth 0.25", **{name: value}) for name, value in (("ttft_s", 0.3), ("tpot_s", 0.02))
    )
    both = one("depth 0.25", ttft_s=0.3, tpot_s=0.02)
    for i in (0, 1):
        alone = [at(s, LIMITS, i).concurrency for s in (ttft, tpot)]
        assert at(both, LIMITS, i).concurrency <= min(alone)
        assert at(both, LIMITS, i).concurrency >= 0.9 * min(alone)
    sure = [at(one("depth 0.25", tpot_s=0.02, probability=p), LIMITS) for p in (0.5, 0.8, 0.95)]
    assert sure[0].concurrency > sure[1].concurrency > sure[2].concurrency > 0
    for point, least in zip(sure, (0.5, 0.8, 0.95)):
        assert point.probability >= least
    equal = [at(one("depth 0.25", tpot_s=t), EQUAL).probability for t in (0.1, 0.06, 0.05, 0.04)]
    assert equal == sorted(equal, reverse=True)
    assert equal[0] > equal[-1]


def test_a_model_that_cannot_keep_the_limits_states_which_and_by_how_much() -> None:
    service = one("depth 0.5", ttft_s=10.0, tpot_s=0.005)
    dense, pruned = service.kinds[LIMITS]
    assert (dense.concurrency, dense.unmet) == (0, "tpot")
    assert math.isnan(dense.tokens_per_s)
    assert dense.to_dict()["tokens_per_s"] is None
    alone = at(one("depth 0.5", concurrency=1), EQUAL, 0)
    assert close(dense.excess, alone.tpot_s / 0.005)
    assert failing_text(service, dense).startswith("time per output token 6.8")
    assert pruned.concurrency > 0
    assert math.isnan(pruned.ratio)
    assert "; the dense model fails (time per output token 6.8" in of_service(service)[2]
    assert one("depth 0.5", ttft_s=2e-3, tpot_s=1e-4).kinds[LIMITS][0].unmet == "tpot", (
        "of two, that by more"
    )
    nothing = one("depth 0.5", ttft_s=0.001)
    assert [p.concurrency for p in nothing.kinds[LIMITS]] == [0, 0]
    assert (
        "no request can be served: the dense model fails (time to the first token"
        in of_service(nothing)[2]
    )
    uncertain = one("depth 0.5", tpot_s=1.02 * alone.tpot_s, probability=0.9)
    assert "below the limit with a probability of only" in failing_text(
        uncertain, uncertain.kinds[LIMITS][0]
    )


def test_costs_are_those_of_the_devices_time() -> None:
    service = one("depth 0.25", seq=3000, price=2.0, devices=2, concurrency=32)
    for p in service.points:
        hours = p.request_s * 2 / p.concurrency / 3600.0
        assert close(p.cost_output, 2.0 * hours / 256 * 1e6)
        assert close(p.cost_all, 2.0 * hours / 3256 * 1e6)
        parts = p.cost_prompt * 3000 + p.cost_new * 256
        assert close(parts / 1e6, 2.0 * hours)
        assert 0.0 < p.cost_prompt < p.cost_new
    double = one("depth 0.25", seq=3000, price=4.0, devices=2, concurrency=32)
    for p, twice in zip(service.points, double.points):
        assert close(twice.cost_output, 2.0 * p.cost_output)
    assert math.isnan(at(one(), MEMORY).cost_output)


def test_a_dense_model_that_does_not_fit_has_no_point_and_a_pruned_one_that_does_has() -> None:
    found = serve("llama-3.1-70b", "h100", prune="depth 0.5", **NEW, tpot_s=1.0)
    (service,) = found.services
    for kind in (MEMORY, LIMITS):
        dense, pruned = service.kinds[kind]
        assert (dense.concurrency, dense.fits, dense.unmet) == (0, False, "")
        assert math.isnan(dense.probability)
        assert pruned.concurrency > 0
        assert math.isnan(pruned.ratio)
    lines = of_service(service)
    assert lines[0].startswith(
        "llama-3.1-70b does not fit on h100_sxm in vllm (seq 2048 + 256 new): its weights take 1"
    )
    assert lines[1].endswith("; the dense model does not fit.")
    assert any("its times are hypothetical" in note for note in found.notes)
    with pytest.raises(
        InputError,
        match=r"h100_sxm: no model fits: with one request, the smallest needs 1.* available",
    ):
        serve("llama-3.1-70b", "h100", prune="depth 0.1")


def test_a_pruning_that_removes_nothing_changes_nothing() -> None:
    service = one("depth 0", tpot_s=0.02, price=1.0)
    for dense, pruned in service.kinds.values():
        assert (pruned.ratio, pruned.ratio_lower, pruned.ratio_upper) == (1.0, 1.0, 1.0)
        ours, theirs = (p.to_dict() for p in (pruned, dense))
        same = set(ours) - {"pruning", "prune", "family"}
        assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}


def test_the_sentence_of_equal_memory_multiplies_out() -> None:
    service = one(["kv_cache 0.5", "depth 0.25"], seq=4096)
    assert ranked(service) == [2, 1]
    dense, pruned = at(service, MEMORY, 0), at(service, MEMORY, 2)
    more, longer = pruned.concurrency / dense.concurrency, pruned.request_s / dense.request_s
    assert close(pruned.ratio, more / longer)
    times = f"{pruned.ratio:.2f}x ({pruned.ratio_lower:.2f}-{pruned.ratio_upper:.2f})"
    fit = f"{more:.2f}x as many sequences fit ({pruned.concurrency} instead of {dense.concurrency}"
    assert (
        equal_memory(dense, pruned)
        == f"depth at 25 % serves {times} as many tokens/s at equal memory: {fit}, as weights"
        f" shrink by 21.7 % and the cache of each by 25 %), and each request takes {longer:.2f}x"
        " as long."
    )
    assert "as the cache of each shrinks by 4" in equal_memory(dense, at(service, MEMORY, 1))


def test_a_budget_and_a_cached_prefix_reach_the_service() -> None:
    plain, cached = one(seq=4096), one(seq=4096, cached_prefix=0.75)
    assert at(cached, MEMORY, 0).tokens_per_s > 1.2 * at(plain, MEMORY, 0).tokens_per_s
    small = one(seq=4096, token_budget=512)
    assert at(small, MEMORY, 0).tokens_per_s < at(plain, MEMORY, 0).tokens_per_s
    tiny = at(one(seq=512, token_budget=3), MEMORY, 0)
    assert (tiny.concurrency, tiny.limited_by) == (3, "engine")


def test_what_cannot_be_predicted_is_a_note_beside_others_and_an_error_alone() -> None:
    found = serve(
        MODEL, "h100", prune=["semi_structured 0.5", "depth 0.25"], engine=["vllm", "trtllm"], **NEW
    )
    assert [len(s.kinds[EQUAL]) for s in found.services] == [2, 3]
    assert any("vllm has no 2:4 kernels" in note for note in found.notes)
    for more, message in tables_of("prediction/mistakes.yaml")["services"]:
        with pytest.raises(InputError, match=message):
            serve(MODEL, "h100", **more)


def test_a_given_concurrency_that_does_not_fit_is_hypothetical() -> None:
    found = serve(MODEL, "h100", prune="depth 0.25", concurrency=2000, **NEW)
    assert not any(p.fits for p in found.services[0].kinds[EQUAL])
    text = " ".join(found.notes)
    assert "depth at 25 % at concurrency 2000 on h100_sxm:" in text
    assert "hypothetical" in text
