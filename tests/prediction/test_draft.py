"""Speculative decoding: limits by hand, agreement with its parts, what a check costs, memory, and
bad input."""

from __future__ import annotations

from typing import Any

import pytest
from tables import tables_of

import simulator
from simulator.capacity import memory
from simulator.codes import Kind
from simulator.errors import InputError

HW = simulator.load_hardware("h100")


def drafts(**asked: Any) -> Any:
    usual = {"model": "llama-3.1-8b", "prune": "depth 0.5", "hardware": HW, "drafted": [1, 4]}
    return simulator.draft(**{**usual, **asked})


def test_a_round_is_its_passes_and_one_check() -> None:
    for row in drafts(batch=[1, 16], acceptance=[0.0, 0.7, 1.0], engine="trtllm"):
        spent = row.drafted * row.draft_s + row.check_s
        assert row.speedup == pytest.approx(row.tokens * row.dense_s / spent, rel=1e-6)
        assert row.speedup_lower <= row.speedup <= row.speedup_upper
        dense = simulator.lower("llama-3.1-8b", batch=row.batch, engine="trtllm")
        assert row.dense_s == pytest.approx(simulator.workload_time(dense, HW).total_s)


def test_the_first_pass_of_a_draft_computes_what_the_target_accepted() -> None:
    for engine, first in (("vllm", 6), ("hf", 2)):
        settings: dict[str, Any] = {"phase": "decode", "batch": 64, "seq": 2048, "engine": engine}
        w, step = (
            simulator.prune(simulator.lower("llama-3.1-8b", **settings, positions=p), "depth", 0.5)
            for p in (first, 1)
        )
        head = w.is_role("lm_head")
        assert w.m[head] == first * step.m[head]
        alone, both = (
            simulator.workload_time(one.take(~head[: len(one)]), HW).total_s for one in (step, w)
        )
        head_s = simulator.workload_time(step, HW).total_s - alone
        (found,) = drafts(drafted=4, acceptance=0.8, batch=64, engine=engine)
        assert found.draft_s == pytest.approx((3 * alone + both) / 4 + head_s, rel=0.06)


def test_tokens_of_a_round_by_hand() -> None:
    found = {(r.drafted, r.acceptance): r.tokens for r in drafts(acceptance=[0.0, 0.5, 1.0])}
    assert found[1, 0.0] == found[4, 0.0] == 1.0  # the target's own token
    assert (found[1, 1.0], found[4, 1.0]) == (2.0, 5.0)
    assert found[4, 0.5] == pytest.approx((1 - 0.5**5) / 0.5)
    measured = {r.drafted: r.tokens for r in drafts(drafted=[1, 2, 3], by_position=[0.9, 0.5])}
    assert measured == pytest.approx({1: 1.9, 2: 1.9 + 0.45})  # three have no measured acceptance


def test_a_draft_as_slow_as_the_target_never_pays_and_a_free_one_nearly_always() -> None:
    for row in drafts(prune="depth 0"):  # only the scheduler works once per round
        assert row.speedup < 1.06 * row.tokens / (row.drafted + 1)
        assert row.pays_from is None or row.pays_from > 0.93
    # one of 32 layers; the head stays
    (free,) = drafts(prune="depth 0.96875", drafted=1, acceptance=1.0)
    assert 1.6 < free.speedup < 2.0
    assert free.pays_from == pytest.approx(free.draft_s / free.dense_s, abs=0.05)


def test_it_pays_from_the_acceptance_at_which_it_is_as_fast() -> None:
    for row in drafts(batch=[1, 64]):
        assert row.pays_from_lower <= row.pays_from <= row.pays_from_upper
        (again,) = drafts(batch=row.batch, drafted=row.drafted, acceptance=row.pays_from)
        assert again.speedup == pytest.approx(1.0, abs=1e-3)
        assert (row.speedup > 1.0) == (row.acceptance > row.pays_from)


def test_checks_stop_being_free_at_large_batches() -> None:
    one, many = (drafts(batch=b, drafted=8, acceptance=0.9) for b in (1, 256))
    costs = [r.check_s / r.dense_s for found in (one, many) for r in found]
    assert costs[0] < 1.1
    assert costs[1] > 1.5
    assert max(r.speedup for r in one) > max(r.speedup for r in many)


def test_a_check_attends_with_all_positions_and_computes_all_logits() -> None:
    settings: dict[str, Any] = {"phase": "decode", "batch": 3, "seq": 1000, "engine": "vllm"}
    step, check = (simulator.lower("qwen3-30b-a3b", **settings, positions=p) for p in (1, 5))
    assert check.m[check.is_role("lm_head")].tolist() == [15]
    attention = check.is_attention
    assert (check.q_len[attention] == 5).all()
    assert (check.kv_len[attention] == 1005).all()
    pairs = 5 * 1003  # queries see 1,001 to 1,005 positions
    assert check.flops[attention].sum() / step.flops[step.is_attention].sum() == pytest.approx(
        pairs / 1001
    )
    # keys and values are read once for all positions
    assert check.bytes[attention].sum() < 1.1 * step.bytes[step.is_attention].sum()
    touched = [w.weight_bytes_each[w.kind == Kind.EXPERTS].sum() for w in (step, check)]
    assert 2.0 < touched[1] / touched[0] < 5.0
    times = [simulator.workload_time(w, HW).total_s for w in (step, check)]
    assert times[1] > times[0]


def test_layers_of_the_target_share_its_memory() -> None:
    (own,) = drafts(drafted=1, acceptance=0.8, batch=8)
    (narrow,) = drafts(prune="width mlp=0.5", drafted=1, acceptance=0.8, batch=8)
    (other,) = drafts(prune="", draft="llama-3.2-1b", drafted=1, acceptance=0.8, batch=8)
    target = memory(simulator.lower("llama-3.1-8b", batch=8, positions=2), HW)
    draft = memory(simulator.lower("llama-3.2-1b", batch=8), HW)
    assert own.memory_bytes == target.total_bytes
    assert narrow.memory_bytes > own.memory_bytes + 5e9
    assert other.memory_bytes == pytest.approx(
        target.total_bytes + draft.weights_bytes + draft.cache_bytes
    )


def test_a_pruned_target_is_compared_with_the_dense_one() -> None:
    plain, pruned = (
        drafts(target_prune=text, drafted=2, acceptance=0.8) for text in ("", "width mlp=0.5")
    )
    assert pruned.rows[0].dense_s == plain.rows[0].dense_s
    assert pruned.rows[0].speedup > 1.1 * plain.rows[0].speedup


@pytest.mark.parametrize(
    ("asked", "words"),
    tables_of("prediction/mistakes.yaml")["drafts"],
)
def test_bad_input_is_one_line(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        drafts(**asked)
    assert str(error.value) == words
