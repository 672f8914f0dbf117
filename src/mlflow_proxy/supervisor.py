"""Runs worker processes: starts them, replaces those that died or are out of date, and ends them.

One loop over signals and pipes compares what there is with what there should be. Workers are forked, so that what was
imported costs once, and share the listening socket, so that no connection that waits in it dies with one of them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

_STOPS = (signal.SIGINT, signal.SIGTERM)
_SIGNALS = (*_STOPS, signal.SIGHUP, signal.SIGCHLD)
# Seconds before another worker is started in place of one that failed, and between looks at those that are leaving.
_PAUSE = 1.0
_LOOK = 0.1
# Seconds that a worker gets beyond its own deadline, before it is killed.
_PATIENCE = 5.0


@dataclass(frozen=True)
class Lifelines:
    """What a worker holds of its supervisor: where it tells that it serves, and what ends with the supervisor."""

    ready: int
    supervisor: int


@dataclass
class _Worker:
    pid: int
    generation: int
    told: int  # the pipe in which it tells that it serves
    ready: bool = False
    leaves_until: float | None = None


class Supervisor:
    """Keeps `count` workers, each of which runs `work` in a process of its own until SIGTERM, and gives an exit code.

    `reload`, in a thread, says at SIGHUP whether there is something new; then all workers are replaced, one by one.
    `stopping` is called once when all shall end. `drain`: seconds that a worker needs at the most to end.
    """

    def __init__(
        self,
        work: Callable[[Lifelines], int],
        *,
        count: int,
        drain: float,
        reload: Callable[[], bool],
        stopping: Callable[[], None],
    ) -> None:
        self._work = work
        self._count = count
        self._drain = drain
        self._reload = reload
        self._workers: dict[int, _Worker] = {}
        self._generation = 0
        self._not_before = 0.0
        self._stopping = False
        self._on_stop = stopping
        self._judging: threading.Thread | None = None
        self._selector = selectors.DefaultSelector()
        self._told, self._tell = os.pipe()
        self._alive = os.pipe()  # never written to; ends with this process

    def run(self) -> None:
        """Until SIGINT or SIGTERM, and until all workers have ended."""
        os.set_blocking(self._told, False)
        os.set_blocking(self._tell, False)
        self._selector.register(self._told, selectors.EVENT_READ)
        for number in _SIGNALS:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        while True:
            timeout = self._reconcile()
            if self._stopping and not self._workers:
                break
            for key, _ in self._selector.select(timeout):
                if key.fd == self._told:
                    self._hear()
                else:
                    self._note_ready(key.data)
            self._bury()
        signal.set_wakeup_fd(-1)

    # What happened

    def _hear(self) -> None:
        for number in os.read(self._told, 512):
            if number in _STOPS:
                if not self._stopping:
                    self._on_stop()
                self._stopping = True
            elif number == signal.SIGHUP:
                self._begin_reload()
            elif number == 0:
                self._generation += 1

    def _begin_reload(self) -> None:
        if self._judging is None or not self._judging.is_alive():
            self._judging = threading.Thread(target=self._judge, name="reload", daemon=True)
            self._judging.start()
        else:  # what it reads may have been changed once more
            threading.Timer(_PAUSE, os.kill, (os.getpid(), signal.SIGHUP)).start()

    def _judge(self) -> None:
        if self._reload():
            os.write(self._tell, b"\0")

    def _note_ready(self, worker: _Worker) -> None:
        worker.ready = bool(os.read(worker.told, 1))
        self._forget_pipe(worker)

    def _bury(self) -> None:
        for worker in list(self._workers.values()):
            pid, status = os.waitpid(worker.pid, os.WNOHANG)
            if pid:
                del self._workers[pid]
                self._forget_pipe(worker)
                if worker.leaves_until is None:
                    self._not_before = time.monotonic() + (0 if worker.ready else _PAUSE)
                    logger.error("worker %d ended unexpectedly (%s); another one takes its place", pid, _cause(status))

    def _forget_pipe(self, worker: _Worker) -> None:
        if worker.told >= 0:
            self._selector.unregister(worker.told)
            os.close(worker.told)
            worker.told = -1

    # What should be

    def _reconcile(self) -> float | None:
        """Start and end workers as it should be. Gives in how many seconds to look again, if nothing happens."""
        now = time.monotonic()
        staying = [worker for worker in self._workers.values() if worker.leaves_until is None]
        if self._stopping:
            for worker in staying:
                self._end(worker, now)
        else:
            current = [worker for worker in staying if worker.generation == self._generation]
            old = [worker for worker in staying if worker.generation != self._generation]
            surplus = sum(worker.ready for worker in current) + len(old) - self._count
            for worker in old[: max(0, surplus)]:
                self._end(worker, now)
            missing = self._count - len(current)
            one_by_one = old and not all(worker.ready for worker in current)
            if missing and not one_by_one and not self._judges() and now >= self._not_before:
                for _ in range(1 if old else missing):
                    self._start()
        for worker in self._workers.values():
            if worker.leaves_until is not None and now > worker.leaves_until:
                logger.error("worker %d did not end in time and is killed", worker.pid)
                worker.leaves_until = float("inf")
                os.kill(worker.pid, signal.SIGKILL)
        pending = len(self._workers) < self._count or any(w.leaves_until is not None for w in self._workers.values())
        return _LOOK if pending or self._judges() else None

    def _judges(self) -> bool:
        """A configuration is being judged in a thread; a process forked now would have locks that nobody frees."""
        return self._judging is not None and self._judging.is_alive()

    def _end(self, worker: _Worker, now: float) -> None:
        worker.leaves_until = now + self._drain + _PATIENCE
        os.kill(worker.pid, signal.SIGTERM)

    def _start(self) -> None:
        told, tell = os.pipe()
        # A stop that arrives before the child is set up must end it, and not be heard twice.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        pid = os.fork()
        if not pid:
            self._become_worker(Lifelines(tell, self._alive[0]), told)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(tell)
        worker = self._workers[pid] = _Worker(pid, self._generation, told)
        self._selector.register(told, selectors.EVENT_READ, worker)

    def _become_worker(self, lifelines: Lifelines, told: int) -> None:
        code = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # until it serves, and has a handler of its own
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, but the supervisor decides
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            self._selector.close()
            for number in (told, self._told, self._tell, self._alive[1], *self._pipes()):
                os.close(number)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            code = self._work(lifelines)
        except BaseException:
            logger.exception("a worker failed")
        finally:
            with contextlib.suppress(BaseException):
                logging.shutdown()
            os._exit(code)

    def _pipes(self) -> list[int]:
        return [worker.told for worker in self._workers.values() if worker.told >= 0]


def _cause(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
