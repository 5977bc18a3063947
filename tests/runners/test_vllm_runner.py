"""vLLM as executor: a fake of its interface in real child processes, with planted times and faults.

The fake accepts the parameters of two releases that ``vllm_signatures.json`` records from vLLM's
sources.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.vllm import FILE, pass_s

from calibration.devices.protocol import Description
from calibration.devices.replay import ReplayDevice
from calibration.measure.run import Interrupted
from calibration.records.store import read_store
from calibration.runners.cases import Case, ModelRun
from calibration.runners.compare import compare
from calibration.runners.engine import observe, settings_of
from calibration.runners.vllm import runner as running
from calibration.runners.vllm.runner import CLASSES, RELEASES, Models, VllmRunner, environment
from simulator.errors import InputError
from simulator.hardware.library import load_hardware
from simulator.models.library import load_model
from simulator.models.lower import lower
from simulator.models.model import Model
from simulator.models.write import content_of
from simulator.prediction.prunings import prunings_of
from simulator.prediction.table import predict

TESTS = Path(__file__).parents[1]
MODEL = load_model("smollm2-135m")
PHASES = ("prefill", "decode", "generate", "serve")


def _cases(
    *texts: str, phases: tuple[str, ...] = ("decode",), model: Model = MODEL, **options: Any
) -> list[Case]:
    given = {"engine": "vllm", "new_tokens": 15, "batch": 4, "seq": 256, **options}
    dense = [lower(model, phase=phase, **given) for phase in phases]
    return [Case.of(w, pruning) for w in dense for pruning in prunings_of((), prune=texts)]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install the fake as package ``vllm`` of child processes, with a fault."""
    package = tmp_path / "site" / "vllm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "from fakes.vllm import *\nfrom fakes.vllm import __version__\n"
    )
    (package / "sampling_params.py").write_text("from fakes.vllm import RequestOutputKind\n")
    (package.parent / "torch.py").write_text("__version__ = '2.14.0'\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(package.parent), str(TESTS))))

    def planted(fault: str = "", **plan: str) -> None:
        monkeypatch.setenv(
            "FAKE_VLLM", json.dumps({"release": RELEASES[1], "fault": fault, **plan})
        )

    planted()
    return planted


def _device(name: str = "cpu", memory: float = 1e11) -> ReplayDevice:
    return ReplayDevice(description=Description(name, "some CPU", memory_bytes=memory))


def _runner(
    cases: list[Case],
    *,
    memory: float = 1e11,
    python: str = sys.executable,
    patience_s: float = 900.0,
) -> VllmRunner:
    runner = VllmRunner(
        _device(memory=memory),
        ModelRun(MODEL, "bf16", "vllm", content_of(MODEL), python),
        patience_s,
    )
    for case in cases:
        runner.check(case)
    return runner


def _config(case: Case, model: Model = MODEL) -> dict[str, Any]:
    """Return the config.json that vLLM should see for the pruned model of a case."""
    models = Models(model, content_of(model))
    return models.config_of(models.pruned(case))


def test_scattered_zeros_run_as_the_dense_model() -> None:
    dense = Models(MODEL, content_of(MODEL))
    (case,) = _cases("unstructured 0.5")
    assert _config(case) == dense.config_of(MODEL)


def _planted_s(config: dict[str, Any], case: Case) -> float:
    batch, seq, steps = case.batch, case.seq, case.dense.meta.new_tokens
    return {
        "prefill": pass_s(config, batch * seq),
        "decode": pass_s(config, batch),
        "generate": pass_s(config, batch * seq) + steps * pass_s(config, batch),
        "serve": batch * pass_s(config, seq) + (steps + 1) * pass_s(config, batch),
    }[case.phase]


@pytest.mark.parametrize(
    ("release", "text"), [(RELEASES[0], "depth 0.25"), (RELEASES[1], "width mlp=0.5")]
)
def test_planted_times_come_back_in_every_phase(
    plant: Callable[..., None], release: str, text: str
) -> None:
    plant(release=release)
    cases = _cases(text, phases=PHASES)
    dense = Models(MODEL, content_of(MODEL)).config_of(MODEL)
    with closing(_runner(cases)) as runner:
        for case in cases:
            record = runner.record(case, 10.0)
            assert (record["status"], record["reason"], record["runtime"]) == ("ok", "", "vllm")
            assert record["versions"] == {"vllm": release, "torch": "2.14.0"}
            assert len(record["dense_s"]) == len(record["pruned_s"]) >= running.LEAST
            assert record["dense_s"] == pytest.approx(
                [_planted_s(dense, case)] * len(record["dense_s"]), rel=1e-5
            )
            expected = [_planted_s(_config(case), case)] * len(record["pruned_s"])
            assert record["pruned_s"] == pytest.approx(expected, rel=1e-5)
            assert record["settings"]["in_turns"] == "samples"
            json.dumps(record, allow_nan=False)


def test_waits_for_first_tokens_are_part_of_a_steady_state(plant: Callable[..., None]) -> None:
    (case,) = _cases("depth 0.5", phases=("serve",))
    with closing(_runner([case])) as runner:
        record = runner.record(case, 10.0)
    # one prefill, and the decode step in which it is scheduled
    dense = Models(MODEL, content_of(MODEL)).config_of(MODEL)
    wait = pass_s(dense, case.seq) + pass_s(dense, case.batch)
    assert record["dense_first_token_s"] == pytest.approx(
        [wait] * len(record["dense_first_token_s"]), rel=1e-5
    )
    assert len(record["dense_first_token_s"]) >= case.batch


def test_a_model_that_leaves_no_room_is_timed_before_the_other(plant: Callable[..., None]) -> None:
    cases = _cases("depth 0.5", phases=("prefill",))
    alive = []
    with closing(_runner(cases, memory=4e9)) as runner:
        ask = runner._sample
        runner._sample = lambda *a: (alive.append(len(runner.engines)), ask(*a))[1]  # type: ignore[method-assign]
        record = runner.record(cases[0], 10.0)
    assert (record["status"], record["settings"]["in_turns"]) == ("ok", "models")
    assert set(alive) == {1}
    assert len(record["dense_s"]) == len(record["pruned_s"]) == running.ENOUGH


def test_processes_are_kept_for_all_cases_of_a_pruning_and_end(plant: Callable[..., None]) -> None:
    cases = _cases("depth 0.25", "depth 0.5", phases=("prefill", "serve"))
    seen = set()
    with closing(_runner(cases)) as runner:
        assert not runner.apart
        for case in sorted(cases, key=lambda c: c.prune):
            runner.record(case, 0.0)
            seen |= {engine.process.pid for engine in runner.engines.values()}
            assert len(runner.engines) == 2
    assert len(seen) == 3  # the dense model, two prunings
    for pid in seen:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_engine_is_stopped_while_it_has_no_request(plant: Callable[..., None]) -> None:
    (case,) = _cases("depth 0.25")
    with closing(_runner([case])) as runner:
        assert runner.record(case, 0.0)["status"] == "ok"
        for engine in runner.engines.values():
            os.waitid(os.P_PID, engine.process.pid, os.WSTOPPED)  # returns when it is stopped


def test_an_engine_ends_with_a_killed_comparison(plant: Callable[..., None]) -> None:
    """It is stopped then, and would keep its memory."""
    psutil = pytest.importorskip("psutil")
    (case,) = _cases("depth 0.25")
    reading, writing = os.pipe()
    if not (child := os.fork()):
        runner = _runner([case])
        runner.record(case, 0.0)
        os.write(
            writing, json.dumps([engine.process.pid for engine in runner.engines.values()]).encode()
        )
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    _, alive = psutil.wait_procs(
        [psutil.Process(pid) for pid in json.loads(os.read(reading, 1000))], timeout=10
    )
    assert all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_models_start_on_all_cpus_and_run_on_the_cpu_of_this_process(
    plant: Callable[..., None],
) -> None:
    every = os.sched_getaffinity(0)
    if len(every) < 2:
        pytest.skip("needs two CPUs")
    (case,) = _cases("depth 0.25")
    with closing(_runner([case])) as runner:
        runner.device.allowed = every  # type: ignore[attr-defined]
        os.sched_setaffinity(0, {min(every)})
        try:
            runner.begin(case)
            (engine,) = runner.engines.values()
            assert os.sched_getaffinity(engine.process.pid) == every
            runner.wait_ready()
            threads = [
                int(path.name) for path in Path(f"/proc/{engine.process.pid}/task").iterdir()
            ]
            assert {min(os.sched_getaffinity(number)) for number in threads} == {min(every)}
            assert all(len(os.sched_getaffinity(number)) == 1 for number in threads)
        finally:
            os.sched_setaffinity(0, every)


def test_serve_has_its_own_process_if_other_cases_need_a_larger_budget(
    plant: Callable[..., None],
) -> None:
    # 4,096 tokens; a CPU's server takes 2,048
    cases = _cases("depth 0.25", phases=("prefill", "serve"), batch=16)
    with closing(_runner(cases)) as runner:
        assert runner.apart == ("serve",)
        budgets = [runner.record(case, 0.0)["settings"]["max_num_batched_tokens"] for case in cases]
    assert budgets == [4096, 2048]


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ("memory", "skipped", "OutOfMemoryError: CUDA out of memory"),
        (
            "crash",
            "failed",
            "the vLLM process ended with status 3: CUDA error: an illegal memory access",
        ),
        ("short", "failed", "with 18 new tokens each, got 68 tokens in 16 common steps"),
        (
            "argument",
            "unsupported",
            "unexpected keyword argument 'kv_cache_memory_bytes'; supported releases of vLLM:",
        ),
    ],
)
def test_faults_are_recorded_with_their_cause(
    plant: Callable[..., None], fault: str, status: str, reason: str
) -> None:
    plant(fault)
    (case,) = _cases("depth 0.25")
    with closing(_runner([case])) as runner:
        record = runner.record(case, 10.0)
        assert record["status"] == status
        assert reason in record["reason"]
        assert "\n" not in record["reason"]
        plant()
        assert runner.record(case, 10.0)["status"] == "ok"  # the next case starts anew


