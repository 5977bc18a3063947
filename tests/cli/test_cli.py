"""The command line: exit status, one line for bad input, the shape of its output; that all of it is
documented."""

from __future__ import annotations

import configparser
import csv
import io
import json
import os
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from tables import rows_of

import simulator
from calibration.evidence import commands_page
from calibration.evidence.pages import sections_table
from simulator.cli import render
from simulator.cli.program import COMMANDS, GROUP
from simulator.engines.engine import list_engines, load_engine

pytestmark = pytest.mark.usefixtures("inside")
ROOT = Path(__file__).resolve().parents[2]
SPEEDUP = "speedup llama-3.1-8b --hardware h100_sxm"
STABLE_KEYS = (
    "model hardware engine family sparsity realised_sparsity phase batch seq dtype dense_s"
    " dense_lower dense_upper pruned_s pruned_lower pruned_upper speedup speedup_lower"
    " speedup_upper flop_bound byte_bound roofline_bound bottleneck"
)


BAD = """
speedup llama-3.1-8b --hardware h10_sxm                              | did you mean h100_sxm
speedup llama-3.1-8b --hardware h100@tensorrt                        | h100_sxm: stack 'tensorrt' is unknown
gemm 1 1 1 --hardware h100@torch,a100                                | Known: sglang, trtllm
gemm 1 1 1 --hardware cpu@vllm --dtype fp32                          | cpu: expected no stack
speedup llama-3.1-8c --hardware h100                                 | did you mean llama-3.1-8b
@ --family depht                                                     | did you mean depth
@ --method shortgtp                                                  | did you mean shortgpt
@ --method shortgpt --family depth                                   | give no family or option with it
@ --method llm-pruner --sparsity 0.9                                 | llm-pruner at sparsity 0.9: s * layers / (layers - 6) 1.10769: expected a fraction
methods shortgtp                                                     | did you mean shortgpt
explain llama-3.1-8b --hardware h100                                 | expected a pruning to explain, such as
explain llama-3.1-8b --hardware h100 --method flap                   | expected one to explain flap, such as 0.2
@ --sparsity 1.0                                                     | sparsity 1: expected a fraction in [0, 1)
@ --sparsity 25                                                      | for 25 % write 0.25
@ --sparsity nan                                                     | expected a fraction such as 0.25 or 25%
@ --skew x                                                           | --skew 'x': expected a number such as 0.8
@ --sparsity 0.1,,0.5                                                | separated by single commas
@ --family semi_structured --sparsity 0.25                           | 0.5
@ --batch 0                                                          | --batch: expected a whole number from 1
@ --phase prefill --seq 2147483647 --batch 64                        | expected at most
@ --phase prefil                                                     | did you mean prefill
@ --engine graph                                                     | engine 'graph' is unknown
@ --engine no/such.yaml                                              | no/such.yaml:1:1: file: cannot be read
@ --family semi_structured --sparsity 0.5                            | vllm has no 2:4 kernels; these engines have
@ --dense-time 18.6                                                  | --dense-time '18.6': expected a time such as
@ --dense-time -1ms                                                  | --dense-time: expected a positive time
@ --dense-time 18ms --batch 1,2                                      | expected one batch, got 2
@ --phase serve --batch 8 --seq 128 --new-tokens 0                   | new_tokens: expected at least 1
@ --dtype bf17                                                       | did you mean bf16
@ --devices 0                                                        | --devices: expected a whole number from 1
@ --devices 2 --parallel data                                        | parallel 'data' is unknown
@ --figure x.jpg | x.jpg: expected a name that ends in .pdf, .svg or .png
@ --figure no/such/x.pdf                                             | folder no/such does not exist
@ --csv x.csv --json                                                 | expected one of them
@ --prune 'width 0.25 iner=3'                                        | iner
@ --prune 'width 0.25 inner=-3'                                      | inner
@ --dtype int4                                                       | int4
speedup llama-3.1-8b --hardware a100 --dtype nvfp4                   | a100_sxm_80gb has no nvfp4
@ --parallel expert                                                  | parallel: expected several devices
@ --devices 2 --parallel expert                                      | parallel: expected several devices (expert: and a model with routed experts)
@ --skew 1                                                           | skew: expected a model with routed experts
@ --cached-prefix 512                                                | cached_prefix: expected phase prefill
@ --token-budget 64                                                  | token_budget: expected in prefill
@ --link pcie                                                        | --link: expected with --devices of at least 2
@ --devices 2 --link pci                                             | link 'pci' is unknown
@ --devices 2 --link bridge                                          | h100_sxm has no such connection; expected one of
speedup no/such/config.json --hardware h100                          | no/such/config.json
speedup llama-3.1-8b --hardware no/such.yaml                         | no/such.yaml
explain llama-3.1-8b --hardware h100 --family all --sparsity 0.3     | one family
explain llama-3.1-8b --hardware h100 --family width --sparsity x=0.3 | x
gemm 0 1 1 --hardware h100                                           | M: expected a whole number
gemm 1 1 99999999999 --hardware h100                                 | K: expected a whole number
gemm 1 1 1 --hardware h100 --dtype float                             | dtype 'float' is unknown
gemm 1 1 --hardware h100                                             | Missing argument 'K'
gemm 1 1 1                                                           | Missing option '--hardware'
models show llama-9                                                  | llama
calibrate cpu -o run --seed -1                                       | --seed: expected whole numbers from 0 up, got -1
hardware show hundred                                                | 'hundred' is unknown
hardware                                                             | Missing command
predict                                                              | No such command 'predict'
--hardwear                                                           | No such option
"""


