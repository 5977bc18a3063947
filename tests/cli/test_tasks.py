"""Tasks as people typed them: input that was refused, hints that led nowhere, answers that misled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "speedup llama-2-7b --prune 'depth 0.25'",
        "explain llama-2-7b --prune 'depth 0.25'",
        "serve llama-2-7b --prune 'depth 0.25'",
        "advise llama-2-7b --family depth --target 1.2x",
        "costs llama-2-7b",
        "search llama-2-7b --target 1.2x",
        "report llama-2-7b --prune 'depth 0.25' -o report.html",
    ],
)
def test_one_bad_engine_of_several_is_excluded_with_a_note(line: str, cli: Any) -> None:
    out, err = cli(f"{line} --hardware h100 --engine vllm,hf --weight-dtype fp8")
    assert out
    assert "note: hf is excluded: hf has no kernels for fp8 weights alone" in err
    assert "hf has no kernels" in cli.refused(f"{line} --hardware h100 --engine hf --weight-dtype fp8")


def test_an_engine_without_kernels_of_a_pruning_is_excluded_and_an_unknown_one_is_not(cli: Any) -> None:
    line = "speedup llama-2-7b --hardware h100 --prune 2:4 --engine"
    out, err = cli(f"{line} vllm,trtllm")
    assert "on h100_sxm in trtllm" in out
    assert "vllm is excluded: vllm has no 2:4 kernels" in err
    assert "vllm has no 2:4 kernels" in cli.refused(f"{line} vllm,sglang")
    assert "engine 'vlm' is unknown" in cli.refused(f"{line} vlm,trtllm")
