"""The child process that captures an operator first: its answers, its end, and what it does with a device."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from calibration.devices.capture_probe import CaptureProbe, Probed, kernel_names, serve  # noqa: E402
from calibration.devices.cuda_timing import NotCapturable  # noqa: E402
from calibration.devices.protocol import CaptureFailed, Operator, OutOfMemory, Unsupported  # noqa: E402

GEMM = Operator("gemm", m=4, n=128, k=64)
UNKNOWN = Probed(reason="no child process can open the GPU")
CHILD = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    m = json.loads(line)["m"]
    if m == 1:
        os._exit(3)
    if m == 2:
        time.sleep(60)
    answer = {"captured": m > 3, "reason": "" if m > 3 else "not capturable", "kernels": ["a", str(os.getpid())]}
    print(json.dumps(answer), flush=True)
    if m == 3:
        break
"""


def _gemm(m: int) -> Operator:
    return Operator("gemm", m=m, n=128, k=64)


def _probe(code: str, limit_s: float = 20.0) -> CaptureProbe:
    return CaptureProbe([sys.executable, "-c", code], limit_s)


def test_one_child_answers_until_a_failed_capture_ends_it() -> None:
    probe = _probe(CHILD)
    first, second = probe(_gemm(4)), probe(_gemm(5))
    assert first == second == Probed(True, "", first.kernels)
    assert first.kernels[0] == "a"
    assert probe(_gemm(3)).captured is False
    third = probe(_gemm(4))  # by another child
    assert third.captured
    assert third.kernels != first.kernels
    probe.close()


def test_a_child_that_crashes_or_hangs_costs_its_operator() -> None:
    probe = _probe(CHILD)
    with pytest.raises(Unsupported, match="a child process that captured it ended with status 3"):
        probe(_gemm(1))
    assert probe(_gemm(4)).captured
    probe.close()
    hasty = _probe(CHILD, limit_s=1.0)
    with pytest.raises(Unsupported, match="gave no answer within 1 s"):
        hasty(_gemm(2))


def test_where_no_child_can_open_the_gpu_nothing_is_known_and_none_is_started_again() -> None:
    probe = _probe("raise SystemExit(1)")
    assert probe(GEMM) == UNKNOWN
    probe._command = ("no such program",)
    assert probe(GEMM) == UNKNOWN


class Planted:
    """A device whose preparation raises what is planted."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors, self.closed = list(errors), 0

    def prepare(self, operator: Operator) -> Any:
        if error := self.errors.pop(0):
            raise error

    def kernels(self, operator: Operator) -> tuple[str, ...]:
        return ("kernel of " + operator.kind,)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.quick
def test_the_child_answers_for_its_device_and_ends_when_a_capture_fails() -> None:
    for error in (NotCapturable("not capturable: planted"), CaptureFailed("not capturable: planted")):
        device = Planted(None, OutOfMemory("no room"), error, None)
        requests, answers = [json.dumps(vars(GEMM))] * 4, io.StringIO()
        serve(device, requests, answers)
        ready, *found = [json.loads(line) for line in answers.getvalue().splitlines()]
        assert ready == {"ready": True}
        assert [answer["captured"] for answer in found] == [True, None, False]
        assert found[0]["kernels"] == ["kernel of gemm"]
        assert found[2]["reason"] == "not capturable: planted"
        assert device.closed == 2  # nothing is kept between two questions


@pytest.mark.quick
def test_names_of_kernels_are_those_of_the_device_once_and_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.autograd import DeviceType

    class Profile:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def events(self) -> list[Any]:
            on = [("a" * 200, DeviceType.CUDA), ("aten::mm", DeviceType.CPU), ("b", DeviceType.CUDA)]
            return [type("Event", (), {"name": name, "device_type": kind}) for name, kind in on * 2]

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profile())
    calls: list[str] = []
    names = kernel_names(lambda: calls.append("launch"), lambda: calls.append("wait"))
    assert names == ("a" * 80, "b")
    assert calls == ["launch", "wait"]
