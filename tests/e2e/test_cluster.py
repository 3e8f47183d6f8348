"""The parts of `infra/compose.yaml` as processes, and a pipeline on them that loses a node.

Postgres, SeaweedFS, MLflow, Prefect with a worker, a Ray head and a node beside it, each with
credentials that must not come to light anywhere.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import postgres_server
import psutil
import pytest
import s3_server
from places import COMMAND, PREFECT, ROOT, background, free_port, place

from pipelines.s3_files import S3Files
from sdn.ledger import attempts_of

pytestmark = [pytest.mark.rest, pytest.mark.timeout(3000)]
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
USER = "someone"
PYTHON_M = (sys.executable, "-m")


@dataclass(frozen=True)
class Planted:
    """Credentials that nothing may show."""

    auth: str
    s3: str
    database: str
    ray: str

    @classmethod
    def new(cls):
        return cls(*(f"planted{name}{secrets.token_hex(16)}" for name in ("a", "s", "d", "r")))

    def seen_in(self, text):
        return [name for name, value in vars(self).items() if value in text]


@dataclass(frozen=True)
class Parts:
    """Where everything is."""

    folder: Path
    """With a log for each process."""
    ray_folder: Path
    env: dict[str, str]
    """Of those who use the parts."""
    planted: Planted
    database: postgres_server.Postgres
    s3: s3_server.S3Server
    node: subprocess.Popen
    """The second node of the Ray cluster."""
    mlflow: str
    prefect: str

    @property
    def login(self):
        return (USER, self.planted.auth)

    def ask(self, path, content):
        answer = httpx.post(f"{self.prefect}/{path}", json=content, auth=self.login, timeout=30)
        assert answer.is_success, answer.text
        return answer.json()

    def log(self, name):
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def trees(self):
        """Command lines of all processes of the parts."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = "\0".join(process.info["cmdline"] or [])
            if str(self.folder) in line or str(self.ray_folder) in line or str(ROOT) in line:
                found.append(line)
        return found


