"""The GEMM constants of the shipped GPUs side by side: the first table of ``docs/constants.md``."""

from __future__ import annotations

from collections.abc import Sequence

from calibration.fit.core import free_constants, machine_of
from calibration.judge.pages_tables import left
from calibration.judge.report import table
from simulator.hardware.library import load_hardware
from simulator.hardware.parts import Fitted
from simulator.hardware.profile import constants_of


def cell(constant: Fitted) -> str:
    """A value with its relative standard error, or what it is instead of fitted.

    >>> cell(Fitted(2.853e-6, 2.1e-8, "fitted")), cell(Fitted(5e13, None, "default"))
    ('2.85e-06 ± 0.7 %', '5e+13 (default)')
    """
    if constant.std_error is None:
        return f"{constant.value:.3g} ({constant.status})"
    return f"{constant.value:.3g} ± {100 * constant.std_error / abs(constant.value):.1f} %"


def overview(names: Sequence[str], dtype: str = "bf16") -> str:
    """A table of the constants a dense fit may find, one column a GPU, as its profile ships.

    Parameters
    ----------
    names : sequence of str
        Profiles with a calibrated GEMM section of ``dtype``; others are left out.
    dtype : str

    Returns
    -------
    str
        Markdown.

    Examples
    --------
    >>> print(overview(["h100_sxm"]).split("\\n")[2])
    | `t0` | s | 2.68e-06 ± 0.3 % |
    """
    known = constants_of("gemm")
    profiles = [
        hw for hw in map(load_hardware, names) if dtype in hw.rates and hw.section("gemm", dtype).status == "calibrated"
    ]
    shown = dict.fromkeys(name for hw in profiles for name in free_constants(machine_of(hw, dtype)))
    sections = [hw.section("gemm", dtype) for hw in profiles]
    rows = [[f"`{name}`", known[name].unit, *(cell(s.constants[name]) for s in sections)] for name in shown]
    return left(table(["constant", "unit", *(f"`{hw.name}`" for hw in profiles)], rows), 1)
