"""Champions under fire: processes that finish at once, processes that are killed."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from claiming import higher, operate, race
from registered_versions import aliases, registered
from test_mlflow_outage import Server

from pipelines.digests import folder_digest
from pipelines.registry import SHA256
from pipelines.rolling_back import check_files
from pipelines.succession import Succession

pytestmark = pytest.mark.timeout(900)
SDN = str(Path(sys.executable).with_name("sdn"))
VERSIONS = [str(number) for number in range(1, 9)]


@pytest.fixture(scope="module")
def processes():
    """Makes processes that have MLflow imported already, and nothing opened."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["claiming"])
    return context


@pytest.fixture(scope="module")
def pool(processes):
    with ProcessPoolExecutor(2, mp_context=processes) as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A store for all tests: MLflow takes seconds to make the tables of a new one."""
    return tmp_path_factory.mktemp("store")


def uri_of(place):
    return f"sqlite:///{place / 'mlflow.db'}"


def finish_at_once(pool, uri, client, name, order):
    """Two processes of four threads each; everything that must be true afterwards."""
    at = time.time() + 0.5
    halves = [pool.submit(race, uri, name, half, at) for half in (order[:4], order[4:])]
    found = [one for half in halves for one in half.result()]
    terms = Succession(client, name).terms()
    assert [term.number for term in terms] == list(range(1, len(terms) + 1))
    assert [term.previous for term in terms] == [None, *(term.champion for term in terms[:-1])]
    assert all(higher(term.champion, term.previous) for term in terms)
    assert terms[-1].champion == max(order, key=int)  # the best is never lost
    won = {one["term"]: one for one in found if one["term"] is not None}
    for term in terms:
        assert won[term.number]["version"] == term.champion
        assert won[term.number]["compared"][-1] == term.previous
    assert len(won) == len(terms)
    expected = {"champion": terms[-1].champion, "previous": terms[-1].previous}
    assert aliases(client, name) == {k: v for k, v in expected.items() if v is not None}
    return sum(len(one["compared"]) for one in found) - len(found)


@pytest.mark.rest
def test_flows_that_finish_at_once(place, pool):
    """Eight times eight challengers in two processes: never do two win against the same one."""
    lost = 0
    for number in range(8):
        name = f"sdn-race-{number}"
        client = registered(place, versions=len(VERSIONS), name=name)
        order = random.Random(number).sample(VERSIONS, len(VERSIONS))
        lost += finish_at_once(pool, uri_of(place), client, name, order)
    print(f"\n{lost} claims were lost and compared anew")
    assert lost > 0  # else nothing was at once


def prepared(place, name, what):
    """A model of four versions with two champions behind it; its succession."""
    found = Succession(registered(place, versions=4, name=name), name)
    for version in ("1", "2"):
        found.succeed(version, lambda _: (True, "better"))
    if what == "succeed":
        found.client.set_registered_model_alias(name, "challenger", "3")
    return found


def whole(one, what):
    """After a kill: a whole champion; then the next operation leaves nothing of the kill."""
    found = aliases(one.client, one.name)["champion"]
    assert found in {"succeed": ("2", "3"), "roll back": ("2", "1")}[what]
    assert check_files(one.client, one.name, found) == one.version(found).tags[SHA256]
    newest = one.settle()
    assert newest.champion == one.terms()[-1].champion
    shown = aliases(one.client, one.name)
    assert (shown["champion"], shown["previous"]) == (newest.champion, newest.previous)
    assert ("challenger" in shown) == (what == "succeed" and newest.champion == "2")
    back = one.roll_back(lambda version: check_files(one.client, one.name, version), "next")
    assert (back.number, back.champion) == (newest.number + 1, newest.previous)
    assert aliases(one.client, one.name)["champion"] == newest.previous
    return newest.number


@pytest.mark.rest
@pytest.mark.parametrize("what", ["succeed", "roll back"])
def test_a_process_killed_between_any_two_requests(place, processes, what):
    """SIGKILL after each number of requests: the champion is whole, the next one completes it."""
    newest = []
    for requests in itertools.count():
        one = prepared(place, f"sdn-{what}-{requests}", what)
        process = processes.Process(target=operate, args=(uri_of(place), one.name, what, requests))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -9
        newest.append(whole(one, what))
    assert newest == sorted(newest)  # before the claim term 2, after it term 3
    assert set(newest) == {2, 3}


@pytest.mark.rest
def test_a_process_killed_at_any_moment(place, processes):
    """SIGKILL from outside, in the middle of a request too, at random times."""
    moments = random.Random(7)
    killed = 0
    for number in range(16):
        what = ("succeed", "roll back")[number % 2]
        one = prepared(place, f"sdn-moment-{number}", what)
        ready = processes.Event()
        process = processes.Process(
            target=operate, args=(uri_of(place), one.name, what, 1000, ready)
        )
        process.start()
        assert ready.wait(60)
        time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.join(60)
        killed += process.exitcode == -9
        whole(one, what)
    print(f"\n{killed} of 16 were killed at work")
    assert killed > 0


def test_on_a_server(tmp_path, pool):
    """Over HTTP: a race with one winner at a time, and a rollback whose files come by HTTP."""
    server = Server(tmp_path)
    server.start()
    try:
        name = "sdn-served"
        client = registered(tmp_path, versions=len(VERSIONS), uri=server.uri, name=name)
        finish_at_once(pool, server.uri, client, name, VERSIONS[:-1])
        # Else there is nothing to go back to where the best was the first.
        Succession(client, name).succeed(VERSIONS[-1], lambda _: (True, "better"))
        before = aliases(client, name)
        env = {k: v for k, v in os.environ.items() if not k.startswith(("SDN_", "MLFLOW_"))}
        env |= {"SDN_TRACKING_URI": server.uri, "SDN_STORE": str(tmp_path / "store")}
        began = time.monotonic()
        done = subprocess.run(
            [SDN, "rollback", "--reason", "drew nothing", "--json"],
            env=env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        wall = time.monotonic() - began
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        print(f"\nrollback over HTTP: {said['seconds']} s, the whole command {wall:.1f} s")
        assert wall < 30
        assert (said["before"], said["after"]) == (before["champion"], before["previous"])
        after = {"champion": before["previous"], "previous": before["champion"]}
        assert aliases(client, name) == after
        made = tmp_path / "made" / name / said["after"] / "model"
        assert said["sha256"] == folder_digest(made)
    finally:
        server.signal(9)
