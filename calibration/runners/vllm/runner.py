"""Time cases in vLLM: :class:`VllmRunner`, an executor of :mod:`calibration.runners.compare`.

Samples are those of ``vllm bench latency``: a batch of random prompts is sent at once, greedy sampling, no end of
sequence, no prefix cache.

- prefill: one new token per sequence.
- decode: the difference of 1 and :data:`STEPS` + 1 new tokens, per step; lengths are centred on ``seq``.
- generate: the whole batch; the prefill makes the first token, so ``new_tokens`` steps make one token more.
- serve: the steady state of a closed loop, without an HTTP server; one sample is the time of one request.

vLLM keeps the memory that it reserved until its process ends, so each model has a child process. If both fit, dense and
pruned samples alternate; the idle process uses no GPU time. Else the dense model is timed first, then the pruned one,
and slow changes of the machine affect the ratio. The dense process serves all cases, that of a pruned model all cases
of this pruning. Their caches hold the largest case that was checked, so check all cases before the first record.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from calibration.devices.protocol import Device, OutOfMemory, Unsupported
from calibration.measure.run import FAILED, SKIPPED, UNSUPPORTED
from calibration.measure.timing import OK, InvalidTiming, median_interval
from calibration.runners.cases import Case
from calibration.runners.pairs import ENOUGH, LEAST, PRECISION, Runner
from calibration.runners.vllm.models import Models
from calibration.runners.vllm.process import RELEASES, EngineFailed, EngineProcess, check_installed, environment
from simulator.capacity import activation_bytes, cache_bytes, weights_bytes
from simulator.errors import InputError
from simulator.models.changes import write_config
from simulator.models.config import ModelConfig
from simulator.models.lower import lower
from simulator.workload import WorkloadBatch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Number formats, and their names in vLLM."""

STEPS = 64
"""Decode steps of a sample."""
WINDOWS = 2
"""Samples of one steady state; each costs a ramp-up of one request."""
WARM = 2
"""Unmeasured samples of each model before those of a case."""
LONGEST_S = 60.0
"""Maximum time for the pairs of one case."""
MOST = 50
"""Maximum number of pairs."""
PATIENCE_S = 900.0
"""Longest wait for an answer; the first start of a model compiles it."""

_BATCHED, _BATCHED_SERVING, _MOST_BATCHED = 2048, 8192, 32768  # tokens of one pass: vLLM's defaults, and a limit
_BLOCK = 128  # tokens; at least a block of every attention backend
_OWN_BYTES = 3e9  # context, libraries, graphs and workspaces of one process on a GPU
_SHARE = 0.92  # of the memory, as vLLM's default


@dataclass(frozen=True)
class LargestRequest:
    """Largest request that engines must accept."""

    sequences: int = 1
    tokens: int = 0  # of one sequence, new ones included
    batched: int = _BATCHED  # tokens of one pass

    def with_case(self, case: Case) -> LargestRequest:
        """Return the sizes that also hold a case: a prefill is one pass, as predicted, up to a limit."""
        prompt = case.batch * case.seq if case.phase in ("prefill", "generate") else 0
        least = _BATCHED_SERVING if case.phase == "serve" else case.batch
        return LargestRequest(
            max(self.sequences, case.batch),
            max(self.tokens, sum(lengths(case))),
            max(self.batched, least, min(prompt, _MOST_BATCHED)),
        )


@dataclass(frozen=True)
class Samples:
    """Samples of a model, s per pass (per request in serve)."""

    seconds: Sequence[float]
    first_token_s: Sequence[float] = ()  # waits for first tokens in serve

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """Return the samples of parts in their order, rounded to ns."""
        return cls(
            [round(s, 9) for part in parts for s in part.seconds],
            [round(s, 9) for part in parts for s in part.first_token_s],
        )


Started = tuple[ModelConfig, LargestRequest]


