"""Decoders timed in turns and compared with predictions: planted times, a tiny model, faults,
figure, command."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import tables

torch = pytest.importorskip("torch")

from decoder_reference import CONFIG  # noqa: E402

from calibration.devices.protocol import Description  # noqa: E402
from calibration.devices.replay import ReplayDevice  # noqa: E402
from calibration.runners import compare as comparing  # noqa: E402
from calibration.runners.cases import (  # noqa: E402
    LEAST,
    Case,
    ModelRun,
    Sampler,
    alternate,
    cases_of,
)
from calibration.runners.compare import (  # noqa: E402
    ComparedCases,
    ComparedSpeedup,
    by_phase,
    conclusions,
    doubts,
    known_within,
    rows_of,
    summary,
)
from calibration.runners.decoder import timing  # noqa: E402
from calibration.runners.decoder.families import DYNAMIC, prune_decoder  # noqa: E402
from calibration.runners.decoder.model import random_decoder  # noqa: E402
from calibration.validation.scoring import spearman  # noqa: E402
from simulator.errors import InputError  # noqa: E402
from simulator.hardware.library import load_hardware  # noqa: E402
from simulator.prediction.table import speedup  # noqa: E402

HW = load_hardware("a100")


def _device(kind: type[ReplayDevice] = ReplayDevice, **options: Any) -> ReplayDevice:
    return kind(description=Description("cpu", "some CPU", {"threads": "1"}), **options)


def _cases(**settings: Any) -> list[Case]:
    usual = {"phase": ("prefill", "decode"), "seq": 64, "sparsity": [0.5], "engine": ""}
    return cases_of(CONFIG, {**usual, **settings})[0]


def _compare(
    folder: Path, cases: list[Case], device: ReplayDevice | None = None, **options: Any
) -> ComparedCases:
    budget_s = options.pop("budget_s", 5.0)
    return comparing.compare(
        folder / "run", device or _device(), ModelRun(CONFIG, **options), cases, budget_s
    )


class Ticking(ReplayDevice):
    """A device whose clock goes on by 3 ms when it is read: a run of real passes on a clock that
    stands would refine without an end."""

    def clock(self) -> float:
        self.rest(0.003)
        return super().clock()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Plant times instead of passes: a decoder takes a second per layer. The list receives the
    timed decoders."""
    seen: list[str] = []

    def timed(first: Any, second: Any, case: Case, runtime: str, *_: Any) -> dict[str, Any]:
        seen.append(
            f"{second.rule.family if second.rule else len(second.layers)} {case.phase} {runtime}"
        )
        noise = (1.0, 1.004, 0.996, 1.002, 0.998, 1.0, 1.0)  # narrow enough to need no more
        pruned_s = (float(len(second.layers)),) * len(noise)
        return {
            "loops": 1,
            "dense_s": tuple(len(first.layers) * x for x in noise),
            "pruned_s": pruned_s,
        }

    monkeypatch.setattr(timing, "time_pair", timed)
    return seen


def test_loops_follow_from_a_pass_after_those_that_compile_and_record() -> None:
    def sampler() -> Sampler:
        passes = itertools.count()
        return lambda loops: 1.0 if next(passes) < 3 else 1e-3

    assert (
        alternate(sampler(), sampler(), 0.0, ReplayDevice())["loops"] == 4
    )  # passes of 1 ms in a window of 4 ms


def test_pairs_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []
    ticks = itertools.count()

    def sampler(seconds: float) -> Sampler:
        def sample(loops: int) -> float:
            order.append(int(seconds))
            return seconds * (1.0 + 0.1 * math.sin(len(order)))

        return sample

    monkeypatch.setattr("calibration.runners.cases.time.perf_counter", lambda: float(next(ticks)))
    first, second = sampler(2.0), sampler(1.0)
    times = alternate(first, second, 5.0, ReplayDevice())
    assert len(times["dense_s"]) == len(times["pruned_s"]) == 5  # a tick per pair
    # passes that may compile and record, then those that set the number of loops
    assert order[:8] == [2, 1] * 4
    assert order[8:16] == [2, 1, 1, 2, 2, 1, 1, 2]
    for limit_s in (1.5, 0.5, 0.2):  # fewer pairs would not show their scatter
        assert len(alternate(first, second, limit_s, ReplayDevice())["dense_s"]) == LEAST


