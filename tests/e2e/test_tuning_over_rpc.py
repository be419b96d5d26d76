"""Measuring on servers of a TVM RPC tracker: here the tracker and two servers on this machine's CPU."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import tvm
from tvm import rpc, tirx
from typer.testing import CliRunner

from tdc_tvm import cli, measure_rpc, rpc_servers
from tdc_tvm.errors import TdcError
from tdc_tvm.measure import Case, build_kernels
from tdc_tvm.measure_rpc import RpcMeasurer, work
from tdc_tvm.rpc_servers import Server, Tracker
from tdc_tvm.schedules import backend
from tdc_tvm.schedules.kernel import ConvWeights, KernelConfig
from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape
from tdc_tvm.search import Space
from tdc_tvm.targets import resolve_target
from tdc_tvm.tuning_db import TuningDatabase

SHAPE = TuckerConvShape(Conv2dShape(1, 6, 6, 8, 8, (3, 3), padding=(1, 1, 1, 1)), 4, 4)
# Of the shape's configurations.
WRONG, HANGING = 1, 2
SERVER = Server("llvm", "haswell", "haswell", 1, tvm.target.codegen.llvm_get_system_triple())
TIMEOUT_S = 5
# Of a start on a slow machine: a server imports TVM twice.
START_S = 120


ABSENT = KernelConfig("fused_tile", (("strip", 6),))


def sabotaged(connection):
    """`measure_rpc.work`, with two kernels damaged."""
    from tdc_tvm.schedules.cpu import conv

    make_kernel = conv.make_kernel

    def make_damaged(shape, epilogue, weights, config, device, name):
        number = Space.of(SHAPE, device).numbers.get(config)
        if number == WRONG:
            weights = tuple(ConvWeights(2 * one.kernel, one.bias) for one in weights)
        kernel = make_kernel(shape, epilogue, weights, config, device, name)
        if number == HANGING:
            forever = tirx.Evaluate(tirx.call_extern("int32", "sleep", 1000))
            kernel = replace(kernel, func=kernel.func.with_body(forever))
        return kernel

    conv.make_kernel = make_damaged
    work(connection)


def ending(connection):
    """Instead of `measure_rpc.work`: ends when it has built something."""
    while True:
        *_, job = connection.recv()
        if job is not None:
            connection.send("")
            os._exit(3)
        connection.send(SERVER)


class Cluster:
    """A tracker and two servers, each in a process group of its own, as they start further processes."""

    def __init__(self, folder):
        self.folder, self.processes = folder, []
        self.tracker = Tracker("127.0.0.1", free_port(), "cpu")

    def __enter__(self):
        try:
            self._start("rpc_tracker", self.tracker.port)
            # A server that finds none looks again after 5 s.
            self.wait_until(lambda queues: True)
            for _ in range(2):
                self._start("rpc_server", free_port(), "--tracker", str(self.tracker), "--key", self.tracker.key)
            self.wait_until_free(2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for number in range(len(self.processes)):
            self.kill(number)

    def wait_until_free(self, count):
        self.wait_until(lambda queues: queues.get(self.tracker.key, {"free": -1})["free"] == count)

    def _start(self, command, port, *options):
        arguments = ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1), *options]
        with open(self.log(len(self.processes)), "wb") as log:
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", f"tvm.exec.{command}", *arguments],
                    cwd=self.folder, env={**os.environ, "TVM_NUM_THREADS": "1"}, stdout=log, stderr=log,
                    start_new_session=True,
                )
            )  # fmt: skip

    def wait_until(self, is_so):
        """Until that is so of the tracker's queues."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with suppress(OSError):
                if is_so(queues(self.tracker)):
                    return
            time.sleep(0.05)
        logs = "\n".join(self.log(number).read_text() for number in range(len(self.processes)))
        pytest.fail(f"not within {START_S} s:\n{logs}")

    def log(self, number):
        """The tracker's is the first."""
        return self.folder / f"{number}.log"

    def kill(self, number):
        process = self.processes[number]
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def queues(tracker):
    # TVM itself tries again for a minute while nobody listens.
    socket.create_connection((tracker.host, tracker.port), timeout=5).close()
    session = rpc.connect_tracker(tracker.host, tracker.port)
    try:
        return session.summary()["queue_info"]
    finally:
        session.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("cluster")) as one:
        yield one


@pytest.fixture(scope="module")
def measurer(cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_rpc, "work", sabotaged)
        with RpcMeasurer(cluster.tracker, "llvm", seconds=0.01, timeout_s=TIMEOUT_S) as one:
            yield one


@pytest.fixture(scope="module")
def configs(measurer):
    """All of the shape."""
    return Space.of(SHAPE, measurer.machine.device).configs


@pytest.fixture(scope="module")
def results(measurer, configs):
    """Of all configurations of the shape, and of one that there is not."""
    return list(measurer.measure(SHAPE, [*configs, ABSENT]))


def test_results_come_in_order_and_bad_kernels_are_errors(configs, results):
    assert [result.config for result in results] == [*configs, ABSENT]
    wrong, hanging, unbuilt = results[WRONG], results[HANGING], results[-1]
    assert wrong.error.startswith("wrong result: relative error")
    assert hanging.error == f"no result in {TIMEOUT_S} s"
    assert hanging.seconds >= TIMEOUT_S
    assert unbuilt.error.startswith("was not built: TdcError")
    for number in set(range(len(configs))) - {WRONG, HANGING}:
        assert (len(results[number].samples_us), results[number].error) == (10, "")