@pytest.mark.parametrize(("line", "says"), rows_of(BAD))
def test_bad_input_is_one_line_and_status_2(line: str, says: str, cli: Any) -> None:
    assert says in cli.refused(re.sub("^@", SPEEDUP, line))


@pytest.mark.quick
def test_a_check_lists_the_problems_one_line_each(cli: Any) -> None:
    Path("mine.yaml").write_text("name: mine\n  title: [\n")
    assert "mine.yaml:" in cli.refused("speedup llama-3.1-8b --hardware mine.yaml")
    out, err = cli("hardware check mine.yaml", 2)
    assert out == ""
    assert err
    assert all(row.startswith("prunesim: ") for row in err.splitlines())
    good = ROOT / "hardware_profiles" / "h100_sxm.yaml"
    assert "no problem" in cli.out(f"hardware check {good}")
    assert "no problem" in cli.out(f"hardware check {good.with_suffix('.trtllm.yaml')}")
    found = {"file": str(good), "problems": [], "warnings": []}
    assert cli.json(f"hardware check {good}") == found
    text = good.with_name("l40s.yaml").read_text().replace("864 GB/s", "9.6 GB/s")
    Path("slow.yaml").write_text(text)
    out, err = cli("hardware check slow.yaml", 0)
    assert "no problem" in out
    assert err.startswith("note: slow.yaml: datasheet.bandwidth: expected 190 GB/s to 1.10 TB/s")
    Path("bad.yaml").write_text("schema_version: 1\nname: x\n")
    assert json.loads(cli("hardware check bad.yaml --json", 2)[0])["problems"]


@pytest.mark.quick
def test_a_program_error_is_one_line_and_status_1(
    cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("simulator.prediction.table.table", broken)
    monkeypatch.delenv("PRUNESIM_DEBUG", raising=False)
    _, err = cli(SPEEDUP, 1)
    assert err.count("\n") == 1
    assert "ZeroDivisionError: planted" in err


def test_nothing_is_to_be_installed_from_an_index_that_has_no_such_package() -> None:
    files = [
        ROOT / "README.md",
        *(
            path
            for folder in ("docs", "notebooks", "simulator", "calibration", "tests")
            for path in (ROOT / folder).rglob("*")
            if path.suffix in (".md", ".ipynb", ".py", ".sh")
        ),
    ]
    advice = re.compile(r"pip install (?:-\S+ )*[\"'\\]*prunesim\b")
    assert not [str(path) for path in files if advice.search(path.read_text(encoding="utf-8"))]


@pytest.mark.quick
def test_json_records_have_the_stable_keys_first_and_agree_with_the_library(cli: Any) -> None:
    records = cli.json(
        f"{SPEEDUP} --family depth --sparsity 0.1,0.25 --phase prefill,decode --batch 1,8"
    )
    assert len(records) == 2 * 2 * 2
    table = simulator.table(
        ["llama-3.1-8b"],
        ["h100_sxm"],
        ["depth"],
        [0.1, 0.25],
        phase=["prefill", "decode"],
        batch=[1, 8],
    )
    for record, expected in zip(records, table, strict=True):
        assert " ".join(record).startswith(STABLE_KEYS)
        assert record["speedup"] == record["dense_s"] / record["pruned_s"]
        for name in ("dense", "pruned", "speedup"):
            value = record["speedup" if name == "speedup" else f"{name}_s"]
            assert record[f"{name}_lower"] <= value <= record[f"{name}_upper"]
        for key in ("speedup", "phase", "batch", "sparsity"):
            assert record[key] == getattr(expected, key)


@pytest.mark.quick
def test_csv_keeps_every_digit(cli: Any) -> None:
    line = f"{SPEEDUP} --family width,low_rank --phase decode"
    assert cli.out(f"{line} --csv out.csv") == (answer := cli.out(line))  # the answer too
    records = cli.json(line)
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records) == 6
    for row, record in zip(rows, records, strict=True):
        assert list(row) == list(record)
        for key, value in record.items():
            if isinstance(value, float):
                assert float(row[key]) == value, key
            else:
                assert row[key] == ("" if value is None else str(value)), key
    out, err = cli(f"{line} --csv -")
    assert out == Path("out.csv").read_text()
    assert err.startswith(answer)
    assert cli.out(line) == answer  # standard output is restored


