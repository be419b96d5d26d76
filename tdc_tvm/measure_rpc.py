"""Measuring on other machines, which serve at a TVM RPC tracker under a key.

Each server has a process here that builds a kernel, asks the tracker for a server that is free, and has it checked and
timed there in a session of its own.  So whatever a kernel does to a GPU's state ends with it, and building, which takes
longest, goes on in parallel.

TVM's own `RPCRunner` would not do: it fills arguments at random, so that no result could be checked, and gives what was
measured when a server was lost no second try.
"""

from __future__ import annotations

import functools
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tvm import rpc
from tvm.error import RPCSessionTimeoutError

from tdc_tvm.errors import TdcError
from tdc_tvm.measure import NOT_BUILT, BuiltKernel, Case, Worker, build_kernels, checked_arguments
from tdc_tvm.rpc_servers import Server, Tracker
from tdc_tvm.schedules.kernel import KernelConfig
from tdc_tvm.schedules.shape import ConvShape
from tdc_tvm.search import Measurement
from tdc_tvm.tuning import Machine

# What a process may take for all but building and measuring: its start, and finding a server.
_SLACK_S = 20.0
# Times of a kernel.
_SAMPLES = 10


class RpcMeasurer:
    """Builds kernels on this machine, and has them checked and timed on servers, all of one kind, at once.

    What is checked is what `LocalMeasurer` checks.  The clock is TVM's ``time_evaluator``, on the server: 10 samples,
    each the mean of as many launches, one behind the other, as take a tenth of ``seconds``.  On a CPU that is what
    `LocalMeasurer` does.  On a GPU, that one times launches within a CUDA graph; here the server's CPU launches each by
    itself, so that no kernel seems to take less than a launch does, some microseconds, and one of several parts pays
    for each.  So compare times of short kernels with others of this clock only.

    Parameters
    ----------
    tracker : Tracker
        Where the servers are.  One process is started for each that has the key now; those that come later stand in
        for lost ones.  What others use is waited for.
    target : str
        ``"cuda"`` or ``"llvm"``, the servers' GPU or CPU, or the GPU's architecture such as ``"sm_90a"``.
    seconds : float
        Of timing for a configuration, about.
    timeout_s : float
        After which a kernel has failed, from the beginning of its upload; so long may its build take, too.
    tries : int
        With how many servers a kernel is tried if one after the other is lost, before it has failed.  TVM's server does
        not outlive a kernel that crashes, so each try can cost one.

    Attributes
    ----------
    server : Server
        What they all are.
    server_count : int
        How many there were.
    machine : Machine
        What is tuned on.

    Raises
    ------
    TdcError
        If there is no tracker, no server, or none that kernels for the target run on.
    """

    def __init__(
        self, tracker: Tracker, target: str = "cuda", seconds: float = 0.05, timeout_s: float = 60.0, tries: int = 2
    ) -> None:
        if target not in ("cuda", "llvm") and not target.startswith("sm_"):
            raise TdcError(
                f"found the target {target!r}; expected 'cuda', 'llvm' or a GPU's architecture such as 'sm_90a'"
            )
        self.tracker, self.seconds, self.timeout_s, self.tries = tracker, seconds, timeout_s, tries
        self.kind = "llvm" if target == "llvm" else "cuda"
        self.server_count = tracker.server_count()
        self._threads = ThreadPoolExecutor(self.server_count)
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._is_closed = False
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
        try:
            self.server = self._ask_server()
            self.machine = self.server.machine(target)
        except BaseException:
            self.close()
            raise
        for _ in range(self.server_count - 1):
            self._idle.put(None)

    def measure(self, shape: ConvShape, configs: Sequence[KernelConfig]) -> Iterator[Measurement]:
        """One after the other, in order, while others are under way.

        Raises
        ------
        TdcError
            If the tracker or the last server is gone, or a server is another device than the first was.
        """
        return self._threads.map(functools.partial(self._measure, shape), configs)

    def close(self) -> None:
        """End the processes, and what is under way with them."""
        with self._lock:
            self._is_closed = True
            for worker in self._workers:
                worker.process.kill()
        # Its threads see that their processes have ended.
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> RpcMeasurer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask_server(self) -> Server:
        worker = self._start()
        answer, _ = self._answer(worker, None)
        if isinstance(answer, Server):
            self._idle.put(worker)
            return answer
        if not isinstance(answer, TdcError):
            answer = TdcError(
                f"a server with the key {self.tracker.key!r} at the RPC tracker {self.tracker} does not say what it is"
                f" ({answer}); end it and start another: {self.tracker.start_command}"
            )
        raise answer

    def _measure(self, shape: ConvShape, config: KernelConfig) -> Measurement:
        begin = time.monotonic()
        worker = self._idle.get()
        try:
            for _ in range(self.tries):
                worker = worker or self._start()
                answer, is_built = self._answer(worker, (shape, config, self.server, self.machine, self.seconds))
                if isinstance(answer, TdcError):
                    raise answer
                if isinstance(answer, Measurement):
                    return replace(answer, seconds=time.monotonic() - begin)
                # It may hang, or have ended.
                self._end(worker)
                worker = None
                if not is_built:
                    return Measurement(config, error=f"{NOT_BUILT}{answer}")
            return Measurement(
                config, error=f"the server was lost, {self.tries} times of {self.tries}; the last: {answer}"
            )
        finally:
            self._idle.put(worker)

    def _answer(self, worker: Worker, job: Any) -> tuple[Any, bool]:
        """What comes of a job, text if the server or the process was lost; and whether it was built before that."""
        answer: Any = worker.ask((self.tracker, self.kind, self.timeout_s, job))
        is_built = False
        while answer == "":
            answer = worker.wait(self.timeout_s + _SLACK_S)
            is_built = is_built or answer == ""
        return answer, is_built

    def _start(self) -> Worker:
        with self._lock:
            if self._is_closed:
                raise TdcError("measuring has ended")
            worker = Worker(work)
            self._workers.append(worker)
            return worker

    def _end(self, worker: Worker) -> None:
        with self._lock:
            if not self._is_closed:
                worker.close()
                self._workers.remove(worker)


