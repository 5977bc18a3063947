"""``prunesim compare --bench``: result files of ``vllm bench`` next to predictions, without a device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")

from simulator.cli import run


def _latency(folder: Path, name: str, seconds: float) -> str:
    file = folder / name
    samples = [seconds * x for x in (1.0, 1.02, 0.98, 1.01)]
    file.write_text(json.dumps({"avg_latency": seconds, "latencies": samples, "percentiles": {"50": seconds}}))
    return str(file)


def _command(folder: Path, files: list[str], *more: str) -> list[str]:
    words = "compare llama-3.1-8b --engine vllm --hardware h100 --batch 8 --seq 1024 --new-tokens 128 -o"
    return [*words.split(), str(folder / "r"), *(word for file in files for word in ("--bench", file)), *more]


def test_two_files_give_a_measured_speedup_next_to_the_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [_latency(tmp_path, "dense.json", 1.2), _latency(tmp_path, "pruned.json", 0.96)]
    assert run(_command(tmp_path, files, "--prune", "depth 0.25", "--json")) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["phase"], row["batch"], row["seq"], row["prune"]) == ("generate", 8, 1024, "depth 0.25")
    assert row["measured"] == pytest.approx(1.25)
    assert row["dense_s"] / row["pruned_s"] == pytest.approx(row["measured"])
    assert 1.1 < row["predicted"] < 1.4
    assert (tmp_path / "r" / "comparison.vllm.csv").is_file()
    assert not list((tmp_path / "r").glob("*.jsonl"))
    prefill = _command(tmp_path, files, "--prune", "depth 0.25", "--phase", "prefill", "--json")
    assert run(prefill) == 0
    assert json.loads(capsys.readouterr().out)[0]["phase"] == "prefill"


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--prune", "depth 0.25", "--prune", "width 0.25"], "--bench: expected 3 files, of the dense model"),
        (["--prune", "depth 0.25", "--batch", "1,8"], "--bench: expected one --batch and one --seq"),
        (["--prune", "depth 0.25", "--engine", "hf"], "--bench: expected --engine vllm"),
        (["--prune", "semi_structured 0.25"], "expected 0.5"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], reason: str) -> None:
    files = [_latency(tmp_path, name, 1.0) for name in ("dense.json", "pruned.json")]
    assert run(_command(tmp_path, files, *more)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "r").exists()
