"""Fixtures shared by all tests: where measured data lies, and a skip with a reason where it does not."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a job of a shell without job control: programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# a hundred programs are started, and two workers read the tests: each would compile every module again
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# the same examples in every run; --hypothesis-profile=thorough draws others, and many
settings.register_profile("few", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk() -> Iterator[None]:
    """A record of a run is safe from a loss of power when ``fsync`` returns: no test can tell, and thousands wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the measured tables that may not be committed (``PRUNESIM_SHARED_DATA``, or ``../shared/data``)."""
    folder = Path(os.environ.get("PRUNESIM_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "rtx4090_gemm.csv").is_file():
        pytest.skip("the RTX 4090 tables are not at hand; set PRUNESIM_SHARED_DATA to their folder")
    return folder


@pytest.fixture(scope="module")
def three_folds() -> Iterator[None]:
    """Fits of GEMMs to few rows predict held-out rows in three folds, each with constants of its own, instead of ten:
    where a test is about what comes before a fit and after it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calibration.fit.gemm.FEW_FOLDS", 3)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have no figures, which take half the time of a calibration: where a test is about something else."""
    monkeypatch.setattr("calibration.evidence.validate.ENOUGH_TO_DRAW", float("inf"))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Helpers of tests are imported by the tests that need them (some need torch), not collected for doctests."""
    return True if collection_path.suffix == ".py" and not collection_path.name.startswith("test_") else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``, each worker has a stretch of the tests, and one that has finished takes half of another's rest: what
    the tests of a module share is made once, as it would not be if they were dealt out one by one.
    """
    if config.getvalue("dist") != "load":  # asked for by --dist
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Examples in docstrings are quick; which tests are, their modules say."""
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.quick)
