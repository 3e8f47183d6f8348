"""`sdn deploy`: what a Prefect server and an S3 server need before flows can run; repeatable."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import yaml
from tenacity import (
    retry,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_delay,
    wait_fixed,
)

from pipelines.deployed import as_left, resolved, version_of
from pipelines.prefect_api import PrefectApi

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pipelines.settings import Settings

FILE = "prefect.yaml"
TRAINING, QUICK = "training", "default"
"""Work queues: of flows that train, one at a time; of all others."""
TRAININGS, RUNS = 1, 4
"""How many flow runs of the queue `training`, and of the pool, run at the same time."""
_ROOT = Path(__file__).parents[1]
_PATIENCE_S = 120
_TAIL = 15


class DeployError(RuntimeError):
    """Something cannot be deployed; the text says what and why."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to be there."""

    pool: str = "sdn"
    kind: str = "process"
    """Type of the pool, if it has to be made."""
    trainings: int | None = None
    """Limit of the queue `training`; None for one where there is none yet."""
    runs: int | None = None
    """Limit of the pool; likewise."""
    file: Path | None = None
    """With the deployments; None for that of the folder, else the project's own."""
    early: bool = False
    """Load the flows before the server answers: it is a new one, to which all is deployed."""


def deploy(settings: Settings, wanted: Wanted, say: Callable[[str], None]) -> dict[str, Any]:
    """Make the bucket, the pool, its queues and the deployments that are not there as wanted.

    What is there is left as it is: limits, schedules, whether a trigger is on, what was paused.

    Args:
        settings: with the server and the store.
        wanted: what is to be there.
        say: told each thing that is done.

    Returns:
        What was done: `made` and `deployed`, names; both empty where nothing was to do.

    Raises:
        DeployError: no server, no such file, or Prefect refuses a deployment.
        PrefectApiError, ValueError, OSError: as they say.
    """
    path = find_file(wanted.file)
    entries = read_entries(path, wanted.pool)
    with PrefectApi.of(settings) as api, _loading(settings, entries, wanted.early) as loaded:
        _wait_for(api)
        made = [*_bucket(settings), *_pool(api, wanted)]
        for one in made:
            say(one)
        there = {one["name"]: one for one in api.ask("POST", "deployments/filter", {})}
        new = [one for one in entries if _differ(one, there.get(one["name"]))]
        if new:
            say(f"deploying {', '.join(one['name'] for one in new)}")
            _run_prefect(settings, [_kept(api, one, there.get(one["name"])) for one in new], loaded)
            _pause_again(
                api, [one["name"] for one in new if there.get(one["name"], {}).get("paused")]
            )
    return {
        "file": str(path),
        "pool": wanted.pool,
        "made": made,
        "deployed": [one["name"] for one in new],
        "deployments": [one["name"] for one in entries],
    }


def find_file(given: Path | None) -> Path:
    """The file with the deployments.

    Args:
        given: by the user; None for that of the working folder if it is this project's, else the
            one beside the code, else the one that was installed with it.

    Raises:
        DeployError: there is none.
    """
    if given is not None:
        if not given.is_file():
            raise DeployError(f"{given} is no file: name a {FILE} with --file")
        return given.resolve()
    here = Path(FILE).resolve()
    places = [_ROOT / FILE, Path(sysconfig.get_path("data")) / "share" / "sdn" / FILE]
    if here.is_file() and (yaml.safe_load(here.read_text()) or {}).get("name") == "sdn":
        places.insert(0, here)
    for place in places:
        if place.is_file():
            return place
    raise DeployError(f"no {FILE} at {' or '.join(map(str, places))}: name one with --file")


def read_entries(path: Path, pool: str) -> list[dict[str, Any]]:
    """The deployments of a file, for one pool, each with a version that says what it is.

    The version has digests of the entry, as it is and with the environment filled in, and of the
    code, for the form of a deployment comes out of the code. So what has not changed is known
    without loading a flow.

    Raises:
        DeployError: the file has no deployments.
    """
    found = yaml.safe_load(path.read_text()) or {}
    entries: list[dict[str, Any]] = found.get("deployments") or []
    if not entries:
        raise DeployError(f"{path} has no deployments")
    code = _code_digest()
    # The shell's PWD may be another folder than this process works in.
    variables = os.environ | {"PWD": str(Path.cwd())}
    for entry in entries:
        entry.setdefault("work_pool", {})["name"] = pool
        entry.setdefault("pull", found.get("pull", []))
        entry["version"] = version_of(entry, code, variables)
    return [resolved(entry, variables) for entry in entries]


def _differ(entry: dict[str, Any], found: dict[str, Any] | None) -> bool:
    """Whether an entry has to be deployed; one whose pool was deleted has lost its queue."""
    if found is None or found["version"] != entry["version"]:
        return True
    return bool(found["work_pool_name"] != entry["work_pool"]["name"])


def _kept(api: PrefectApi, entry: dict[str, Any], found: dict[str, Any] | None) -> dict[str, Any]:
    """The entry with what a person has changed on the server."""
    if found is None:
        return entry
    return as_left(
        entry, found, api.ask("GET", f"automations/related-to/prefect.deployment.{found['id']}")
    )


