"""``prunesim serve``: its sentences, its table, JSON, CSV and figure, and bad input."""

from __future__ import annotations

import csv
import json
import re
from typing import Any

import pytest
from tables import rows_of

import simulator
from simulator.cli import render
from simulator.prediction.service import OperatingPoint

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("inside")]
LINE = (
    "serve llama-3.1-8b --hardware h100 --new-tokens 256 --prune 'depth 0.25' --prune 'kv_cache"
    " 0.5'"
)
KEYS = (
    "point model hardware engine devices power_limit seq cached_prefix new_tokens pruning prune family"
    " concurrency fits request_s request_lower request_upper ttft_s ttft_lower ttft_upper tpot_s"
    " tpot_lower tpot_upper tokens_per_s tokens_per_s_lower tokens_per_s_upper ratio ratio_lower"
    " ratio_upper probability unmet excess cost_output cost_all cost_prompt cost_new"
    " joules_per_token joules_per_token_lower joules_per_token_upper energy_saved"
    " energy_saved_lower energy_saved_upper watts electricity carbon_g"
    " largest_concurrency limited_by weights_bytes cache_bytes level"
)


def test_several_equal_concurrencies(cli: Any) -> None:
    out = cli.out("serve llama-3.1-8b --hardware h100 --prune 'depth 24' --concurrency 1,16,64")
    assert out.startswith("With 1 request in flight")
    assert "With 64 requests in flight" in out
    rows = [row.split() for row in out.splitlines() if row.startswith("  dense ")]
    assert [row[1] for row in rows[:3]] == ["1", "16", "64"]
    error = cli.refused("serve llama-3.1-8b --hardware h100 --prune 'depth 24' --concurrency many")
    assert "--concurrency 'many': expected a whole number" in error


def test_a_device_that_cannot_run_the_model_is_excluded(cli: Any) -> None:
    out, err = cli(
        "serve llama-3.1-8b --hardware b200,a100,t4 --prune 'depth 0.25' --dtype nvfp4"
        " --concurrency 4"
    )
    assert out.startswith("With 4 requests in flight on b200_sxm")
    for name in ("a100_sxm_80gb", "t4"):
        assert f"note: {name} in vllm is excluded: " in err


def test_a_concurrency_that_does_not_fit_is_named(cli: Any) -> None:
    out = " ".join(
        cli.out("serve llama-3.1-8b --hardware h100 --prune 'depth 0.25' --concurrency 270").split()
    )
    assert re.search(
        r"tokens/s per GPU; stock vllm runs it; so many do not fit with the dense model\.", out
    )


def test_the_answers_come_first_then_one_table(cli: Any) -> None:
    out, err = cli(f"{LINE} --tpot 20ms --ttft 1s --price 2")
    head, table, rest = out.split("\n\n")
    first, second, third = re.split(r"(?<=\.) (?=[dW])", " ".join(head.split()))
    assert re.fullmatch(
        r"With \d+ requests in flight on h100_sxm in vllm \(seq 2048 \+ 256 new\), depth at 25 %"
        r" makes llama-3.1-8b "
        r"1\.\d\dx faster \(1\.\d\d-1\.\d\d\), with [\d,]+ tokens/s per GPU; stock vllm runs it;"
        r" others: "
        r"kv_cache at 50 % 1\.\d\dx \(.*-.*\), which stock vllm does not run\.",
        first,
    )
    assert re.fullmatch(
        r"depth at 25 % serves 1\.\d\dx \(.*-.*\) as many tokens/s at equal memory: 1\.\d\dx as"
        r" many sequences fit "
        r"\(\d+ instead of \d+, as weights shrink by .* % and the cache of each by 25 %\), and each"
        r" request takes "
        r"\d\.\d\dx as long\.",
        second,
    )
    assert re.fullmatch(
        r"Within 1\.00 s to the first token and 20\.0 ms per output token \(with a probability of"
        r" 50 %\), depth at "
        r"25 % serves 1\.\d\dx \(.*-.*\) as many tokens/s: \d+ requests in flight instead of \d+; a"
        r" million output "
        r"tokens cost 0\.\d+ with \d+ in flight instead of 0\.\d+ with \d+ in flight\.",
        third,
    )
    rows = table.splitlines()
    assert [row for row in rows if not row.startswith(" ")][-3:] == [
        "at equal concurrency",
        "at equal memory",
        "within limits",
    ]
    assert sum(row.startswith("  dense ") for row in rows) == 3
    assert sum(row.startswith("  depth at 25 % ") for row in rows) == 3
    assert "kv_cache at 50 % serves 1." in rest
    assert (
        "kv_cache at 50 % in vllm: will it run? No: stock vllm has no kernels for kv_cache." in rest
    )
    assert out.count("depends on how requests arrive") == 1
    assert len(err.splitlines()) <= render.MOST_NOTES
    assert max(map(len, out.splitlines())) <= render.PIPED_WIDTH
    verbose = cli.out(f"{LINE} --tpot 20ms --ttft 1s --price 2 --verbose")
    assert verbose.startswith(head)
    assert "every concurrency" in verbose
    assert "prompt" in verbose