def test_a_budget_for_no_start_is_refused(plant: Callable[..., None], tmp_path: Path) -> None:
    cases = _cases("depth 0.25")
    model = ModelRun(MODEL, "bf16", "vllm", content_of(MODEL), sys.executable)
    expected = "--budget: expected at least 20s, as vLLM starts two models, got 5s"
    with pytest.raises(InputError, match=expected):
        compare(tmp_path / "run", _device(), model, cases, 5.0)
    with pytest.raises(InputError, match=expected):
        observe(tmp_path / "run", _device(), model, settings_of(PHASES[:2], (), ()), 5.0)
    assert not (tmp_path / "run").exists()


def test_a_silent_child_is_ended(plant: Callable[..., None]) -> None:
    plant("hang")
    (case,) = _cases("depth 0.25")
    with closing(_runner([case], patience_s=0.5)) as runner:
        record = runner.record(case, 10.0)
        assert (record["status"], record["reason"]) == ("failed", "no answer of vLLM within 0.5 s")
        assert not runner.engines


def test_all_prompts_of_a_decode_case_are_one_pass_and_serve_keeps_its_own_budget() -> None:
    """Else early sequences end before the last step, which is up to 8 % of the time of 32 steps."""
    cases = _cases("depth 0.25", phases=("prefill", "decode", "serve"), batch=64, seq=1024)
    runner = running.VllmRunner.__new__(running.VllmRunner)
    sizes = [running.LargestRequest(batched=2048).with_case(case).batched for case in cases]
    assert sizes == [32768, 65536, 2048]
    runner.budget, runner.sizes = 2048, {False: running.LargestRequest(batched=65536)}
    assert runner.apart == ("serve",)


