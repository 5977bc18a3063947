"""The script for a machine with a GPU, run on the CPU with a tiny model: nothing but the kernels is
new on a GPU."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer

from calibration.cli import calibrate, compare, upper_bound
from calibration.records.store import read_store
from simulator.hardware.library import load_hardware

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "run.sh"
TINY = """{
"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 128, "num_hidden_layers": 2,
"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256, "vocab_size": 512,
"max_position_embeddings": 512, "hidden_act": "silu"}"""
VARIABLES = (
    "DEVICE",
    "MODEL",
    "LAYERS",
    "DTYPES",
    "ENGINES",
    "SEQ",
    "BATCH",
    "SPARSITY",
    "BUDGET",
    "LIMIT",
    "START_S",
    "PYTHON",
)
Done = subprocess.CompletedProcess[str]


def start(folder: Path, prunesim: str, **variables: str) -> subprocess.Popen[str]:
    """Start the script in a folder that has no prunesim, with one that is not installed."""
    clean = {
        name: value for name, value in os.environ.items() if name not in (*VARIABLES, "PYTHONPATH")
    }
    program = {"PRUNESIM": f"{sys.executable} {prunesim}", "PYTHON": sys.executable}
    words, pipe = [str(SCRIPT), str(folder / "run")], subprocess.PIPE
    environment = clean | program | variables
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(folder: Path, prunesim: str, **variables: str) -> Done:
    with start(folder, prunesim, **variables) as process:
        out, err = process.communicate(timeout=600)
    return Done(process.args, process.returncode, out, err)


ALL = "torch", "transformers", "vllm"


def python(folder: Path, packages: Sequence[str] = ALL, layers: int = 0) -> str:
    """A Python with these packages installed, which is quick to say versions, and how many layers
    fit (0: all)."""
    file, missing = folder / "python.sh", " ".join(name for name in ALL if name not in packages)
    answers = f"echo {missing}; echo {layers or ''}"
    cases = (
        f'case $1 in -m) echo versions ;; -c) {answers} ;; *) exec {sys.executable} "$@" ;; esac'
    )
    file.write_text(f"#!/bin/bash\n{cases}\n")
    file.chmod(0o755)
    return str(file)


def pretend(
    folder: Path,
    body: str = "",
    packages: Sequence[str] = ALL,
    layers: int = 0,
    **variables: str,
) -> tuple[Done, list[list[str]]]:
    """Run a program that only writes down what it was asked, and fails as told, with these packages
    installed."""
    file, log = folder / "pretend.py", folder / "asked.jsonl"
    file.write_text(
        f"import json, sys\nprint(json.dumps(sys.argv[1:]), file=open({str(log)!r}, 'a'))\n{body}\n"
    )
    done = run(folder, str(file), **{"PYTHON": python(folder, packages, layers), **variables})
    asked = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return done, [words for words in asked if words != ["--version"]]


def after(arguments: list[str], option: str) -> str:
    return arguments[arguments.index(option) + 1]


def seconds(arguments: list[str]) -> float:
    return float(after(arguments, "--budget").removesuffix("s"))


ENGINES = ["vllm", "hf", "compile", "reference"]


@pytest.mark.parametrize("dtypes", ["bf16 fp8", "bf16", "bf16 fp16 fp8"])
def test_every_step_in_order_with_the_time_that_earlier_steps_left(
    tmp_path: Path, dtypes: str
) -> None:
    # each step of no time counts as one of 40 s
    done, asked = pretend(tmp_path, DTYPES=dtypes, START_S="-40")
    assert done.returncode == 0, done.stderr
    first, *others = dtypes.split()
    assert [a[0] for a in asked] == [
        "calibrate",
        *["compare"] * 4,
        "upper-bound",
        *["calibrate"] * len(others),
    ]
    assert [after(a, "--dtype") for a in asked] == [*[first] * 6, *others]
    assert [after(a, "--engine") for a in asked[1:5]] == ENGINES
    assert all("cuda" in a for a in asked)
    assert {a[1] for a in asked if a[0] != "calibrate"} == {"llama-3.1-8b"}
    # with the profile of the first step
    assert {after(a, "-o") for a in asked[:6]} == {after(asked[0], "-o")}
    vllm, _, compiled, _ = asked[1:5]
    assert (after(vllm, "--family"), after(compiled, "--layers")) == ("depth,width", "8")
    left_s = [380.0 - 40.0 * number for number in range(len(asked))]
    assert all(seconds(a) <= left for a, left in zip(asked, left_s))
    assert seconds(asked[-1]) == pytest.approx(left_s[-1], abs=8.0)
    # only the first calibration runs models
    assert ["none" in a for a in asked] == [False] * 6 + [True] * len(others)


def test_an_engine_that_is_not_installed_is_skipped_and_leaves_its_time_to_the_others(
    tmp_path: Path,
) -> None:
    done, asked = pretend(tmp_path, packages=["torch"])
    assert done.returncode == 0, done.stdout
    assert [after(a, "--engine") for a in asked if a[0] == "compare"] == ["reference"]
    for engine, package in (("hf", "transformers"), ("compile", "transformers"), ("vllm", "vllm")):
        assert f"compare {engine}: skipped, because {package} is not installed" in done.stdout
    _, everything = pretend(tmp_path)
    assert seconds(asked[0]) > 1.5 * seconds(everything[len(asked)])


@pytest.mark.parametrize("layers", [6, 20])
def test_models_of_which_two_copies_fit_are_run(tmp_path: Path, layers: int) -> None:
    _, asked = pretend(tmp_path, layers=layers)
    cut = [after(a, "--layers") for a in asked if a[0] in ("compare", "upper-bound")]
    compiled = min(layers, 8)  # torch compiles layer by layer
    assert cut == [str(n) for n in (layers, layers, compiled, layers, layers)]


def test_variables_reach_the_commands_by_options_that_they_have(tmp_path: Path) -> None:
    settings = {"DEVICE": "cuda:1", "MODEL": "mistral-7b-v0.3", "LAYERS": "8", "SEQ": "512,1024"}
    _, asked = pretend(tmp_path, **settings, BATCH="4", SPARSITY="0.3")
    for arguments in asked[1:6]:
        pairs = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        assert arguments[1] == "mistral-7b-v0.3"
        assert (pairs["--device"], pairs["--layers"], pairs["--seq"]) == ("cuda:1", "8", "512,1024")
        assert (pairs["--batch"], pairs["--sparsity"]) == ("4", "0.3")
    own = {"calibrate": calibrate, "upper-bound": upper_bound, "compare": compare}
    for arguments in asked:
        lone = typer.Typer()
        lone.command()(own[arguments[0]].command)
        found = {o for p in typer.main.get_command(lone).params for o in p.opts}
        assert {a for a in arguments if a.startswith("-")} <= found


def test_a_step_that_fails_is_named_and_the_others_still_run(tmp_path: Path) -> None:
    body = "if sys.argv[1] == 'upper-bound': print('no such kernel', file=sys.stderr); sys.exit(1)"
    done, asked = pretend(tmp_path, body)
    assert done.returncode == 1
    assert "FAILED with status 1" in done.stdout
    assert "no such kernel" in done.stdout
    assert [a[0] for a in asked] == ["calibrate", *["compare"] * 4, "upper-bound", "calibrate"]
    assert "1 steps failed" in (tmp_path / "run" / "report.md").read_text()
    assert "run/log.txt" in packed(tmp_path)


@pytest.mark.slow
def test_a_step_that_reaches_the_time_limit_is_interrupted_between_two_samples(
    tmp_path: Path,
) -> None:
    body = """
