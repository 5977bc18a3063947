"""Hardware profiles: shipped facts, bad files, saving and loading, arrays, sections."""

from __future__ import annotations

import codecs
import hashlib
import io
import itertools
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_times import decode, prefill

from simulator import lower, workload_time
from simulator.errors import InputError
from simulator.hardware import library, save
from simulator.hardware.arrays import read_archive, read_arrays
from simulator.hardware.library import (
    check_hardware,
    files_of,
    hardware_warnings,
    list_hardware,
    load_hardware,
    new_hardware,
    profiles_folder,
    reference,
    shipped_names,
)
from simulator.hardware.profile import (
    ARCHITECTURES,
    STACKS,
    Fitted,
    HardwareProfile,
    Provenance,
    Section,
)
from simulator.hardware.save import save_hardware, save_stack
from simulator.hardware.schema import QUANTITIES, plain_name
from simulator.operators import CONSTANTS
from simulator.operators.base import ENGINE_STACK, OTHER_STACK, SAME_STACK
from simulator.uncertainty.operators import gemm_time, operator_time
from simulator.units import EXAMPLES

pytestmark = pytest.mark.quick

BAD = Path(__file__).parents[1] / "bad_profiles"
GOOD = (BAD / "good.yaml").read_text()
LINE = re.compile(r".+?:\d+:\d+: [^\n]+?: [^\n]+")


def write(folder: Path, content: str | bytes) -> Path:
    path = folder / "my_gpu.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", list_hardware())
def test_shipped_profile_is_complete(name: str, tmp_path: Path) -> None:
    path = profiles_folder() / f"{name}.yaml"
    assert check_hardware(path) == hardware_warnings(path) == []
    hw = load_hardware(name)
    assert hw.name == name
    common = {"fp32", "fp16", "bf16", "int8"} | ({"tf32"} if hw.architecture != "cdna4" else set())
    assert common <= set(hw.rates) or hw.architecture in ("volta", "turing", "cpu")
    assert ("fp8" in hw.rates) == (hw.architecture not in ("volta", "turing", "ampere", "cpu"))
    facts = {"sm_count", *QUANTITIES, *(f"rates.{dtype}" for dtype in hw.rates)}
    facts |= {"link.bandwidth", "link.latency"} if hw.link else set()
    facts |= {"link.connection"} if hw.link and hw.link.connection == "pcie-host" else set()
    facts |= {"bridge.bandwidth", "bridge.latency"} if hw.bridge else set()
    if hw.architecture != "cpu":
        assert hw.sources.keys() == facts
        # where it can be looked up
        assert all("https://" in source for source in hw.sources.values())
    else:  # an example, measured or said by its system; its boost clock is the highest
        assert hw.sources.keys() == facts - {"max_clock"}
    assert hw.clock_headroom >= 1
    own = hw.sections if hw.stack == "" else {}
    save_hardware(replace(hw, sections=own), tmp_path / f"{name}.yaml")
    for stack in STACKS:
        if (profiles_folder() / f"{name}.{stack}.yaml").exists():
            save_stack(hw, stack, tmp_path / f"{name}.{stack}.yaml")
    # saving a shipped profile again would change nothing
    shipped = profiles_folder().glob(f"{name}.*")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        p.name: p.read_bytes() for p in shipped
    }
    for operator in CONSTANTS:
        section = hw.section(operator, "bf16" if "bf16" in hw.rates else "fp16")
        for constant, known in CONSTANTS[operator].items():
            assert known.low <= section[constant] <= known.high, constant


FLOP_PER_CLOCK = """
device           fp32  tf32  fp16  bf16    fp8   int8  nvfp4  mxfp4  mxfp6
a100_sxm_80gb     128  1024  2048  2048      -   4096      -      -      -
h100_sxm          256  2048  4096  4096   8192   8192      -      -      -
rtx_4090          256   256   512   512   1024   2048      -      -      -
rtx_3090          256   256   512   512      -   2048      -      -      -
v100              128     -  1024     -      -      -      -      -      -
t4                128     -  1024     -      -   2048      -      -      -
mi300x            256  1024  2048  2048   4096   4096      -      -      -
mi355x            256     -  4096  4096   8192   8192      -  16384  16384
a6000             256   512  1024  1024      -   2048      -      -      -
h20               256   512  1024  1024   2048   2048      -      -      -
l40s              256   512  1024  1024   2048   2048      -      -      -
rtx_pro_6000      256   512  1024  1024   2048   2048   4096      -      -
b200_sxm          256  4096  8192  8192  16384  16384  32768      -      -
a100_sxm_40gb     128  1024  2048  2048      -   4096      -      -      -
a100_pcie_80gb    128  1024  2048  2048      -   4096      -      -      -
rtx_5090          256   256   512   512   1024   2048   4096      -      -
a10               256   512  1024  1024      -   2048      -      -      -
gh200             256  2048  4096  4096   8192   8192      -      -      -
h100_pcie         256  2048  4096  4096   8192   8192      -      -      -
h200_sxm          256  2048  4096  4096   8192   8192      -      -      -
h800              256  2048  4096  4096   8192   8192      -      -      -
l4                256   512  1024  1024   2048   2048      -      -      -
a10g              256   256   512   512      -   1024      -      -      -
l20               256   256   512   512   1024   1024      -      -      -
rtx_6000_ada      256   512  1024  1024   2048   2048      -      -      -
a40               256   512  1024  1024      -   2048      -      -      -
a30               128  1024  2048  2048      -   4096      -      -      -
h100_nvl          256  2048  4096  4096   8192   8192      -      -      -
b300_sxm          256  4096  8192  8192  16384    512  49152      -      -
gb300             256  4096  8192  8192  16384    512  49152      -      -
rtx_5080          256   256   512   512   1024   2048   4096      -      -
rtx_4080          256   256   512   512   1024   2048      -      -      -
rtx_3080          256   256   512   512      -   2048      -      -      -
rtx_pro_6000_ws   256   512  1024  1024   2048   2048   4096      -      -
a100_pcie_40gb    128  1024  2048  2048      -   4096      -      -      -
mi325x            256  1024  2048  2048   4096   4096      -      -      -
"""
"""FLOP per clock and SM, dense, from the architecture whitepapers (two for each multiply-add)."""