def test_a_model_that_does_not_fit_is_said_to(cli: Any) -> None:
    out, err = cli("speedup llama-3.1-70b --hardware h100 --family depth --memory")
    assert "too large" in out
    assert "llama-3.1-70b" in err
    assert "too large" not in cli.out(
        "speedup llama-3.1-8b --hardware h100 --family depth --memory"
    )


@pytest.mark.parametrize("available", [60, 80, 100, 120, 200])
def test_tables_fit_their_width(available: int, cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render, "width", lambda: available)
    out = cli.out("speedup llama-3.1-8b --hardware a100,h100,4090 --phase prefill,decode")
    rows = [
        line for line in out.splitlines() if not re.search(r"batch 1|intervals;|bottleneck:", line)
    ]
    assert max(map(len, rows)) <= available
    assert "…" not in out
    for name in ("a100_sxm_80gb", "h100_sxm", "rtx_4090", "sparse_attention", "kv_cache"):
        assert name in out


@pytest.mark.parametrize("name", ["h20", "l40s"])
def test_a_device_shows_the_fit_of_each_engine_with_the_error_of_the_accuracy_page(
    cli: Any, name: str
) -> None:
    (shown,) = cli.json(f"hardware show {name}")
    text, page = cli.out(f"hardware show {name}").partition("fitted part")[2], sections_table()
    for row in shown["served"]:
        part = row["operator"], row["dtype"]
        (line,) = re.findall(rf"^{part[0]} +{re.escape(part[1])} .*", text, re.MULTILINE)
        (cells,) = re.findall(
            rf"^\| {name} \| {part[0]} \| {re.escape(part[1])} \| (.*)", page, re.MULTILINE
        )
        assert row["held_out"] in cells
        for engine, fit in row["engines"].items():
            section = (
                simulator.load_hardware(name).serving(load_engine(engine).stacks).section(*part)
            )
            assert fit["stack"] == (section.stack if section.status != "default" else "datasheet")
            error = f" {100 * fit['error']:.1f}" if section.status != "default" else ""
            assert f"{fit['stack']}{error}" in line
            assert f"{error} ({fit['rows']:,})" in cells or not error
    assert max(map(len, text.splitlines())) <= 120


