"""The command line: exit status, one clear line for bad input, the shape of its output, and that all of it is documented."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

import simulator
from calibration.cli import app
from simulator.cli import render, run
from simulator.cli import speedup as speedup_command

ROOT = Path(__file__).resolve().parents[2]

STABLE_KEYS = [
    *("model", "hardware", "family", "sparsity", "realised_sparsity", "phase", "batch", "seq", "dtype", "runtime"),
    *("dense_s", "pruned_s", "speedup", "speedup_lower", "speedup_upper", "flop_bound", "byte_bound"),
    *("roofline_bound", "limit"),
]

SPEEDUP = ["speedup", "llama-3.1-8b", "--hardware", "h100_sxm"]


def failure(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of a command refused with status 2."""
    status = run(arguments)
    out, err = capsys.readouterr()
    assert status == 2, (status, out, err)
    assert out == ""
    assert err.startswith("prunesim: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err.strip()


def output(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Standard output of a command that succeeds."""
    status = run(arguments)
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


# -- bad input --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["speedup", "llama-3.1-8b", "--hardware", "h10_sxm"], "did you mean h100_sxm"),
        (["speedup", "llama-3.1-8c", "--hardware", "h100"], "did you mean llama-3.1-8b"),
        ([*SPEEDUP, "--family", "depht"], "did you mean depth"),
        ([*SPEEDUP, "--sparsity", "1.0"], "sparsity 1: expected a fraction in [0, 1)"),
        ([*SPEEDUP, "--sparsity", "-0.1"], "sparsity -0.1: expected a fraction in [0, 1)"),
        ([*SPEEDUP, "--sparsity", "25"], "for 25 % write 0.25"),
        ([*SPEEDUP, "--sparsity", "nan"], "expected a fraction in [0, 1)"),
        ([*SPEEDUP, "--sparsity", "a"], "--sparsity 'a': expected a number"),
        ([*SPEEDUP, "--sparsity", "0.1,,0.5"], "separated by single commas"),
        ([*SPEEDUP, "--family", "semi_structured", "--sparsity", "0.25"], "0.5"),
        ([*SPEEDUP, "--family", "semi_structured", "--sparsity", "0.25,0.5"], "0.5"),
        ([*SPEEDUP, "--batch", "0"], "batch 0: expected a whole number from 1"),
        ([*SPEEDUP, "--batch", "1.5"], "--batch '1.5': expected a whole number"),
        ([*SPEEDUP, "--seq", "0"], "seq 0: expected a whole number from 1"),
        ([*SPEEDUP, "--seq", "2147483647", "--batch", "64"], "expected at most"),
        ([*SPEEDUP, "--phase", "prefil"], "did you mean prefill"),
        ([*SPEEDUP, "--phase", "generate", "--new-tokens", "0"], "new tokens 0"),
        ([*SPEEDUP, "--runtime", "graph"], "runtime 'graph' is unknown"),
        ([*SPEEDUP, "--dtype", "bf17"], "did you mean bf16"),
        ([*SPEEDUP, "--weight-dtype", "int5"], "did you mean int"),
        ([*SPEEDUP, "--devices", "0"], "devices 0"),
        ([*SPEEDUP, "--devices", "2", "--parallel", "data"], "parallel 'data' is unknown"),
        ([*SPEEDUP, "--figure", "x.jpg"], "x.jpg: expected a name that ends in .pdf, .svg or .png"),
        ([*SPEEDUP, "--figure", "no/such/x.pdf"], "folder no/such does not exist"),
        ([*SPEEDUP, "--csv", "no/such/x.csv"], "folder no/such does not exist"),
        ([*SPEEDUP, "--csv", "x.csv", "--json"], "expected one of them"),
        ([*SPEEDUP, "--option", "inner=8810"], "options belong to a family"),
        ([*SPEEDUP, "--family", "width", "--option", "inner"], "expected NAME=VALUE"),
        ([*SPEEDUP, "--family", "width", "--option", "iner=3"], "iner"),
        ([*SPEEDUP, "--family", "width", "--option", "inner=-3"], "inner"),
        ([*SPEEDUP, "--family", "width", "--option", "inner=3", "--option", "inner=4"], "given twice"),
        ([*SPEEDUP, "--dtype", "int4"], "int4"),
        (["speedup", "llama-3.1-8b", "--hardware", "a100", "--dtype", "fp8"], "a100_sxm_80gb has no fp8"),
        ([*SPEEDUP, "--devices", "7"], "devices 7"),
        (["speedup", "no/such/config.json", "--hardware", "h100"], "no/such/config.json"),
        (["speedup", "llama-3.1-8b", "--hardware", "no/such.yaml"], "no/such.yaml"),
        ([*SPEEDUP, "--family", "depth,width,semi_structured", "--sparsity", "1.5"], "expected a fraction in [0, 1)"),
        (["explain", "llama-3.1-8b", "--hardware", "h100", "--family", "all", "--sparsity", "0.3"], "one family"),
        (
            ["explain", "llama-3.1-8b", "--hardware", "h100", "--family", "depth,width", "--sparsity", "0.3"],
            "one family",
        ),
        (["explain", "llama-3.1-8b", "--hardware", "h100", "--family", "width", "--sparsity", "x=0.3"], "x"),
        (["gemm", "0", "1", "1", "--hardware", "h100"], "M 0: expected a whole number"),
        (["gemm", "1", "1", "99999999999", "--hardware", "h100"], "K 99999999999: expected a whole number"),
        (["gemm", "1", "one", "1", "--hardware", "h100"], "N 'one': expected a whole number"),
        (["gemm", "1", "1", "1", "--hardware", "h100", "--dtype", "float"], "dtype 'float' is unknown"),
        (["gemm", "1", "1", "--hardware", "h100"], "Missing argument 'K'"),
        (["gemm", "1", "1", "1"], "Missing option '--hardware'"),
        (["models", "show", "llama-9"], "llama"),
        (["models", "show", "llama-2-7b", "--batch", "0"], "batch 0"),
        (["hardware", "show", "hundred"], "'hundred' is unknown"),
        (["hardware"], "Missing command"),
        (["predict"], "No such command 'predict'"),
        (["--hardwear"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in failure(arguments, capsys)


def test_a_config_without_a_needed_key_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 8,
                "vocab_size": 16,
            }
        )
    )
    line = failure(["speedup", str(config), "--hardware", "h100"], capsys)
    assert "hidden_size" in line
    assert "config.json" in line


def test_a_malformed_yaml_is_one_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "mine.yaml"
    profile.write_text("name: mine\n  title: [\n")
    line = failure(["speedup", "llama-3.1-8b", "--hardware", str(profile)], capsys)
    assert "mine.yaml:" in line
    assert run(["hardware", "check", str(profile)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err
    assert all(row.startswith("prunesim: ") for row in err.splitlines())


def test_checking_a_shipped_profile_finds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    shipped = ROOT / "hardware_profiles" / "h100_sxm.yaml"
    assert "no problem" in output(["hardware", "check", str(shipped)], capsys)


# -- failures ---------------------------------------------------------------------------------------------------------------------


def test_a_write_failure_is_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.csv"
    target.write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("simulator.files.write.os.fsync", full)
    assert run([*SPEEDUP, "--family", "depth", "--csv", str(target)]) == 1
    _, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("prunesim: ")
    assert "out.csv: No space left" in err
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_program_error_is_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr("simulator.predict.table.table", broken)
    monkeypatch.delenv("PRUNESIM_DEBUG", raising=False)
    assert run(SPEEDUP) == 1
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "ZeroDivisionError: planted" in err


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m simulator.cli speedup llama-3.1-8b --hardware h100_sxm --family depth,width --json | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout == "[\n"
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# -- output -----------------------------------------------------------------------------------------------------------------------


def test_json_records_have_the_stable_keys_first_and_agree_with_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    records = json.loads(
        output(
            [
                *(*SPEEDUP, "--family", "depth", "--sparsity", "0.1,0.25", "--phase", "prefill,decode", "--batch"),
                *("1,8", "--json"),
            ],
            capsys,
        )
    )
    assert len(records) == 2 * 2 * 2
    table = simulator.table(["llama-3.1-8b"], ["h100_sxm"], ["depth"], [0.1, 0.25], ["prefill", "decode"], [1, 8])
    for record, expected in zip(records, table, strict=True):
        assert list(record)[: len(STABLE_KEYS)] == STABLE_KEYS
        assert record["speedup"] == expected.speedup
        assert record["speedup"] == record["dense_s"] / record["pruned_s"]
        assert record["speedup_lower"] <= record["speedup"] <= record["speedup_upper"]
        assert (record["phase"], record["batch"], record["sparsity"]) == (
            expected.phase,
            expected.batch,
            expected.sparsity,
        )


def test_csv_keeps_every_digit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out.csv"
    arguments = [*SPEEDUP, "--family", "width,low_rank", "--phase", "decode"]
    assert output([*arguments, "--csv", str(target)], capsys) == ""
    records = json.loads(output([*arguments, "--json"], capsys))
    with target.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records) == 6
    for row, record in zip(rows, records, strict=True):
        assert list(row) == list(record)
        for key, value in record.items():
            if isinstance(value, float):
                assert float(row[key]) == value, key
            else:
                assert row[key] == ("" if value is None else str(value)), key
    assert output([*arguments, "--csv", "-"], capsys) == target.read_text()


def test_a_combination_a_family_does_not_support_is_left_out_with_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SPEEDUP, "--json"]) == 0
    out, err = capsys.readouterr()
    records = json.loads(out)
    assert {r["sparsity"] for r in records if r["family"] == "semi_structured"} == {0.5}
    assert len({r["family"] for r in records}) == 11
    (line,) = [line for line in err.splitlines() if "semi_structured" in line]
    assert line.startswith("note: ")
    assert "0.1, 0.25" in line


def test_a_model_that_does_not_fit_is_said_to(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["speedup", "llama-3.1-70b", "--hardware", "h100", "--family", "depth", "--memory"]) == 0
    out, err = capsys.readouterr()
    assert "too large" in out
    assert "llama-3.1-70b" in err
    assert run(["speedup", "llama-3.1-8b", "--hardware", "h100", "--family", "depth", "--memory"]) == 0
    out, err = capsys.readouterr()
    assert "too large" not in out


@pytest.mark.parametrize("available", [60, 80, 100, 120, 200])
def test_tables_fit_their_width(
    available: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "width", lambda: available)
    out = output(["speedup", "llama-3.1-8b", "--hardware", "a100,h100,4090", "--phase", "prefill,decode"], capsys)
    tables = [
        line for line in out.splitlines() if "batch 1" not in line and "interval)" not in line and "limit:" not in line
    ]
    assert max(map(len, tables)) <= available
    assert "…" not in out
    for name in ("a100_sxm_80gb", "h100_sxm", "rtx_4090", "sparse_attention", "kv_cache"):
        assert name in out


def test_narrow_layouts_lose_columns_not_devices() -> None:
    table = simulator.table(["llama-3.1-8b"], ["a100", "h100"], ["depth"], [0.25])
    layouts = list(speedup_command.speedup_layouts(table.records))
    widths = [render.table_width(columns) for columns in layouts]
    assert widths == sorted(widths, reverse=True)
    assert all(
        any("h100_sxm" in c.title for c in columns) and any("a100_sxm_80gb" in c.title for c in columns)
        for columns in layouts
    )


def test_an_odd_inner_width_is_slower_than_its_aligned_neighbour_and_explain_says_alignment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [
        *("explain", "llama-2-7b", "--family", "width", "--sparsity", "0.2", "--hardware", "a100,h100,4090"),
        *("--json", "--option"),
    ]
    odd = json.loads(output([*arguments, "inner=8810"], capsys))
    aligned = json.loads(output([*arguments, "inner=8816"], capsys))
    assert len(odd) == 3
    for slow, fast in zip(odd, aligned, strict=True):
        assert slow["pruned_s"] > fast["pruned_s"], slow["hardware"]
        assert "alignment" in slow["conclusion"]
        assert "alignment" not in fast["conclusion"]


def test_the_steps_of_explain_multiply_to_the_speedup(capsys: pytest.CaptureFixture[str]) -> None:
    (record,) = json.loads(
        output(
            [
                *("explain", "llama-3.1-8b", "--family", "dynamic_depth", "--sparsity", "0.3", "--hardware", "h100"),
                "--json",
            ],
            capsys,
        )
    )
    product = 1.0
    for step in record["waterfall"]:
        product *= step["factor"]
    assert product == pytest.approx(record["speedup"], rel=1e-12)
    assert record["waterfall"][0]["factor"] == pytest.approx(1 / 0.7)


def test_explain_ends_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    out = output(
        ["explain", "llama-3.1-8b", "--family", "width", "--sparsity", "attention=0.25,mlp=0.5", "--hardware", "h100"],
        capsys,
    )
    last = out.rstrip().splitlines()[-1]
    assert last.endswith(".")
    assert "promises" in out
    assert "h100_sxm" in out


def test_gemm_prints_a_ladder_that_ends_at_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gemm", "1,2048", "4096", "4096", "--hardware", "a100,h100"]
    records = json.loads(output([*arguments, "--json"], capsys))
    assert [(r["m"], r["hardware"]) for r in records] == [
        (1, "a100_sxm_80gb"),
        (2048, "a100_sxm_80gb"),
        (1, "h100_sxm"),
        (2048, "h100_sxm"),
    ]
    for r in records:
        assert list(r["ladder_s"]) == ["roofline", "tile", "wave", "alignment", "kernel", "launch"]
        assert r["ladder_s"]["launch"] == r["seconds"]
        assert r["lower_s"] < r["seconds"] < r["upper_s"]
    out = output([*arguments, "--explain"], capsys)
    assert out.count("effect") == 4


def test_lists_and_shows(capsys: pytest.CaptureFixture[str]) -> None:
    names = {r["name"] for r in json.loads(output(["hardware", "list", "--json"], capsys))}
    assert {"a100_sxm_80gb", "h100_sxm", "rtx_4090"} <= names
    assert "h100_sxm" in output(["hardware", "list"], capsys)
    (shown,) = json.loads(output(["hardware", "show", "h100", "--json"], capsys))
    assert shown["name"] == "h100_sxm"
    assert shown["sources"]
    assert "989" in output(["hardware", "show", "h100"], capsys)
    models = json.loads(output(["models", "list", "--json"], capsys))
    assert len(models) >= 12
    assert "llama-3.1-8b" in output(["models", "list"], capsys)
    assert "8,030,261,248" in output(["models", "show", "llama-3.1-8b"], capsys)
    (model,) = json.loads(output(["models", "show", "llama-3.1-8b", "--json"], capsys))
    assert sum(g["flops"] for g in model["gemms"]) < model["flops"]


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(["--version"], capsys).startswith("prunesim ")
    assert output([], capsys) == output(["--help"], capsys)


def test_no_colour_where_it_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert render.colored()
    assert "\x1b[" in render.table_text([render.Column("a", ["1"], styles=["red"])], color=True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not render.colored()
    assert "\x1b[" not in render.table_text([render.Column("a", ["1"], styles=["red"])], "title")


def test_the_progress_bar_waits_and_needs_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    now = [0.0]
    monkeypatch.setattr(render.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("TERM", "xterm")
    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        now[0] = 0.0
        with render.progress("predicting") as report:
            now[0] = 1.9
            report(1, 4)
            assert stream.getvalue() == ""
            now[0] = 2.1
            report(2, 4)
        assert ("2/4" in stream.getvalue()) is expected


# -- the whole ----------------------------------------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Paths of all commands: "speedup", "hardware list", ..."""

    def walk(command: object, path: list[str]) -> list[str]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return [" ".join(path)]
        return [found for name, sub in inner.items() for found in walk(sub, [*path, name])]

    return walk(typer.main.get_command(app), [])


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(commands()) >= 8
    missing = [command for command in commands() if f"prunesim {command}" not in text]
    assert not missing


def test_every_command_has_help_that_names_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands():
        out = output([*command.split(), "--help"], capsys)
        assert f"prunesim {command}" in out
        assert "--json" in out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from simulator.cli import run; run(['--help']); "
        "heavy = {'numpy', 'matplotlib', 'pydantic', 'scipy', 'torch', 'pandas'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_predicting_imports_neither_matplotlib_nor_torch() -> None:
    code = (
        f"import sys; from simulator.cli import run; run({[*SPEEDUP, '--family', 'depth']!r}); "
        "heavy = {'matplotlib', 'torch', 'pandas', 'pyarrow'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_a_check_as_json_lists_the_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ROOT / "hardware_profiles" / "h100_sxm.yaml"
    assert json.loads(output(["hardware", "check", str(good), "--json"], capsys)) == {"file": str(good), "problems": []}
    bad = tmp_path / "bad.yaml"
    bad.write_text("schema_version: 1\nname: x\n")
    assert run(["hardware", "check", str(bad), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["problems"]
