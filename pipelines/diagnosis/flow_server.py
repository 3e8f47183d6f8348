"""The Prefect server: reached, of our version, and with all that a deployed run needs."""

from __future__ import annotations

from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx

from pipelines.deployed import same_code
from pipelines.deploying import FILE, RUNS, TRAINING, TRAININGS, find_file, read_entries
from pipelines.diagnosis.check import Check
from pipelines.flows import POOL, RECONCILER

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pipelines.settings import Settings

KINDS = ("process", "kubernetes")
"""Types of pools whose workers can start our flows."""


def expected_deployments() -> dict[str, str]:
    """Name -> version of what `sdn deploy` would deploy from here."""
    return {one["name"]: one["version"] for one in read_entries(find_file(None), POOL)}


def look_at_prefect(settings: Settings) -> Iterator[Check]:
    """The server, and what stands on it; embedded there is none to look at."""
    from prefect.settings import PREFECT_API_URL

    url = PREFECT_API_URL.value()
    if not url:
        found = "embedded (no PREFECT_API_URL); `sdn ui` shows its runs"
        yield Check(ok=True, what="Prefect", found=found)
        return
    with _client(url) as client:
        server = _Server(client, url.rstrip("/"))
        reached = server.reached()
        yield reached
        if reached.ok:
            yield from _stands_on(server, settings)


def _stands_on(server: _Server, settings: Settings) -> Iterator[Check]:
    """What a server that answers has, or lacks."""
    yield server.same_version()
    yield server.keeps_leases()
    yield server.pool()
    yield server.kind()
    yield server.worker()
    yield server.queues()
    yield server.deployed()
    yield server.schedules()
    yield server.late()
    yield server.reconciler(settings)


