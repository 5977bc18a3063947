"""Every command begins with its conclusion, prints at most three notes, and an interval as two
ends."""

from __future__ import annotations

import re
from typing import Any

import pytest

from simulator.cli import render
from simulator.prediction.service import probability_of

BEGINS = {
    "explain llama-3.1-8b --hardware h100 --family width --sparsity 0.25 --phase decode": (
        r"width at 25 %( \(.* realised\))? of llama-3.1-8b: nominal 1.33x, predicted 1\.\d\dx"
        r" \(1\.\d\d-1\.\d\d\) "
        r"on h100_sxm in vllm \(decode, batch 1, seq 2048\), memory-bound; losses: .*\."
    ),
    "speedup llama-3.1-8b --hardware h100 --prune 'width mlp=0.3 attention=0.25' --devices 2 --phase decode": (
        r"width mlp=0.3 attention=0.25 makes llama-3.1-8b 1\.\d\dx faster \(.*-.*\) on 2 x h100_sxm"
        r" in vllm "
        r"\(decode, batch 1, seq 2048\), memory-bound; stock vllm runs it\."
    ),
    "speedup llama-3.1-8b --hardware 4090 --prune 'width heads=0.2' --phase decode --memory": (
        r".* on rtx_4090 in vllm \(decode, batch 1, seq 2048\), memory-bound; stock vllm does not"
        r" run it; "
        r"up to \d+ sequences fit \(dense: \d+\)\."
    ),
    "speedup llama-3.1-8b --hardware h100 --method snapkv-1024 --phase decode --batch 16 --seq 512:4k": (
        r"SnapKV-1024 on h100_sxm in vllm \(decode, batch 16\) pays from seq 2,048 \(.*\); not at"
        r" 1,024; "
        # which holds for a length beyond the budget, not for the first
        r"stock vllm does not run it\."
    ),
    "explain llama-3.2-1b --hardware h100,a100 --family depth --sparsity 0.25 --phase prefill,decode": (
        r"depth at 25 % of llama-3.2-1b, 4 settings: predicted \d\.\d\dx \(.*\) on .* to \d\.\d\dx"
        r" \(.*\) on .*\."
    ),
    "advise llama-3.1-8b --hardware h100 --target 1.3x --phase decode --batch 8 --engine sglang": (
        r"The least pruning of llama-3.1-8b that reaches 1.30x on h100_sxm in sglang \(decode,"
        r" batch 8, seq 2048\) is "
        r"depth at \d\d(\.\d)? %( \(\d\d(\.\d)? % realised\))?; predicted 1.3\d?x \(.*\), .* ms,"
        r" probability \d\d %; "
        r"stock sglang runs it\."
    ),
    "advise llama-3.1-8b --hardware h100 --target 30 --family depth": (
        r"No pruning of llama-3.1-8b reaches 30x on .*; the closest is depth at 90 % \(90.6 %"
        r" realised\): "
        r".*x \(.*-.*\), .*, probability < 1 %\."
    ),
    "advise llama-3.1-8b --hardware h100 --latency 1s --family depth": (
        r"The dense model reaches 1.00 s on h100_sxm in vllm \(decode, batch 1, seq 2048\)\."
    ),
    "pareto llama-2-7b --hardware h100 --phase prefill": (
        r"On h100_sxm in vllm \(prefill, batch 1, seq 2048\), \d of \d+ pruned llama-2-7b are on"
        r" the frontier: .*; "
        r"best trade: .* \d+ %, \d\.\d\dx \(.*-.*\) at .* % loss of .*\."
    ),
    "pareto llama-3.1-8b --hardware h100 --max-loss 5% --phase prefill": (
        r"On h100_sxm in vllm \(prefill, batch 1, seq 2048\), the fastest llama-3.1-8b with at most"
        r" 5 % loss of .* is "
        r"Shortened-taylor 12.5 %: \d\.\d\dx \(.*-.*\) at 2.8 % loss\."
    ),
    "pareto llama-3.1-8b --hardware h100 --max-loss 1% --phase prefill": (
        r"On h100_sxm in vllm \(prefill, batch 1, seq 2048\), no pruned llama-3.1-8b with at most 1"
        r" % loss of .* is "
        r"faster than the dense model\."
    ),
    "pareto llama-2-7b --hardware h100,a100 --phase prefill,decode --max-loss 30%": (
        r"The fastest with at most 30 % loss of C4 perplexity: SLEB 10 % on 4 of 4 settings"
        r" \(.*\)\."
    ),
    "pareto llama-2-7b --hardware h100,a100 --phase prefill,decode": (
        r"The best trade, most speedup per loss of .*: .* on \d of 4 settings \(.*\)\. On at least"
        r" one frontier: .*\."
    ),
    "validate h100 h100_sxm/collective/trtllm": (
        r"h100_sxm holds on [\d,]+ measurements of NVIDIA H100 .*: median error .* % \(datasheet"
        r" roofline .* %\), "
        r"\d+ % in their 90 % interval\..*"
    ),
    "paper": (
        r"\d\d of 20 published speedups lie in the 90 % interval of their prediction; the median"
        r" error is .*\."
    ),
    "paper --claims --hardware h100 --engine vllm": (
        r"Claim \(a\) .* of 2 combinations of GPU, engine and phase\. Claim \(b\) .* of 2"
        r" combinations of .*\."
    ),
}


