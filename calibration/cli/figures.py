"""``prunesim figures`` with the shipped measured GEMMs next to the predictions of their devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.cli.figures import figures_command

if TYPE_CHECKING:
    from simulator.figures.measured import MeasuredGemms
    from simulator.hardware.profile import HardwareProfile


def shipped_gemms(hw: HardwareProfile, dtype: str) -> MeasuredGemms | None:
    """Return the GEMM table of a profile's fit; None if it does not ship or has no rows of the format."""
    from calibration.build_profiles import RECIPES
    from calibration.measurements import list_measurements, load_measurements, provenance
    from simulator.figures.measured import from_columns

    recipe = RECIPES.get(f"{hw.name}.{hw.stack}")
    name = next((n for n in recipe.tables if "/gemm/" in n and n in list_measurements()), None) if recipe else None
    if name is None:
        return None
    rows = load_measurements(name)
    rows = rows.select(rows.labels() == dtype)
    if not len(rows):
        return None
    about = provenance(name)
    source = f"{about['framework']} {about['version']}, aiconfigurator-core 0.12.0"
    return from_columns(
        {column: getattr(rows, column) for column in ("m", "n", "k", "copies", "seconds")}, source, dtype
    )


command = figures_command(shipped_gemms)