import signal, time
signal.signal(signal.SIGINT, lambda *_: (print('resume later'), sys.exit(130)))
if sys.argv[1] == 'calibrate': time.sleep(600)"""
    done, asked = pretend(tmp_path, body, ENGINES="", LIMIT="10")
    assert done.returncode == 1
    assert [a[0] for a in asked] == ["calibrate"]
    assert "| resume later" in done.stdout
    assert done.stdout.count("skipped: the time limit of 10 s is reached") == 2


def test_a_second_run_resumes_in_the_same_folder_and_keeps_the_log(tmp_path: Path) -> None:
    first, again = (pretend(tmp_path, ENGINES="reference") for _ in range(2))
    assert first[1] == again[1][: len(first[1])]
    assert again[1][len(first[1]) :] == first[1]
    assert (tmp_path / "run" / "log.txt").read_text().count("== calibrate bf16") == 2


def packed(folder: Path) -> dict[str, str]:
    """The text files of the archive, by name."""
    with tarfile.open(folder / "run.tar.gz") as tar:
        assert {(entry.uname, entry.gname, entry.uid) for entry in tar} == {("", "", 0)}
        files = {entry.name: tar.extractfile(entry) for entry in tar}
        return {
            name: file.read().decode("utf-8", "replace")
            for name, file in files.items()
            if file is not None
        }


MEASURES_AND_WAITS = """
import sys, time
from pathlib import Path
from simulator.cli import run
words = sys.argv[1:]
status = run([*words, '--measure-only'] if words[0] == 'calibrate' else words)
if ' '.join(words).startswith({step!r}):
    try:
        Path({ready!r}).touch()
        time.sleep(600)
    except KeyboardInterrupt:
        sys.exit(130)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "number"),
    [
        ("calibrate replay:planted -o {}/run/bf16", signal.SIGINT),
        ("upper-bound", signal.SIGTERM),
        ("calibrate replay:planted -o {}/run/fp16", signal.SIGHUP),
    ],
)
def test_a_kill_in_any_step_leaves_all_records_in_the_archive(
    step: str, number: signal.Signals, tmp_path: Path
) -> None:
    file, ready = tmp_path / "waits.py", tmp_path / "ready"
    file.write_text(MEASURES_AND_WAITS.format(step=step.format(tmp_path), ready=str(ready)))
    variables = {"DEVICE": "replay:planted", "DTYPES": "bf16 fp16", "LAYERS": "2", "BUDGET": "20"}
    with start(tmp_path, str(file), PYTHON=python(tmp_path), **variables) as process:
        while not ready.exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        process.send_signal(number)
        out, err = process.communicate(timeout=120)  # the step waits for 600 s
    assert process.returncode == 130, err
    assert "run the script again to resume" in out
    texts = packed(tmp_path)
    records = list((tmp_path / "run").glob("*/records.jsonl"))
    assert records
    for path in records:
        assert texts[str(path.relative_to(tmp_path))] == path.read_text()
        assert len(read_store(path).rows) > 10


