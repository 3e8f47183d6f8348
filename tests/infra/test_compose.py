"""`infra/compose.yaml` without an engine: its schema, and what it promises."""

from __future__ import annotations

import json
import re
from importlib.resources import files

import infra_files
import pytest
import yaml
from jsonschema import Draft202012Validator
from sdn_commands import refusal

from pipelines.settings import Settings

GIVEN = {
    "SDN_AUTH": "someone:not-a-real-password",
    "AWS_ACCESS_KEY_ID": "id",
    "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
    "SDN_POSTGRES_PASSWORD": "not-a-real-password",
    "SDN_RAY_TOKEN_FILE": "./ray-token",
}
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH|ACCESS_KEY")
NO_SECRETS = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH", "POSTGRES_PASSWORD_FILE"}
WITHOUT_PROBE = {"deploy"}
EXAMPLE = infra_files.INFRA / "compose.env.example"
CONTAINERFILE = infra_files.INFRA / "Containerfile"


@pytest.fixture(scope="module")
def document():
    return infra_files.compose(GIVEN)


@pytest.fixture(scope="module")
def services(document):
    return document["services"]


def published_schema():
    """The compose specification's own schema, as check-jsonschema carries it."""
    folder = files("check_jsonschema") / "builtin_schemas" / "vendor"
    return json.loads((folder / "compose-spec.json").read_text())


def errors_of(document):
    return [e.message for e in Draft202012Validator(published_schema()).iter_errors(document)]


def test_the_file_meets_the_specification(document):
    """compose.yaml, its variables filled in, is valid under the compose specification's schema."""
    assert errors_of(document) == []


def test_the_schema_refuses_what_is_wrong(document):
    """The schema used is no empty one: an unknown key and a wrong type are found."""
    services = document["services"]
    assert errors_of({"services": services | {"s3": services["s3"] | {"comand": []}}})
    assert errors_of({"services": services | {"s3": services["s3"] | {"image": 5}}})


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_nothing_starts_without_a_credential(name):
    """Each credential is required: it has no default."""
    with pytest.raises(KeyError, match=name):
        infra_files.compose({k: v for k, v in GIVEN.items() if k != name})


def test_the_example_names_every_credential():
    """compose.env.example has a line for each required variable, and no credential."""
    found = infra_files.lines_of(EXAMPLE)
    assert set(found) == set(GIVEN)
    place = found.pop("SDN_RAY_TOKEN_FILE")
    assert set(found.values()) == {""}
    # Where the file says, from compose.yaml's folder on, and never committed.
    ignored = (infra_files.ROOT / ".gitignore").read_text().splitlines()
    token = (infra_files.INFRA / place).resolve().relative_to(infra_files.ROOT)
    assert str(token) in ignored
    assert f"> {token}" in (infra_files.INFRA / "README.md").read_text()


OPTIONAL = ("SDN_NOTIFY_URL", "SDN_NOTIFY_COMMAND", "SDN_LANDING", "SDN_DATASET")


@pytest.mark.parametrize("name", OPTIONAL)
def test_what_is_optional_reaches_the_flows(name, services, monkeypatch):
    """Whom to tell and where data arrive: empty means not set; the example names each."""
    given = infra_files.compose(GIVEN | {name: "https://a.place"})["services"]
    assert re.search(f"^# {name}=", EXAMPLE.read_text(), re.MULTILINE)
    for part in ("worker", "reconciler"):
        assert given[part]["environment"][name] == "https://a.place"
        monkeypatch.setenv(name, services[part]["environment"][name])
        field = name.removeprefix("SDN_").lower()
        assert getattr(Settings(), field) is None


def test_a_way_out_has_to_be_asked_for(document):
    """compose.outside.yaml lets out those who tell people or fetch data, and nobody else."""
    added = yaml.safe_load((infra_files.INFRA / "compose.outside.yaml").read_text())
    assert errors_of(added) == []
    assert not any((one or {}).get("internal") for one in added["networks"].values())
    assert set(added["networks"]).isdisjoint(document["networks"])
    inside = {name: set(document["services"][name]["networks"]) for name in added["services"]}
    assert set(inside) == {"flow-node", "ray-worker", "ray-gpu", "reconciler"}
    assert not any(networks & {"database", "front"} for networks in inside.values())
    assert document["services"]["worker"]["network_mode"] == "service:flow-node"