def test_every_family_really_runs(tmp_path: Path) -> None:
    cases = _cases()
    found = _compare(tmp_path, cases, _device(Ticking), budget_s=0.5, dtype="fp32")
    by_name = {r["key"]: r for r in found.records}
    assert len(by_name) == len(cases)
    assert {r["status"] for r in found.records if r["family"] != "semi_structured"} == {"ok"}
    assert all(
        "sparse tensor cores" in r["reason"]
        for r in found.records
        if r["family"] == "semi_structured"
    )
    assert found.left == 0
    rows = rows_of(cases, found.records, HW, device="some CPU", dtype="fp32")
    assert len(rows) == len(cases) - 2
    assert all(0 < r.measured_lower <= r.measured <= r.measured_upper for r in rows)
    assert {(r.device, r.runtime) for r in rows} == {("some CPU", "eager")}


def test_rows_hold_what_was_measured_and_what_is_predicted(
    tmp_path: Path, planted: list[str]
) -> None:
    cases = _cases(family=["depth", "width"], sparsity=[0.25, 0.5])
    found = _compare(tmp_path, cases)
    assert sorted(planted)[:2] == ["2 decode eager", "2 prefill eager"]
    by_name = {(c.family, c.sparsity, c.phase): c for c in cases}
    known = [1.9 if name == ("depth", 0.5, "decode") else math.nan for name in by_name]
    rows = {
        (r.family, r.sparsity, r.phase): r
        for r in rows_of(cases, found.records, HW, measured_bounds=known)
    }
    half, case = (of["depth", 0.5, "decode"] for of in (rows, by_name))
    launched = case.run_in("hf")
    eager = speedup(launched.dense, launched.pruned, HW)
    assert (half.measured, half.dense_s, half.pruned_s) == (2.0, 4.0, 2.0)
    assert half.measured_lower < 2.0 < half.measured_upper
    assert (half.predicted, half.predicted_dense_s, half.flop_bound) == (
        eager.speedup,
        eager.dense_s,
        eager.flop_bound,
    )
    assert half.error == pytest.approx(eager.speedup / 2.0 - 1.0)
    assert half.measured_bound == 1.9
    assert math.isnan(rows["width", 0.5, "decode"].measured_bound)
    prefill = by_name["depth", 0.5, "prefill"]
    assert (
        rows["depth", 0.5, "prefill"].predicted
        == speedup(prefill.dense, prefill.pruned, HW).speedup
    )
    assert known_within(list(rows.values())) == pytest.approx(0.004, abs=1e-4)


TEXTS = ("width mlp=0.3 heads=0.5", "depth 0.25 + width mlp=0.5 layers=1-2", "depth layers=1")


def test_records_tell_texts_apart_and_a_rerun_does_new_ones(
    tmp_path: Path, planted: list[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("layers:\n  1: depth\n")
    cases = _cases(sparsity=None, prune=[*TEXTS, str(plan)], phase="decode")
    assert [c.prune for c in cases] == list(TEXTS)  # the plan is the third text
    found = _compare(tmp_path, cases)
    assert [r.prune for r in rows_of(cases, found.records, HW)] == list(TEXTS)
    assert {r["prune"]: r["family"] for r in found.records} == dict(
        zip(TEXTS, ("width", "depth+width", "depth"), strict=True)
    )
    # layers of each
    assert sorted(planted) == ["3 decode eager", "3 decode eager", "4 decode eager"]
    plan.write_text("layers:\n  1-2: depth\n")  # the same path, another plan
    _compare(tmp_path, _cases(sparsity=None, prune=[*TEXTS, str(plan)], phase="decode"))
    assert planted[3:] == ["2 decode eager"]


def test_texts_that_a_decoder_cannot_run_are_named_before_it_is_made(
    tmp_path: Path, planted: list[str]
) -> None:
    cannot = {
        "slicegpt 0.25": "no option 'residual_projections'",
        "dynamic_depth 0.5 layers=1": "expected one fraction",
    }
    cannot |= {
        "token 0.5 + width 0.25": "one dynamic family",
        "kv_cache budget=8": "no option 'budget'",
    }
    cases = _cases(sparsity=None, prune=["depth 0.5", *cannot], phase="decode")
    found = _compare(tmp_path, cases)
    assert len(found.records) == len(planted) == 1
    assert len(found.notes) == len(cannot)
    for note, (text, reason) in zip(found.notes, cannot.items(), strict=True):
        assert note.startswith(f"{text}: not executed: ")
        assert reason in note
    with pytest.raises(InputError, match="residual_projections"):
        _compare(tmp_path / "other", cases[1:])
    assert not (tmp_path / "other").exists()


def test_the_budget_ends_a_run_and_says_what_is_left(tmp_path: Path, planted: list[str]) -> None:
    class Ticking(ReplayDevice):
        def clock(self) -> float:
            self._now += 1.0
            return self._now

    device = Ticking(description=Description("cpu", "some CPU"))
    found = _compare(tmp_path, _cases(), device, budget_s=20.0)
    assert found.stopped == "budget"
    assert len(planted) < 20
    assert found.left + len(found.records) == len(_cases())
    device = Ticking(description=Description("cpu", "some CPU"))
    (tmp_path / "short").mkdir()
    short = _compare(tmp_path / "short", _cases(), device, budget_s=0.5)
    whole = [case for case in _cases() if case.prune == _cases()[0].prune]
    assert len(short.records) == len(whole) > 1  # one pruning in all its settings


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("CUDA out of memory"), "skipped"), (ValueError("odd"), "failed")],
)
def test_a_case_that_breaks_is_kept_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    monkeypatch.setattr(timing, "time_pair", Mock(side_effect=error))
    cases = _cases(family=["depth", "width"], sparsity=[0.25, 0.5])
    found = _compare(tmp_path, cases)
    assert {r["status"] for r in found.records} == {status}
    assert all(str(error) in note for note in found.notes)
    if status == "failed":  # three in a row: the device is gone
        assert found.stopped.startswith("device lost: 3")
        assert found.left == len(cases) - 3
        assert found.needs_new_process
        reasons = [r["prune"] + r["phase"] for r in found.records]
        again = _compare(tmp_path, cases)  # as in a new process: the cases that failed are the last
        assert [r["prune"] + r["phase"] for r in again.records][:3] == reasons
        assert again.left == len(cases) - 3
        assert len(again.records) == 6
    assert rows_of(cases, found.records, HW) == []
    with pytest.raises(InputError, match="expected at least one measured case"):
        summary([])