@pytest.mark.slow
def test_the_archive_holds_no_names_of_the_machine(tmp_path: Path) -> None:
    body = """
import socket, pathlib
print(f'a traceback in {pathlib.Path.home()}/prune/x.py on {socket.gethostname()}; tcp://10.1.2.3:80')
folder = pathlib.Path(sys.argv[sys.argv.index('-o') + 1]) if '-o' in sys.argv else None
if folder and 'calibrate' in sys.argv:
    from calibration.records.store import Header, Store
    with Store(folder / 'records.jsonl', Header('Planted GPU', extra={'path': f'{pathlib.Path.home()}/models'})) as s:
        s.append({'key': 'gemm', 'reason': 'plain'})
"""
    home = tmp_path / "home" / "ada_lovelace"
    home.mkdir(parents=True)
    smi = tmp_path / "nvidia-smi"
    lines = (
        "GPU UUID     : GPU-12345678-1234-1234-1234-123456789abc",
        "Serial Number: 1650320000001",
        "Product Name : NVIDIA H100",
    )
    smi.write_text("\n".join(["#!/bin/bash", *(f"echo '    {line}'" for line in lines)]))
    smi.chmod(0o755)
    search = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    settings = {
        "ENGINES": "",
        "DTYPES": "bf16",
        "PYTHON": sys.executable,
        "HOME": str(home),
        "LOGNAME": "ada_lovelace",
        "PATH": search,
    }
    (tmp_path / "run" / "bf16").mkdir(parents=True)
    done, _ = pretend(tmp_path, body, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    texts = packed(tmp_path)
    assert {"run/report.md", "run/log.txt", "run/versions/pip.txt", "run/versions/gpu.txt"} <= set(
        texts
    )
    for name, text in texts.items():
        for private in (
            "ada_lovelace",
            str(tmp_path / "home"),
            str(ROOT),
            "123456789abc",
            "1650320000001",
            "10.1.2.3",
        ):
            assert private not in text, name
    assert "NVIDIA H100" in texts["run/versions/gpu.txt"]
    assert "a traceback in ~/prune/x.py" in texts["run/log.txt"]
    copy = tmp_path / "records.jsonl"
    copy.write_text(texts["run/bf16/records.jsonl"])
    content = read_store(copy)  # the checksums are those of the changed lines
    assert content.header.extra["path"] == "~/models"
    assert [row["reason"] for row in content.rows] == ["plain"]


def test_a_verdict_against_a_profile_is_no_failure(tmp_path: Path) -> None:
    body = (
        "if sys.argv[1] == 'calibrate': print('Do not use run/profile.yaml: the machine was busy');"
        " sys.exit(1)"
    )
    done, asked = pretend(tmp_path, body, DTYPES="bf16")
    assert done.returncode == 0, done.stdout
    assert "the verdict is not to use the profile" in done.stdout
    assert [a[0] for a in asked] == ["calibrate", *["compare"] * 4, "upper-bound"]


def test_a_number_format_that_the_gpu_lacks_is_no_failure(tmp_path: Path) -> None:
    body = (
        "if 'fp8' in sys.argv: print('--dtype fp8: not supported by device cuda:0; supported:"
        " bf16'); sys.exit(2)"
    )
    done, _ = pretend(tmp_path, body, ENGINES="")
    assert done.returncode == 0, done.stdout
    assert "skipped: this device does not have the number format" in done.stdout


@pytest.mark.slow
def test_the_script_runs_end_to_end_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    model, out = tmp_path / "config.json", tmp_path / "run"
    model.write_text(TINY)
    settings = {
        "DEVICE": "cpu",
        "MODEL": str(model),
        "DTYPES": "fp32",
        "SEQ": "64",
        "ENGINES": "reference",
    }
    budget = os.environ.get("PRUNESIM_SCRIPT_S", "60")
    done = run(tmp_path, "-m simulator.cli", **settings, BUDGET=budget)
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, f"{done.stdout}\n{settings}\n{log[-3000:]}"
    profile = load_hardware(out / "fp32" / "profile.yaml")
    assert profile.section("gemm", "fp32").status == "calibrated"
    kinds = {
        row["operator"]["kind"]
        for row in read_store(out / "fp32" / "records.jsonl").rows
        if row.get("median_s")
    }
    assert {"gemm", "attention_prefill", "attention_decode", "elementwise", "low_rank"} <= kinds
    texts = (
        (out / "fp32" / file).read_text().splitlines()
        for file in ("upper_bound.csv", "comparison.csv")
    )
    bounds, compared = (list(csv.DictReader(lines)) for lines in texts)
    assert {row["family"] for row in bounds} >= {
        "depth",
        "width",
        "low_rank",
        "dynamic_depth",
        "token",
        "kv_cache",
    }
    assert all(float(row["measured_bound"]) > 0 for row in bounds if row["missing"] == "0")
    assert {row["family"] for row in compared} >= {"depth", "width", "low_rank"}
    assert all(float(row["measured"]) > 0 and float(row["predicted"]) > 0 for row in compared)
    assert {row["hardware"] for row in compared} == {profile.name}
    for link in re.findall(r"\]\(([^)]+)\)", (out / "report.md").read_text()):
        assert (out / link).is_file(), link
