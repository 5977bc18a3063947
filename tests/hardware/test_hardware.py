"""Hardware profiles: shipped facts, bad files, saving and loading, sections."""

from __future__ import annotations

import codecs
import hashlib
import io
import os
import random
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

import simulator.hardware.profile as hardware
import simulator.hardware.schema as profile_io
from simulator.errors import InputError
from simulator.hardware.arrays import pack_arrays, read_arrays
from simulator.hardware.constants import Constant
from simulator.hardware.library import check_hardware, forget, load_hardware, save_hardware
from simulator.hardware.names import list_hardware, plain_name, profiles_folder, shipped_names
from simulator.hardware.parts import Fitted, Interval, Provenance, Section
from simulator.hardware.profile import OPERATORS, HardwareProfile
from simulator.hardware.save import profile_text
from simulator.units import EXAMPLES
from simulator.workload import DTYPES

BAD = Path(__file__).parents[1] / "bad_profiles"
GOOD = (BAD / "good.yaml").read_text()
LINE = re.compile(r".+?:\d+:\d+: [^\n]+?: [^\n]+")

CONSTANTS = MappingProxyType(
    {
        "t0_s": Constant("s", 1e-7, 1e-4, "fixed time", {"*": 3e-6, "hopper": 2.7e-6}, "test"),
        "tensor_efficiency": Constant("1", 0.05, 1.5, "share of the peak", {"*": 0.9}, "test"),
        "dram_efficiency": Constant("1", 0.05, 1.5, "share of the bandwidth", {"*": 0.8}, "test"),
    }
)