@pytest.mark.parametrize(
    "row", FLOP_PER_CLOCK.strip().splitlines()[1:], ids=lambda row: row.split()[0]
)
def test_rates_follow_from_clock_and_sm_count(row: str) -> None:
    _, *formats = FLOP_PER_CLOCK.strip().splitlines()[0].split()
    name, *cells = row.split()
    hw = load_hardware(name)
    known = {dtype: int(cell) for dtype, cell in zip(formats, cells, strict=True) if cell != "-"}
    assert set(hw.rates) == set(known)
    for dtype, each in known.items():
        # H and B datasheets state fp32 at a higher boost clock than the tensor core rates
        clock = hw.max_clock_hz if hw.name[0] in "bgh" and dtype == "fp32" else hw.boost_clock_hz
        # printed as 362.05 for 366.4; no clock of the H20 is published
        loose = (name == "l40s" and dtype in ("fp16", "bf16")) or name == "h20"
        tolerance = 0.013 if loose else 0.01
        # int8 of Blackwell Ultra is stated at no known clock
        tolerance = 0.1 if dtype == "int8" and name in ("b300_sxm", "gb300") else tolerance
        assert hw.peak_flop_per_s(dtype) == pytest.approx(hw.sm_count * each * clock, rel=tolerance)


def test_numbers_people_know() -> None:
    a100, h100, geforce = (load_hardware(name) for name in ("a100", "h100", "4090"))
    assert a100.peak_flop_per_s("bf16", sparse=True) == 624e12
    assert geforce.l2_bytes == 73728 * 1024
    assert a100.ridge_point("bf16") == pytest.approx(153.0, abs=0.1)
    assert geforce.clock_headroom == pytest.approx(3105 / 2520)
    assert (h100.bandwidth_bytes_per_s, h100.link.bandwidth_bytes_per_s) == (3.35e12, 450e9)


def test_names_aliases_and_changed_files(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_hardware(path) is load_hardware(path)
    write(tmp_path, GOOD.replace("value: 132", "value: 1320"))
    assert load_hardware(path).sm_count == 1320
    assert load_hardware("H100-SXM") is load_hardware("h100_sxm") is load_hardware(" H100 sxm ")
    assert load_hardware("RTX 4090") is load_hardware("rtx_4090")
    assert load_hardware("NVIDIA A100-SXM4-80GB").name == "a100_sxm_80gb"  # as nvidia-smi prints it
    assert load_hardware(str(profiles_folder() / "l40s.yaml")).name == "l40s"
    for name in list_hardware():  # the quick look-up of aliases reads what the loader reads
        for alias in (name, *load_hardware(name).aliases):
            assert shipped_names()[plain_name(alias)] == name


def test_unknown_device_is_one_line_and_names_the_closest() -> None:
    for name in (
        "",
        "p100",
        "../h100_sxm",
        "h100_sxm.yml",
        "/",
        "a\0b.yaml",
        "x" * 5000 + ".yaml",
        "\ud800.yaml",
    ):
        with pytest.raises(InputError) as caught:
            load_hardware(name)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="did you mean h100"):
        load_hardware("h10")
    with pytest.raises(InputError, match="expected a name or a path, got int"):
        load_hardware(4090)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a100_sxm_80gb has no fp8 arithmetic; it has fp32"):
        load_hardware("a100").rate("fp8")
    with pytest.raises(InputError, match="did you mean gemm"):
        load_hardware("a100").section("gem", "bf16")


