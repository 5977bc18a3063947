"""Time speculative decoding in Transformers or vLLM on a CPU, with planted acceptance, next to
plain decoding.

    python -m calibration.evidence.drafts smollm2-135m vllm "depth 0.5" 4 1,4,16 ~/vllm/bin/python

prints rows of ``docs/cpu/drafts.csv``: a model, its draft, four drafted tokens, by batch. Weights
are random, and a table states the next token: the rows of the head are those of the embedding,
permuted, and layers add little to the residual stream. The draft has another next token for a share
of tokens, by class of the token, and the last token of a prompt selects the class. So the engine
drafts, checks and rejects as with trained weights.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

import torch

from calibration.runners.cases import ModelRun
from calibration.runners.hf import build
from calibration.runners.vllm.runner import PATIENCE_S, EngineProcess, environment
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.write import content_of
from simulator.pruning import prune

ACCEPTANCES = (0.6, 0.8, 1.0)  # by class of tokens, the remainder of their division by three
PROMPT, NEW, PAIRS = 128, 40, 4  # tokens, tokens, pairs of runs after the first
CPU = {"VLLM_CPU_OMP_THREADS_BIND": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "MALLOC_MMAP_MAX_": "0"}
CPU["MALLOC_TRIM_THRESHOLD_"] = str(2**31 - 1)  # malloc keeps blocks, as in calibrations

Sample = tuple[list[float], float]  # times of steps or rounds, s; tokens of each per sequence


def next_tokens(vocab: int, drafts: bool) -> torch.Tensor:
    """Return the token after each token, one cycle per class; a draft has wrong ones by the class's
    acceptance."""
    choose = torch.Generator().manual_seed(0)
    found = torch.empty(vocab, dtype=torch.long)
    for which, acceptance in enumerate(ACCEPTANCES):
        own = torch.arange(which, vocab, len(ACCEPTANCES))
        own = own[torch.randperm(len(own), generator=choose)]
        found[own] = own.roll(-1)
        wrong = own[torch.rand(len(own), generator=choose) >= acceptance]
        if drafts and len(wrong) > 1:
            found[wrong] = found[wrong].roll(1)
    return found


def planted(run: ModelRun, text: str) -> Any:
    """Return the target, or the draft that a pruning makes of it."""
    dense = lower(run.config, phase="decode", engine="hf", dtype=run.dtype)
    model = build(run, prune(dense, text) if text else dense, "cpu").model
    rows = model.get_input_embeddings().weight.data.normal_(
        generator=torch.Generator().manual_seed(1)
    )
    head = torch.empty_like(rows)
    head[next_tokens(len(rows), bool(text))] = rows
    model.get_output_embeddings().weight = torch.nn.Parameter(head, requires_grad=False)
    model.config.tie_word_embeddings = False
    return model


def hf_sample(target: Any, seed: int, which: int, draft: Any = None, drafted: int = 0) -> Sample:
    prompt = torch.randint(
        len(target.lm_head.weight), (1, PROMPT), generator=torch.Generator().manual_seed(seed)
    )
    prompt[0, -1] = prompt[0, -1] // 3 * 3 - 3 + which
    marks = list[tuple[float, int]]()
    given = dict[str, Any]()
    # the processor time of the thread, which other processes do not lengthen
    streamer = SimpleNamespace(
        put=lambda x: marks.append((time.thread_time(), x.numel())), end=lambda: None
    )
    if draft is not None:
        given = {"assistant_model": draft}
        draft.generation_config.update(
            num_assistant_tokens=drafted,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0,
        )
    with torch.inference_mode():
        target.generate(prompt, max_new_tokens=NEW, do_sample=False, streamer=streamer, **given)
    at, made = zip(*marks[1:], strict=True)  # without the prompt
    # the last rounds draft less
    whole = sum(tokens < NEW - drafted for tokens in itertools.accumulate(made))
    return [late - early for early, late in itertools.pairwise(at[:whole])], mean(made[1:whole])


def main(name: str, engine: str, text: str, g: str, many: str, python: str = "") -> None:
    drafted = int(g)
    batches = [int(batch) for batch in many.split(",")]
    run = ModelRun(load_model(name), "bf16", engine, content_of(name), python)
    target, draft = (planted(run, one) for one in ("", text))
    with tempfile.TemporaryDirectory() as folder:
        engines = (
            in_vllm(Path(folder), target, draft, drafted, max(batches), python)
            if engine == "vllm"
            else []
        )
        for process in engines:
            process.wait_ready()
        for number, batch in enumerate(batches):
            which = (drafted + number) % 3
            pairs = list[list[Sample]]()
            for seed in range(PAIRS + 1):
                ask = {"batch": batch, "tokens": PROMPT, "output": NEW, "vocab": run.config.vocab}
                asked = [one.ask("rounds", seed=seed, which=which, **ask) for one in engines]
                drafts = (hf_sample(target, seed, which, *more) for more in ((), (draft, drafted)))
                pairs.append([(one["seconds"], one["tokens"]) for one in asked] or list(drafts))
            times = (median(median(pair[k][0]) for pair in pairs[1:]) for k in range(2))
            found = [mean(pair[1][1] for pair in pairs[1:]), *times]
            print(
                engine,
                name,
                text,
                drafted,
                batch,
                PROMPT + NEW // 2,
                *(f"{x:.4g}" for x in found),
                sep=",",
            )
        for one in engines:
            one.close()


def in_vllm(
    folder: Path, target: Any, draft: Any, drafted: int, batch: int, python: str
) -> list[EngineProcess]:
    """Return processes that decode plainly and with the draft."""
    usual = {"model": str(folder / "target"), "skip_tokenizer_init": True, "dtype": "bfloat16"}
    usual |= {"max_model_len": 2 * PROMPT, "max_num_seqs": batch, "max_num_batched_tokens": 2048}
    usual |= {"enable_prefix_caching": False, "kv_cache_memory_bytes": 2**30}
    how = {
        "method": "draft_model",
        "model": str(folder / "draft"),
        "num_speculative_tokens": drafted,
    }
    env = {
        name: value for name, value in environment().items() if not name.startswith("OMP_")
    } | CPU
    target.save_pretrained(folder / "target")
    draft.save_pretrained(folder / "draft")
    start = partial(
        EngineProcess, log=folder / "log.txt", python=python, env=env, patience_s=PATIENCE_S
    )
    return [start(usual), start({**usual, "speculative_config": how})]


if __name__ == "__main__":
    main(*sys.argv[1:])
