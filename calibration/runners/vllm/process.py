"""Keep one model in vLLM in a child process: :class:`EngineProcess`.

vLLM returns its memory only when its process ends, and a crash of an engine must not end a comparison.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calibration.devices.protocol import OutOfMemory, Unsupported
from simulator.errors import InputError, one_line

WORKER = Path(__file__).with_name("worker.py")

RELEASES = ("0.11.0", "0.33.0")
"""First and last release of vLLM whose interface was compared with the worker's calls."""

_LOG_BYTES = 200_000
_CLOSING_S = 20.0
_ERROR = re.compile(r"\b((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception)): (.*)")
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|Free memory on device|larger than the available KV cache memory"
    r"|No available memory for the cache blocks",
    re.IGNORECASE,
)
_ARGUMENT = re.compile(r"unexpected keyword argument|Unexpected keyword argument")
_QUIET = re.compile(r"\b(?:DEBUG|INFO|WARNING) \d\d-\d\d ")
_GENERIC = re.compile(r"Engine core initialization failed|EngineCore encountered an issue|EngineDeadError|WorkerProc")


class EngineFailed(RuntimeError):
    """The child ended or did not answer; the message is the cause in one line."""


def environment(device: str) -> dict[str, str]:
    """Return the environment of a child on a device: its GPU, no network, no module search beside the program."""
    env = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if device.startswith("cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        index = int(device.partition(":")[2] or 0)
        env["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) and visible[0] else str(index)
    return env


def check_installed(python: str) -> None:
    """Raise InputError if an interpreter has no vLLM."""
    code = "import importlib.util; print(importlib.util.find_spec('vllm') is not None)"
    try:
        found = subprocess.run([python, "-c", code], env=environment("cpu"), capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{python}: cannot be run ({error}); expected a Python interpreter with vLLM") from None
    if found.stdout.strip() != "True":
        raise InputError(f"vLLM is not installed for {python}; install it with: {python} -m pip install vllm")


class EngineProcess:
    """One model in vLLM in a child process; it is ready when made.

    Parameters
    ----------
    settings : mapping
        Keyword arguments of ``vllm.LLM``.
    log : Path
        File for the output of vLLM.
    python : str
        Interpreter that has vLLM.
    env : mapping
        Environment, see :func:`environment`.
    patience_s : float
        Longest wait for an answer, in seconds; the start is one answer.

    Raises
    ------
    OutOfMemory
        If the model or its cache does not fit.
    Unsupported
        If this release of vLLM does not accept an argument.
    EngineFailed
        If the child ends, fails or does not answer in time.
    """

    def __init__(
        self, settings: Mapping[str, Any], log: Path, *, python: str, env: Mapping[str, str], patience_s: float
    ) -> None:
        self.log, self.patience_s, self._rest = log, patience_s, b""
        self._answers, theirs = os.pipe()
        try:
            with log.open("wb") as output:
                self.process = subprocess.Popen(
                    [python, str(WORKER), str(theirs), json.dumps(dict(settings))],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs,),
                    env=dict(env),
                    start_new_session=True,
                )
        finally:
            os.close(theirs)
        try:
            self.versions: dict[str, str] = self._answer()["versions"]
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """Send a request of the worker's table ``TIMED`` and return its answer."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"what": what, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # the process has ended; its output has the reason
        return self._answer()

    def close(self) -> None:
        """End the child and its processes."""
        if self._answers < 0:
            return
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_CLOSING_S if self.process.poll() is None else 0.0)
        self._kill()
        self.process.wait()
        os.close(self._answers)
        self._answers = -1

    def _answer(self) -> dict[str, Any]:
        end = time.monotonic() + self.patience_s
        while b"\n" not in self._rest:
            over = self.process.poll() is not None  # before the read: the last answer may still come
            ready, _, _ = select.select([self._answers], [], [], 0.0 if over else 0.2)
            part = os.read(self._answers, 1 << 16) if ready else b""
            self._rest += part
            if not part and (ready or over):
                raise self._failure(f"the vLLM process ended with status {self._status()}")
            if not part and time.monotonic() > end:
                self._kill()
                raise EngineFailed(f"no answer of vLLM within {self.patience_s:g} s")
        line, _, self._rest = self._rest.partition(b"\n")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise self._failure(str(found["error"]))
        return found

    def _status(self) -> int:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
        return self.process.returncode if self.process.returncode is not None else 0

    def _kill(self) -> None:
        """End all processes of the child's session, also those that outlive it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _failure(self, error: str) -> Exception:
        """Return the exception for an error of the child: its own, or if that names none the cause in the output."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)  # it writes the rest of its output
        text = self.log.read_bytes()[-_LOG_BYTES:].decode("utf-8", "replace")
        reason, found = one_line(error, 300), cause(text)
        if found and _GENERIC.search(error):
            reason = found
        elif found and not _ERROR.search(error):
            reason = f"{reason}: {found}"
        if _MEMORY.search(reason) or _MEMORY.search(error):
            return OutOfMemory(reason)
        if _ARGUMENT.search(reason):
            return Unsupported(f"{reason}; supported releases of vLLM: {' to '.join(RELEASES)}")
        return EngineFailed(reason)


def cause(output: str) -> str:
    """Return the last error in the output of vLLM that names a cause, else the last line; "" without any."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if not _QUIET.search(line)]
    found = [m for line in telling if (m := _ERROR.search(line)) and not _GENERIC.search(line)]
    if found:
        return one_line(f"{found[-1][1].rsplit('.', 1)[-1]}: {found[-1][2]}", 300)
    return one_line(lines[-1], 300) if lines else ""