def test_rough_cases_get_more_samples_after_every_case_had_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, float]] = []
    device = _device()

    def timed(first: Any, second: Any, case: Case, runtime: str, *rest: Any) -> dict[str, Any]:
        seen.append((case.prune, len(second.layers)))
        device._now += 10.0
        spread = 0.2 if case.prune == TEXTS[1] else 0.001
        ratios = [1.0 - spread, 1.0 + spread] * 4
        return {"loops": 1, "dense_s": ratios, "pruned_s": [1.0] * 8}

    monkeypatch.setattr(timing, "time_pair", timed)
    cases = _cases(sparsity=None, prune=list(TEXTS), phase="decode")
    found = _compare(tmp_path, cases, device, budget_s=55.0)
    # in the order of --prune, then the rough case until the time is over
    assert [text for text, _ in seen] == [*TEXTS, TEXTS[1], TEXTS[1], TEXTS[1]]
    assert [len(r["dense_s"]) for r in found.records] == [8, 32, 8]
    assert (found.left, found.stopped) == (0, "")


def test_a_verdict_counts_only_what_the_samples_can_show() -> None:
    def rows(half: float) -> list[ComparedSpeedup]:
        ends = {"measured_lower": 1.3 / (1.0 + half), "measured_upper": 1.3 * (1.0 + half)}
        given = {"predicted_lower": 1.1, "predicted_upper": 1.25, "roofline_bound": 2.0, **ends}
        return [_row(1.18, 1.3, error=0.0, **given)] * 12

    assert "do not hold" in conclusions(rows(0.01))[0]  # apart from the predicted interval
    assert " hold on " in conclusions(rows(0.05))[0]  # the samples cannot show a miss
    rough = conclusions(rows(0.2))[0]  # nor a hit
    assert rough.endswith("12 of them too rough to tell; a verdict needs 10.")


def test_a_failed_capture_ends_the_process_and_the_next_one_does_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def timed(first: Any, second: Any, case: Case, runtime: str, *_: Any) -> dict[str, Any]:
        asked.append(runtime)
        if len(asked) == 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return {"loops": 1, "dense_s": (2.0,) * 6, "pruned_s": (1.0,) * 6}

    monkeypatch.setattr(timing, "time_pair", timed)
    monkeypatch.setattr(timing.Executor, "_runtime", lambda self, *_: "cuda_graph")
    cases = _cases(family=["depth", "width"], phase="decode")
    first = _compare(tmp_path, cases)
    assert (len(asked), first.left, first.needs_new_process) == (1, 1, True)
    (record,) = first.records
    assert record["status"] == "unsupported"
    assert record["reason"].startswith("not captured: RuntimeError: operation not permitted")
    again = _compare(tmp_path, cases)
    assert asked == ["cuda_graph"] * 2
    assert sorted(r["status"] for r in again.records) == ["ok", "unsupported"]
    assert not again.needs_new_process