def programs(ports, database, ray_folder):
    """Command line of each part: what the containers run, on addresses of this machine."""
    ray = (*PYTHON_M, "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")
    # Workers anywhere: both nodes, and whatever clusters there are else, share this machine.
    ray += ("--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0")
    ray += ("--num-cpus=1", "--object-store-memory=150000000")
    return {
        "mlflow": (
            *PYTHON_M, "mlflow", "server", "--host=127.0.0.1", f"--port={ports['mlflow']}",
            "--workers=1", "--backend-store-uri", database.address("psycopg", "mlflow"),
            "--serve-artifacts", "--artifacts-destination=s3://data/mlflow",
        ),
        "prefect": (
            *PYTHON_M, "prefect", "server", "start", "--host=127.0.0.1",
            f"--port={ports['prefect']}",
        ),
        "ray-head": (
            *ray, "--head", f"--port={ports['ray']}", f"--dashboard-port={ports['dashboard']}",
            "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={ports['agent']}",
            f"--ray-client-server-port={ports['client']}", f"--temp-dir={ray_folder}",
        ),
        "ray-node": (
            *ray, f"--address=127.0.0.1:{ports['ray']}",
            f"--dashboard-agent-listen-port={ports['agent-2']}",
        ),
        "worker": (*PYTHON_M, "prefect", "worker", "start", "--pool=sdn", "--type=process"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Everything started, deployed and healthy."""
    postgres_server.require()
    folder, planted = tmp_path_factory.mktemp("cluster"), Planted.new()
    s3_folder = tmp_path_factory.mktemp("s3")
    # Ray's sockets lie there, and their paths may have 107 characters.
    ray_folder = Path(tempfile.mkdtemp(prefix="sdn-r-"))
    names = ("mlflow", "prefect", "ray", "dashboard", "client", "agent", "agent-2")
    ports = {name: free_port() for name in names}
    api, mlflow = f"http://127.0.0.1:{ports['prefect']}/api", f"http://127.0.0.1:{ports['mlflow']}"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, ray_folder, ignore_errors=True)
        database = stack.enter_context(postgres_server.running(planted.database))
        s3 = stack.enter_context(s3_server.running(s3_folder, secret=planted.s3))
        for name in ("mlflow", "prefect"):
            database.make(name)
        common = place(folder).env | s3.keys() | {
            "AWS_ENDPOINT_URL": s3.endpoint,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": planted.ray,
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1.0",
            "RAY_worker_niceness": "0",
            "SDN_CACHE": str(folder / "cache"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }  # fmt: skip
        on_database = common | {"PGPASSWORD": planted.database}
        env = common | {
            "SDN_AUTH": f"{USER}:{planted.auth}",
            "PREFECT_API_URL": api,
            "PREFECT_API_AUTH_STRING": f"{USER}:{planted.auth}",
            "MLFLOW_TRACKING_USERNAME": USER,
            "MLFLOW_TRACKING_PASSWORD": planted.auth,
            "SDN_TRACKING_URI": mlflow,
            "SDN_STORE": "s3://data/runs",
            "SDN_RAY_ADDRESS": f"127.0.0.1:{ports['ray']}",
        }
        environments = {
            "mlflow": on_database
            | {
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                "MLFLOW_S3_ENDPOINT_URL": s3.endpoint,
            },
            "prefect": on_database
            | {
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": database.address("asyncpg", "prefect"),
                "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{planted.auth}",
            },
            "ray-head": common,
            "ray-node": common,
            "worker": env,
        }
        commands = programs(ports, database, ray_folder)

        def start(name):
            return stack.enter_context(
                background(*commands[name], env=environments[name], log=folder / f"{name}.log")
            )

        stack.callback(end_ray, ray_folder)

        def start_ray(name):
            """Ray gives a node half a minute to start, which a busy machine may not keep."""
            for _ in range(3):
                process = start(name)
                while process.poll() is None:
                    if "Ray runtime started" in (folder / f"{name}.log").read_text():
                        return process
                    time.sleep(0.5)
            raise AssertionError((folder / f"{name}.log").read_text()[-3000:])

        def wait(name, *addresses):
            wait_healthy(started[name], folder / f"{name}.log", addresses, env)

        started = {"ray-head": start_ray("ray-head")}
        started |= {name: start(name) for name in ("mlflow", "prefect")}
        wait("ray-head", *(f"tcp://127.0.0.1:{ports[name]}" for name in ("ray", "dashboard")))
        node = start_ray("ray-node")
        wait("prefect", f"{api}/health")
        deploy(env)
        started["worker"] = start("worker")
        wait("mlflow", f"{mlflow}/health")
        wait("worker", "worker://sdn")
        yield Parts(
            folder=folder, ray_folder=ray_folder, env=env, planted=planted, database=database,
            s3=s3, node=node, mlflow=mlflow, prefect=api,
        )  # fmt: skip


def wait_healthy(process, log, addresses, env):
    """Ask as the containers' health checks do, until it is well."""
    until = time.monotonic() + 300
    while True:
        asked = subprocess.run(
            [*PYTHON_M, "pipelines.health", *addresses], env=env, cwd=ROOT, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        if asked.returncode == 0:
            return
        said = asked.stderr + log.read_text()[-3000:]
        assert process.poll() is None, said
        assert time.monotonic() < until, said
        time.sleep(0.5)


def deploy(env):
    """The work pool and the deployments."""
    for command in (
        ("work-pool", "create", "sdn", "--type", "process"),
        ("deploy", "--all"),
    ):
        done = subprocess.run(
            [PREFECT, "--no-prompt", *command],
            env=env, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


def end_ray(folder):
    """End those of Ray's processes that are no children of what was started."""
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in part for part in process.info["cmdline"] or []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def kill_tree(process):
    """SIGKILL of a process and all that it started, as when a machine goes away."""
    for part in [
        *psutil.Process(process.pid).children(recursive=True),
        psutil.Process(process.pid),
    ]:
        with contextlib.suppress(psutil.NoSuchProcess):
            part.kill()
    process.wait()


CHANGES = (
    "search.trials=0", "workers=1", "max_workers=2", "teacher.epochs=1", "captions.epochs=1",
    "stage_one.epochs=1", "stage_two.epochs=40",
)  # fmt: skip


@pytest.fixture(scope="module")
def survived(parts):
    """A run of the pipeline in whose second stage the second node is killed; (id, lines, s)."""
    (found,) = parts.ask(
        "deployments/filter", {"deployments": {"name": {"any_": ["sdn-pipeline"]}}}
    )
    parameters = {"recipe": "tiny", "store": None, "changes": list(CHANGES)}
    run = parts.ask(f"deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"]
    began = time.monotonic()

    def state():
        answer = httpx.get(f"{parts.prefect}/flow_runs/{run}", auth=parts.login, timeout=30)
        return answer.json()["state"]["type"]

    def wait(what, check, seconds):
        until = time.monotonic() + seconds
        while not (got := check()):
            assert state() not in FINAL or what == "end", parts.log("worker")[-4000:]
            assert time.monotonic() < until, (what, parts.log("worker")[-4000:])
            time.sleep(0.5)
        return got

    names = wait("two ranks train stage two", lambda: trained_by_two(parts), 1500)
    lines = parts.trees()
    killed = time.monotonic()
    kill_tree(parts.node)
    wait("end", lambda: state() in FINAL, 900)
    assert state() == "COMPLETED", parts.log("worker")[-6000:]
    print(f"\nnode killed after {killed - began:.0f} s, end after {time.monotonic() - began:.0f} s")
    return run, lines, names


def objects(parts, prefix=""):
    """All that lies in the bucket: (key, content)."""
    pages = parts.s3.client.get_paginator("list_objects_v2")
    for page in pages.paginate(Bucket=s3_server.BUCKET, Prefix=prefix):
        for one in page.get("Contents", []):
            body = parts.s3.client.get_object(Bucket=s3_server.BUCKET, Key=one["Key"])["Body"]
            yield one["Key"], body.read()


def training_of(parts, stage):
    """The place of a stage's training; None before there is one."""
    listed = parts.s3.client.list_objects_v2(
        Bucket=s3_server.BUCKET, Prefix=f"runs/training/{stage}", MaxKeys=1
    ).get("Contents")
    if not listed:
        return None
    name = listed[0]["Key"].split("/")[2]
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in parts.s3.keys().items():
            patch.setenv(variable, value)
        files = S3Files(f"s3://data/runs/training/{name}", endpoint=parts.s3.endpoint)
        assert files.client
    return files


def trained_by_two(parts):
    """Whether two ranks of stage two have written their first points."""
    files = training_of(parts, "stage_two")
    if files is None:
        return False
    worlds = [attempt.world for attempt in attempts_of(files)]
    return 2 in worlds and any(files.walk("points"))


def test_the_pipeline_outlives_a_node(parts, survived):
    """One of two Ray nodes is killed in stage two: the run completes, on the one that is left."""
    files = training_of(parts, "stage_two")
    worlds = [attempt.world for attempt in attempts_of(files)]
    assert worlds[0] == 2
    assert worlds[-1] == 1
    mark = json.loads(dict(objects(parts, "runs/stages/stage_two"))[done_key(parts)])
    ledger = mark["result"]["result"]["ledger"]
    print(worlds, ledger)
    assert (ledger["lost"], ledger["twice"]) == (0, 0)
    # Ranks that cannot be heard would be taken for hung, and killed, after SDN_STALL_S.
    said = "".join(p.read_text() for p in parts.ray_folder.rglob("job-driver-stage_two*.log"))
    assert "attempt failed and is repeated" in said
    assert "reports is gone" not in said


def done_key(parts):
    (found,) = [k for k, _ in objects(parts, "runs/stages/stage_two") if k.endswith("/done.json")]
    return found


def test_the_model_is_registered(parts, survived):
    """MLflow on Postgres has the version, its files in the bucket, and Prefect its artifacts."""
    answer = httpx.get(
        f"{parts.mlflow}/api/2.0/mlflow/registered-models/alias",
        params={"name": "sdn-tiny", "alias": "champion"}, auth=parts.login, timeout=30,
    )  # fmt: skip
    assert answer.is_success, answer.text
    assert answer.json()["model_version"]["version"] == "1"
    assert any(key.startswith("mlflow/") for key, _ in objects(parts, "mlflow/"))
    run, _, _ = survived
    artifacts = parts.ask("artifacts/filter", {})
    mine = {one["key"] for one in artifacts if one["flow_run_id"] == run}
    assert {"resolved-config", "result"} <= mine


def test_no_credential_comes_to_light(parts, survived):
    """Logs, command lines, databases, bucket and what `sdn doctor` says show none of them."""
    _, lines, _ = survived
    doctor = subprocess.run(
        [COMMAND, "doctor", "--json"], env=parts.env, cwd=parts.folder, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert '"MLflow"' in doctor.stdout
    texts = {"doctor": doctor.stdout + doctor.stderr, "command lines": "\n".join(lines)}
    texts["databases"] = parts.database.dump()
    texts["postgres"] = (parts.database.folder / "postgres.log").read_text()
    for folder in (parts.folder, parts.ray_folder):
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                texts[str(path)] = path.read_bytes().decode(errors="replace")
    texts |= {key: content.decode(errors="replace") for key, content in objects(parts)}
    assert len(texts) > 50
    assert any(path.endswith("ray-head.log") for path in texts)
    found = {where: seen for where, text in texts.items() if (seen := parts.planted.seen_in(text))}
    assert found == {}
