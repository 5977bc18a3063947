"""Who computes the parts of a sweep: this process, others of this machine, or the workers of a Dask cluster.

Use :func:`compute_parts`. Tasks are pure and return the bytes of their part, which the calling process alone writes: a
worker that dies midway costs a recomputation, never a part twice or half. Workers of a cluster need this package, and
must see profiles and configurations given as files under the same paths.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context
from typing import Any

from simulator.errors import InputError

CONNECT_S = 10.0  # how long to look for the scheduler
RETRIES = 3  # times a part is tried again after an error of the worker that computes it


def compute_parts(
    compute: Callable[[int], bytes], todo: list[int], jobs: int = 1, scheduler: str | None = None
) -> Iterator[tuple[int, bytes]]:
    """Parts as they come, with their index."""
    jobs = min(jobs, max(1, len(todo)))
    if scheduler is not None:
        yield from _on_cluster(scheduler, compute, todo)
    elif jobs == 1:
        for index in todo:
            yield index, compute(index)
    else:
        # spawned: a forked child would inherit the locks of threads it does not have
        context, others = get_context("spawn"), set(active_children())

        def submit(index: int) -> Future[bytes]:
            with _undisturbed():
                return pool.submit(compute, index)

        with ProcessPoolExecutor(jobs, mp_context=context, initializer=_follow, initargs=(os.getpid(),)) as pool:
            try:
                yield from windowed(submit, todo, 2 * jobs)
            except BrokenExecutor as error:
                why = "a worker process ended before its time, perhaps for want of memory; the same command goes on"
                raise OSError(why) from error
            except BaseException:
                for worker in set(active_children()) - others:
                    worker.terminate()
                pool.shutdown(cancel_futures=True)
                raise


def windowed(submit: Callable[[int], Future[bytes]], todo: Iterable[int], many: int) -> Iterator[tuple[int, bytes]]:
    """Results of tasks as they finish, never more than so many under way: their bytes are all that adds up."""
    waiting = iter(todo)
    under_way: dict[Future[bytes], int] = {}
    while True:
        for index in waiting:
            under_way[submit(index)] = index
            if len(under_way) >= many:
                break
        if not under_way:
            return
        for future in wait(under_way, return_when=FIRST_COMPLETED).done:
            yield under_way.pop(future), future.result()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Hold Ctrl-C back while a worker may be started: it starts without it, and never has to answer what reaches the
    whole group, the parent alone."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(parent: int) -> None:
    """End this worker when the process that started it is gone, whatever killed that."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it could not be held back
    threading.Thread(target=watch, daemon=True).start()


def _on_cluster(address: str, compute: Callable[[int], bytes], todo: list[int]) -> Iterator[tuple[int, bytes]]:
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