def test_lists_and_shows(cli: Any, tmp_path: Path) -> None:
    assert {"a100_sxm_80gb", "h100_sxm", "rtx_4090"} <= {
        r["name"] for r in cli.json("hardware list")
    }
    listed = cli.out("hardware list")
    assert re.search(r"h100_sxm +hopper .* vllm, sglang, trtllm +h100\n", listed)
    assert re.search(r"h100_pcie .* as h100_sxm\n", listed)
    assert max(map(len, listed.splitlines())) <= 104
    (shown,) = cli.json("hardware show h100")
    assert shown["name"] == "h100_sxm"
    assert shown["sources"]
    assert "989" in cli.out("hardware show h100")
    power = r"drawn: \d\d W idle, \d{3} W at full bandwidth, 700 W at full arithmetic \(calibrated: ml-energy"
    assert re.search(power, cli.out("hardware show h100"))
    assert re.search(
        r"drawn: .* 400 W at full arithmetic \(assumed\)", cli.out("hardware show a100")
    )
    assert re.search(r"gemm +bf16 +trtllm [\d.]+ %\n", cli.out("hardware show h100@trtllm"))
    assert re.search(r"\nvllm, [\d,]+ rows: as h100_sxm vllm\n", cli.out("hardware show h800"))
    own = tmp_path / "own.yaml"
    assert cli.json(f"hardware new own -o {own}") == {"file": str(own)}
    assert "prunesim hardware check mine.yaml" in cli.out("hardware new mine")
    stacks = "speedup llama-3.1-8b --hardware a100,a100@trtllm --family depth --sparsity 0.25"
    assert [r["hardware"] for r in cli.json(stacks)] == ["a100_sxm_80gb", "a100_sxm_80gb@trtllm"]
    assert [e["name"] for e in cli.json("engines list") + cli.json("engines show vllm")] == [
        *list_engines(),
        "vllm",
    ]
    assert len(cli.json("models list")) >= 12
    assert "llama-3.1-8b" in cli.out("models list")
    assert "8,030,261,248" in cli.out("models show llama-3.1-8b")
    (model,) = cli.json("models show llama-3.1-8b")
    assert sum(g["flops"] for g in model["gemms"]) < model["flops"]
    shown = cli.out("models show deepseek-v3")
    assert "671,026,419,200 parameters, 37,552,297,472 of them active" in shown
    latent = "61 latent attention (128 heads of 192 on a latent of 512 + 64)"
    assert f"61 layers, hidden 7168, vocabulary 129,280: {latent}, 3 MLP" in shown
    assert "58 experts (256 of a width of 2,048, 8 per token, beside an MLP of 2,048)" in shown
    hybrid = cli.out("models show nemotron-nano-9b-v2")
    assert "27 Mamba-2 (128 heads of 80, state 128), 25 MLP (plain, width 15,680), 4" in hybrid
    # six of 80 layers
    assert re.search(r"down +2048 +8192 +14336 +6 ", cli.out("models show nemotron-super-49b"))


@pytest.mark.parametrize("available", [80, 120])
def test_methods_are_listed_and_predicted_under_their_names(
    available: int, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "width", lambda: available)
    lines = [*cli.out("methods").splitlines(), *cli.out("methods sheared-llama").splitlines()]
    assert max(map(len, lines)) <= available
    listed = cli.json("methods")
    assert {m["name"] for m in listed} == simulator.METHODS.keys()
    assert cli.json("methods mod") == [m for m in listed if m["name"] == "mod"]
    line = "llama-2-7b --hardware h100 --phase generate --method"
    out = cli.out(f"speedup {line} shortened-llama,minitron-width --memory")
    assert (
        max(len(row) for row in out.splitlines() if not re.search(r"batch 1|interval;", row))
        <= available
    )
    # answer, speedups, serving, memory, parts, will it run
    assert out.count("\nMinitron (width) ") == 6
    assert "Sheared LLaMA at 60 % (width_cross+width)" in cli.out(
        f"explain {line} sheared-llama --sparsity 0.6"
    )


@pytest.mark.quick
def test_version_and_help(cli: Any) -> None:
    assert cli.out("--version").startswith("prunesim ")
    assert cli.out("") == cli.out("--help")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_colour_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    red = [render.Column("a", ["1"], styles=["red"])]
    assert render.colored()
    assert "\x1b[" in render.table_text(red, color=True)
    monkeypatch.setenv("TERM", "dumb")
    assert not render.colored()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert render.colored()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not render.colored()
    assert "\x1b[" not in render.table_text(red, "title")


def test_a_pipe_gets_colours_only_when_it_asks(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # the fixture refuses codes, in errors and help as well
    plain = cli.out(f"{SPEEDUP} --family depth")
    cli.refused("speedup llama-3.1-8b")
    monkeypatch.setenv("FORCE_COLOR", "1")
    coloured = cli.out(f"{SPEEDUP} --family depth")
    assert "\x1b" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).split() == plain.split()
    assert "\x1b" not in cli.out("speedup --help") + cli.refused("speedup llama-3.1-8b")