def _bad_files() -> Iterator[tuple[str, str, str, str]]:
    """Yield a name, the replaced text, its replacement, and the expected error: the cases of
    edits.txt and cases of every quantity."""
    for line in (BAD / "edits.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, old, new, says = re.split(r" ?\| ?", line)
            yield (
                name,
                codecs.decode(old, "unicode_escape"),
                codecs.decode(new, "unicode_escape"),
                says,
            )
    for key, (_, quantity) in QUANTITIES.items():
        line = re.search(rf"  {key}: {{value: ([^,]+),.*\n", GOOD)
        whole, value, unit = line[0], line[1], quantity.unit
        bad = {
            "the unit is missing": ["12.5", "3.35e12"],
            "unknown": ["3 parsec"],
            "is a unit of": [next(EXAMPLES[u] for u in EXAMPLES if u != unit)],
            "expected": [
                f"{number:g} {unit}" for number in (0, -1, quantity.low / 10, quantity.high * 10)
            ],
            "does not start with a number": [".nan", f"inf {unit}", "true", ""],
            "got a list": [f"[{value}]"],
        }
        for says, wrong in bad.items():
            yield from (
                (f"{key} {text or 'empty'}", whole, whole.replace(value, text), says)
                for text in wrong
            )
        yield f"{key} bare", whole, f"  {key}: {value}\n", "expected {value: ..., source: ...}"
        yield f"{key} without source", whole, f"  {key}: {{value: {value}}}\n", "source: is missing"
        yield f"{key} twice", whole, whole + whole, "is given twice"
        if key != "max_clock":
            yield f"{key} missing", whole, "", f"{key}: is missing"


@pytest.mark.parametrize(
    ("old", "new", "says"), [pytest.param(*case, id=name) for name, *case in _bad_files()]
)
def test_bad_file(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert old == "*" or old in GOOD
    text = new if old == "*" else GOOD.replace(old, new, 1)
    path = write(tmp_path, text.encode("latin-1"))
    problems = check_hardware(path)
    assert any(says in line for line in problems), problems
    assert all(LINE.fullmatch(line) and line.startswith(str(path)) for line in problems), problems
    with pytest.raises(InputError) as caught:
        load_hardware(path)
    assert str(caught.value).startswith(problems[0])


def test_position_is_that_of_the_mistake(tmp_path: Path) -> None:
    path = write(
        tmp_path, GOOD.replace("value: 3.35 TB/s", "value: 3.35 TB").replace("hopper", "hoper")
    )
    number = GOOD.splitlines().index("  bandwidth: {value: 3.35 TB/s, source: sheet}") + 1
    assert check_hardware(path) == [
        (
            f"{path}:5:15: architecture: unknown value hoper; did you mean hopper? Known:"
            f" {', '.join(ARCHITECTURES)}"
        ),
        (
            f'{path}:{number}:22: datasheet.bandwidth.value: expected a bandwidth such as "3.35'
            ' TB/s", got "3.35 TB": TB is a unit of an amount of bytes'
        ),
    ]
    with pytest.raises(InputError, match=r"\(and 1 more: prunesim hardware check "):
        load_hardware(path)


def test_what_is_no_file_and_files_that_take_too_much(tmp_path: Path) -> None:
    assert "is a folder" in check_hardware(tmp_path)[0]
    assert "cannot be read" in check_hardware(tmp_path / "gone.yaml")[0]
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "the pipe is empty" in check_hardware(tmp_path / "pipe.yaml")[0]
    assert "larger than 1 MB" in check_hardware(write(tmp_path, GOOD + "#" * 1_000_001))[0]
    bomb = "a: &a [x, x, x]\n" + "".join(
        f"{b}: &{b} [{f'*{a}, ' * 4}]\n" for a, b in zip("abcdefgh", "bcdefghi")
    )
    (problem,) = check_hardware(write(tmp_path, bomb))
    assert problem.startswith(
        f"{tmp_path}/my_gpu.yaml:1:4: a: anchors (&) and aliases (*) are not allowed"
    )
    assert len(check_hardware(write(tmp_path, "[" * 300_000))) == 1


def assert_same(a: HardwareProfile, b: HardwareProfile) -> None:
    other = {"sections": {}, "stacks": {}, "path": None}
    assert {**vars(a), **other} == {**vars(b), **other}
    assert a.sections.keys() == b.sections.keys()
    for one, other in ((a.sections[key], b.sections[key]) for key in a.sections):
        assert {**vars(one), "arrays": None} == {**vars(other), "arrays": None}
        assert one.arrays.keys() == other.arrays.keys()
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name], strict=True)


