"""``prunesim draft``: the answer, and all rows as JSON."""

from __future__ import annotations

from typing import Any

import numpy as np


def test_the_command_prints_the_answer_and_all_rows_as_json(cli: Any) -> None:
    line = "draft llama-3.1-70b --draft llama-3.1-8b --hardware h100 --devices 4 --batch 1:64"
    shown = cli.out(line)
    assert shown.startswith("llama-3.1-8b as a draft makes llama-3.1-70b ")
    assert "it pays from an acceptance of" in shown
    rows = cli.json(f"{line} --acceptance 0.6:0.9 --drafted 1:4")
    assert len(rows) == 7 * 4 * 3  # 1, 2 and 4 drafted tokens
    best = [r for r in rows if r["best"]]
    assert len(best) == 7 * 4
    at = {(r["batch"], r["acceptance"]): r["speedup"] for r in best}
    assert at[1, 0.9] > at[64, 0.9] > 1.0
    assert np.diff([at[1, a] for a in (0.6, 0.7, 0.8, 0.9)]).min() > 0


def test_the_answer_says_what_it_compares_and_what_it_needs(cli: Any) -> None:
    pair = "draft llama-3.1-70b --draft llama-3.1-8b --hardware h100"
    shown = cli.out(f"{pair} --devices 4 --target-prune 'depth 0.25'")
    assert "makes llama-3.1-70b pruned by depth 0.25 " in shown
    assert "compared with the dense target" in shown
    assert "GiB per device, more than it has" in cli.out(pair)
    assert "no certain gain" in cli.out(
        "draft llama-3.1-70b --prune 'depth 0.5' --hardware h100 --acceptance 0.5"
    )
