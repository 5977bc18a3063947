"""``prunesim upper-bound``: measure the upper bound of the speedup from pruning a model on a
device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from calibration.cli.calibrate import (
    Folder,
    Measuring,
    describe,
    finish,
    in_format,
    restart_if_needed,
    seconds,
)
from simulator.cli import options, render
from simulator.cli.options import opt, option
from simulator.errors import InputError, one_line
from simulator.files.csv import csv_text

if TYPE_CHECKING:
    from calibration.devices import Device
    from calibration.runners.cases import Case
    from calibration.runners.upper_bound import Bound
    from simulator.hardware.profile import HardwareProfile
    from simulator.models.model import Model


@dataclass(frozen=True)
class CaseOptions(Measuring):
    family: str | None = option(
        "LIST", "Pruning families, or all. Default: all, or none with --prune."
    )
    sparsity: str | None = option("LIST", "Removed fractions of families. Default: 0.25,0.5.")
    prune: options.Prune = None
    pruned: options.Pruned = None
    layers: int | None = option("N", "Use only the first N layers of the model.")

    def cases(
        self,
        model: str,
        settings: Mapping[str, Any],
        kernels: Mapping[str, str] = MappingProxyType({}),
        phases: Sequence[str] = ("prefill", "decode"),
    ) -> tuple[Model, list[Case], list[str]]:
        """Return the model, its cases and notes on excluded cases; ``kernels`` are those of the
        device by family, ``phases`` those that can run."""
        from calibration.runners.cases import cases_of, fewer_layers
        from simulator.models.library import load_model

        if self.pruned and self.layers is not None:
            raise InputError("--layers: expected none with --pruned, as it compares whole models")
        config = fewer_layers(load_model(model), self.layers)
        chosen = options.Prunings(
            self.family, None, self.pruned, self.prune, self.sparsity
        ).parsed()
        cases, notes = cases_of(config, {**settings, **chosen}, kernels, phases)
        return config, cases, notes

    @contextlib.contextmanager
    def opened(
        self, device: str, folder: Path, dtype: str
    ) -> Iterator[tuple[Device, HardwareProfile, float]]:
        """Yield the open device, its profile and the remaining seconds of the budget."""
        from calibration.devices import open_device
        from calibration.fit.base_profile import thread_notes
        from calibration.runners.cases import profile_of

        budget_s = seconds("--budget", self.budget)
        with contextlib.closing(open_device(device, threads=self.threads)) as opened:
            start = opened.clock()
            hw = profile_of(folder, opened, dtype, self.hardware)
            render.notes(thread_notes(hw, opened.describe().device))
            yield opened, hw, max(budget_s - (opened.clock() - start), 1e-3)


SETTINGS = ("phase", "batch", "seq", "new_tokens", "dtype")
REQUESTS: options.Run = options.run_options(
    *SETTINGS, "engine", phase="prefill,decode", engine="reference", dtype=None
)


@options.expanded("csv", "figure")
def command(
    model: options.Model,
    device: Annotated[str, opt("--device", "DEVICE", "cpu, cuda, cuda:1 or replay:planted.")],
    output: Folder,
    run: options.Run = REQUESTS,
    selection: CaseOptions = CaseOptions(budget="5min"),
    out: options.Output = options.OUTPUT,
) -> None:
    """Measure the upper bound of pruning a model.

    Begins with the largest measured bound and the error of the predicted bounds. Times plain GEMMs
    and attention at the dense and the pruned shapes; the ratio of the times is the best possible
    speedup on the device. Writes RUN/records.jsonl and RUN/upper_bound.csv. Run the command again
    to resume.
    """
    from calibration.runners.runs import RunOptions, check_folder
    from calibration.runners.upper_bound import bound_errors, bounds, measure_bounds
    from simulator.files.write import write_whole

    run = in_format(run, device)
    dtype = run.text("dtype")
    _, cases, notes = selection.cases(model, run.asked().settings)
    folder = check_folder(output)
    with (
        selection.opened(device, folder, dtype) as (opened, hw, left),
        render.progress("measuring") as report,
    ):
        how = RunOptions(left, dtype, seed=selection.seed)
        found = measure_bounds(folder, opened, cases, how, progress=report, note=render.status)
    restart_if_needed(found.outcome, render.status)
    rows = bounds(cases, found.records, hw, dtype=dtype)
    file = folder / "upper_bound.csv"
    records = [asdict(row) for row in rows]
    write_whole(file, csv_text(records).encode())
    if out.write(records):
        render.conclude(*_conclusion(rows, bound_errors(rows)))
        first = rows[0]
        columns = render.columns(
            rows,
            *case_columns(rows),
            ("FLOP\nbound", ratio_of("flop_bound")),
            *(
                (f"{name}\nbound", ratio_of(f"{name}_bound"))
                for name in ("byte", "roofline", "measured")
            ),
            ("predicted\nspeedup", ratio_of("predicted")),
            ("bound as\npredicted", ratio_of("predicted_bound")),
            (
                "dense\nkernels",
                lambda r: (
                    "-" if math.isnan(r.dense_kernels_s) else render.seconds(r.dense_kernels_s)
                ),
            ),
        )
        where = (
            ""
            if len({(r.batch, r.seq) for r in rows}) > 1
            else f", batch {first.batch}, seq {first.seq}"
        )
        render.show(
            columns,
            f"{first.model} on {first.device}, {first.dtype}{where}; predicted by {first.hardware}",
        )
        print(f"\n{file}: {len(found.plan.items)} shapes; {describe(found.outcome)}")
    lines = list(notes)
    if missing := sum(1 for row in rows if row.missing):
        lacking = f"{missing} of {len(rows)} cases have shapes without a time, so no measured bound"
        lines.insert(0, f"{lacking}; run the command again with a larger --budget")
    finish(found.outcome, lines, out.verbose)


def _conclusion(rows: Sequence[Bound], errors: Mapping[str, float]) -> list[str]:
    measured = [r for r in rows if not math.isnan(r.measured_bound)]
    first, parts = rows[0], []
    if not measured:
        return [f"No bound of {first.model} was measured on {first.device}: shapes have no time."]
    for phase in dict.fromkeys(r.phase for r in measured):
        r = max((r for r in measured if r.phase == phase), key=lambda r: r.measured_bound)
        bound = (
            f"{render.ratio(r.measured_bound)}x ({render.ratio(r.lower)}-{render.ratio(r.upper)})"
        )
        parts.append(
            f"{phase} {bound} by {r.pruning}, predicted speedup {render.ratio(r.predicted)}x"
        )
    error, bare = render.percent(errors["predicted"]), render.percent(errors["model"])
    without = f" (without measured shapes {bare})" if errors["predicted"] != errors["model"] else ""
    return [
        f"The largest measured bounds of {first.model} on {first.device}: {'; '.join(parts)}.",
        f"{first.hardware} predicts the bounds with a median error of {error}{without}.",
    ]


def case_columns(rows: Sequence[Any]) -> list[render.Described[Any]]:
    """Return the columns of a case: its pruning and phase, and its shape if that varies."""
    columns: list[render.Described[Any]] = [
        ("<pruning", lambda r: one_line(r.pruning, 40)),
        ("<phase", "phase"),
        ("batch\nx seq", lambda r: f"{r.batch} x {r.seq}"),
    ]
    return columns if len({(r.batch, r.seq) for r in rows}) > 1 else columns[:2]


def ratio_of(name: str) -> Callable[[Any], str]:
    return lambda r: "-" if math.isnan(getattr(r, name)) else render.ratio(getattr(r, name))