def calibrated() -> HardwareProfile:
    rng = np.random.default_rng(0)
    provenance = Provenance(
        "tables: a, b", "0" * 64, "2026-11-25", "CUDA 12.9 # stack", "NVIDIA H100", "graph", 400
    )
    gemm = Section(
        {
            "t0": Fitted(2.7e-6, 1.25e-8),
            "e_tc": Fitted(0.1 + 0.2, None, "fixed"),
            "e_d": Fitted(1.0, 0.0),
        },
        {
            "lattice": rng.normal(size=(16, 13, 13)),
            "edges": np.arange(5),
            "small": np.float32([[1.5, 2.5]]),
        },
        0.85,
        {"mape": 0.046, "speedup p95": 0.178},
        provenance,
        "calibrated",
    )
    provenance = replace(provenance, inherited_from="a100_sxm_80gb")
    runtime = Section({"host_op_s": Fitted(1e-5)}, provenance=provenance, status="inherited")
    return load_hardware("h100").calibrated({("gemm", "bf16"): gemm, ("runtime", "*"): runtime})


def saved(folder: Path) -> tuple[HardwareProfile, Path]:
    hw, path = calibrated(), folder / "h100_sxm.yaml"
    save_hardware(hw, path)
    return hw, path


def with_lattice(hw: HardwareProfile) -> HardwareProfile:
    gemm = replace(hw.sections["gemm", "bf16"], arrays={"lattice": np.zeros(3)})
    return replace(hw, sections={("gemm", "bf16"): gemm})


def test_new_arrays_replace_the_old_file(tmp_path: Path) -> None:
    hw, path = saved(tmp_path)
    (old,) = tmp_path.glob("*.npz")
    bystander = tmp_path / "h100_sxm.mine.npz"
    bystander.write_bytes(b"not ours")
    save_hardware(with_lattice(hw), path)
    assert old not in tmp_path.iterdir()
    assert load_hardware(path).sections["gemm", "bf16"].arrays["lattice"].shape == (3,)
    save_hardware(replace(hw, sections={}), path)
    assert list(tmp_path.glob("*.npz")) == [bystander]


def test_saving_stopped_in_between_leaves_a_readable_profile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hw, path = saved(tmp_path)
    whole = save.write_whole

    def stop(target: Path, content: bytes) -> None:
        if target.suffix == ".yaml":
            raise KeyboardInterrupt
        whole(target, content)

    monkeypatch.setattr(save, "write_whole", stop)
    with pytest.raises(KeyboardInterrupt):
        save_hardware(with_lattice(hw), path)
    library._load.cache_clear()
    assert_same(load_hardware(path), hw)


CHARACTERS = st.characters(categories=["L", "N", "P", "Zs"])
TEXT = (
    st.text(CHARACTERS, min_size=1, max_size=40)
    .map(str.strip)
    .filter(lambda text: text and text.isprintable())
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_what_is_saved_is_read_again(data: st.DataObject, tmp_path: Path) -> None:
    hw = calibrated()
    facts = {a: data.draw(st.floats(q.low, q.high), a) for a, q in QUANTITIES.values()}
    facts["max_clock_hz"] = max(facts["max_clock_hz"], facts["boost_clock_hz"])
    texts = data.draw(st.lists(TEXT, min_size=7, max_size=7))
    about = Provenance(texts[0], "0" * 64, str(data.draw(st.datetimes())), *texts[1:4], rows=3)
    constants = {
        name: Fitted(
            data.draw(st.floats(c.low, c.high), name), data.draw(st.none() | st.floats(0, 1e30))
        )
        for name, c in CONSTANTS["gemm"].items()
    }
    gemm = replace(hw.sections["gemm", "bf16"], constants=constants, provenance=about)
    sources = {**hw.sources, "power": texts[5]}  # sources get short names
    hw = replace(
        hw, title=texts[4], references={}, sources=sources, notes={"sm_count": texts[6]}, **facts
    )
    hw = replace(hw, sections={**hw.sections, ("gemm", "bf16"): gemm})
    save_hardware(hw, tmp_path / "my.yaml")
    assert check_hardware(tmp_path / "my.yaml") == []
    loaded = load_hardware(tmp_path / "my.yaml")
    assert_same(loaded, replace(hw, references=loaded.references))
    assert not loaded.sections["gemm", "bf16"].arrays["lattice"].flags.writeable


def test_what_cannot_be_loaded_or_has_no_place_is_not_written(tmp_path: Path) -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sm_count": 0}, "sm_count"),
        ({"power_w": 1e9}, "datasheet.power.value"),
        ({"architecture": "pascal"}, "architecture"),
        ({"title": "two\nlines"}, "title"),
        ({"sources": {}}, "is missing"),
        ({"aliases": ("l40s",)}, "already means l40s"),
    ]
    hw = load_hardware("h100")
    for changes, says in refused:
        with pytest.raises(InputError, match=says):
            save_hardware(replace(hw, **changes), tmp_path / "x.yaml")
    for target in (tmp_path / "x.txt", tmp_path / "gone" / "x.yaml"):
        with pytest.raises(InputError):
            save_hardware(hw, target)
    section = Section(
        {"t0": Fitted(1e-6)}, {"lattice": np.array([1.0, np.nan])}, status="calibrated"
    )
    with pytest.raises(ValueError, match="lattice holds values that are not finite"):
        save_hardware(replace(hw, sections={("gemm", "bf16"): section}), tmp_path / "x.yaml")
    assert list(tmp_path.iterdir()) == []


