"""Fixtures of all tests: the place of measured data, or a skip with the reason if it is missing."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from program import cli

__all__ = ["cli"]

ROOT = Path(__file__).resolve().parent.parent
# Packages whose tests run the same code with and without extras, because import-linter keeps torch
# out of them. A module of tests that is an exception marks itself with "extras".
WITHOUT_EXTRAS = {
    "engines",
    "evidence",
    "figures",
    "files",
    "fit",
    "hardware",
    "measure",
    "operators",
    "plans",
    "prediction",
    "pruning",
    "records",
    "serving",
    "uncertainty",
    "validation",
}
# a job of a shell without job control: programs inherit it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# a hundred programs are started, and two workers read the tests: each would compile every module
# again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# the same examples in every run; --hypothesis-profile=thorough draws others, and many
settings.register_profile("few", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """Replace ``fsync``: it protects records from a loss of power, which no test simulates, and
    takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the measured tables that may not be committed (``PRUNESIM_SHARED_DATA``, or
    ``../shared/data``)."""
    folder = Path(os.environ.get("PRUNESIM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "rtx4090_gemm.csv").is_file():
        pytest.skip("the RTX 4090 tables are not at hand; set PRUNESIM_SHARED_DATA to their folder")
    return folder


@pytest.fixture(scope="module")
def three_folds() -> Iterator[None]:
    """Cross-validate fits of GEMMs to few rows in three folds instead of ten, for tests of other
    parts of a calibration."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.fit.gemm.FEW_FOLDS", 3)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figures in reports, which take half the time of a calibration, for tests of other
    parts."""
    monkeypatch.setattr("calibration.validation.validate.ENOUGH_TO_DRAW", float("inf"))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Do not collect doctests of helpers: tests import helpers, and some helpers need torch."""
    return (
        True
        if collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
        else None
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``, give each worker a contiguous part of the tests; an idle worker takes half of
    the rest of another.

    Fixtures of a module are then made once, and not by every worker.
    """
    if config.getvalue("dist") != "load":  # asked for by --dist
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the examples in docstrings as quick, and the tests that extras may change."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.quick)
        if not WITHOUT_EXTRAS & {*item.path.relative_to(ROOT).parts[:-1]}:
            item.add_marker(pytest.mark.extras)
