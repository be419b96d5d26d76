"""Servers at a TVM RPC tracker: where they are found, and what they say that they are."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import tvm
from tvm import rpc
from tvm.target import Target

import tdc_tvm
from tdc_tvm.cuda_toolchain import cuda_version
from tdc_tvm.errors import TdcError
from tdc_tvm.schedules.device import DeviceSpec, cpu_spec
from tdc_tvm.targets import gpu_arch, gpu_name, resolve_target
from tdc_tvm.tuning import Machine

# So long may a tracker take to answer.
PATIENCE_S = 5.0


@dataclass(frozen=True)
class Tracker:
    """A TVM RPC tracker, and the key of the servers that are wanted.

    Parameters
    ----------
    host, port
        Where the tracker listens.
    key : str
        What the servers were started with.
    """

    host: str
    port: int
    key: str

    @staticmethod
    def parse(address: str, key: str) -> Tracker:
        """From ``HOST:PORT``.

        Raises
        ------
        TdcError
            If it is anything else.
        """
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise TdcError(f"found the tracker {address!r}; expected HOST:PORT, such as 'gpu-rack:9190'")
        return Tracker(host, int(port), key)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def start_command(self) -> str:
        """What starts a server."""
        return f"python -m tvm.exec.rpc_server --tracker {self} --key {self.key}"

    def server_count(self) -> int:
        """How many servers have the key, whether or not they are free.

        Raises
        ------
        TdcError
            If there are none, or the tracker does not answer.
        """
        try:
            with _connected(self) as tracker:
                found = [info["key"].removeprefix("server:") for info in tracker.summary()["server_info"]]
        except (OSError, RuntimeError, ValueError) as error:
            raise TdcError(
                f"no RPC tracker answers at {self} ({error}); start one there with: python -m tvm.exec.rpc_tracker"
                f" --port {self.port}"
            ) from None
        if self.key not in found:
            others = ", ".join(sorted(set(found))) or "none"
            raise TdcError(
                f"no server has the key {self.key!r} at the RPC tracker {self}, where these keys are: {others}; start"
                f" one on each machine with: {self.start_command}"
            )
        return found.count(self.key)

    def request(self, timeout_s: float, wait: Callable[[], None]) -> rpc.RPCSession:
        """A session of ``timeout_s`` seconds with a server that is free; ``wait`` is called while there is none.

        Raises
        ------
        TdcError
            If there are no servers, or no tracker, any more.
        RuntimeError
            If the server that the tracker named does not answer.
        """
        while True:
            self.server_count()
            with _connected(self) as tracker:
                try:
                    return tracker.request(self.key, session_timeout=timeout_s, max_retry=1)
                except RuntimeError as error:
                    # So it reads where a socket waited in vain for the tracker's answer: no server is free.
                    if not str(error).endswith("last_error:timed out"):
                        raise
            wait()


@contextmanager
def _connected(tracker: Tracker) -> Iterator[rpc.TrackerSession]:
    """TVM's own tracker session; but TVM would wait for ever for what does not answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE_S)
    try:
        # TVM tries again for a minute where nobody listens.
        socket.create_connection((tracker.host, tracker.port)).close()
        session = rpc.connect_tracker(tracker.host, tracker.port)
    finally:
        socket.setdefaulttimeout(before)
    try:
        yield session
    finally:
        session.close()


@dataclass(frozen=True)
class Server:
    """What a server says that it is.

    Parameters
    ----------
    kind : str
        ``"cuda"`` or ``"llvm"``.
    name : str
        The driver's of a GPU, LLVM's of a CPU.
    arch : str
        ``"sm_90a"`` and the like; of a CPU its name.
    cores : int
        A GPU's processors, or the threads that TVM runs on a CPU.
    triple : str
        LLVM's name of the system.
    """

    kind: str
    name: str
    arch: str
    cores: int
    triple: str

    def __str__(self) -> str:
        return f"{self.name} ({self.arch} x {self.cores}, {self.triple})"

    @staticmethod
    def of(session: rpc.RPCSession, kind: str) -> Server:
        """Ask.

        Raises
        ------
        TdcError
            If it cannot tell, or has no such device.
        """
        try:
            triple = str(session.get_function("target.llvm_get_system_triple")())
            if kind == "llvm":
                cpu = str(session.get_function("target.llvm_get_system_cpu")())
                return Server(kind, cpu, cpu, session.get_function("runtime.NumThreads")(), triple)
        except AttributeError as error:
            raise TdcError(
                f"a server does not say what it is ({error}); run it with apache-tvm {tvm.__version__}, as here"
            ) from None
        gpu = session.cuda(0)
        try:
            is_there = gpu.exist
        except tvm.error.RPCError:
            # Without CUDA's runtime library, TVM does not load its own.
            is_there = False
        if not is_there:
            raise TdcError(
                "a server has no NVIDIA GPU that TVM can use; start it where there is one, with the folder of"
                " libcudart.so.13 in LD_LIBRARY_PATH, or tune for its CPU with --target llvm"
            )
        return Server(kind, str(gpu.device_name), gpu_arch(gpu), gpu.multi_processor_count, triple)

    def machine(self, target: str) -> Machine:
        """What kernels are built for, and what measurements count for.

        Raises
        ------
        TdcError
            If kernels for the target do not run there, or cannot be built here.
        """
        here = tvm.target.codegen.llvm_get_system_triple()
        if self.triple.partition("-")[0] != here.partition("-")[0]:
            raise TdcError(
                f"the servers' system is {self.triple}, this machine's is {here}; tune from a machine like them"
            )
        versions = {"tdc_tvm": tdc_tvm.__version__, "tvm": tvm.__version__, "clock": "time_evaluator over RPC"}
        if self.kind == "llvm":
            built_for = resolve_target(Target({"kind": "llvm", "mcpu": self.arch}))
            # `DeviceSpec.from_target` would count this machine's cores.
            device = cpu_spec(self.arch, self.cores)
            return Machine(str(built_for), device, device.name, versions)
        arch = self.arch if target == "cuda" else target
        if arch not in (self.arch, self.arch.rstrip("a")):
            raise TdcError(
                f"the servers have the GPU {self.name}, {self.arch}; found the target {target!r}, expected 'cuda' or"
                f" {self.arch!r}"
            )
        # Its CPU, which launches the kernels, may lack what this one has.
        built_for = resolve_target(Target({"kind": "cuda", "arch": arch, "host": {"kind": "llvm"}}))
        device = DeviceSpec.from_target(built_for)
        versions |= {"cuda": cuda_version(), "gpu": self.name}
        return Machine(str(built_for), device, gpu_name(self.name, self.cores), versions)