def test_arrays_of_another_version_are_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    (npz,) = tmp_path.glob("*.npz")
    npz.write_bytes(npz.read_bytes() + b"1")
    assert "belongs to another version of the profile" in check_hardware(path)[0]
    npz.unlink()
    assert "cannot be read" in check_hardware(path)[0]
    npz.mkdir()
    assert "is a folder" in check_hardware(path)[0]


def _zip(**entries: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(f"gemm.bf16.{name}.npy", data)
    return buffer.getvalue()


def _npy(array: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


_HUGE = (
    b"{'descr': '<f8', 'fortran_order': False, 'shape': (999999999, 999999999), }".ljust(117)
    + b"\n"
)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "not a readable .npz"),
        (b"no zip at all", "not a readable .npz"),
        (_zip(other=_npy(np.zeros(3))), "is not in the .npz"),
        (_zip(x=b""), "bad header"),
        (_zip(x=b"\x93NUMPY\x09\x00"), "bad header"),
        (_zip(x=b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16), "bad header"),
        (_zip(x=_npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)), "pickled objects"),
        (_zip(x=_npy(np.array(["text"]))), "expected numbers"),
        (_zip(x=_npy(np.array([np.inf]))), "not finite"),
        (_zip(x=_npy(np.zeros(100))[:-8]), "does not have the size"),
        (_zip(x=_npy(np.zeros(100)) + b"more"), "does not have the size"),
        (_zip(x=b"\x93NUMPY\x01\x00v\x00" + _HUGE), "does not have the size"),
        (_zip(x=bytes(70_000_000)), "larger than 64 MB"),
        (_zip(x=bytes(40_000_000), y=bytes(40_000_000)), "larger than 64 MB"),
    ],
    # the bytes of an archive hold the time when it was written, and pytest -n needs the same name
    # in each process
    ids=lambda value: value if isinstance(value, str) else "raw",
)
def test_bad_arrays(raw: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(raw)
    names, digest = ("x", "y") if b"gemm.bf16.y" in raw else ("x",), hashlib.sha256(raw).hexdigest()
    with pytest.raises(ValueError, match=re.escape(says)):
        read_arrays(read_archive(path, digest), "gemm.bf16", names)


def test_sections_are_defaults_or_inherited_between_the_16_bit_types_only(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("calibrated:")]
    for part in (r"  max_clock:.*\n", r"  link:\n(?:    .*\n)+", r"aliases:.*\n"):
        text, changed = re.subn(part, "", text)
        assert changed == 1
    hw = load_hardware(write(tmp_path, text))
    assert (hw.link, hw.aliases, hw.clock_headroom) == (None, (), 1.0)
    section = hw.section("gemm", "bf16")
    assert section.status == section.constants["t0"].status == "default"
    assert section["t0"] == 2.7e-6  # the default of its architecture
    hw = load_hardware(write(tmp_path, GOOD))
    own, inherited = hw.section("gemm", "bf16"), hw.section("gemm", "fp16")
    assert (own.status, inherited.status) == ("calibrated", "inherited")
    assert own["e_tc"] == inherited["e_tc"] == 0.81
    assert inherited.provenance.inherited_from == "my_gpu gemm bf16"
    assert own["e_d"] == 0.81  # not fitted: the default, and it says so
    assert own.constants["e_d"].status == "default"
    assert (
        hw.section("gemm", "fp8").status
        == hw.section("attention_decode", "bf16").status
        == "default"
    )
    uneven = replace(hw, rates={**hw.rates, "fp16": replace(hw.rates["fp16"], flop_per_s=1e15)})
    assert uneven.section("gemm", "fp16").status == "default"


def section(value: float, stack: str, **more: Any) -> Section:
    about = Provenance(
        "my records", "0" * 64, "2026-11-25", f"{stack} 1.0", "my GPU", "CUDA graph", 400
    )
    return Section(
        {"t0": Fitted(value)}, provenance=about, status="calibrated", stack=stack, **more
    )


def stacked(folder: Path) -> Path:
    """Return a device with two stacks: sglang has GEMMs; trtllm has other GEMMs, and GEMMs of 4-bit
    weights with arrays."""
    path = write(folder, GOOD[: GOOD.index("calibrated:")])
    hw = load_hardware(path)
    one = {("gemm", "bf16"): section(1e-6, "", section_scale=0.8)}
    save_stack(hw.calibrated(one), "sglang", folder / "my_gpu.sglang.yaml")
    both = {
        ("gemm", "bf16"): section(2e-6, ""),
        ("gemm", "int4_wo"): section(3e-6, "", arrays={"x": np.zeros(3)}),
    }
    save_stack(hw.calibrated(both), "trtllm", folder / "my_gpu.trtllm.yaml")
    return path


def test_the_preferred_stack_comes_first_and_others_lend(tmp_path: Path) -> None:
    path = stacked(tmp_path)
    assert [check_hardware(file) for file in sorted(tmp_path.glob("*.yaml"))] == [[], [], []]
    hw, other = load_hardware(path), load_hardware(f"{path}@trtllm")
    assert (list(hw.stacks), hw.stack, other.stack) == (["sglang", "trtllm"], "sglang", "trtllm")
    assert [hw.section("gemm", "bf16")["t0"], other.section("gemm", "bf16")["t0"]] == [1e-6, 2e-6]
    # SGLang runs Marlin, not TensorRT-LLM's weight-only kernels
    assert hw.section("gemm", "int4_wo").status == "default"
    inherited = hw.sections["gemm", "int4_wo"]
    assert (inherited["t0"], inherited.status, inherited.stack) == (3e-6, "inherited", "trtllm")
    assert inherited.provenance.inherited_from == "my_gpu trtllm"
    assert other.section("gemm", "int4_wo").status == "calibrated"
    assert (
        hw.on("trtllm")
        is other
        is load_hardware(path, stack="trtllm")
        is load_hardware(f"{path}@ TRTLLM")
    )
    pinned = hw.on("sglang")
    assert pinned is pinned.on("sglang") is hw.on("sglang")
    assert pinned.sections == hw.sections
    assert (hw.label, pinned.label, other.label) == ("my_gpu", "my_gpu@sglang", "my_gpu@trtllm")
    assert other.on("sglang").label == "my_gpu@sglang"
    # an engine chooses among the stacks, but not against a person
    assert [h.serving(("torch", "trtllm")).stack for h in (hw, pinned, other)] == [
        "trtllm",
        "sglang",
        "trtllm",
    ]
    assert hw.serving(()) is hw
    assert reference(str(path)) == str(path)
    assert [reference(name) for name in ("a100", "A100@trtllm")] == [
        "a100_sxm_80gb",
        "a100_sxm_80gb@trtllm",
    ]
    one = section(4e-6, "vllm")
    save_stack(
        replace(hw, stacks={"vllm": {("gemm", "bf16"): one}}), "vllm", tmp_path / "my_gpu.vllm.yaml"
    )
    assert list(load_hardware(path).stacks) == ["vllm", "sglang", "trtllm"]  # a new file is seen
    assert not any("." in name for name in list_hardware())


def test_a_section_scale_is_that_of_its_table_on_the_user_s_stack_alone(tmp_path: Path) -> None:
    path = stacked(tmp_path)
    for same, factors in ((False, (ENGINE_STACK, 1.0)), (True, (SAME_STACK, 0.8))):
        hw = load_hardware(path, same_stack=same)
        assert hw.error_scales(hw.section("gemm", "bf16")) == factors
        for dtype in ("int4_wo", "fp8"):
            assert hw.error_scales(hw.section("gemm", dtype)) == (OTHER_STACK, 1.0)
    own = load_hardware(write(tmp_path, GOOD))  # its own calibration, with stacks beside it
    assert (own.stack, own.same_stack, list(own.stacks)) == ("", True, ["", "sglang", "trtllm"])
    assert own.error_scales(own.section("gemm", "bf16")) == (SAME_STACK, 0.9)
    # a copy of a shipped profile is not the user's calibration
    save_hardware(load_hardware("h100"), tmp_path / "copy.yaml")
    copy = load_hardware(tmp_path / "copy.yaml")
    assert (copy.same_stack, copy.section("attention_decode", "bf16").stack) == (False, "vllm")


@pytest.mark.parametrize(
    ("name", "key", "factor", "says"),
    [
        ("l40s", "bandwidth", 1e-2, "expected 190 GB/s to 1.10 TB/s for ada, got 8.64 GB/s"),
        ("h100_sxm", "bf16", 2.0, "got 1.98 PFLOP/s; check that it is not the rate with 2:4 spars"),
        ("a10", "fp16", 2.0, "got 250 TFLOP/s; check that it is not the rate with 2:4 sparsity"),
        ("b200_sxm", "nvfp4", 2.0, "got 18.0 PFLOP/s"),
        ("mi300x", "fp8", 2.0, "got 5.23 PFLOP/s; check that"),
        ("t4", "int8", 2.0, "got 260 TFLOP/s; check that it is not the rate with 2:4 sparsity"),
        ("a100_sxm_80gb", "fp16", 1e-3, "got 312 GFLOP/s"),
    ],
)
def test_facts_outside_the_range_of_the_architecture_are_warnings(
    name: str, key: str, factor: float, says: str, tmp_path: Path
) -> None:
    hw = load_hardware(name)
    if key == "bandwidth":
        hw = replace(hw, bandwidth_bytes_per_s=factor * hw.bandwidth_bytes_per_s)
    else:
        rate = replace(hw.rates[key], flop_per_s=factor * hw.rates[key].flop_per_s)
        hw = replace(hw, rates={**hw.rates, key: rate})
    save_hardware(replace(hw, stacks={}, sections={}), tmp_path / "wrong.yaml")
    (warning,) = hardware_warnings(tmp_path / "wrong.yaml")
    assert key in warning
    assert says in warning


def test_stacks_of_a_related_gpu(tmp_path: Path) -> None:
    pcie, sxm = load_hardware("h100_pcie"), load_hardware("h100")
    assert list(pcie.stacks) == list(sxm.stacks)
    for key, inherited in pcie.on("trtllm").sections.items():
        assert inherited.status == "inherited"
        assert inherited.constants is sxm.on("trtllm").sections[key].constants
        assert inherited.provenance.inherited_from.startswith("h100_sxm ")
    assert ("collective", "*") in sxm.sections
    assert ("collective", "*") not in pcie.sections  # another link
    both = [
        load_hardware(f"{name}@trtllm").section("gemm", "bf16").status for name in ("h200", "gh200")
    ]
    assert both == ["calibrated", "inherited"]  # its own tables, or its sibling's
    old = load_hardware(write(tmp_path, GOOD.replace("vendor:", "stacks_of: h100_sxm\nvendor:")))
    assert old.section("attention_decode", "bf16").status == "inherited"
    assert ("gemm", "fp8") not in old.sections  # it has no such arithmetic
    path = write(tmp_path, GOOD.replace("vendor:", "stacks_of: h101_sxm\nvendor:"))
    assert "did you mean h100_sxm" in check_hardware(path)[0]
    assert LINE.fullmatch(check_hardware(path)[0])
    with pytest.raises(InputError, match="stacks_of: profile 'h101_sxm' is unknown"):
        load_hardware(path)
    # a chain of related GPUs is followed, a circle is refused
    (tmp_path / "first.yaml").write_text(
        GOOD.replace("name: my_gpu", "name: first\nstacks_of: h100_pcie")
    )
    second = GOOD.replace("name: my_gpu", "name: second\nstacks_of: first")
    (tmp_path / "second.yaml").write_text(second)
    found = load_hardware(tmp_path / "second.yaml")
    assert (
        found.section("attention_decode", "bf16").constants
        is sxm.section("attention_decode", "bf16").constants
    )
    assert len(files_of(found)) > len(files_of(load_hardware(tmp_path / "first.yaml")))
    (tmp_path / "second.yaml").write_text(second.replace("stacks_of: first", "stacks_of: second"))
    with pytest.raises(InputError, match="second -> second is a circle"):
        load_hardware(tmp_path / "second.yaml")
    assert "is a circle" in check_hardware(tmp_path / "second.yaml")[0]
    for i in range(400):  # the end of the chain is missing
        (tmp_path / f"g{i}.yaml").write_text(
            GOOD.replace("name: my_gpu", f"name: g{i}\nstacks_of: g{i + 1}")
        )
    with pytest.raises(InputError, match=r"g0 -> g1 .* has more than 8 steps"):
        load_hardware(tmp_path / "g0.yaml")


def test_unknown_stacks_are_one_line_and_name_those_there_are(tmp_path: Path) -> None:
    for name, says in (
        ("h100@tensorrt", "h100_sxm: stack 'tensorrt' is unknown; .*Known: sglang, trtllm, vllm"),
        ("h100@", "Known: sglang, trtllm, vllm"),
        ("h100@torch", "Known: sglang, trtllm, vllm"),
        ("cpu@vllm", "cpu: expected no stack, as nothing was fitted for one, got 'vllm'"),
        ("h10@vllm", "did you mean h100"),
        (f"{write(tmp_path, GOOD)}@vllm", "my_gpu: expected no stack"),
    ):
        with pytest.raises(InputError, match=says):
            load_hardware(name)
    with pytest.raises(InputError, match="expected one stack"):
        load_hardware("h100@vllm", stack="trtllm")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("hardware: my_gpu", "hardware: your_gpu", "hardware: unknown value your_gpu"),
        ("stack: trtllm", "stack: vllm", "stack: unknown value vllm"),
        (
            "    int4_wo:",
            "    fp8:",
            "unknown dtype; expected one this device has a rate for: bf16, fp16, int8_wo",
        ),
        ("schema_version: 1", "schema_version: 2", "this prunesim reads no other version"),
        ("t0: {value: 2e-06", "t0: {value: 2", "from 1e-07"),
        ("stack: trtllm\n", "", "stack: is missing"),
    ],
)
def test_bad_stack_file(old: str, new: str, says: str, tmp_path: Path) -> None:
    path = stacked(tmp_path)
    file = tmp_path / "my_gpu.trtllm.yaml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    (problem,) = check_hardware(file)
    assert LINE.fullmatch(problem)
    assert problem.startswith(f"{file}:")
    assert says in problem
    assert check_hardware(path) == [problem]  # checking the profile finds the same problem
    with pytest.raises(InputError, match=re.escape(problem)):
        load_hardware(path)


