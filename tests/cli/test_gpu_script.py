"""The script for a machine with a GPU, run on the CPU with a tiny model: nothing but the kernels is new on a GPU."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from calibration.cli import calibrate, compare, upper_bound
from calibration.records.store import read_store
from simulator.hardware.library import load_hardware

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "run.sh"
MINUTES = 10.0

TINY = """{
"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "num_hidden_layers": 2,
"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 512,
"max_position_embeddings": 512, "hidden_act": "silu"}"""
VARIABLES = ("DEVICE", "MODEL", "LAYERS", "DTYPES", "SEQ", "BATCH", "SPARSITY", "BUDGET")
Done = subprocess.CompletedProcess[str]


def run(folder: Path, prunesim: str, **variables: str) -> Done:
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = clean | {"PRUNESIM": f"{sys.executable} {prunesim}", "PYTHONPATH": str(ROOT), **variables}
    words = [str(SCRIPT), str(folder / "run")]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)


def pretend(folder: Path, body: str = "", **variables: str) -> tuple[Done, list[list[str]]]:
    """Run a program that only writes down what it was asked, and fails as told."""
    file, log = folder / "pretend.py", folder / "asked.jsonl"
    file.write_text(f"import json, sys\nprint(json.dumps(sys.argv[1:]), file=open({str(log)!r}, 'a'))\n{body}\n")
    done = run(folder, str(file), **variables)
    return done, [json.loads(line) for line in log.read_text().splitlines()]


def after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


@pytest.mark.parametrize("dtypes", ["bf16 fp16", "bf16", "bf16 fp16 fp8"])
def test_every_step_in_order_within_ten_minutes(tmp_path: Path, dtypes: str) -> None:
    done, asked = pretend(tmp_path, DTYPES=dtypes)
    assert done.returncode == 0, done.stderr
    names = dtypes.split()
    assert [a[0] for a in asked] == [*["calibrate"] * len(names), "upper-bound", "compare"]
    assert [after(a, "--dtype") for a in asked] == [*names, names[0], names[0]]
    assert all("cuda" in a for a in asked)
    assert asked[-1][1] == asked[-2][1] == "llama-3.1-8b"
    assert after(asked[-1], "-o") == after(asked[0], "-o")  # predicted by the profile of the first step
    total_s = sum(float(after(a, "--budget").removesuffix("s")) for a in asked)
    assert total_s == pytest.approx(480.0, abs=1.0)
    assert total_s < MINUTES * 60 - 100  # the rest is for starting, fitting and drawing


def test_variables_reach_the_commands_by_options_that_they_have(tmp_path: Path) -> None:
    settings = {"DEVICE": "cuda:1", "MODEL": "mistral-7b-v0.3", "LAYERS": "8", "SEQ": "512,1024"}
    _, asked = pretend(tmp_path, **settings, BATCH="4", SPARSITY="0.3")
    for arguments in asked[-2:]:
        pairs = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        assert arguments[1] == "mistral-7b-v0.3"
        assert (pairs["--device"], pairs["--layers"], pairs["--seq"]) == ("cuda:1", "8", "512,1024")
        assert (pairs["--batch"], pairs["--sparsity"]) == ("4", "0.3")
    own = {"calibrate": calibrate, "upper-bound": upper_bound, "compare": compare}
    for arguments in asked:
        lone = typer.Typer()
        lone.command()(own[arguments[0]].command)
        found = {o for p in typer.main.get_command(lone).params for o in p.opts}
        assert {a for a in arguments if a.startswith("-")} <= found


def test_a_step_that_fails_is_named_and_the_others_still_run(tmp_path: Path) -> None:
    body = "if sys.argv[1] == 'upper-bound': print('no such kernel', file=sys.stderr); sys.exit(1)"
    done, asked = pretend(tmp_path, body)
    assert done.returncode == 1
    assert "FAILED with status 1" in done.stdout
    assert "no such kernel" in done.stdout
    assert [a[0] for a in asked] == ["calibrate", "calibrate", "upper-bound", "compare"]
    assert "1 steps failed" in (tmp_path / "run" / "report.md").read_text()


def test_a_verdict_against_a_profile_is_no_failure(tmp_path: Path) -> None:
    body = "if sys.argv[1] == 'calibrate': print('Do not use run/profile.yaml: the machine was busy'); sys.exit(1)"
    done, asked = pretend(tmp_path, body, DTYPES="bf16")
    assert done.returncode == 0, done.stdout
    assert "verdict: do not use this profile" in done.stdout
    assert [a[0] for a in asked] == ["calibrate", "upper-bound", "compare"]


@pytest.mark.slow
def test_the_script_runs_end_to_end_in_simulated_time(tmp_path: Path) -> None:
    model, out = tmp_path / "config.json", tmp_path / "run"
    model.write_text(TINY)
    done = run(tmp_path, "-m simulator.cli", DEVICE="replay:planted", MODEL=str(model), SEQ="64", BUDGET="60")
    assert done.returncode == 0, f"{done.stdout}\n{(out / 'log.txt').read_text()[-3000:]}"
    assert "decoder: skipped" in done.stdout
    bounds = list(csv.DictReader((out / "bf16" / "upper_bound.csv").read_text().splitlines()))
    assert all(float(row["measured_bound"]) > 0 for row in bounds)
    for dtype in ("bf16", "fp16"):
        assert load_hardware(out / dtype / "profile.yaml").section("gemm", dtype).status == "calibrated"


@pytest.mark.slow
def test_the_script_runs_end_to_end_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model, out = tmp_path / "config.json", tmp_path / "run"
    model.write_text(TINY)
    settings = {"DEVICE": "cpu", "MODEL": str(model), "DTYPES": "fp32", "SEQ": "64"}
    budget = os.environ.get("PRUNESIM_SCRIPT_S", "100")
    done = run(tmp_path, "-m simulator.cli", **settings, BUDGET=budget)
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{settings}\n{log[-3000:]}"
    profile = load_hardware(out / "fp32" / "profile.yaml")
    assert profile.section("gemm", "fp32").status == "calibrated"
    kinds = {row["operator"]["kind"] for row in read_store(out / "fp32" / "records.jsonl").rows if row.get("median_s")}
    assert {"gemm", "attention_prefill", "attention_decode", "elementwise", "low_rank"} <= kinds
    texts = ((out / "fp32" / file).read_text().splitlines() for file in ("upper_bound.csv", "comparison.csv"))
    bounds, compared = (list(csv.DictReader(lines)) for lines in texts)
    assert {row["family"] for row in bounds} >= {"depth", "width", "low_rank", "dynamic_depth", "token", "kv_cache"}
    assert all(float(row["measured_bound"]) > 0 for row in bounds if row["missing"] == "0")
    assert {row["family"] for row in compared} >= {"depth", "width", "low_rank"}
    assert all(float(row["measured"]) > 0 and float(row["predicted"]) > 0 for row in compared)
    assert {row["hardware"] for row in compared} == {profile.name}
    for link in re.findall(r"\]\(([^)]+)\)", (out / "report.md").read_text()):
        assert (out / link).is_file(), link
