"""Ray started in a process of ours: who can reach it, and who may use it."""

import dataclasses
import ipaddress
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import training_place

OWNER = """
import ipaddress, json, os, sys
import psutil, ray
from pipelines.cluster import start_ray, stop_ray
from pipelines.settings import Settings

@ray.remote
def here():
    return os.getpid()

start_ray(Settings(store=sys.argv[1], cpus=1))
ray.get(here.remote())
me = psutil.Process()
found = {"address": ray.get_runtime_context().gcs_address, "near": 0, "far": []}
for process in (me, *me.children(recursive=True)):
    for one in process.net_connections("inet"):
        if one.status != psutil.CONN_LISTEN:
            continue
        ip = ipaddress.ip_address(one.laddr.ip)
        if (getattr(ip, "ipv4_mapped", None) or ip).is_loopback:
            found["near"] += 1
        else:
            found["far"].append([process.name(), one.laddr.ip])
print(json.dumps(found), flush=True)
sys.stdin.readline()
stop_ray()
"""
STRANGER = """
import sys

import pytest
from ray._raylet import GcsClient

# Not `ray.init`: that would ask the network's address instead of 127.0.0.1, where nobody listens.
print("let in", GcsClient(address=sys.argv[1]).internal_kv_keys(b"", None, timeout=20))
"""


def without_token():
    """An environment in which Ray knows of no token."""
    return {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def listening(process):
    """Addresses at which a process and its descendants wait to be called."""
    return [
        ipaddress.ip_address(one.laddr.ip)
        for each in (process, *process.children(recursive=True))
        for one in each.net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    ]


def near(address):
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def test_ranks_on_this_machine_meet_at_loopback(tmp_path):
    """Neither the store of their group nor what they hand each other is open to another machine."""
    training_place.write_store(tmp_path)
    order = tmp_path / "order.json"
    order.write_text(json.dumps(dataclasses.asdict(training_place.order_of(tmp_path, "two", 2))))
    tests = Path(__file__).parents[1]
    paths = [str(tests.parent), str(tests / "unit"), str(tests / "chaos")]
    driver = subprocess.Popen(
        [sys.executable, "-m", "training_place", str(order)],
        env=os.environ | {"SDN_CPUS": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(paths)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        said = (json.loads(line) for line in driver.stdout if line.startswith("["))
        assert any(kind == "step" for kind, _ in said)
        found = listening(psutil.Process(driver.pid))
    finally:
        driver.terminate()
        driver.communicate(timeout=60)
    assert [str(one) for one in found if not near(one)] == []
    assert len(found) > 2, "Ray's own servers were seen"


def test_an_embedded_ray_is_reached_from_this_machine_alone_and_asks_for_its_token(tmp_path):
    """No process of it listens beyond loopback, and a client without its token is refused."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)],
        env=without_token() | {"HOME": str(tmp_path / "owner")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        found = json.loads(owner.stdout.readline())
        asked = subprocess.run(
            [sys.executable, "-c", STRANGER, found["address"]],
            env=without_token() | {"HOME": str(tmp_path / "other"), "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    finally:
        owner.communicate("\n", timeout=60)
    assert found["far"] == []
    assert found["near"] > 2, "Ray's own servers were seen"
    assert asked.returncode != 0
    assert "let in" not in asked.stdout
    assert "Unauthenticated" in asked.stderr


ENDED = """
import os, signal, sys, time
from pipelines.cluster import start_ray, stop_ray
from pipelines.settings import Settings

class Asked(BaseException):
    pass

def ask(*_):
    raise Asked

if sys.argv[2] == "its own":
    signal.signal(signal.SIGTERM, ask)
start_ray(Settings(store=sys.argv[1], cpus=1))
try:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
except (Asked, SystemExit) as error:
    time.sleep(5)  # a last checkpoint
    print(type(error).__name__, flush=True)
    stop_ray()
"""


@pytest.mark.parametrize(("handler", "came"), [("its own", "Asked"), ("none", "SystemExit")])
def test_sigterm_leaves_time_for_a_last_checkpoint(tmp_path, handler, came):
    """It means what it meant before Ray, and Ray does not abort the process three seconds later."""
    done = subprocess.run(
        [sys.executable, "-c", ENDED, str(tmp_path), handler],
        env=without_token() | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == [came], done.stderr[-2000:]
    assert done.returncode == 0