def test_an_interrupt_ends_the_wait_for_a_model(plant: Callable[..., None]) -> None:
    plant("hang")
    (case,) = _cases("depth 0.25")
    with closing(_runner([case])) as runner:
        asked = []
        runner.interrupted = lambda: len(asked) > 2 or bool(asked.append(1))
        with pytest.raises(Interrupted):
            runner.record(case, 10.0)


def test_an_engine_is_calibrated_on_copies_of_a_model(
    plant: Callable[..., None], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("calibration.devices.open_device", lambda name, **_: _device(name))
    plant(slower="30")  # else it is faster than the CPU of the profile can be
    line = "calibrate engine --engine vllm -o run --hardware cpu --dtype fp32"
    out, _ = cli(line)
    assert "Use run/profile.yaml as --hardware: it predicts passes that are left out within" in out
    (found,) = load_hardware("run/profile.yaml").engines.values()
    assert (found.version, found.tokens) == (RELEASES[1], (1, 4, 16, 128, 512))
    assert set(found.operators) == {"gemm", "prefill_attention", "decode_attention"}
    dense = Models(MODEL, content_of(MODEL)).config_of(MODEL)
    after = predict(
        "smollm2-135m",
        "depth 0.5",
        "run/profile.yaml",
        engine="vllm",
        batch=4,
        seq=128,
        dtype="fp32",
    )
    assert after.dense_s == pytest.approx(30.0 * pass_s(dense, 4), rel=0.25)  # the fake has no head
    records = read_store(Path("run/engine.vllm.jsonl")).rows
    (row,) = cli.json(line)  # nothing runs again
    assert read_store(Path("run/engine.vllm.jsonl")).rows == records
    assert len(row["passes"]) == len(records) == 10


def test_a_calibrated_engine_runs_the_settings_that_are_asked_within_its_budget(
    plant: Callable[..., None], cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("calibration.devices.open_device", lambda name, **_: _device(name))
    plant(slower="30")
    line = "calibrate engine --engine vllm --hardware cpu --dtype fp32 --batch 2,3 --seq 64"
    (row,) = cli.json(f"{line} --phase decode -o run")
    assert {(p["phase"], p["batch"], p["seq"]) for p in row["passes"]} == {
        ("decode", 2, 64),
        ("decode", 3, 64),
    }
    assert "Known: decode, prefill" in cli.refused(f"{line} --phase serve -o other")
    ticks = itertools.count(step=30)
    monkeypatch.setattr(ReplayDevice, "clock", lambda device: next(ticks))
    _, err = cli(f"{line} --budget 20s -o short")  # the first setting of every phase
    assert len(read_store(Path("short/engine.vllm.jsonl")).rows) == 4
    assert "4 passes left (budget); run the command again to resume" in err


def test_vllm_must_be_installed() -> None:
    (case,) = _cases("depth 0.25")
    with pytest.raises(InputError, match=r"vLLM is not installed .* pip install vllm"):
        _runner([case])
    with pytest.raises(
        InputError, match=r"cannot be run .* expected a Python interpreter with vLLM"
    ):
        _runner([case], python="/nowhere/python")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("low_rank 0.25", "low-rank factors"),
        ("token 0.25", "no kernels for token"),
        ("dynamic_depth 0.25", "routers"),
        ("depth 0.25 unit=attention", "a config.json of llama cannot state these shapes"),
    ],
)
def test_models_that_vllm_does_not_build_are_refused_before_they_run(
    plant: Callable[..., None], text: str, reason: str
) -> None:
    (case,) = _cases(text)
    with closing(_runner([])) as runner:
        with pytest.raises(InputError, match=reason):
            runner.check(case)
        assert runner.record(case, 10.0)["status"] == "unsupported"
        assert not runner.engines


