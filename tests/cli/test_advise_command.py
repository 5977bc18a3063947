"""``prunesim advise``: a written configuration is predicted the same; bad requests are one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import simulator
from simulator.prediction.advise import BOTH

ADVISE = "advise llama-3.2-1b --hardware h100 --engine hf --phase prefill --batch 8 --target 1.5 "


def test_written_configurations_are_predicted_the_same(
    cli: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    line = f"{ADVISE} --family depth,width,width_cross,low_rank --write out"
    records = cli.json(line)
    assert {p.name for p in Path("out").iterdir()} == {"depth", "width", "width_cross", BOTH}
    for r in records:
        if r["family"] != "low_rank":
            again = simulator.table(
                "llama-3.2-1b",
                "h100",
                pruned=f"out/{r['family']}",
                phase="prefill",
                batch=8,
                engine="hf",
            )
            assert again[0].pruned_s == pytest.approx(r["pruned_s"], rel=1e-6)
    _, err = cli(line)  # the same again
    assert "written: out/{" in err
    Path("out/depth/config.json").write_text("{}")
    assert "out/depth/config.json: exists with different content" in cli.refused(line)
    assert Path("out/depth/config.json").read_text() == "{}"
    several = cli.refused(
        f"{ADVISE.replace('--batch 8', '--batch 1,8')} --family depth --write there"
    )
    assert "--write: expected one device, engine and request, got 2" in several
    assert not Path("there").exists()


def test_a_file_keeps_its_other_keys_and_shapes_that_it_cannot_state_are_noted(
    cli: Any, tmp_path: Path
) -> None:
    content = {
        "model_type": "mistral",
        "hidden_size": 52,
        "intermediate_size": 1,
        "num_hidden_layers": 40,
    }
    content |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 13,
        "vocab_size": 50000,
    }
    content |= {"rope_theta": 1e6, "torch_dtype": "bfloat16"}
    file = tmp_path / "own.json"
    file.write_text(json.dumps(content))
    cli(
        f"advise {file} --hardware h100 --phase decode --target 1.3 --engine hf --family depth"
        f" --write {tmp_path}/out"
    )
    written = json.loads((tmp_path / "out/depth/config.json").read_text())
    assert written.pop("num_hidden_layers") < content.pop("num_hidden_layers")
    assert written == content
    line = (
        "advise opt-13b --hardware h100 --phase decode --target 1.3 --family depth,width --verbose"
    )
    _, err = cli(f"{line} --write {tmp_path}/opt")
    assert "not written: " in err


def test_the_command_wants_one_target(cli: Any) -> None:
    line = "advise llama-3.2-1b --hardware h100 --phase decode"
    for more in ("", "--target 1.5 --latency 2ms"):
        assert "--target, --latency, --tokens-per-s: expected one of them" in cli.refused(
            f"{line} {more}"
        )
    assert "--latency '2': expected" in cli.refused(f"{line} --latency 2")
    assert "No such option: --prune" in cli.refused(f"{line} --target 1.5 --prune 'depth 0.25'")
    out = cli.out(f"{line} --latency 1.4ms --family depth,unstructured --verbose")
    assert " ".join(out.split()).startswith(
        "The least pruning of llama-3.2-1b that reaches 1.40 ms on h100_sxm in vllm"
    )
    assert "missed" in out
