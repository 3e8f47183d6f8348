"""A Ray head, and nodes beside it, as a cluster for tests; ended by the ids of its processes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines import jobs

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Cluster:
    """Where it is found."""

    address: str
    """host:port, for `ray.init`."""
    dashboard: str


def free_ports(count):
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def ray_cluster(folder, cpus=2):
    """A running head with so many cores, whose log lies in `folder`."""
    port, dashboard, agent = free_ports(3)
    env = environment()
    command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
    command += [f"--num-cpus={cpus}", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}"]
    command += ["--disable-usage-stats", "--object-store-memory=200000000"]
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        yield Cluster(
            f"127.0.0.1:{port}", wait_for(f"http://127.0.0.1:{dashboard}", head, folder / "ray.log")
        )
    finally:
        # Ray's own processes are no children of the command: they carry the port or its session.
        tree = [*psutil.Process(head.pid).children(recursive=True), *carrying(str(port))]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(20)
        head.kill()
        _, alive = psutil.wait_procs(tree, timeout=10)
        for process in [*alive, *carrying(str(port))]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@contextlib.contextmanager
def node(cluster, folder):
    """A node of one core that joins the cluster, and is killed at the end."""
    (agent,) = free_ports(1)
    command = [RAY, "start", "--block", f"--address={cluster.address}", "--num-cpus=1"]
    command += ["--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}"]
    command += ["--disable-usage-stats", "--object-store-memory=100000000"]
    with (folder / "node.log").open("w") as log:
        process = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        yield process
    finally:
        tree = [*psutil.Process(process.pid).children(recursive=True), process]
        for part in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        process.wait()


def environment():
    """That of a cluster's processes."""
    paths = [ROOT, ROOT / "tests" / "unit", ROOT / "tests" / "chaos"]
    return os.environ | {
        "PYTHONPATH": ":".join(map(str, paths)),
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1.0",
    }


def carrying(port):
    """The processes of the cluster on this port."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if f":{port}" in command or f"gcs_server_port={port}" in command:
            found.append(process)
    return found


def wait_for(address, head, log):
    until = time.monotonic() + 90
    while True:
        with contextlib.suppress(jobs.ClusterError):
            jobs.connect(address).list_jobs()
            return address
        assert head.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < until, log.read_text()[-2000:]
        time.sleep(1)