def test_a_step_has_as_many_tokens_as_the_cases_need(plant: Callable[..., None]) -> None:
    """More tokens per step lengthen the start of a model."""
    for phases, tokens in ((("prefill", "decode"), 256), (("serve",), 2048)):
        cases = _cases("depth 0.25", phases=phases, batch=1, seq=128)
        with closing(_runner(cases)) as runner:
            settings = runner.record(cases[0], 0.0)["settings"]
        assert settings["max_num_batched_tokens"] == tokens


def test_other_formats_and_lengths_are_refused(plant: Callable[..., None]) -> None:
    with pytest.raises(
        InputError, match="expected at most 8192 positions, got 8202 with new tokens"
    ):
        _runner(_cases("depth 0.25", batch=1, seq=8192))
    with pytest.raises(InputError, match="expected weights, cache and arithmetic in bf16"):
        _runner(_cases("depth 0.25", weight_dtype="int8"))
    with pytest.raises(InputError, match=r"needs a config\.json"):
        Models(MODEL, {})
    with pytest.raises(InputError, match="model_type 'gpt_neox'"):
        Models(load_model("pythia-6.9b"), content_of("pythia-6.9b"))


@pytest.mark.quick
@pytest.mark.parametrize("text", ["depth 0.25", "width mlp=0.25", "width 0.5", "width_cross 0.25"])
@pytest.mark.parametrize(
    "name", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b", "mistral-7b-v0.3", "phi-3-mini-4k"]
)
def test_configurations_state_the_predicted_shapes(name: str, text: str) -> None:
    model = load_model(name)
    (case,) = _cases(text, model=model)
    if name == "qwen2.5-7b" and text in ("width 0.5", "width_cross 0.25"):
        # vLLM's class has no key for the width of a head
        with pytest.raises(InputError, match="not for qwen2"):
            _config(case, model)
        return
    config = _config(case, model)
    assert config["architectures"] == [CLASSES[model.architecture]]
    assert load_model(config).parameters == pytest.approx(case.pruned.parameters, rel=1e-9)
    assert load_model(config).parameters < model.parameters


