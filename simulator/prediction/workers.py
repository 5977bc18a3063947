"""Compute the parts of a sweep in this process or in worker processes on this machine.

Use :func:`compute_parts`. Tasks are pure and return the bytes of their part; only the calling process writes it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from multiprocessing import active_children, get_context


def compute_parts(compute: Callable[[int], bytes], todo: list[int], jobs: int = 1) -> Iterator[tuple[int, bytes]]:
    """Yield finished parts with their index."""
    jobs = min(jobs, max(1, len(todo)))
    if jobs == 1:
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
                why = "a worker process ended early, perhaps for lack of memory; run the command again to resume"
                raise OSError(why) from error
            except BaseException:
                for worker in set(active_children()) - others:
                    worker.terminate()
                _close_results(pool)
                pool.shutdown(cancel_futures=True)
                raise


def windowed(submit: Callable[[int], Future[bytes]], todo: Iterable[int], many: int) -> Iterator[tuple[int, bytes]]:
    """Yield results of tasks as they finish; at most ``many`` run at once, which bounds the memory."""
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


def _close_results(pool: ProcessPoolExecutor) -> None:
    """Close this process's end of the pipe of results: of one that a worker wrote in part when it ended, the pool would
    wait for the rest as long as another process can write it. The pool has no public way."""
    results = getattr(pool, "_result_queue", None)
    if results is not None:
        results._writer.close()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Block Ctrl-C while a worker may be started: workers inherit the mask, and only the parent handles the signal."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _follow(parent: int) -> None:
    """End this worker when its parent process has ended for any reason."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # if it could not be blocked
    threading.Thread(target=watch, daemon=True).start()