def test_many_devices_have_one_row_each(cli: Any) -> None:
    out = cli.out(f"{LINE.replace('h100', 'h100,a100')} --engine vllm,sglang --tpot 30ms")
    rows = [
        row
        for row in out.splitlines()
        if re.match(r"(h100_sxm|a100_sxm_80gb) +(vllm|sglang) +2,048 +depth at 25 % ", row)
    ]
    assert len(rows) == 4
    assert "within limits" in out


def test_json_and_csv_are_the_points_of_the_library(cli: Any) -> None:
    line = (
        f"{LINE} --tpot 20ms --concurrency 16 --price 2 --confidence 0.8 --seq 1k --dtype fp16"
        " --cached-prefix 25%"
    )
    records = cli.json(line)
    found = simulator.serve(
        "llama-3.1-8b",
        "h100",
        prune=["depth 0.25", "kv_cache 0.5"],
        seq=1024,
        concurrency=16,
        tpot_s=0.02,
        probability=0.8,
        price=2.0,
        new_tokens=256,
        dtype="fp16",
        cached_prefix=0.25,
    )
    assert records == [point.to_dict() for point in found.points]
    assert [" ".join(record) for record in records] == [KEYS] * 9
    assert KEYS.split() == list(OperatingPoint.__dataclass_fields__)
    assert cli.out(f"{line} --csv out.csv") == cli.out(line)
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, record in zip(rows, records, strict=True):
        assert list(row) == list(record)
        assert float(row["tokens_per_s"]) == record["tokens_per_s"]
    everything = json.loads(cli.out(f"{line} --json --verbose"))
    assert everything[:9] == records
    assert {record["point"] for record in everything[9:]} == {"curve"}


@pytest.mark.parametrize(
    ("options", "says"),
    rows_of("""
--ttft 5                                  | the unit is missing
--phase decode                            | server option --phase: expected with a rate, requests or a trace
--token-budget 16 --concurrency 32        | expected at least the 32 tokens of a decode step
--token-budget 16 --engine hf             | token_budget: expected an engine with a scheduler
--rate 5 --max-num-sqs 4                  | did you mean --max-num-seqs
--rate 5 --ttf 30ms                       | option '--ttf' is unknown; did you mean --ttft?
--rate 5 --engine sglang --max-num-seqs 4 | option of sglang '--max-num-seqs'
--rate 5 --concurrency 4                  | concurrency: expected one, with requests
--rate 5 --requests 10M                   | requests: expected a whole number from 1 to 1,000,000
--trace missing.csv                       | missing.csv: cannot be read: No such file
--rate 5 --token-budget 1                 | tokens of a step: expected at least 2
--timeline out.png                        | --timeline: expected with --rate
--new-tokens 0                            | new_tokens: expected at least 1
"""),
)
def test_bad_values_are_one_line(options: str, says: str, cli: Any) -> None:
    assert says in cli.refused(f"{LINE} {options}")


LOAD = "serve llama-3.1-8b --hardware h100 --seq 1024 --new-tokens 128 --requests 200"


def test_how_many_gpus_a_rate_needs(cli: Any) -> None:
    out = " ".join(
        cli.out(
            f"{LOAD} --rate 60 --ttft 300ms --tpot 30ms --tp 1,2 --prune 'depth 0.25' --price 2.5"
        ).split()
    )
    assert re.match(
        r"At 60 requests/s within 300 ms to the first token and 30.0 ms per output token for 99 %"
        r" of the requests, the dense model needs \d+ h100_sxm",
        out,
    )
    assert "With depth at 25 %, the 99th percentile is" in out
    assert re.search(r"one replica serves 1\.\dx|one replica serves \d\.\d\dx", out)
    assert re.search(r"dense \d+ x 1 .* dense \d+ x 2", out)


def test_a_queue_that_cannot_drain_is_the_first_sentence(cli: Any) -> None:
    out = cli.out(f"{LOAD} --rate 500 --max-num-seqs 16")
    assert out.startswith("The queue of the dense model cannot drain: 500 requests/s arrive,")


def test_the_records_of_a_load_have_equal_keys(cli: Any) -> None:
    line = f"{LOAD} --rate 10 --prune 'depth 0.25'"
    records = json.loads(cli.out(f"{line} --json"))
    assert [record["pruning"] for record in records] == ["", "depth at 25 %"]
    assert list(records[0]) == list(records[1])
    assert records[0]["latency_ratio"] is None
    assert records[1]["latency_ratio_lower"] < records[1]["latency_ratio"]
    cli.out(f"{line} --csv out.csv --figure rate.png")
    with open("out.csv", newline="") as file:
        assert [float(row["ttft_p99"]) for row in csv.DictReader(file)] == [
            record["ttft_p99"] for record in records
        ]


def test_a_trace_and_a_timeline(cli: Any, tmp_path: Any) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival,prompt,output\n" + "".join(f"{i / 4},512,64\n" for i in range(20)))
    out = cli.out(f"serve llama-3.1-8b --hardware h100 --trace {trace} --timeline line.svg")
    assert "20 requests at 4.21/s (trace.csv)" in out
    with open("line.svg") as file:
        assert "decodes" in file.read()


def test_several_lengths_have_a_table_each(cli: Any) -> None:
    out = cli.out(
        "serve llama-3.1-8b --hardware h100 --seq 512,2048 --prune 'depth 0.25' --concurrency 4"
    )
    assert "(seq 512 + 128 new)" in out
    assert "(seq 2048 + 128 new)" in out