def test_rank_correlation_by_hand() -> None:
    # ranks 1.5, 1.5, 3 and 1, 3, 2; then opposite ones; then too few values, and one side that
    # never changes
    pairs = [
        ([1, 1, 2], [3, 5, 4]),
        ([1, 2, 2, 9], [8, 3, 3, 1]),
        ([1, 2], [1, 2]),
        ([1, 1, 1], [1, 2, 3]),
    ]
    found = [spearman(*np.array(pair, dtype=float)) for pair in pairs]
    assert found == pytest.approx([0.0, -1.0, math.nan, math.nan], abs=1e-12, nan_ok=True)


def _row(predicted: float, measured: float, **changes: Any) -> ComparedSpeedup:
    base: dict[str, Any] = dict.fromkeys(
        ComparedSpeedup.__dataclass_fields__.keys() - {"prune"}, 1.0
    )
    base |= dict.fromkeys(("model", "device", "hardware", "dtype", "runtime"), "x")
    base |= {
        "predicted_lower": 0.9 * predicted,
        "predicted_upper": 1.1 * predicted,
        "predicted_dense_s": 1.2,
    }
    base |= {
        "measured_lower": 0.98 * measured,
        "measured_upper": 1.02 * measured,
        "family": "depth",
        "phase": "decode",
    }
    values = {**base, "predicted": predicted, "measured": measured, **changes}
    return ComparedSpeedup(**{"prune": f"{values['family']} {values['sparsity']:g}", **values})


def test_agreement_by_hand() -> None:
    rows = [_row(1.1, 1.0), _row(2.0, 2.0), _row(3.0, 4.0), _row(1.5, 1.5, phase="prefill")]
    # one of four measured speedups is outside: 4 > 1.1 x 3
    wanted = {
        "count": 4,
        "spearman": 1.0,
        "median": 0.05,
        "bias": 0.0,
        "inside": 0.75,
        "dense_time": 0.2,
    }
    assert {
        name: value for name, value in summary(rows).items() if name in wanted
    } == pytest.approx(wanted, abs=1e-9)
    assert {name: b["count"] for name, b in by_phase(rows).items()} == {
        "decode": 3,
        "prefill": 1,
        "all": 4,
    }


def test_a_comparison_states_whether_predictions_hold_and_its_worst_case() -> None:
    def row(family: str, measured: float, predicted: float) -> ComparedSpeedup:
        about = {
            "model": "m",
            "hardware": "planted",
            "device": "planted GPU",
            "sparsity": 0.5,
            "roofline_bound": 2.0,
        }
        return _row(predicted, measured, family=family, error=predicted / measured - 1.0, **about)

    first, worst = conclusions([row("depth", 1.5, 1.52), row("width", 1.3, 1.4)] * 5)
    assert first.startswith(
        "The predictions of planted for m hold on planted GPU: median error 4.5 % (datasheet roof"
    )
    assert worst == "Worst: width 50 % in decode, measured 1.30x, predicted 1.40x (1.26-1.54)."
    assert "do not hold" in conclusions([row("depth", 1.0, 1.9), row("width", 1.0, 2.1)] * 5)[0]
    assert conclusions([row("depth", 1.0, 1.9)])[0].endswith(
        "1 measured speedup; a verdict needs 10."
    )


def test_noise_in_measured_speedups_is_stated() -> None:
    rows = [_row(1.2, 1.4, flop_bound=1.3), _row(1.2, 1.31, flop_bound=1.3)]
    (above,) = doubts(rows)
    assert (
        "measured 1.40x is above 1.30x, the bound of its FLOPs, bytes and number of operators:"
        " noise" in above
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "config.json"
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "vocab_size": 211,
    }
    heads = {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
    }
    file.write_text(json.dumps({**config, **heads, "hidden_size": 96, "intermediate_size": 160}))
    return file


def test_the_command_compares_on_the_cpu(tiny: Path, tmp_path: Path, cli: Any) -> None:
    folder = tmp_path / "run"
    line = (
        f"compare {tiny} --device cpu --seq 64 --sparsity 0.5 --hardware a100 -o {folder} --family"
    )
    out, err = cli(f"{line} depth,semi_structured --budget 15s")
    assert "median error" in out
    assert "sparse tensor cores" in err
    assert {p.name for p in folder.iterdir()} == {
        "decoder.jsonl",
        "comparison.csv",
        "comparison.md",
        "comparison.png",
    }
    page = (folder / "comparison.md").read_text()
    assert page.count("\n| depth") == 2
    assert len((folder / "comparison.csv").read_text().splitlines()) == 1 + 2
    assert [list(row) for row in cli.json(f"{line} depth")] == [
        list(ComparedSpeedup.__dataclass_fields__)
    ] * 2