def test_arrays_of_other_stacks_stay(tmp_path: Path) -> None:
    path = stacked(tmp_path)
    (held,) = tmp_path.glob("my_gpu.trtllm.*.npz")
    own = load_hardware(path).calibrated(
        {("gemm", "bf16"): section(1e-6, "", arrays={"y": np.zeros(2)})}
    )
    save_hardware(own, path)
    save_hardware(replace(own, sections={}), path)
    save_stack(own, "sglang", tmp_path / "my_gpu.sglang.yaml")
    assert held in tmp_path.iterdir()
    assert len(list(tmp_path.glob("*.npz"))) == 2
    assert load_hardware(path).sections["gemm", "int4_wo"].arrays["x"].shape == (3,)


def test_a_new_profile_names_what_is_to_fill_in_and_works_once_it_is(tmp_path: Path) -> None:
    path = new_hardware("My GPU", tmp_path / "my_gpu.yaml")
    problems = check_hardware(path)
    # five facts are optional; the architecture is a further problem
    assert len(problems) == path.read_text().count("value: FILL_IN") - 5 + 1
    for line in problems:
        assert LINE.fullmatch(line)
        assert "FILL_IN" in line
    text = path.read_text().replace("architecture: FILL_IN", "architecture: turing")
    text = text.replace('"FILL_IN"', '"its datasheet"')
    optional = "# (max_clock|link:|bridge:|  (?:kind|connection|max_devices|bandwidth|latency))"
    text = re.sub(optional, r"\1", text)
    filled = {
        "sm_count": 40,
        "FILL_IN GHz": "1.5 GHz",
        "FILL_IN TFLOP/s": "60 TFLOP/s",
        "FILL_IN GB/s": "300 GB/s",
    }
    filled |= {
        "FILL_IN GB": "16 GB",
        "FILL_IN MiB": "4 MiB",
        "FILL_IN W": "70 W",
        "FILL_IN us": "1.5 us",
    }
    for placeholder, value in filled.items():
        text = text.replace(f"{placeholder}: {{value: FILL_IN", f"{placeholder}: {{value: {value}")
        text = text.replace(placeholder, str(value)) if placeholder.startswith("FILL_IN") else text
    path.write_text(text)
    assert check_hardware(path) == []
    hw = load_hardware(path)
    assert (hw.name, hw.l2_bytes, hw.link and hw.link.max_devices) == ("my_gpu", 4 * 2**20, 8)
    for name, where, said in (
        ("My GPU", path, "expected a new file"),
        ("H100", tmp_path / "h.yaml", "is a name of the shipped h100_sxm"),
        ("a/b", tmp_path / "h.yaml", "expected a name of lower-case letters"),
        ("own", tmp_path / "h.json", "ends in .yaml"),
    ):
        with pytest.raises(InputError, match=said):
            new_hardware(name, where)