# Searches ask for several configurations of a shape.
_case = functools.lru_cache(maxsize=1)(Case.of)


def work(connection: Connection) -> None:
    """Do jobs: an empty message is a sign of life, the first when a kernel was built; any other is the answer."""
    # The process that asks may be gone.
    with suppress(EOFError, OSError):
        while True:
            tracker, kind, timeout_s, job = connection.recv()
            alive = functools.partial(connection.send, "")
            try:
                if job is None:
                    answer: Any = Server.of(tracker.request(timeout_s, alive), kind)
                else:
                    answer = _build_and_measure(tracker, timeout_s, alive, *job)
            except TdcError as error:
                answer = error
            except Exception as error:
                answer = f"{type(error).__name__}: {error}"[:2000]
            connection.send(answer)


def _build_and_measure(
    tracker: Tracker,
    timeout_s: float,
    alive: Callable[[], None],
    shape: ConvShape,
    config: KernelConfig,
    server: Server,
    machine: Machine,
    seconds: float,
) -> Measurement:
    case = _case(shape)
    (kernel,) = build_kernels(case, machine.target, machine.device, [config])
    if kernel.error:
        return Measurement(config, error=kernel.error)
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "kernel.so")
        kernel.library.export_library(str(library))
        alive()
        session = tracker.request(timeout_s, alive)
        alive()
        try:
            return Measurement(config, _time(session, case, kernel, library, server, seconds))
        except ArithmeticError as error:
            return Measurement(config, error=str(error))
        except RPCSessionTimeoutError:
            return Measurement(config, error=f"no result in {timeout_s:g} s")
        except TdcError:
            raise
        except Exception as error:
            # Of the kernel if the server still answers; else the server is lost, and this fails, too.
            session.get_function("runtime.NumThreads")()
            return Measurement(config, error=f"{type(error).__name__}: {error}"[:2000])


def _time(
    session: rpc.RPCSession, case: Case, kernel: BuiltKernel, library: Path, server: Server, seconds: float
) -> tuple[float, ...]:
    """Check and time a kernel; microseconds."""
    found = Server.of(session, server.kind)
    if found != server:
        raise TdcError(
            f"found servers of different kinds: {found} beside {server}; give each kind a key of its own, as"
            " measurements on one count for no other"
        )
    session.upload(str(library))
    module = session.load_module(library.name)
    place = session.cpu(0) if server.kind == "llvm" else session.cuda(0)
    arguments = checked_arguments(case, kernel, module[kernel.name], place)
    sample_ms = max(1, round(seconds * 1e3 / _SAMPLES))
    evaluator = module.time_evaluator(kernel.name, place, number=1, repeat=_SAMPLES, min_repeat_ms=sample_ms)
    return tuple(round(sample_s * 1e6, 3) for sample_s in evaluator(*arguments).results)
