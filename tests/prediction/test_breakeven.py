"""The sentence about the batch or length from which a pruning pays follows from the intervals."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tables import tables_of

from simulator.prediction.result import Result
from simulator.prediction.speedup_sentences import break_even, of_speedups
from simulator.prediction.table import predict


def results(
    *speedups: tuple[float, float, float], axis: str = "batch", first: int = 1
) -> list[Result]:
    base = predict("llama-3.2-1b", "depth 0.25", "h100", phase="decode")
    values = [first * 2**i for i in range(len(speedups))]
    return [
        replace(base, **{axis: v, "speedup": s, "speedup_lower": low, "speedup_upper": high})
        for v, (s, low, high) in zip(values, speedups)
    ]


GAIN, MAYBE, LOSS = (1.2, 1.1, 1.3), (1.02, 0.97, 1.06), (0.9, 0.85, 0.95)


NAMED = {"gain": GAIN, "maybe": MAYBE, "loss": LOSS, "even": (1.2, 1.004, 1.3)}


@pytest.mark.parametrize(("names", "verdict"), tables_of("prediction/cases.yaml")["verdicts"])
def test_verdicts(names: str, verdict: str) -> None:
    (found,) = break_even(results(*(NAMED[name] for name in names.split())))
    assert found.verdict == verdict
    assert found.sentence == f"depth at 25 % on h100_sxm in vllm (decode, seq 2048) {verdict}."


def test_many_values_are_counted() -> None:
    (found,) = break_even(results(*(GAIN if i % 2 else MAYBE for i in range(16))))
    assert "pays at batch 8 of 16 values from 1 to 32,768" in found.verdict


def test_lengths_and_places() -> None:
    long = results(MAYBE, GAIN, axis="seq", first=1024)
    (found,) = break_even(long)
    assert found.axis == "seq"
    assert found.sentence.startswith(
        "depth at 25 % on h100_sxm in vllm (decode, batch 1) pays from seq 2,048 (1.20x"
    )
    assert break_even(results(GAIN)) == []
    both = [replace(r, hardware=name) for name in ("a", "b") for r in results(GAIN, MAYBE)]
    assert [b.where for b in break_even(both)] == [
        f"{name} in vllm (decode, seq 2048)" for name in ("a", "b")
    ]
    serve = [replace(r, phase="serve") for r in results(MAYBE, GAIN)]
    assert break_even(serve)[0].verdict.startswith("pays from concurrency 2")


def test_conclusions_of_many_and_few() -> None:
    one, two = results(GAIN, LOSS)
    assert of_speedups([one]) == [
        "depth at 25 % makes llama-3.2-1b 1.20x faster (1.10-1.30) on h100_sxm in vllm (decode,"
        f" batch 1, seq 2048), {one.bottleneck}-bound."
    ]
    assert "makes llama-3.2-1b slower: 0.90x (0.85-0.95)" in of_speedups([two])[0]
    assert "gives llama-3.2-1b no certain gain" in of_speedups(results(MAYBE))[0]
    many = [
        replace(one, prune=f"depth {i / 10}", sparsity=i / 10, realised_sparsity=i / 10)
        for i in range(1, 6)
    ]
    many.append(two)
    first, second = of_speedups(many)
    assert first.startswith(
        "On h100_sxm in vllm (decode, batch 1, seq 2048), the fastest is depth at 10 %: 1.20x"
    )
    assert first.endswith("5 of 5 are faster with their whole interval.")
    assert second.endswith("0 of 1 are faster with their whole interval, 1 slower.")
    settings = [replace(r, hardware=name) for name in "abcde" for r in (one, two)]
    (text,) = of_speedups(settings)
    assert text.startswith(
        "Of 10 settings, the fastest is depth at 25 % on a in vllm (decode, batch 1, seq 2048):"
        " 1.20x"
    )


def test_batches_that_do_not_fit_are_named_and_do_not_count() -> None:
    found = results(GAIN, GAIN, LOSS, LOSS)
    (one,) = break_even([replace(r, pruned_fits=r.batch < 4) for r in found])
    assert one.values == (1, 2)
    assert one.sentence.startswith("Batch 4 and more do not fit into the memory; depth at 25 % on ")
    (nowhere,) = break_even([replace(r, pruned_fits=False) for r in found])
    assert (nowhere.values, nowhere.too_large) == ((1, 2, 4, 8), ())
    assert nowhere.sentence.startswith("No batch fits into the memory, so times are hypothetical; ")
    (dense,) = break_even([replace(r, dense_fits=r.batch < 4) for r in found])
    where = "llama-3.2-1b itself does not fit from batch 4 on, where its times are hypothetical; "
    assert dense.sentence.startswith(where)


@pytest.mark.parametrize("name", ["dense_fits", "pruned_fits"])
def test_speedups_of_what_does_not_fit_are_conditional(name: str) -> None:
    one, two = (replace(r, **{name: False}) for r in results(GAIN, LOSS))
    for some in ([one], [one] * 4):
        first, second = of_speedups(some)
        assert first.startswith("Does not fit into ")
        assert "1.20x faster (1.10-1.30) if it fitted" in second or (
            "1.20x (1.10-1.30) if it fitted" in second
        )
    assert "if it fitted" in of_speedups([two])[1]
    # the fastest setting is one that fits
    fitting = replace(two, devices=2, **{name: True})
    answer = of_speedups([one, replace(one, devices=4), replace(one, devices=8), fitting])[-1]
    assert "the fastest is depth at 25 % on h100_sxm" in answer
    assert "0.90x (0.85-0.95);" in answer
