"""Methods of files in the real decoder: passes against a dense one in float64 with masks, executed
products against the predicted rows, refusals, and the recorded runs."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import yaml

torch = pytest.importorskip("torch", reason="torch is not installed")

from decoder_reference import (  # noqa: E402
    BATCH,
    CONFIG,
    LAYERS,
    PROMPT,
    STEPS,
    TOKENS,
    Masks,
    check,
    reference,
    run,
)
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from calibration.records.store import read_store  # noqa: E402
from calibration.runners.cases import cases_of  # noqa: E402
from calibration.runners.compare import (  # noqa: E402
    ComparedSpeedup,
    name_of,
    rows_of,
    summary,
)
from calibration.runners.decoder import described  # noqa: E402
from calibration.runners.decoder.described import check_method, with_method  # noqa: E402
from calibration.runners.decoder.model import (  # noqa: E402
    Decoder,
    decode,
    prefill,
    random_decoder,
)
from calibration.runners.decoder.steps import check_steps, prune_by_steps  # noqa: E402
from simulator.errors import InputError  # noqa: E402
from simulator.hardware.library import load_hardware  # noqa: E402
from simulator.pruning.described.description import Description  # noqa: E402

GROUPS = CONFIG.inner // 16
METHODS = Path(__file__).resolve().parents[2] / "docs" / "cpu" / "methods"
SKIP, SHARE = (Description.read(METHODS / f"{n}.yaml") for n in ("skip-mlp", "share-channels"))
TINY = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "vocab_size": 211,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "hidden_size": 96,
    "intermediate_size": 160,
}


@pytest.fixture(scope="module")
def dense() -> Decoder:
    return random_decoder(CONFIG, dtype="fp32", seed=1)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that receives the choices, by pass and layer."""
    found, best = list[Any](), described.best

    def noted(scores: Any, many: int) -> Any:
        found.append(best(scores, many))
        return found[-1]

    monkeypatch.setattr(described, "best", noted)
    return found