COMPLETED = """
sp                                 | speedup
speedup llama-3.1                  | llama-3.1-405b llama-3.1-70b llama-3.1-8b
speedup x --hardware rtx_4090,h100_s | rtx_4090,h100_sxm
explain x --engine hf,vl           | hf,vllm
advise x --family dep              | depth
methods shortg                     | shortgpt
hardware show mi                   | mi300x mi325x mi355x
gemm 1 1 1 --dtype bf              | bf16
quality --fam                      | --family
"""


@pytest.mark.quick
@pytest.mark.parametrize(("line", "offers"), rows_of(COMPLETED))
def test_a_shell_completes_names(
    line: str, offers: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_PRUNESIM_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"prunesim {line}")
    monkeypatch.setenv("COMP_CWORD", str(len(line.split())))
    assert cli.out("").split() == offers.split()


def test_completion_is_offered(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"--install-completion", "--show-completion"} <= set(cli.out("--help").split())
    monkeypatch.setenv("_PRUNESIM_COMPLETE", "source_bash")
    assert "complete -o default -F _prunesim_completion prunesim" in cli.out("")


@pytest.mark.parametrize(("stream", "shows"), [(Terminal(), True), (io.StringIO(), False)])
def test_the_progress_bar_waits_and_needs_a_terminal(
    stream: io.StringIO, shows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream)
    with render.progress("predicting") as report:
        now[0] = 1.9
        report(1, 4)
        assert stream.getvalue() == ""
        now[0] = 2.1
        report(2, 4)
    assert ("2/4" in stream.getvalue()) is shows
    with render.progress("measuring") as report:  # a file gets a line now and then
        now[0] += 45.0
        report(45, 180)
    line = "status: measuring: 45 of 180, 135 s left\n"
    assert (line in stream.getvalue()) is not shows


@pytest.mark.quick
def test_every_command_has_help(cli: Any) -> None:
    found = [path for path, _ in commands_page.commands()]
    assert len(found) >= 8
    for command in found:
        assert f"prunesim {command}" in cli.out(f"{command} --help")


HEAVY = {"matplotlib", "torch", "pandas", "pyarrow"}
OTHER_COMMANDS = {f"simulator.cli.{place.partition(':')[0]}" for _, place in COMMANDS} - {
    "simulator.cli.speedup"
}


@pytest.mark.parametrize(
    ("line", "heavy"),
    [
        ("--help", {*HEAVY, "numpy", "pydantic", "scipy", "yaml"}),
        (f"{SPEEDUP} --family depth", {*HEAVY, "calibration", *OTHER_COMMANDS}),
    ],
)
def test_no_command_imports_what_it_does_not_need(line: str, heavy: set[str], python: Any) -> None:
    code = (
        f"import sys, simulator.cli as p; p.run({line.split()}); print(sorted({heavy} &"
        " set(sys.modules)))"
    )
    status, out, lines = python(["-c", code])
    assert (status, lines, out.decode().splitlines()[-1]) == (0, [], "[]")


def test_help_lists_the_commands_of_other_packages(cli: Any) -> None:
    listed = re.findall(r"^  ([a-z-]+)  ", cli.out("--help"), re.MULTILINE)
    assert {"fit", "validate", "calibrate", "figures", "speedup", "hardware"} <= set(listed)
    assert len(listed) == len(set(listed))
    assert cli.out("--help speedup") == cli.out("--help")


def test_installed_entry_points_are_those_of_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    declared = config["options.entry_points"][GROUP].strip().splitlines()
    found = sorted(f"{point.name} = {point.value}" for point in entry_points(group=GROUP))
    assert found == sorted(declared), "the installed package is out of date: pip install -e ."


def test_a_package_registers_a_command(tmp_path: Path, python: Any) -> None:
    """Another package's function becomes a command; it cannot replace one of the program's own."""
    info = tmp_path / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[{GROUP}]\ngreet = other:greet\nmethods = other:greet\n"
    )
    (tmp_path / "other.py").write_text("def greet(name: str) -> None:\n    print('hello', name)\n")
    where = {"environment": {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}}
    assert python(["-m", "simulator.cli", "greet", "you"], **where) == (0, b"hello you\n", [])
    status, out, _ = python(["-m", "simulator.cli", "methods", "sleb"], **where)
    assert (status, b"hello" in out) == (0, False)
