from pathlib import Path

import pytest
from pydantic import ValidationError

from pipelines.cluster import cores, has_gpu
from pipelines.run import RunSpec
from pipelines.settings import Settings

NAMES = (
    *("STALL_S", "GRACE_S"),
    *("STORE", "CACHE", "CACHE_GIB", "TRACKING_URI", "RAY_ADDRESS", "S3_ENDPOINT", "CPUS", "GPU"),
    *("AUTH", "DATABASE", "STACK", "TRACEBACK", "LANDING", "DATASET"),
    *("RECONCILE_S", "SILENCE_S", "REVIVALS", "NOTIFY_COMMAND", "NOTIFY_URL"),
)


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(f"SDN_{name}", raising=False)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)


def test_defaults_run_embedded():
    """With nothing set there is a local store and no server."""
    found = Settings()
    assert found.store == "runs"
    assert found.local == Path("runs").resolve()
    assert (found.tracking_uri, found.ray_address, found.s3_endpoint) == (None, None, None)
    assert cores(found) >= 1


def test_every_variable_is_read(monkeypatch):
    """Each field is set by the variable SDN_ and its name."""
    values = {
        "store": "s3://bucket/prefix",
        "cache": "~/somewhere",
        "cache_gib": "2.5",
        "tracking_uri": "http://tracking:5000",
        "ray_address": "ray://head:10001",
        "s3_endpoint": "http://minio:9000",
        "cpus": "3",
        "gpu": "True",
        "stall_s": "60.0",
        "grace_s": "5.0",
        "reconcile_s": "4.0",
        "silence_s": "300.0",
        "revivals": "1",
        "notify_command": "mail me",
        "notify_url": "**********",  # never shown
        "landing": "s3://bucket/in",
        "dataset": "s3://bucket/set",
        "traceback": "True",
        "stack": "runs/stack",
        "auth": "**********",
        "database": "**********",
    }
    # Prefect's and Amazon's own variables.
    own = set(Settings.model_fields) - {"prefect_api_url", "s3_key", "s3_secret"}
    assert {name.lower() for name in NAMES} == own == set(values)
    for name, value in values.items():
        monkeypatch.setenv(f"SDN_{name.upper()}", value)
    found = Settings()
    assert {name: str(getattr(found, name)) for name in values} == values
    assert cores(found) == 3
    assert found.local == Path("~/somewhere").expanduser()
    assert found.prefect_api_url is None
    monkeypatch.setenv("PREFECT_API_URL", "http://prefect:4200/api")
    assert Settings().prefect_api_url == "http://prefect:4200/api"


def test_a_login_is_what_each_client_reads(monkeypatch):
    """SDN_AUTH becomes the variables of Prefect's and MLflow's clients, and is never shown."""
    assert Settings().logins == {}
    monkeypatch.setenv("SDN_AUTH", "anna:pass:word:of-many")
    found = Settings()
    assert found.credentials == ("anna", "pass:word:of-many")
    assert found.logins == {
        "PREFECT_API_AUTH_STRING": "anna:pass:word:of-many",
        "MLFLOW_TRACKING_USERNAME": "anna",
        "MLFLOW_TRACKING_PASSWORD": "pass:word:of-many",
    }
    assert "pass" not in f"{found!r} {found} {found.model_dump_json()}"


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_impossible_number_of_cores(monkeypatch, value):
    """A number of cores below 1 is refused with the field's name."""
    monkeypatch.setenv("SDN_CPUS", value)
    with pytest.raises(ValidationError, match="cpus"):
        Settings()


def test_option_wins_over_variable(monkeypatch, tmp_path):
    """A run's own store replaces that of the environment; without one, the variable holds."""
    monkeypatch.setenv("SDN_STORE", str(tmp_path / "variable"))
    option = RunSpec("tiny", store=str(tmp_path / "option")).open()
    assert option.store.uri == str(tmp_path / "option")
    assert RunSpec("tiny").open().store.uri == str(tmp_path / "variable")


def test_settings_are_frozen():
    """Settings are read once and not changed."""
    with pytest.raises(ValidationError, match="frozen"):
        Settings().store = "elsewhere"


@pytest.mark.parametrize("told", [True, False])
def test_ranks_are_told_of_gpus_that_are_to_come(monkeypatch, told):
    """SDN_GPU decides, whatever devices there are now: a cluster may grow them when asked."""
    monkeypatch.setenv("SDN_GPU", str(told).lower())
    monkeypatch.setattr("torch.cuda.is_available", lambda: not told)
    assert has_gpu() is told
