"""A sweep on a running Dask cluster: the same parts, computed by its workers.

Use :func:`compute_on` through ``sweep(..., scheduler=ADDRESS)``. Tasks are pure and return the bytes of their part,
which the calling process alone writes: a worker that dies midway costs a recomputation, never a part twice or half.
Workers need this package, and must see profiles and configurations given as files under the same paths.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any

from simulator.errors import InputError

CONNECT_S = 10.0
"""How long to look for the scheduler."""

RETRIES = 3
"""Times a part is tried again after an error of the worker that computes it."""


def compute_on(address: str, compute: Callable[[int], bytes], todo: list[int]) -> Iterator[tuple[int, bytes]]:
    """Parts of a sweep as the workers of a cluster finish them; InputError without ``distributed`` or a scheduler that
    answers."""
    try:
        distributed: Any = importlib.import_module("distributed")
    except ImportError:
        raise InputError("--scheduler needs Dask, which is not installed: pip install distributed") from None
    try:
        client: Any = distributed.Client(address, timeout=CONNECT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:  # OSError: also its time-out
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        wanted = "expected an address such as tcp://host:8786"
        raise InputError(f"--scheduler {address}: no scheduler answers there ({reason}); {wanted}") from None
    with contextlib.closing(client):
        workers = max(1, sum(client.nthreads().values()))
        waiting, started = iter(todo), {}
        arriving: Any = distributed.as_completed([], loop=client.loop)

        def start(many: int) -> None:
            for _, index in zip(range(many), waiting):
                future = client.submit(compute, index, pure=False, retries=RETRIES)
                started[future.key] = index
                arriving.add(future)

        start(4 * workers)  # those under way hold their bytes until this process has written them
        for future in arriving:
            index = started.pop(future.key)
            try:
                content = future.result()
            except InputError:
                raise
            except Exception as error:  # whatever a remote worker died of
                reason = f"{type(error).__name__}: {error}"
                raise OSError(f"part {index} failed on the cluster ({reason}); the same command goes on") from error
            future.release()
            yield index, content
            start(1)