def test_generic_defaults_say_how_far_they_are_off() -> None:
    """Calibrated GPUs with the defaults of their own architecture, and of one on which nothing was
    ever fitted: their coverage, and the root mean squares of log errors that docs/model.md
    shows."""
    rows, lengths, widths = (
        np.array([1, 8, 1, 4]),
        np.array([1024, 1024, 8192, 4096]),
        [1024, 4096, 14336],
    )
    gemms = [
        np.array(list(itertools.product(m, widths, widths))).T for m in ([1, 16], [128, 1024, 8192])
    ]
    inside, off = [], []
    for name in ("a100", "h100", "h200", "l40s", "rtx_4090", "rtx_pro_6000", "b200"):
        hw = load_hardware(name)
        own, stranger = (
            replace(hw, sections={}, stacks={}, stack="", architecture=name)
            for name in (hw.architecture, "cdna3")
        )
        times = [
            [gemm_time(*sizes, one).seconds for sizes in gemms]
            + [operator_time(prefill(rows, lengths, lengths, 32, 8, 128, one), one).seconds]
            + [operator_time(decode(8 * rows, lengths, 32, 8, 128, one), one).seconds]
            for one in (hw, own, stranger)
        ]
        off.append(
            [[np.log(true / told).mean() for true, told in zip(times[0], t)] for t in times[1:]]
        )
        for phase, batch, seq in (
            ("decode", 1, 1024),
            ("decode", 64, 1024),
            ("prefill", 1, 512),
            ("prefill", 4, 2048),
        ):
            w = lower("llama-3.1-8b", phase=phase, batch=batch, seq=seq)
            told = workload_time(w, stranger)
            inside.append(told.total_lower_s <= workload_time(w, hw).total_s <= told.total_upper_s)
    assert np.mean(inside) >= 0.85
    rms = np.sqrt(np.mean(np.square(off), axis=0)).round(2)
    assert rms.tolist() == [[0.09, 0.09, 0.30, 0.23], [0.15, 0.35, 0.27, 0.21]]