@pytest.mark.parametrize("line", BEGINS)
def test_the_conclusion_comes_first_and_an_interval_has_two_ends(line: str, cli: Any) -> None:
    out, err = cli(line)
    first = " ".join(out.partition("\n\n")[0].split())
    assert re.fullmatch(BEGINS[line], first), first
    assert all(row.startswith("note: ") for row in err.splitlines())
    assert len(err.splitlines()) <= render.MOST_NOTES
    assert not re.search(r"\+-|\+/-|±", out + err)
    assert max(map(len, out.splitlines())) <= render.PIPED_WIDTH


ONE = "advise {} --hardware h100 --engine sglang --target 1.3 --phase decode --batch 8 "
ONE += "--family depth,width,kv_cache,token"


def test_advice_states_the_numbers_of_its_records(cli: Any) -> None:
    line = ONE.format("llama-3.1-8b")
    records, text = cli.json(line), " ".join(cli.out(line).split())
    best = records[0]
    ends = f"({render.ratio(best['speedup_lower'])}-{render.ratio(best['speedup_upper'])})"
    chance = f"probability {100 * best['probability']:.0f} %; stock sglang runs it"
    speedup = (
        f"predicted {render.ratio(best['speedup'])}x {ends}, {render.seconds(best['pruned_s'])},"
        f" {chance}."
    )
    removed = (
        f"{render.percent(best['sparsity'])} ({render.percent(best['realised_sparsity'])} realised)"
    )
    assert f"is {best['family']} at {removed}; {speedup}" in text
    for r in records:
        expected = probability_of(1.3, r["speedup"], r["speedup_lower"], r["speedup_upper"])
        assert r["probability"] == pytest.approx(expected, abs=1e-9)


def test_notes_are_three_and_all_with_verbose(cli: Any) -> None:
    line = "speedup llama-3.1-70b --hardware h100,t4 --dtype fp16 --seq 200000 --sparsity 0.3"
    few, every = (cli(f"{line}{more}")[1].splitlines() for more in ("", " --verbose"))
    assert len(few) == 3 < len(every)
    assert few[-1].endswith(f" ({len(every) - 3} more with --verbose)")
    assert few[:2] == every[:2]


@pytest.mark.quick
def test_notes_of_one_text_are_one_note(capsys: pytest.CaptureFixture[str]) -> None:
    render.notes(
        [
            "a: too large",
            "b:\n too large",
            "short",
            *(f"{i}: no quality" for i in range(9)),
            "last",
            "a: too large",
        ]
    )
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["note: a, b: too large", "note: short"]
    assert lines[2] == "note: 0, 1, 2, 3 and 5 more: no quality (1 more with --verbose)"
    render.notes([])
    assert capsys.readouterr() == ("", "")


def test_a_table_over_batches_has_every_pruning(cli: Any) -> None:
    out = cli.out(
        "speedup llama-3.2-1b --hardware h100 --family depth,width,low_rank --phase decode"
        " --batch 1:4"
    )
    shown = [
        name
        for name in ("depth", "width", "low_rank")
        for s in (10, 25, 50)
        if f"{name} at {s} %" in out.partition("\n\n")[2]
    ]
    assert shown == ["depth"] * 3 + ["width"] * 3 + ["low_rank"] * 3
    assert max(len(line) for line in out.splitlines()) <= 120
    assert (
        len(
            cli.out(
                "speedup llama-3.2-1b --hardware h100 --prune 'depth 0.25' --phase decode"
                " --batch 1:4"
            ).splitlines()
        )
        < 15
    )


def test_the_kernel_budget_is_stated_and_recorded(cli: Any) -> None:
    line = "explain llama-3.2-1b --hardware h100 --prune 'dynamic_depth 0.5' --phase decode"
    (usual,), (aimed,) = cli.json(line), cli.json(f"{line} --target 1.1x")
    assert [need["target"] for need in usual["budget"]["needs"]] == [1.0]
    assert [need["target"] for need in aimed["budget"]["needs"]] == [1.0, 1.1]
    need, text = aimed["budget"]["needs"][1], " ".join(cli.out(f"{line} --target 1.1x").split())
    allowed = render.seconds_between(
        need["allowed_s"], need["allowed_lower"], need["allowed_upper"]
    )
    assert f"reaches 1.10x in decode if its added work takes less than {allowed} per layer" in text
    assert f"must reach {render.ratio(need['efficiency'])} of the dense kernels' useful" in text
    for refused in ("0.9", "fast"):
        assert "target" in cli.refused(f"{line} --target {refused}")
    several = f"{line} --batch 1,2,4,8"
    assert "added work takes" not in cli.out(several)
    assert cli.out(f"{several} --verbose").count("useful rate") == 4
    (static,) = cli.json(line.replace("dynamic_depth", "width"))
    assert static["budget"] is None


def test_advice_states_the_budget_of_dynamic_families(cli: Any) -> None:
    line = "advise llama-3.1-8b --hardware h100 --target 1.2 --phase prefill --family token,width"
    text, records = " ".join(cli.out(line).split()), cli.json(line)
    needs = {r["family"]: r["budget"] and r["budget"]["needs"] for r in records}
    assert needs["width"] is None
    assert [need["target"] for need in needs["token"]] == [1.2]
    rate = render.ratio(needs["token"][0]["efficiency"])
    assert "reaches 1.20x in prefill if its added work takes less than" in text
    assert f"Its kernels must reach {rate} of the dense kernels' useful rate" in text
