"""Run models of the library Transformers, dense and pruned in alternation, eagerly or compiled.

A prefill is a forward pass over the prompt that fills the keys and values and computes the last logits. Eager decode is
the time per token inside the library's ``generate`` after ``seq`` cached positions; generate is a whole request. A
compiled model is the forward pass under ``torch.compile`` with a static cache, with CUDA graphs on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from calibration.devices.protocol import Device
from calibration.runners.cases import Case
from calibration.runners.hf_model import HfModel, build, check
from calibration.runners.pairs import PairRunner, PairTimes, Sampler, alternate, looped
from simulator.models.config import ModelConfig
from simulator.workload import Workload

TOKENS = 4
"""Decode steps of a sample of eager decode."""
MOST_COMPILED = 1024
"""Compiled passes of one process."""


class HfRunner(PairRunner):
    """Time models of Transformers: eager (engine hf), or compiled (engine compile)."""

    def __init__(
        self, device: Device, config: ModelConfig, content: Mapping[str, Any], dtype: str, *, compiled: bool, seed: int
    ) -> None:
        super().__init__(device)
        self.config, self.content, self.dtype = config, content, dtype
        self.compiled, self.seed = compiled, seed
        self.kept: dict[str, HfModel] = {}  # the last pruned model

    def check(self, case: Case) -> None:
        """Raise InputError if Transformers builds no model of the shapes of a case."""
        check(self.config, self.content, case.pruned)

    def prepare(self, case: Case) -> None:
        """Build the dense model."""
        self.kept["dense"] = self._build(case.dense)

    def _build(self, w: Workload) -> HfModel:
        return build(self.config, self.content, w, dtype=self.dtype, device=self.device.name, seed=self.seed)

    def timed(self, case: Case, end: float) -> tuple[PairTimes, dict[str, Any]]:
        """Time a case; see :class:`~calibration.runners.pairs.PairRunner`."""
        if case.prune not in self.kept:
            self.kept = {"dense": self.kept["dense"]}  # memory may hold two large models, not three
            self.kept[case.prune] = self._build(case.pruned)
        pruned = self.kept[case.prune]
        sampler_of = compiled_sampler if self.compiled else eager_sampler
        with torch.inference_mode():
            dense_sampler, pruned_sampler = (sampler_of(one, case) for one in (self.kept["dense"], pruned))
            times = alternate(dense_sampler, pruned_sampler, time_limit_s=self.limit_s(end))
        return times, {"runtime": "compiled" if self.compiled else "eager", "patched": pruned.patched}


def _prompt(built: HfModel, case: Case) -> Any:
    """Return random tokens (batch, seq)."""
    vocabulary = built.model.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (case.batch, case.seq), generator=torch.Generator().manual_seed(0))
    return tokens.to(built.model.device)


def _wait(built: HfModel) -> Callable[[], Any]:
    return torch.cuda.synchronize if built.model.device.type == "cuda" else lambda: None


class _Stamps:
    """A logits processor that notes the time after every token of ``generate``."""

    def __init__(self, synchronize: Callable[[], Any], tokens: int) -> None:
        self.synchronize, self.tokens, self.at_s = synchronize, tokens, list[float]()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if len(self.at_s) in (0, self.tokens):  # the host may run ahead between the first and the last
            self.synchronize()
        self.at_s.append(time.perf_counter())
        return scores


def eager_sampler(built: HfModel, case: Case) -> Sampler:
    """Return the sampler of a phase of an eager model."""
    from transformers import DynamicCache, LogitsProcessorList

    model, tokens, wait = built.model, _prompt(built, case), _wait(built)
    if case.phase == "prefill":
        return looped(lambda: model(tokens, use_cache=True, logits_to_keep=1), wait)
    if case.phase == "generate":
        many = case.dense.meta.new_tokens + 1  # the prefill makes the first
        return looped(lambda: model.generate(tokens, max_new_tokens=many, do_sample=False), wait)
    cache = DynamicCache(config=model.config)
    model(tokens, use_cache=True, logits_to_keep=1, **{built.cache_name: cache})
    longer = torch.cat([tokens, tokens[:, :1]], dim=1)

    def one() -> float:
        stamps = _Stamps(wait, TOKENS)
        given = {built.cache_name: cache, "logits_processor": LogitsProcessorList([stamps])}
        model.generate(longer, max_new_tokens=TOKENS + 1, do_sample=False, **given)
        cache.crop(case.seq - cache.get_seq_length())
        return (stamps.at_s[-1] - stamps.at_s[0]) / TOKENS

    return lambda loops: sum(one() for _ in range(loops)) / loops


def compiled_sampler(built: HfModel, case: Case) -> Sampler:
    """Return the sampler of a phase of a compiled model; its first pass compiles."""
    from transformers import StaticCache

    # every model and phase has an entry of its own; beyond the limit torch would stop to compile
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
    torch._dynamo.config.accumulated_recompile_limit = max(
        torch._dynamo.config.accumulated_recompile_limit, MOST_COMPILED
    )
    model, tokens, wait = built.model, _prompt(built, case), _wait(built)
    mode = "reduce-overhead" if model.device.type == "cuda" else None
    compiled = torch.compile(model.forward, dynamic=False, fullgraph=True, mode=mode)
    cache = StaticCache(config=model.config, max_cache_len=case.seq + max(case.dense.meta.new_tokens, 1))
    given = {"use_cache": True, "logits_to_keep": 1, built.cache_name: cache}
    model(tokens, **given)  # allocates the cache, which a compiled pass must find
    last = tokens[:, -1:].clone()
    if case.phase == "decode":

        def step() -> None:
            compiled(last, **given)
            cache.crop(-1)

        return looped(step, wait)
    cache.crop(-case.seq)

    def request() -> None:
        logits = compiled(tokens, **given).logits
        for _ in range(case.dense.meta.new_tokens):
            logits = compiled(logits[:, -1].argmax(-1, keepdim=True), **given).logits
        cache.reset()

    return looped(request, wait)