@pytest.mark.quick
def test_every_class_is_in_the_registry_of_the_last_release() -> None:
    known = json.loads(FILE.read_text())
    assert set(known) == set(RELEASES)
    classes = set(CLASSES.values())
    assert classes == set(known[RELEASES[-1]]["architectures"].split())
    # hybrids came after the first release
    assert all(classes > set(known[release]["architectures"].split()) for release in RELEASES[:-1])


@pytest.mark.quick
def test_a_child_sees_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second, cpu = (
        SimpleNamespace(name=name, cpus=(2, 3)) for name in ("cuda", "cuda:1", "cpu")
    )
    assert environment(second)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert environment(second)["CUDA_VISIBLE_DEVICES"] == "6"
    assert environment(first)["CUDA_VISIBLE_DEVICES"] == "4"
    bound = environment(cpu, 3 * 2**29)
    assert (bound["VLLM_CPU_OMP_THREADS_BIND"], bound["VLLM_CPU_KVCACHE_SPACE"]) == ("2,3", "2")
    assert bound["MALLOC_MMAP_MAX_"] == "0"
    assert not {name for name in bound if name.startswith("OMP_")}
    one = environment(SimpleNamespace(name="cpu", cpus=(2,)))
    assert (one["VLLM_CPU_OMP_THREADS_BIND"], one["OMP_NUM_THREADS"]) == ("nobind", "1")


def test_the_installed_vllm_has_the_interface() -> None:
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    engine = {
        "model",
        "load_format",
        "max_num_batched_tokens",
        "kv_cache_memory_bytes",
        "enable_prefix_caching",
    }
    assert engine <= set(inspect.signature(vllm.EngineArgs).parameters)
    assert {"prompts", "sampling_params", "use_tqdm"} <= set(
        inspect.signature(vllm.LLM.generate).parameters
    )
    assert {"request_id", "prompt", "params"} <= set(
        inspect.signature(vllm.LLMEngine.add_request).parameters
    )