def lengths(case: Case) -> tuple[int, int]:
    """Return the prompt and new tokens of each request of a case."""
    if case.phase == "prefill":
        return case.seq, 1
    if case.phase == "decode":
        return max(case.seq - STEPS // 2, 1), STEPS + 1
    return case.seq, case.dense.meta.new_tokens + 1


class VllmRunner(Runner):
    """Time cases in vLLM against the dense model; a case that cannot run gives a record with the reason.

    Parameters
    ----------
    device : Device
        CPU or CUDA device.
    config : ModelConfig
        Dense model.
    content : mapping
        Content of its ``config.json`` (:func:`simulator.models.changes.content_of`).
    dtype : str
        One of :data:`DTYPES`.
    seed : int
        Determines the random weights.
    python : str
        Interpreter that has vLLM; it may belong to another environment.
    patience_s : float
        Longest wait for an answer of vLLM, in seconds.

    Raises
    ------
    InputError
        If vLLM is not installed, or has no such model, number format or device.
    """

    def __init__(
        self,
        device: Device,
        config: ModelConfig,
        content: Mapping[str, Any],
        dtype: str,
        *,
        seed: int,
        python: str = sys.executable,
        patience_s: float = PATIENCE_S,
    ) -> None:
        if dtype not in DTYPES:
            raise InputError(f"--dtype: expected one of {', '.join(DTYPES)} in vLLM, got {dtype}")
        if not device.name.startswith(("cpu", "cuda")):
            raise InputError(f"device: expected cpu or cuda, which run vLLM, got {device.name!r}")
        self.models = Models(config, content)
        check_installed(python)
        super().__init__(device)
        self.dtype, self.seed, self.python, self.patience_s = dtype, seed, python, patience_s
        self.sizes = LargestRequest()
        self.memory_bytes = float(device.describe().memory_bytes)
        self.engines: dict[Started, EngineProcess] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # of the models, made with the first

    def prepare(self, case: Case) -> None:
        """Nothing to do: the engines start with the first record."""

    def close(self) -> None:
        """End the child processes and remove their files."""
        self._keep(())
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def check(self, case: Case) -> None:
        """Raise InputError if vLLM cannot run the pruned model of a case, or would build other shapes."""
        formats = {case.dense.meta.dtype, self.dtype}
        if len(formats) > 1 or (case.dense.weight_dtype != case.dense.dtype).any():
            raise InputError(f"formats: expected weights, cache and arithmetic in {self.dtype} in vLLM")
        sizes, positions = self.sizes.with_case(case), self.models.dense.max_positions
        if sizes.tokens > positions:
            raise InputError(f"seq: expected at most {positions} positions, got {sum(lengths(case))} with new tokens")
        self.models.pruned(case)
        self.sizes = sizes

    def record(self, case: Case, seconds: float) -> dict[str, Any]:
        """Return status, reason and raw times of a case; ``seconds`` exclude starts of vLLM."""
        try:
            self.check(case)
            return {"status": OK, **self._timed(case, seconds)}
        except (Unsupported, InputError) as error:
            return {"status": UNSUPPORTED, "reason": str(error)}
        except InvalidTiming as error:
            return {"status": FAILED, "reason": str(error)}
        except (OutOfMemory, EngineFailed) as error:
            self._keep(())
            return {"status": SKIPPED if isinstance(error, OutOfMemory) else FAILED, "reason": str(error)}

    def _timed(self, case: Case, seconds: float) -> dict[str, Any]:
        pair = (self.models.dense, self.models.pruned(case))
        limit = min(0.8 * seconds, LONGEST_S)
        together = sum(map(self._bytes, set(pair))) <= _SHARE * self.memory_bytes
        if together:
            self._keep(pair)
            found = self._alternating(case, [self._engine(model) for model in pair], limit)
        else:
            found = self._in_turn(case, pair, limit)
        dense, pruned = map(Samples.join, found)
        count = min(len(dense.seconds), len(pruned.seconds))
        waits = {"dense_first_token_s": dense.first_token_s, "pruned_first_token_s": pruned.first_token_s}
        versions = next(iter(self.engines.values())).versions
        return {
            "reason": release_note(versions["vllm"]),
            "runtime": "vllm",
            "loops": STEPS if case.phase == "decode" else 1,
            "dense_s": dense.seconds[:count],
            "pruned_s": pruned.seconds[:count],
            **(waits if case.phase == "serve" else {}),
            "versions": versions,
            "settings": {**self._settings(pair[0]), "in_turns": "samples" if together else "models"},
        }

    def _alternating(
        self, case: Case, engines: Sequence[EngineProcess], limit: float
    ) -> tuple[list[Samples], list[Samples]]:
        """Return samples of both models in alternation, until their ratio is precise or the time is over."""
        for _ in range(1 if case.phase == "serve" else WARM):
            for engine in engines:
                self._sample(case, engine)
        found: tuple[list[Samples], list[Samples]] = ([], [])
        start = self.device.clock()
        for pair in range(1, MOST + 1):
            for i in (0, 1) if pair % 2 else (1, 0):
                found[i].append(self._sample(case, engines[i]))
            spent = self.device.clock() - start
            if spent >= limit and pair >= LEAST:
                break
            if pair >= ENOUGH:
                ratios = [a / b for x, y in zip(*found) for a, b in zip(x.seconds, y.seconds)]
                middle, low, high = median_interval(ratios)
                if high - low <= 2.0 * PRECISION * middle:
                    break
        return found

    def _in_turn(self, case: Case, pair: Sequence[ModelConfig], limit: float) -> tuple[list[Samples], list[Samples]]:
        """Return samples of one model, then of the other: only one fits in the memory."""
        found: tuple[list[Samples], list[Samples]] = ([], [])
        for model, samples in zip(pair, found):
            self._keep((model,))
            engine = self._engine(model)
            for _ in range(1 if case.phase == "serve" else WARM):
                self._sample(case, engine)
            start = self.device.clock()
            while len(samples) < LEAST or (len(samples) < ENOUGH and self.device.clock() - start < limit / 2.0):
                samples.append(self._sample(case, engine))
        return found

    def _sample(self, case: Case, engine: EngineProcess) -> Samples:
        """Return samples of a case in a running model: one, in serve several."""
        tokens, output = lengths(case)
        vocab, batch = self.models.dense.vocab, case.batch
        if case.phase == "serve":
            found = engine.ask("serve", concurrency=batch, tokens=tokens, output=output, vocab=vocab, windows=WINDOWS)
            return Samples(found["seconds"], found["first_token_s"])

        def latency(output: int) -> float:
            found = engine.ask("latency", batch=batch, tokens=tokens, output=output, vocab=vocab)
            return float(found["seconds"])

        seconds = (latency(output) - latency(1)) / STEPS if case.phase == "decode" else latency(output)
        if not seconds > 0.0:
            raise InvalidTiming(f"a decode step of {seconds:g} s: noise exceeds the time of {STEPS} steps")
        return Samples([seconds])

    def _keep(self, models: Sequence[ModelConfig]) -> None:
        """End all other processes, and too small ones, before further ones need their memory."""
        wanted = [(model, self.sizes) for model in models]
        for started in [one for one in self.engines if one not in wanted]:
            self.engines.pop(started).close()

    def _engine(self, model: ModelConfig) -> EngineProcess:
        started = (model, self.sizes)
        if started not in self.engines:
            self._folder = self._folder or tempfile.TemporaryDirectory(prefix="prunesim-vllm-")
            folder = Path(self._folder.name)
            file = write_config(folder / f"model{len(list(folder.iterdir()))}", self.models.config_of(model))
            self.engines[started] = EngineProcess(
                {**self._settings(model), "model": str(file.parent)},
                file.with_name("output.txt"),
                python=self.python,
                env=environment(self.device.name),
                patience_s=self.patience_s,
            )
        return self.engines[started]

    def _settings(self, model: ModelConfig) -> dict[str, Any]:
        """Return keyword arguments of ``vllm.LLM``, except the folder of the model."""
        cache = self._cache_bytes(model)
        share = self._bytes(model) / self.memory_bytes if self.memory_bytes else _SHARE
        return {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": DTYPES[self.dtype],
            "seed": self.seed,
            "max_model_len": self.sizes.tokens,
            "max_num_seqs": self.sizes.sequences,
            "max_num_batched_tokens": self.sizes.batched,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": cache,
            "gpu_memory_utilization": round(min(max(share, 0.05), _SHARE), 3),
        }

    def _cache_bytes(self, model: ModelConfig) -> int:
        """Return the bytes of a cache that holds all sequences in whole blocks; windows save nothing."""
        full = replace(model, windows=(0,) * model.layers)
        tokens = (self.sizes.tokens // _BLOCK + 2) * _BLOCK
        held = lower(full, phase="decode", batch=self.sizes.sequences, seq=tokens, dtype=self.dtype)
        return int(1.1 * cache_bytes(WorkloadBatch.of([held]))[0])

    def _bytes(self, model: ModelConfig) -> float:
        """Return the memory of a process: weights, cache, activations and its own."""
        w = WorkloadBatch.of([lower(model, phase="prefill", seq=self.sizes.batched, dtype=self.dtype)])
        return float(weights_bytes(w)[0] + activation_bytes(w)[0]) + self._cache_bytes(model) + _OWN_BYTES


def release_note(version: str) -> str:
    """Return a note for a release of vLLM whose interface was not compared; "" for others."""

    def numbers(text: str) -> tuple[int, ...]:
        with suppress(ValueError):
            return tuple(int(part) for part in text.split("+")[0].split(".")[:2])
        return ()

    first, last = map(numbers, RELEASES)
    known = first <= numbers(version) <= last
    return "" if known else f"vLLM {version}: not one of the releases that were compared, {' to '.join(RELEASES)}"