@pytest.fixture(autouse=True)
def registry(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small registry of constants, so that these tests do not move with the cost models; ``real_constants`` asks for theirs."""
    hardware._default_section.cache_clear()
    if "real_constants" not in request.fixturenames:
        real = hardware.constants_of
        monkeypatch.setattr(hardware, "constants_of", lambda _operator: CONSTANTS)
        monkeypatch.setattr(profile_io, "constants_of", lambda operator: {**real(operator), **CONSTANTS})
    yield
    hardware._default_section.cache_clear()


@pytest.fixture
def real_constants() -> None:
    """Asks :func:`registry` to stay out of the way."""


def write(folder: Path, content: str | bytes, name: str = "my_gpu.yaml") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# -- shipped profiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_hardware())
def test_shipped_profile_is_complete(name: str) -> None:
    path = profiles_folder() / f"{name}.yaml"
    assert check_hardware(path) == []
    hw = load_hardware(name)
    assert hw.name == name
    assert {"fp32", "tf32", "fp16", "bf16", "int8"} <= set(hw.rates) or hw.architecture == "cpu"
    assert ("fp8" in hw.rates) == (hw.architecture in ("ada", "hopper", "blackwell"))
    for fact, _, source in hw.describe():
        if (
            hw.architecture == "cpu"
        ):  # an example: measured, or said by its system; without a highest clock the boost clock stands in
            assert source or fact == "max_clock"
        else:
            assert "https://" in source  # every fact names where it can be looked up
    assert hw.clock_headroom >= 1
    assert (
        profile_text(hw, *_arrays_reference(hw)) == path.read_text()
    )  # saving a shipped file again would change nothing


def _arrays_reference(hw: HardwareProfile) -> tuple[str, str]:
    text = hw.path.read_text()
    file, digest = re.search(r"file: \"?([^\"\n]+)", text), re.search(r"sha256: \"([0-9a-f]+)\"", text)
    return (file.group(1), digest.group(1)) if file and digest else ("", "")


# FLOP per clock and SM, dense, from the architecture whitepapers (two for each multiply-add)
FLOP_PER_CLOCK = {
    "a100_sxm_80gb": {"fp32": 128, "tf32": 1024, "fp16": 2048, "bf16": 2048, "int8": 4096},
    "h100_sxm": {"fp32": 256, "tf32": 2048, "fp16": 4096, "bf16": 4096, "fp8": 8192, "int8": 8192},
    "rtx_4090": {"fp32": 256, "tf32": 256, "fp16": 512, "bf16": 512, "fp8": 1024, "int8": 2048},
    "l40s": {"fp32": 256, "tf32": 512, "fp16": 1024, "bf16": 1024, "fp8": 2048, "int8": 2048},
    "rtx_pro_6000": {"fp32": 256, "tf32": 512, "fp16": 1024, "bf16": 1024, "fp8": 2048, "int8": 2048},
}
FLOP_PER_CLOCK["a100_sxm_40gb"] = FLOP_PER_CLOCK["a100_pcie_80gb"] = FLOP_PER_CLOCK["a100_sxm_80gb"]
FLOP_PER_CLOCK["h100_pcie"] = FLOP_PER_CLOCK["h200_sxm"] = FLOP_PER_CLOCK["h100_sxm"]


@pytest.mark.parametrize("name", sorted(FLOP_PER_CLOCK))
def test_rates_follow_from_clock_and_sm_count(name: str) -> None:
    hw = load_hardware(name)
    assert set(hw.rates) == set(FLOP_PER_CLOCK[name])
    for dtype, each in FLOP_PER_CLOCK[name].items():
        # Hopper's whitepaper states fp32 at a higher boost clock than the tensor core rates; the L40S sheet prints 362.05 for 366.4
        clock = hw.max_clock_hz if hw.architecture == "hopper" and dtype == "fp32" else hw.boost_clock_hz
        tolerance = 0.0125 if (name, dtype) in (("l40s", "fp16"), ("l40s", "bf16")) else 0.01
        assert hw.peak_flop_per_s(dtype) == pytest.approx(hw.sm_count * each * clock, rel=tolerance)


def test_numbers_people_know() -> None:
    a100, h100, geforce = load_hardware("a100"), load_hardware("h100"), load_hardware("4090")
    assert (a100.name, h100.name, geforce.name) == ("a100_sxm_80gb", "h100_sxm", "rtx_4090")
    assert a100.peak_flop_per_s("bf16") == 312e12
    assert a100.peak_flop_per_s("bf16", sparse=True) == 624e12
    assert h100.bandwidth_bytes_per_s == 3.35e12
    assert geforce.rate("bf16").flop_per_s == 165.2e12  # fp32 accumulate runs at half rate on GeForce
    assert geforce.l2_bytes == 73728 * 1024
    assert a100.ridge_point("bf16") == pytest.approx(153.0, abs=0.1)
    assert geforce.clock_headroom == pytest.approx(3105 / 2520)
    assert h100.link is not None
    assert h100.link.bandwidth_bytes_per_s == 450e9


def test_dtypes_are_those_of_workloads() -> None:
    assert profile_io.DTYPES == DTYPES


def test_names_and_aliases() -> None:
    assert load_hardware("H100-SXM") is load_hardware("h100_sxm") is load_hardware(" H100 sxm ")
    assert load_hardware("RTX 4090") is load_hardware("rtx_4090")
    assert load_hardware(str(profiles_folder() / "l40s.yaml")).name == "l40s"
    for name in list_hardware():  # the quick look-up of aliases reads what the loader reads
        for alias in (name, *load_hardware(name).aliases):
            assert shipped_names()[plain_name(alias)] == name


ODD_NAMES = [
    "",
    "h10",
    "v100",
    "../h100_sxm",
    "h100_sxm.yml",
    "/",
    "no/such.yaml",
    "a\0b.yaml",
    "x" * 5000 + ".yaml",
    "\ud800.yaml",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_unknown_device_is_one_line(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_hardware(name)
    assert "\n" not in str(caught.value)


def test_unknown_device_names_the_closest() -> None:
    with pytest.raises(InputError, match="did you mean h100"):
        load_hardware("h10")
    with pytest.raises(InputError, match="expected a name or a path, got int"):
        load_hardware(4090)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="a100_sxm_80gb has no fp8 arithmetic; it has fp32"):
        load_hardware("a100").rate("fp8")
    with pytest.raises(InputError, match="did you mean gemm"):
        load_hardware("a100").section("gem", "bf16")


# -- bad files ------------------------------------------------------------------------------------------------------------------


def _edits() -> list[tuple[str, str, str, str]]:
    lines = [line for line in (BAD / "edits.txt").read_text().splitlines() if line and not line.startswith("#")]
    cases = [tuple(re.split(r" ?\| ?", line)) for line in lines]
    return [
        (name, *(codecs.decode(part, "unicode_escape") for part in (old, new)), says) for name, old, new, says in cases
    ]


def _generated() -> list[tuple[str, str, str, str]]:
    """The same mistakes for every quantity of the datasheet."""
    cases = []
    for key, (_, unit, low, high) in profile_io.QUANTITIES.items():
        line = re.search(rf"  {key}: {{value: ([^,]+),.*\n", GOOD)
        whole, value = line.group(), line.group(1)
        wrong = next(EXAMPLES[u] for u in EXAMPLES if u != unit)
        for what, bad, says in [
            ("bare number", "12.5", "the unit is missing"),
            ("exponent", "3.35e12", "the unit is missing"),
            ("wrong unit", "3 parsec", "unknown"),
            ("wrong dimension", wrong, "is a unit of"),
            ("zero", f"0 {unit}", "expected"),
            ("negative", f"-1 {unit}", "expected"),
            ("too small", f"{low / 10:g} {unit}", "expected"),
            ("too large", f"{high * 10:g} {unit}", "expected"),
            ("nan", ".nan", "does not start with a number"),
            ("infinite", f"inf {unit}", "does not start with a number"),
            ("true", "true", "does not start with a number"),
            ("empty", "", "does not start with a number"),
            ("list", f"[{value}]", "got a list"),
        ]:
            cases.append((f"{key} {what}", whole, whole.replace(value, bad), says))
        cases.append((f"{key} bare", whole, f"  {key}: {value}\n", "expected {value: ..., source: ...}"))
        cases.append((f"{key} without source", whole, f"  {key}: {{value: {value}}}\n", "source: is missing"))
        cases.append((f"{key} twice", whole, whole + whole, "is given twice"))
        if key != "max_clock":
            cases.append((f"{key} missing", whole, "", f"{key}: is missing"))
    return cases


CASES = _edits() + _generated()


def test_there_are_enough_bad_files() -> None:
    assert len({name for name, *_ in CASES}) == len(CASES) >= 200


@pytest.mark.parametrize(("old", "new", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_file(old: str, new: str, says: str, tmp_path: Path) -> None:
    assert old == "*" or old in GOOD
    text = new if old == "*" else GOOD.replace(old, new, 1)
    path = write(tmp_path, text.encode("latin-1"))
    problems = check_hardware(path)
    assert any(says in line for line in problems), problems
    for line in problems:
        assert LINE.fullmatch(line), line
        assert line.startswith(str(path))
    with pytest.raises(InputError) as caught:
        load_hardware(path)
    assert str(caught.value).startswith(problems[0])


def test_position_is_that_of_the_mistake(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD.replace("value: 3.35 TB/s", "value: 3.35 TB").replace("hopper", "hoper"))
    number = GOOD.splitlines().index("  bandwidth: {value: 3.35 TB/s, source: sheet}") + 1
    assert check_hardware(path) == [
        f"{path}:5:15: architecture: unknown value hoper; did you mean hopper? Known: ampere, ada, hopper, blackwell, cpu",
        f'{path}:{number}:22: datasheet.bandwidth.value: expected a bandwidth such as "3.35 TB/s", '
        'got "3.35 TB": TB is a unit of an amount of bytes',
    ]
    with pytest.raises(InputError, match=r"\(and 1 more: prunesim hardware check "):
        load_hardware(path)


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "is a folder" in check_hardware(tmp_path)[0]
    assert "cannot be read" in check_hardware(tmp_path / "gone.yaml")[0]
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "no regular file" in check_hardware(tmp_path / "pipe.yaml")[0]
    large = write(tmp_path, GOOD + "#" * 1_000_001)
    assert "larger than 1 MB" in check_hardware(large)[0]


def test_laughs_are_cut_short(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
    )
    (problem,) = check_hardware(write(tmp_path, bomb))
    assert problem.startswith(f"{tmp_path}/my_gpu.yaml:1:4: a: anchors (&) and aliases (*) are not allowed")
    assert len(check_hardware(write(tmp_path, "[" * 300_000))) == 1


def _mutate(text: bytes, rng: random.Random) -> bytes:
    """One to four edits: bytes flipped, spans cut, doubled, swapped or replaced by what trips YAML readers."""
    tricks = [
        b"&a ",
        b"*a",
        b"!!python/name:os.system ",
        b"---\n",
        b"\t",
        b"\xff",
        b"\x00",
        b": ",
        b"- ",
        b"{",
        b"]",
        b'"',
        b"'",
        b"#",
        b"010",
        b"1:30",
        b".nan",
        b"1e999",
        b"yes",
        b"null",
        b"9" * 400,
        b"\xe2\x80\xa8",
        b"? ",
        b"|\n",
        b">\n",
        b"<<: ",
        b"%YAML 1.1\n",
        b"\r",
        b"\\",
        b"-",
    ]
    data = bytearray(text)
    for _ in range(rng.randint(1, 4)):
        at, size = rng.randrange(len(data) + 1), rng.randint(1, 30)
        kind = rng.randrange(6)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = data[at : at + size]
        elif kind == 3:
            data[at:at] = rng.choice(tricks)
        elif kind == 4:
            data[at : at + size] = rng.choice(tricks)
        else:
            other = rng.randrange(len(data) + 1)
            data[at : at + size] = data[other : other + size]
    return bytes(data)


def _mutations(count: int, seed: int, folder: Path) -> tuple[int, int]:
    rng = random.Random(seed)
    path = folder / "my_gpu.yaml"
    refused = 0
    for _ in range(count):
        path.write_bytes(_mutate(GOOD.encode(), rng))
        problems = check_hardware(path)
        refused += bool(problems)
        for line in problems:
            assert LINE.fullmatch(line), line
        forget()
        if problems:
            with pytest.raises(InputError):
                load_hardware(path)
        else:
            hw = load_hardware(path)
            again = folder / "again.yaml"
            save_hardware(hw, again)  # what is read can be written and read again
            assert_same(load_hardware(again), hw)
    return refused, count - refused


def test_mutated_files(tmp_path: Path) -> None:
    refused, read = _mutations(2_000, seed=0, folder=tmp_path)
    assert refused > 1_000
    assert read > 20  # some edits hit text only: the mutator must not be blunt


@pytest.mark.slow
def test_many_mutated_files(tmp_path: Path) -> None:
    refused, read = _mutations(20_000, seed=1, folder=tmp_path)
    assert refused > 10_000
    assert read > 200


# -- saving ---------------------------------------------------------------------------------------------------------------------


def assert_same(a: HardwareProfile, b: HardwareProfile) -> None:
    for name in HardwareProfile.__dataclass_fields__:
        if name not in ("sections", "path"):
            assert getattr(a, name) == getattr(b, name), name
    assert a.sections.keys() == b.sections.keys()
    for key, one in a.sections.items():
        other = b.sections[key]
        for name in ("constants", "intervals", "accuracy", "provenance", "status"):
            assert getattr(one, name) == getattr(other, name), (key, name)
        assert one.arrays.keys() == other.arrays.keys()
        for name, array in one.arrays.items():
            np.testing.assert_array_equal(array, other.arrays[name])
            assert array.dtype == other.arrays[name].dtype


def calibrated() -> HardwareProfile:
    """A shipped profile with two made-up sections."""
    rng = np.random.default_rng(0)
    provenance = Provenance("tables: a, b", "sha256:12", "2026-11-25", "CUDA 12.9 # stack", "NVIDIA H100", "graph", 400)
    gemm = Section(
        {
            "t0_s": Fitted(2.7e-6, 1.25e-8),
            "tensor_efficiency": Fitted(0.1 + 0.2, None, "fixed"),
            "dram_efficiency": Fitted(1.0, 0.0),
        },
        {
            "lattice": rng.normal(size=(16, 13, 13)),
            "edges": np.arange(5, dtype=np.int64),
            "small": np.float32([[1.5, 2.5]]),
        },
        (Interval("m <= 16", 0.93, 1.08, 0.9, 120), Interval("all: others", 0.9, 1.2, 0.9, 3)),
        {"mape": 0.046, "speedup p95": 0.178},
        provenance,
        "calibrated",
    )
    runtime = Section(
        {"t0_s": Fitted(1e-5)}, provenance=replace(provenance, borrowed_from="a100_sxm_80gb"), status="borrowed"
    )
    return replace(load_hardware("h100"), sections={("gemm", "bf16"): gemm, ("runtime", "*"): runtime})


def test_round_trip_with_sections(tmp_path: Path) -> None:
    hw = calibrated()
    path = tmp_path / "h100_sxm.yaml"
    save_hardware(hw, path)
    assert check_hardware(path) == []
    loaded = load_hardware(path)
    assert_same(loaded, hw)
    assert not loaded.sections["gemm", "bf16"].arrays["lattice"].flags.writeable
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert len(first) == 2
    save_hardware(loaded, path)  # same profile, same bytes, whatever the clock says
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first


def test_new_arrays_replace_the_old_file(tmp_path: Path) -> None:
    hw = calibrated()
    path = tmp_path / "h100_sxm.yaml"
    save_hardware(hw, path)
    (old,) = tmp_path.glob("*.npz")
    bystander = tmp_path / "h100_sxm.mine.npz"
    bystander.write_bytes(b"not ours")
    gemm = hw.sections["gemm", "bf16"]
    save_hardware(replace(hw, sections={("gemm", "bf16"): replace(gemm, arrays={"lattice": np.zeros(3)})}), path)
    assert not old.exists()
    assert bystander.exists()
    assert load_hardware(path).sections["gemm", "bf16"].arrays["lattice"].shape == (3,)
    save_hardware(replace(hw, sections={}), path)
    assert list(tmp_path.glob("*.npz")) == [bystander]


def test_saving_stopped_in_between_leaves_a_readable_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hw = calibrated()
    path = tmp_path / "h100_sxm.yaml"
    save_hardware(hw, path)
    gemm = hw.sections["gemm", "bf16"]
    newer = replace(hw, sections={("gemm", "bf16"): replace(gemm, arrays={"lattice": np.zeros(3)})})
    import simulator.hardware.save as profile_save

    whole = profile_save.write_whole

    def stop(target: Path, content: bytes) -> None:
        if target.suffix == ".yaml":
            raise KeyboardInterrupt
        whole(target, content)

    monkeypatch.setattr(profile_save, "write_whole", stop)
    with pytest.raises(KeyboardInterrupt):
        save_hardware(newer, path)
    forget()
    assert_same(load_hardware(path), hw)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    assert load_hardware(path) is load_hardware(path)
    write(tmp_path, GOOD.replace("value: 132", "value: 1320"))
    assert load_hardware(path).sm_count == 1320


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sm_count": 0}, "sm_count"),
        ({"power_w": float("1e9")}, "datasheet.power.value"),
        ({"architecture": "volta"}, "architecture"),
        ({"title": "two\nlines"}, "title"),
        ({"sources": {}}, "is missing"),
        ({"aliases": ("l40s",)}, "already means l40s"),
    ],
)
def test_what_the_loader_would_refuse_is_not_written(change: dict[str, object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    with pytest.raises(InputError, match=says):
        save_hardware(replace(load_hardware("h100"), **change), path)
    assert list(tmp_path.iterdir()) == []


def test_saving_to_a_bad_place(tmp_path: Path) -> None:
    for target in (tmp_path / "x.txt", tmp_path / "gone" / "x.yaml"):
        with pytest.raises(InputError):
            save_hardware(load_hardware("h100"), target)
    section = Section({"t0_s": Fitted(1e-6)}, {"lattice": np.array([1.0, np.nan])}, status="calibrated")
    with pytest.raises(ValueError, match="lattice holds values that are not finite"):
        save_hardware(replace(load_hardware("h100"), sections={("gemm", "bf16"): section}), tmp_path / "x.yaml")


def test_new_sources_get_names(tmp_path: Path) -> None:
    hw = load_hardware("h100")
    hw = replace(hw, references={}, sources={**hw.sources, "power": "my meter"})
    save_hardware(hw, tmp_path / "x.yaml")
    assert load_hardware(tmp_path / "x.yaml").sources == hw.sources


# -- arrays ---------------------------------------------------------------------------------------------------------------------


def _saved(tmp_path: Path) -> tuple[Path, Path]:
    path = tmp_path / "h100_sxm.yaml"
    save_hardware(calibrated(), path)
    (npz,) = tmp_path.glob("*.npz")
    return path, npz


def test_arrays_of_another_version_are_refused(tmp_path: Path) -> None:
    path, npz = _saved(tmp_path)
    raw = bytearray(npz.read_bytes())
    raw[len(raw) // 2] ^= 1
    npz.write_bytes(raw)
    (problem,) = check_hardware(path)
    assert "belongs to another version of the profile" in problem
    npz.unlink()
    assert "cannot be read" in check_hardware(path)[0]
    npz.mkdir()
    assert "no regular file" in check_hardware(path)[0]


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
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '<f8', 'fortran_order': False, 'shape': (99999999999, 9999999999), }".ljust(117)
    + b"\n"
)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "no readable .npz"),
        (b"no zip at all", "no readable .npz"),
        (_zip(other=_npy(np.zeros(3))), "is not in the .npz"),
        (_zip(x=b""), "bad header"),
        (_zip(x=b"\x93NUMPY\x09\x00"), "bad header"),
        (_zip(x=b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16), "bad header"),
        (_zip(x=_npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)), "pickled objects"),
        (_zip(x=_npy(np.array(["text"]))), "expected numbers"),
        (_zip(x=_npy(np.array([np.inf]))), "not finite"),
        (_zip(x=_npy(np.zeros(100))[:-8]), "does not have the size"),
        (_zip(x=_npy(np.zeros(100)) + b"more"), "does not have the size"),
        (_zip(x=_HUGE), "does not have the size"),
        (_zip(x=bytes(70_000_000)), "larger than 64 MB"),
    ],
)
def test_bad_arrays(raw: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=re.escape(says)):
        read_arrays(path, hashlib.sha256(raw).hexdigest(), "gemm.bf16", ("x",))


def test_mutated_arrays(tmp_path: Path) -> None:
    rng = random.Random(0)
    good = pack_arrays({"gemm.bf16.x": np.arange(20.0), "gemm.bf16.y": np.eye(3)})
    path = tmp_path / "x.npz"
    refused = 0
    for _ in range(2_000):
        raw = _mutate(good, rng)
        path.write_bytes(raw)
        try:
            read_arrays(path, hashlib.sha256(raw).hexdigest(), "gemm.bf16", ("x", "y"))
        except ValueError as error:
            refused += "\n" not in str(error)
    assert refused > 1_500


# -- sections -------------------------------------------------------------------------------------------------------------------


def test_user_profile_of_facts_alone(tmp_path: Path) -> None:
    text = GOOD[: GOOD.index("calibrated:")]
    for part in (r"  max_clock:.*\n", r"  link:\n(?:    .*\n)+", r"aliases:.*\n"):
        text, changed = re.subn(part, "", text)
        assert changed == 1
    hw = load_hardware(write(tmp_path, text))
    assert (hw.link, hw.aliases, hw.clock_headroom) == (None, (), 1.0)
    section = hw.section("gemm", "bf16")
    assert section.status == "default"
    assert section["t0_s"] == 2.7e-6  # the default of its architecture
    assert section.constants["t0_s"].status == "default"


def test_sections_borrow_between_the_16_bit_types_only(tmp_path: Path) -> None:
    hw = load_hardware(write(tmp_path, GOOD))
    own, borrowed = hw.section("gemm", "bf16"), hw.section("gemm", "fp16")
    assert (own.status, borrowed.status) == ("calibrated", "borrowed")
    assert own["tensor_efficiency"] == borrowed["tensor_efficiency"] == 0.81
    assert borrowed.provenance is not None
    assert borrowed.provenance.borrowed_from == "my_gpu gemm bf16"
    assert own["dram_efficiency"] == 0.8  # not fitted: the default, and it says so
    assert own.constants["dram_efficiency"].status == "default"
    assert hw.section("gemm", "fp8").status == "default"
    assert hw.section("attention_decode", "bf16").status == "default"
    uneven = replace(hw, rates={**hw.rates, "fp16": replace(hw.rates["fp16"], flop_per_s=1e15)})
    assert uneven.section("gemm", "fp16").status == "default"


@pytest.mark.usefixtures("real_constants")
@pytest.mark.parametrize("operator", OPERATORS)
def test_defaults_of_the_cost_models(operator: str) -> None:
    for name in list_hardware():
        hw = load_hardware(name)
        section = hw.section(operator, "bf16")
        for constant, known in hardware.constants_of(operator).items():
            assert known.low <= section[constant] <= known.high, (name, constant)