def test_the_command_runs_texts(tiny: Path, tmp_path: Path, planted: list[str], cli: Any) -> None:
    command = (
        f"compare {tiny} --device cpu --seq 64 --phase decode --hardware a100 -o {tmp_path / 'run'}"
    )
    command += "".join(f" --prune '{text}'" for text in TEXTS)
    out, err = cli(f"{command} --prune 'width heads=0.2'")
    assert [line for text in TEXTS for line in out.splitlines() if line.startswith(f"{text} ")]
    assert "width heads=0.2 in decode: 6 query heads on 4 KV heads cannot run here" in err
    rows = cli.json(f"{command} --family depth --sparsity 0.5")
    assert [row["prune"] for row in rows] == [*TEXTS, "depth 0.5"]
    assert len(planted) == 4
    assert "state the whole pruning" in cli.refused(f"{command} --sparsity 0.5")
    reason = "column 7: part or option of width 'mpl' is unknown; did you mean mlp?"
    assert reason in cli.refused(f"{command} --prune 'width mpl=0.3'")


def test_measured_energies_stand_beside_predicted_ones(
    tmp_path: Path, tiny: Path, planted: list[str], monkeypatch: pytest.MonkeyPatch, cli: Any
) -> None:
    plain = timing.time_pair

    def counted(*given: Any) -> dict[str, Any]:
        return {**plain(*given), "dense_j": [2.0, 2.2, 2.1], "pruned_j": [1.0, 1.1, 1.26]}

    monkeypatch.setattr(timing, "time_pair", counted)
    line = (
        f"compare {tiny} --device cpu --seq 64 --phase decode --hardware a100 -o {tmp_path / 'run'}"
    )
    (row,) = cli.json(f"{line} --family depth --sparsity 0.5")
    names = ("dense_joules", "pruned_joules", "energy_saved")
    assert [row[name] for name in names] == pytest.approx([2.1, 1.1, 0.5])
    ends = [row[f"energy_saved_{end}"] for end in ("lower", "upper")]
    assert ends == pytest.approx([0.4, 0.5])  # the extremes of three turns
    assert 0.0 < row["predicted_pruned_joules"] < row["predicted_dense_joules"]
    out, _ = cli(f"{line} --family depth --sparsity 0.5")
    assert "50.0 (40.0-50.0)" in out
    assert re.search(r"energy saved: [01] of 1 shares in their 90 % interval", out)


BAD = """
--budget 0                               | above zero
--budget soon                            | 2min
--device replay                          | replay:planted
--device cdua                            | did you mean cuda
--family dept                            | did you mean depth
--family semi_structured --sparsity 0.25 | expected 0.5, as 2:4 removes half
--sparsity 50                            | 0.5
--batch 0                                | from 1 to
--seq -1                                 | from 1 to
--phase generate                         | decode
--engine fast                            | engine 'fast' is unknown
--dtype int4                             | int4
--layers 0                               | 1 to 4
--hardware h1000                         | h100
-o /no/such/folder/run                   | does not exist
"""


@pytest.mark.parametrize("command", ["compare", "upper-bound"])
@pytest.mark.parametrize(("change", "reason"), tables.rows_of(BAD))
def test_bad_input_is_one_line(
    tiny: Path, tmp_path: Path, command: str, change: str, reason: str, cli: Any
) -> None:
    line = (
        f"{command} {tiny} --device cpu --seq 64 --sparsity 0.5 --hardware a100 -o"
        f" {tmp_path / 'run'} {change}"
    )
    assert reason in cli.refused(line)
    assert not (tmp_path / "run").exists()


def test_both_phases_are_captured_on_a_gpu_unless_the_host_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = random_decoder(CONFIG, dtype="fp32")
    monkeypatch.setattr("calibration.devices.operators.find_spec", lambda name: True)
    executor = timing.Executor(_device(), ModelRun(CONFIG, "fp32"))
    for family in DYNAMIC:
        pruned = prune_decoder(made, family, 0.5)
        assert executor._runtime(pruned) == "eager"
        assert executor._runtime(replace(pruned, device="cuda:0")) == "cuda_graph"
    monkeypatch.setattr("calibration.devices.operators.find_spec", lambda name: None)
    runtimes = {
        f: executor._runtime(replace(prune_decoder(made, f, 0.5), device="cuda:0")) for f in DYNAMIC
    }
    assert {f for f, runtime in runtimes.items() if runtime == "eager"} == {
        f for f in DYNAMIC if DYNAMIC[f].skips
    }