@pytest.mark.usefixtures("results")
def test_all_servers_take_part(cluster):
    assert all("load_module" in cluster.log(number).read_text() for number in (1, 2))


def test_tuning_on_servers_counts_for_their_device(cluster, model_path, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_rpc, "work", work)
    path = tmp_path / "t.jsonl"
    arguments = [model_path, "--trials", 3, "--seconds", 0.01, "-d", path, "--target", "llvm", "--json"]
    arguments += ["--tracker", cluster.tracker, "--key", cluster.tracker.key]
    result = CliRunner().invoke(cli.main, ["tune", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    name = f"{tvm.target.codegen.llvm_get_system_cpu()} x 1"
    assert data["device"] == name
    assert (data["layers"][0]["trials"], data["layers"][0]["failed"]) == (3, 0)
    records = TuningDatabase(path).records
    assert [(record.key.shape, record.key.device) for record in records] == [(SHAPE, name)] * 3
    assert records[0].versions["clock"] == "time_evaluator over RPC"


def test_another_device_is_refused(measurer, configs, monkeypatch):
    found = measurer.server
    monkeypatch.setattr(measurer, "server", replace(found, name="another"))
    with pytest.raises(TdcError, match="servers of different kinds") as caught:
        list(measurer.measure(SHAPE, configs[:1]))
    assert f"{found} beside another (" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "target", "message"),
    [
        (
            "absent",
            "llvm",
            r"no server has the key 'absent' at the RPC tracker .*, where these keys are: cpu; start one",
        ),
        ("cpu", "cuda", "a server has no NVIDIA GPU that TVM can use"),
        ("cpu", "rocm", "found the target 'rocm'; expected 'cuda', 'llvm'"),
    ],
)
def test_servers_that_do_not_fit_are_refused(cluster, key, target, message):
    with pytest.raises(TdcError, match=message):
        RpcMeasurer(replace(cluster.tracker, key=key), target)


@pytest.mark.parametrize("is_listening", [False, True])
def test_what_is_no_tracker_is_refused(is_listening, monkeypatch):
    monkeypatch.setattr(rpc_servers, "PATIENCE_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        if is_listening:
            silent.listen()
        port = silent.getsockname()[1]
        begin = time.monotonic()
        with pytest.raises(TdcError, match=rf"no RPC tracker answers at 127\.0\.0\.1:{port} .* --port {port}"):
            RpcMeasurer(Tracker("127.0.0.1", port, "cpu"), "llvm")
        assert time.monotonic() - begin < 5


def test_gpu_servers_are_named_like_local_gpus():
    here = tvm.target.codegen.llvm_get_system_triple()
    server = Server("cuda", "NVIDIA H200", "sm_90a", 132, here)
    for target, arch in (("cuda", "sm_90a"), ("sm_90a", "sm_90a"), ("sm_90", "sm_90")):
        machine = server.machine(target)
        assert (machine.name, machine.device.arch) == ("H200", arch)
        assert machine.versions["gpu"] == "NVIDIA H200"
        # Its CPU may be a lesser one than this.
        assert "mcpu" not in resolve_target(machine.target).host.attrs
        pick, _ = backend(machine.device).choose(SHAPE, machine.device)
        (kernel,) = build_kernels(Case.of(SHAPE), machine.target, machine.device, [pick])
        assert kernel.error == ""
    with pytest.raises(TdcError, match="found the target 'sm_80', expected 'cuda' or 'sm_90a'"):
        server.machine("sm_80")
    with pytest.raises(TdcError, match="the servers' system is aarch64-linux-gnu"):
        replace(server, triple="aarch64-linux-gnu").machine("cuda")


def test_a_kernel_whose_servers_are_lost_is_given_up(monkeypatch):
    monkeypatch.setattr(measure_rpc, "work", ending)
    monkeypatch.setattr(Tracker, "server_count", lambda self: 1)
    with RpcMeasurer(Tracker("127.0.0.1", 9190, "cpu"), "llvm", tries=2) as measurer:
        (result,) = measurer.measure(SHAPE, [ABSENT])
    assert result.error == "the server was lost, 2 times of 2; the last: the process ended with status 3"


# The last, as it costs the servers.
def test_what_a_lost_server_had_is_measured_on_another(cluster, measurer, configs, monkeypatch):
    # Long enough to kill a server in the midst of it.
    monkeypatch.setattr(measurer, "seconds", 2)
    monkeypatch.setattr(measurer, "timeout_s", 60)
    good = [config for number, config in enumerate(configs) if number not in (WRONG, HANGING)]
    results = measurer.measure(SHAPE, good)
    cluster.wait_until_free(0)
    cluster.kill(1)
    log = cluster.log(1).read_text()
    assert log.count("connected from") == log.count("finish serving") + 1
    results = list(results)
    assert [result.config for result in results] == good
    assert all(result.samples_us for result in results)
    cluster.kill(2)
    with pytest.raises(TdcError, match="no server has the key 'cpu'"):
        list(measurer.measure(SHAPE, good))