def test_no_credential_is_written_down():
    """What is secret is a variable that must be given, or a file."""
    raw = yaml.safe_load((infra_files.INFRA / "compose.yaml").read_text())
    checked = 0
    for name, service in raw["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) and variable not in NO_SECRETS:
                assert re.fullmatch(r"\$\{\w+:\?[^}]*\}", value), (name, variable)
                checked += 1
    assert checked >= 10
    for secret in raw["secrets"].values():
        assert set(secret) <= {"environment", "file"}


def test_commands_are_those_of_sdn(services):
    """Every container of the project's image runs a command that `sdn` has, with its options."""
    wrong = {
        name: refusal([str(part) for part in service["command"]])
        for name, service in services.items()
        if service["image"].startswith("sdn:")
    }
    assert {name: why for name, why in wrong.items() if why} == {}


def test_one_image(services):
    """All parts of the project have the same tag; Postgres is named with one, too."""
    images = {service["image"] for service in services.values()}
    assert len({image for image in images if image.startswith("sdn:")}) == 1
    assert all(":" in image and not image.endswith(":latest") for image in images)


def test_containers_may_little(services):
    """No root, no capabilities, nothing written outside volumes, and a limit on what is used."""
    for name, service in services.items():
        assert int(service["user"].split(":")[0]) > 0, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert {"cpus", "memory", "pids"} <= set(service["deploy"]["resources"]["limits"]), name
        assert not service.get("privileged"), name


def test_ports_are_of_this_machine_alone(services):
    """Published ports are on 127.0.0.1."""
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 4
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_networks_are_apart(document):
    """Only Prefect and MLflow reach the database, and only networks for pages lead outside."""
    services, networks = document["services"], document["networks"]
    on_database = {n for n, s in services.items() if "database" in s.get("networks", [])}
    assert on_database == {"postgres", "prefect", "mlflow"}
    open_ones = {name for name, network in networks.items() if not network.get("internal")}
    assert open_ones == {"front"}
    assert {n for n, s in services.items() if "front" in s.get("networks", [])} == {
        n for n, s in services.items() if s.get("ports")
    }
    used = {network for s in services.values() for network in s.get("networks", [])}
    assert used == set(networks)


def listens_on(service):
    """Ports in a command line of `sdn serve`."""
    words = [str(part) for part in service["command"]]
    flags = {"--port", "--dashboard-port"}
    return {words[n + 1] for n, word in enumerate(words) if word in flags}


def test_health_is_asked_where_it_listens(services):
    """Every part that stays has a health check, at a port of its own command."""
    elsewhere = {
        "reconciler": {"4200"},
        "ray-worker": {"6379"},
        "ray-gpu": {"6379"},
        "flow-node": {"6379"},
    }
    for name, service in services.items():
        if name in WITHOUT_PROBE:
            continue
        test = service["healthcheck"]["test"]
        assert test[0] == "CMD", name
        if service["image"].startswith("sdn:"):
            assert test[1:4] == ["python", "-m", "pipelines.health"], name
            ports = set(re.findall(r":(\d+)", " ".join(test)))
            assert ports <= listens_on(service) | elsewhere.get(name, set()), (name, ports)


def test_waiting_is_for_what_is_there(services):
    """Parts wait for parts that exist, for health where there is a check, else for the end."""
    for name, service in services.items():
        for other, condition in service.get("depends_on", {}).items():
            wanted = condition["condition"]
            assert wanted in {"service_healthy", "service_completed_successfully"}, name
            assert (wanted == "service_healthy") == ("healthcheck" in services[other]), name
            assert services[other]["restart"].startswith("on-failure") == (other == "deploy")


def test_volumes_and_secrets_exist(document):
    """What services mount is declared, and everything declared is mounted."""
    services = document["services"].values()
    mounted = {v.split(":")[0] for s in services for v in s.get("volumes", [])}
    assert mounted == set(document["volumes"])
    assert {x for s in services for x in s.get("secrets", [])} == set(document["secrets"])


def test_slots_outlive_the_server(document):
    """Prefect's home, where the leases of slots lie, is a volume that stays, owned by its user."""
    prefect = document["services"]["prefect"]
    (volume,) = prefect["volumes"]
    name, place = volume.split(":")
    assert document["volumes"][name] == {}
    assert prefect["environment"]["PREFECT_HOME"] == place
    # A new volume has the owner that its place has in the image.
    assert re.search(rf"install -d -o sdn -g sdn .*{place}\b", CONTAINERFILE.read_text())


def test_databases_have_no_password_in_their_address(services):
    """The password comes beside the address, where no list of processes shows it."""
    for name in ("mlflow", "prefect"):
        command, environment = services[name]["command"], services[name]["environment"]
        (address,) = [part for part in command if part.startswith("postgresql+")]
        assert address.split("://")[1].startswith("sdn@")
        assert environment["PGPASSWORD"] == GIVEN["SDN_POSTGRES_PASSWORD"]


def test_gpus_are_asked_for_only_in_their_profile(services):
    """Without the profile `gpu` nothing reserves a device."""
    with_devices = {
        name
        for name, service in services.items()
        if service["deploy"]["resources"].get("reservations", {}).get("devices")
    }
    assert with_devices == {"ray-gpu"}
    assert services["ray-gpu"]["profiles"] == ["gpu"]