def _client(url: str) -> httpx.Client:
    """A client with the credentials that Prefect's own would use."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    key, auth = PREFECT_API_KEY.value(), PREFECT_API_AUTH_STRING.value()
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    basic = None
    if auth:
        user, _, password = auth.partition(":")
        basic = httpx.BasicAuth(user, password)
    return httpx.Client(base_url=url.rstrip("/") + "/", headers=headers, auth=basic, timeout=5)


def workers_here() -> Iterator[tuple[str, str]]:
    """(pool, type) of each worker that runs on this machine; the server does not know the type."""
    import psutil

    for one in psutil.process_iter(["cmdline"]):
        words = one.info["cmdline"] or []
        options = dict(pairwise(words))
        if options.get("worker") == "start" and {"--pool", "--type"} <= options.keys():
            yield options["--pool"], options["--type"]


@dataclass
class _Server:
    """Asks a server; each answer is one check."""

    client: httpx.Client
    url: str

    def reached(self) -> Check:
        """Whether it answers, and is Prefect's API."""
        remedy = (
            "start it with `sdn serve prefect` (`sdn up` for all of it), or unset PREFECT_API_URL "
            "to run embedded"
        )
        try:
            answer = self.client.get("health")
        except httpx.HTTPError as error:
            found = f"{self.url}: {str(error) or type(error).__name__}"
            return Check(ok=False, what="Prefect", found=found, remedy=remedy)
        found = f"{self.url} answers {answer.status_code}"
        if answer.is_success and answer.text.strip() == "true":
            return Check(ok=True, what="Prefect", found=found)
        if answer.status_code in {401, 403}:
            remedy = (
                "set SDN_AUTH=user:password (or PREFECT_API_AUTH_STRING, PREFECT_API_KEY) as there"
            )
        elif not self.url.endswith("/api"):
            found = f"{self.url} is not its API"
            remedy = f"set PREFECT_API_URL={self.url}/api"
        return Check(ok=False, what="Prefect", found=found, remedy=remedy)

    def same_version(self) -> Check:
        """The same minor version as here."""
        there, here = str(self._get("admin/version")), version("prefect")
        return Check(
            ok=there.split(".")[:2] == here.split(".")[:2],
            what="Prefect version",
            found=f"server {there}, here {here}",
            remedy=f"install prefect=={there} here, or {here} there",
        )

    def keeps_leases(self) -> Check:
        """Whether slots outlive a restart of the server: a run that lost its own is ended."""
        settings = self._get("admin/settings")
        kept = settings["server"]["concurrency"]["lease_storage"].rpartition(".")[2]
        return Check(
            ok=kept != "memory",
            what="Prefect slots",
            found=f"kept in {kept}",
            remedy="start the server with `sdn serve prefect`, or with "
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE="
            "prefect.server.concurrency.lease_storage.filesystem: without it a restart of the "
            "server ends every run that holds a slot",
        )

    def pool(self) -> Check:
        """The work pool is there, not paused, and lets something run."""
        pool = self._pool
        if pool is None:
            return Check(
                ok=False,
                what="Prefect pool",
                found=f"no work pool {POOL}",
                remedy=f"sdn deploy --pool {POOL} (it makes pool, queues, limits and deployments)",
            )
        if pool["is_paused"]:
            found, remedy = f"{POOL} is paused", f"prefect work-pool resume {POOL}"
        else:
            found = f"{POOL} has a limit of 0"
            remedy = f"sdn deploy --runs {RUNS}"
        ok = not pool["is_paused"] and pool["concurrency_limit"] != 0
        found = f"{POOL}, type {pool['type']}" if ok else found
        return Check(ok=ok, what="Prefect pool", found=found, remedy=remedy)

    def worker(self) -> Check:
        """A worker is online."""
        workers = self._post(f"work_pools/{POOL}/workers/filter") if self._pool else []
        online = [one["name"] for one in workers if one["status"] == "ONLINE"]
        return Check(
            ok=bool(online),
            what="Prefect worker",
            found=f"{len(online)} online" if online else f"none is online in {POOL}",
            remedy=f"sdn serve worker --pool {POOL} --type {self._kind}",
        )

    def kind(self) -> Check:
        """The pool is of a type whose runs our workers start."""
        here = [kind for pool, kind in workers_here() if pool == POOL]
        others = [kind for kind in here if kind != self._kind]
        known = self._kind in KINDS
        found = f"pool {self._kind}, workers of this machine {', '.join(here) or 'none'}"
        return Check(
            ok=self._pool is None or (known and not others),
            what="Prefect pool's type",
            found=found,
            remedy=f"prefect work-pool delete {POOL}, then sdn deploy --type "
            f"{others[0] if others else KINDS[0]}: a worker starts no runs of a pool of another "
            f"type, and expected is one of {', '.join(KINDS)}",
        )

    def queues(self) -> Check:
        """No queue is paused or lets nothing run."""
        queues = self._post(f"work_pools/{POOL}/queues/filter") if self._pool else []
        paused = [one["name"] for one in queues if one["is_paused"]]
        closed = [one["name"] for one in queues if one["concurrency_limit"] == 0]
        limits = {one["name"]: one["concurrency_limit"] for one in queues}
        of_trainings = f"sdn deploy --trainings {TRAININGS}"
        ok, remedy = False, f"prefect work-queue resume {' '.join(paused[:1])} --pool {POOL}"
        if paused:
            found = f"{', '.join(paused)} paused"
        elif closed:
            found = f"{', '.join(closed)} with a limit of 0"
            clear = f"prefect work-queue clear-concurrency-limit {closed[0]} --pool {POOL}"
            remedy = of_trainings if TRAINING in closed else clear
        elif self._pool and limits.get(TRAINING) is None:
            found = f"{TRAINING} has no limit" if TRAINING in limits else f"no queue {TRAINING}"
            remedy = f"{of_trainings}: trainings beside each other run out of memory"
        else:
            ok, found = True, f"{len(queues)} open"
        return Check(ok=ok, what="Prefect queues", found=found, remedy=remedy)

    def deployed(self) -> Check:
        """Everything in `prefect.yaml` is there, of this code, and no limit of 0 holds its runs."""
        there = {one["name"]: one for one in self._deployments}
        wanted = expected_deployments()
        missing = [name for name in wanted if name not in there]
        older = [
            name
            for name, version in wanted.items()
            if name in there and not same_code(there[name]["version"], version)
        ]
        limits = {name: one.get("global_concurrency_limit") for name, one in there.items()}
        closed = {n: limit["name"] for n, limit in limits.items() if limit and limit["limit"] == 0}
        found, remedy = (
            f"{len(there)} deployed",
            "sdn deploy, in the folder where runs are to begin",
        )
        if missing:
            found = f"not deployed: {', '.join(missing)}"
        elif older:
            found = f"of other code, or another {FILE}, than here: {', '.join(older)}"
        elif closed:
            found = f"limit 0: {', '.join(closed)}"
            first = next(iter(closed.values()))
            remedy = f"prefect global-concurrency-limit update {first} --limit 1"
        return Check(
            ok=not missing and not older and not closed,
            what="Prefect deployments",
            found=found,
            remedy=remedy,
        )

    def schedules(self) -> Check:
        """Nothing that is to run by itself is paused."""
        paused = [
            one["name"]
            for one in self._deployments
            if one.get("schedules")
            and (one.get("paused") or not all(s["active"] for s in one["schedules"]))
        ]
        planned = sum(bool(one.get("schedules")) for one in self._deployments)
        flows = [
            f"{one['name']}/{one['name']}" for one in self._deployments if one["name"] in paused
        ]
        return Check(
            ok=not paused,
            what="Prefect schedules",
            found=f"paused: {', '.join(paused)}" if paused else f"{planned} deployments planned",
            remedy=f"prefect deployment schedule resume {' '.join(flows[:1])} SCHEDULE-ID, or the "
            "switch on its page",
        )

    def late(self) -> Check:
        """No run waits in vain."""
        late = self._post(
            "flow_runs/filter", {"flow_runs": {"state": {"name": {"any_": ["Late"]}}}, "limit": 200}
        )
        return Check(
            ok=not late,
            what="Prefect late runs",
            found=f"{len(late)} late, the first {late[0]['name']}" if late else "none",
            remedy="see the lines on worker, pool and queues; with a limit of one at a time it "
            "waits for the run before",
        )

    def reconciler(self, settings: Settings) -> Check:
        """Somebody looks for dead runs."""
        remedy = "run `sdn reconcile` beside the server: without it the runs of a worker that died "
        remedy += "stay RUNNING and keep their slots"
        answer = self.client.get(f"variables/name/{RECONCILER}")
        if not answer.is_success:
            found = "none has ever looked for dead runs"
            return Check(ok=False, what="reconciler", found=found, remedy=remedy)
        # By the server's clock alone.
        now = parsedate_to_datetime(answer.headers["date"]).timestamp()
        from datetime import datetime

        looked_s = now - datetime.fromisoformat(answer.json()["updated"]).timestamp()
        return Check(
            ok=looked_s < 3 * settings.reconcile_s + 30,
            what="reconciler",
            found=f"{answer.json()['value'].get('host', '?')} looked {max(0, looked_s):.0f} s ago",
            remedy=remedy,
        )

    @property
    def _kind(self) -> str:
        return str(self._pool["type"]) if self._pool else KINDS[0]

    @cached_property
    def _pool(self) -> dict[str, Any] | None:
        answer = self.client.get(f"work_pools/{POOL}")
        return None if answer.status_code == httpx.codes.NOT_FOUND else self._json(answer)

    @cached_property
    def _deployments(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self._post("deployments/filter")
        return [one for one in found if one["name"].startswith("sdn-")]

    def _get(self, path: str) -> Any:
        return self._json(self.client.get(path))

    def _post(self, path: str, content: dict[str, Any] | None = None) -> Any:
        return self._json(self.client.post(path, json=content or {}))

    @staticmethod
    def _json(answer: httpx.Response) -> Any:
        answer.raise_for_status()
        return answer.json()