def _code_digest() -> str:
    """Of all modules from which a form can come."""
    digest = hashlib.sha256()
    for package in ("pipelines", "sdn"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def _wait_for(api: PrefectApi) -> None:
    @retry(
        retry=retry_if_exception_type(ConnectionError),
        wait=wait_fixed(0.3),
        stop=stop_after_delay(_PATIENCE_S),
        reraise=True,
    )
    def answered() -> None:
        if not api.healthy():
            raise ConnectionError

    try:
        answered()
    except ConnectionError as error:
        raise DeployError(
            f"the Prefect server at {api.url} has not answered for {_PATIENCE_S} s: start it "
            "(`sdn serve prefect`, `sdn up`), or set PREFECT_API_URL to where it is"
        ) from error


def _bucket(settings: Settings) -> Iterator[str]:
    """Make the store's bucket where there is none."""
    if not settings.store.startswith("s3://"):
        return
    from botocore.exceptions import BotoCoreError, ClientError

    from pipelines.s3_files import make_client

    name = urlsplit(settings.store).netloc
    client = make_client(settings.s3_endpoint)
    asked = retry(
        # Refused keys stay refused; a server that starts answers with 5xx or not at all.
        retry=retry_if_exception(
            lambda e: isinstance(e, BotoCoreError) or _status(e) >= HTTPStatus.INTERNAL_SERVER_ERROR
        ),
        wait=wait_fixed(0.3),
        stop=stop_after_delay(_PATIENCE_S),
        reraise=True,
    )
    try:
        try:
            asked(client.head_bucket)(Bucket=name)
        except ClientError as error:
            if _status(error) != HTTPStatus.NOT_FOUND:
                raise
            asked(client.create_bucket)(Bucket=name)
            yield f"bucket {name} made"
    except (BotoCoreError, ClientError) as error:
        raise DeployError(
            f"bucket {name} cannot be made at {settings.s3_endpoint or 'Amazon'} ({error}): check "
            "SDN_S3_ENDPOINT, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or make it by hand"
        ) from error


def _status(error: BaseException) -> int:
    """The HTTP status in an answer of S3; 0 where the error is no answer."""
    answer = getattr(error, "response", {})
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _pool(api: PrefectApi, wanted: Wanted) -> Iterator[str]:
    """Make the pool and its queues; give limits to those without."""
    path = f"work_pools/{wanted.pool}"
    runs = wanted.runs or RUNS
    said = f"{runs} flow run{'' if runs == 1 else 's'} at a time"
    found = api.ask("GET", path, absent=None)
    if found is None:
        content = {"name": wanted.pool, "type": wanted.kind, "concurrency_limit": runs}
        # Without a template: its first worker brings that of its type.
        api.ask("POST", "work_pools/", content)
        yield f"work pool {wanted.pool} made: {said}"
    elif _differs(found, wanted.runs):
        api.ask("PATCH", path, {"concurrency_limit": runs})
        yield f"work pool {wanted.pool}: {said}"
    trainings = wanted.trainings or TRAININGS
    queue = api.ask("GET", f"{path}/queues/{TRAINING}", absent=None)
    if queue is None:
        # After the quick ones (priority 1), which would else wait for hours.
        content = {"name": TRAINING, "concurrency_limit": trainings, "priority": 2}
        api.ask("POST", f"{path}/queues", content)
        yield f"queue {TRAINING} made: {trainings} at a time"
    elif _differs(queue, wanted.trainings):
        api.ask("PATCH", f"{path}/queues/{TRAINING}", {"concurrency_limit": trainings})
        yield f"queue {TRAINING}: {trainings} at a time"


def _differs(found: dict[str, Any], limit: int | None) -> bool:
    """Whether a limit has to be set: one was asked for, or none is there."""
    there = found["concurrency_limit"]
    return there is None if limit is None else there != limit


@contextmanager
def _loading(
    settings: Settings,
    entries: list[dict[str, Any]],
    early: bool,
) -> Iterator[subprocess.Popen[str] | None]:
    """`prefect deploy` that loads these flows meanwhile, if wanted; ended at last."""
    process = _start_prefect(settings, entries) if early else None
    try:
        yield process
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def _start_prefect(settings: Settings, entries: list[dict[str, Any]]) -> subprocess.Popen[str]:
    """`prefect deploy`, which waits for the path of what is to be deployed."""
    places = dict.fromkeys(entry["entrypoint"] for entry in entries)
    # Those in files are left to Prefect.
    modules = [one.rpartition(".")[0] for one in places if ":" not in one]
    return subprocess.Popen(  # noqa: S603 (a module of ours)
        [sys.executable, "-m", "pipelines.flows.loading", *modules],
        env=os.environ | settings.logins,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run_prefect(
    settings: Settings,
    entries: list[dict[str, Any]],
    loaded: subprocess.Popen[str] | None = None,
) -> None:
    """`prefect deploy` with these entries; it, and the server, check their parameters.

    Args:
        settings: with SDN_AUTH.
        entries: of deployments.
        loaded: one that waits for them; None to start one.

    Raises:
        DeployError: with the last that it said.
    """
    with tempfile.TemporaryDirectory(prefix="sdn-deploy-") as folder:
        path = Path(folder) / FILE
        path.write_text(yaml.safe_dump({"name": "sdn", "deployments": entries}, sort_keys=False))
        process = loaded or _start_prefect(settings, [])
        said, _ = process.communicate(f"{path}\n")
    if process.returncode != 0:
        said = "\n".join(said.splitlines()[-_TAIL:])
        raise DeployError(f"`prefect deploy` refused: {said}")


def _pause_again(api: PrefectApi, names: list[str]) -> None:
    """Pause what was paused: deploying anew resumes it."""
    if not names:
        return
    content = {"deployments": {"name": {"any_": names}}}
    for one in api.ask("POST", "deployments/filter", content):
        if not one["paused"]:
            api.ask("PATCH", f"deployments/{one['id']}", {"paused": True})