@pytest.mark.parametrize("s", [0.25, 0.6])
def test_skipped_tokens_miss_the_mlp(dense: Decoder, chosen: list[Any], s: float) -> None:
    logits = run(with_method(dense, SKIP, s))
    prompts, steps = chosen[:LAYERS], chosen[LAYERS:]
    masks: Masks = {}
    for number, rows in enumerate(prompts):
        assert len(rows) == {0.25: 158, 0.6: 84}[s]  # 210 rows in all
        ran = torch.zeros(BATCH, PROMPT + STEPS, dtype=torch.bool)
        ran[rows // PROMPT, rows % PROMPT] = True
        for step, active in enumerate(steps[number::LAYERS]):
            assert len(active) == {0.25: 3, 0.6: 2}[s]  # 3 sequences in all, rounded up
            ran[active, PROMPT + step] = True
        masks["mlp", number] = ran
    check(logits, reference(dense, TOKENS, masks))


@pytest.mark.parametrize("s", [0.25, 0.6])
def test_all_tokens_of_a_pass_share_channels(dense: Decoder, chosen: list[Any], s: float) -> None:
    logits = run(with_method(dense, SHARE, s))
    masks: Masks = {}
    for number in range(LAYERS):
        used = torch.zeros(BATCH, PROMPT + STEPS, GROUPS, dtype=torch.bool)
        spans = [slice(0, PROMPT), *(slice(PROMPT + i, PROMPT + i + 1) for i in range(STEPS))]
        for span, groups in zip(spans, chosen[number::LAYERS], strict=True):
            assert len(groups) == {0.25: 8, 0.6: 4}[s]  # 10 groups in all
            used[:, span, groups] = True
        masks["channels", number] = used.repeat_interleave(16, 2)
    check(logits, reference(dense, TOKENS, masks))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("name", ["skip-mlp", "share-channels"])
def test_the_products_that_run_are_the_predicted_ones(
    dense: Decoder, name: str, phase: str
) -> None:
    def executed(decoder: Decoder) -> float:
        _, state = prefill(decoder, TOKENS)
        with FlopCounterMode(display=False) as counted:
            prefill(decoder, TOKENS) if phase == "prefill" else decode(
                decoder, TOKENS[:, :1], state
            )
        return float(counted.get_total_flops())

    settings = {"phase": phase, "batch": BATCH, "seq": TOKENS.shape[1], "engine": ""}
    for s in (0.25, 0.6):
        text = f"{METHODS / name}.yaml s={s}"
        (case,), _ = cases_of(CONFIG, {**settings, "prune": [text]})
        check_steps(case.steps)
        predicted = float(case.dense.flops.sum() - case.pruned.flops.sum())
        saved = executed(dense) - executed(prune_by_steps(dense, case.steps))
        assert saved == pytest.approx(predicted, rel=1e-12)
        assert predicted


MLP = {"m": "1 - s", "tokens": "exact", "kernel": "gather"}
ROUTER = {"gemm": {"m": "tokens", "n": 1, "k": "hidden", "role": "router", "place": "before mlp"}}
SELECT = {"elementwise": {"read": "tokens", "write": 8, "role": "select", "place": "before mlp"}}


@pytest.mark.parametrize(
    ("dynamic", "adds", "reason"),
    [
        ({"attention": {"keys": "1 - s"}}, [SELECT], "got attention"),
        ({"mlp": MLP, "attention": {"keys": "1 - s"}}, [ROUTER, SELECT], "got mlp, attention"),
        ({"mlp": {**MLP, "tokens": "binomial"}}, [ROUTER, SELECT], "tokens: exact"),
        ({"mlp": {**MLP, "layers": "1:"}}, [ROUTER, SELECT], "in all layers"),
        ({"mlp": MLP}, [ROUTER], "router, select before mlp, in this order; got router"),
        ({"mlp": MLP}, [SELECT, ROUTER], "got select, router"),
        (
            {"mlp": MLP},
            [{"gemm": {**ROUTER["gemm"], "n": "tokens"}}, SELECT],
            "from hidden, inner, s; got tokens",
        ),
    ],
)
def test_what_this_decoder_does_not_execute_is_named(
    dynamic: dict[str, Any], adds: list[Any], reason: str
) -> None:
    check_method(SKIP)
    check_method(SHARE)
    about = Description.of({"method": "other", "dynamic": dynamic, "adds": adds})
    with pytest.raises(InputError, match=f"^other: .*{reason}"):
        check_method(about)


def test_groups_that_are_not_copied_whole_are_named(dense: Decoder) -> None:
    text = (METHODS / "share-channels.yaml").read_text().replace("inner / 16,", "inner / 8,")
    about = Description.of(yaml.safe_load(text))
    with pytest.raises(InputError, match=r"router n: expected 10, one per 16 channels .*, got 20"):
        with_method(dense, about, 0.5)


def test_the_command_runs_a_file_and_runs_it_again_if_it_changes(tmp_path: Path, cli: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    file = tmp_path / "mine.yaml"
    file.write_text((METHODS / "skip-mlp.yaml").read_text())
    line = (
        f"compare {tmp_path} --device cpu --seq 32 --phase prefill --hardware a100 --budget 5s"
        f" -o {tmp_path / 'run'} --prune"
    )
    (first,) = cli.json(f"{line} '{file} s=0.5'")
    assert first["family"] == "skip-mlp"
    assert first["measured"] > 0
    (again,) = cli.json(f"{line} '{file} s=0.5'")
    assert again == first
    file.write_text(file.read_text().replace("n: 1,", "n: 2,"))
    (other,) = cli.json(f"{line} '{file} s=0.5'")
    assert other["measured"] != first["measured"]


def test_recorded_runs_agree_with_predictions() -> None:
    store, hw = read_store(METHODS / "decoder.jsonl"), load_hardware(METHODS / "profile.yaml")
    rows = list[ComparedSpeedup]()
    for record in map(dict, store.rows):
        settings = {name: record[name] for name in ("phase", "batch", "seq", "dtype")}
        text = f"{METHODS / record['family']}.yaml s={record['sparsity']}"
        (case,), _ = cases_of(record["model"], {**settings, "engine": "", "prune": [text]})
        rows += rows_of([case], [{**record, "key": name_of(case, "fp32")}], hw, dtype="fp32")
    found = summary(rows)
    half_widths = [math.sqrt(row.predicted_upper / row.predicted_lower) - 1.0 for row in rows]
    assert len(rows) == len(store.rows) == 33
    assert {row.family for row in rows} == {"skip-mlp", "share-channels"}
    assert found["median"] < 0.05
    assert found["inside"] > 0.85
    assert statistics.median(half_widths) < 0.15
