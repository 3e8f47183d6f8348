"""`infra/kubernetes` without a cluster: its schemas, and what it promises."""

from __future__ import annotations

import copy
import json
import re
from importlib.metadata import version
from uuid import uuid4

import infra_files
import kubernetes_validate
import pytest
import yaml
from infra_files import BASE, containers, pod_templates
from prefect.client.schemas.objects import FlowRun
from prefect.utilities.templating import apply_values
from prefect_kubernetes.settings import KubernetesSettings
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration
from pydantic import ValidationError
from ray_cluster_fields import RayCluster
from sdn_commands import refusal

from pipelines.deploying import RUNS
from pipelines.settings import Settings

KUBERNETES = "1.33"
OPERATORS = {("sdn-ray", "auth_token")}
"""Secrets that an operator makes: KubeRay, for the cluster of this name."""
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH|ACCESS_KEY")
NO_SECRETS = {"RAY_AUTH_MODE", "POSTGRES_PASSWORD_FILE"}
NOT_CONTINUOUS = {"deploy", "pool", "prefect-job"}
"""Containers that end by themselves: nothing is to be asked of them meanwhile."""


def every_document():
    found = {f"{d['kind']}/{d['metadata']['name']}": d for d in infra_files.manifests()}
    found["Job/flow"] = flow_job()
    return found


def flow_job(**variables):
    """The Job that Prefect's worker makes of job-template.json for a run."""
    template = json.loads((BASE / "job-template.json").read_text())
    about = template["variables"]["properties"]
    defaults = {name: one["default"] for name, one in about.items() if "default" in one}
    values = defaults | {"env": {"SDN_CPUS": "2"}, "labels": {}} | variables
    configuration = KubernetesWorkerJobConfiguration(
        **apply_values(template["job_configuration"], values)
    )
    configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="calm-otter"))
    manifest = copy.deepcopy(configuration.job_manifest)
    # The server puts a suffix behind it.
    manifest["metadata"]["name"] = f"{manifest['metadata'].pop('generateName')}x1"
    return manifest


def every_template():
    found = {}
    for document in every_document().values():
        for name, template in pod_templates(document).items():
            found[f"{document['kind']}/{name}"] = template
    return found


def every_container():
    return {
        f"{name}/{one['name']}": one
        for name, template in every_template().items()
        for one in containers(template)
    }


DOCUMENTS = every_document()
TEMPLATES = every_template()
CONTAINERS = every_container()


def check(document):
    """Validate by Kubernetes' schema; unknown fields are errors."""
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize("name", sorted(n for n in DOCUMENTS if not n.startswith("RayCluster")))
def test_a_manifest_meets_kubernetes_schema(name):
    """Each manifest, and the Job of a flow run, is valid for Kubernetes, without unknown fields."""
    check(DOCUMENTS[name])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_pod_meets_kubernetes_schema(name):
    """Each pod template, those inside the RayCluster too, is a valid pod."""
    template = TEMPLATES[name]
    metadata = {"name": "pod"} | (template.get("metadata") or {})
    check({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})


def test_the_ray_cluster_has_known_fields():
    """The RayCluster has the fields of KubeRay's reference, with values that it takes."""
    document = DOCUMENTS["RayCluster/sdn-ray"]
    cluster = RayCluster.model_validate(document)
    assert cluster.spec.rayVersion == version("ray")
    options = document["spec"]["autoscalerOptions"]
    autoscaler = {"name": "autoscaler", "image": "sdn:0", "resources": options["resources"]}
    autoscaler |= {name: options[name] for name in ("securityContext", "volumeMounts")}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}}
    check(pod | {"spec": {"containers": [autoscaler]}})


def test_the_checks_refuse_what_is_wrong():
    """The schemas used are no empty ones: unknown fields and wrong values are found."""
    wrong = copy.deepcopy(DOCUMENTS["Deployment/mlflow"])
    wrong["spec"]["replica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        check(wrong)
    cluster = copy.deepcopy(DOCUMENTS["RayCluster/sdn-ray"])
    cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"] = 0
    with pytest.raises(ValidationError, match="minReplicas"):
        RayCluster.model_validate(cluster)


def test_gpu_workers_scale_from_none():
    """The GPU group begins empty, may grow, and each of its pods asks for one GPU."""
    spec = DOCUMENTS["RayCluster/sdn-ray"]["spec"]
    assert spec["enableInTreeAutoscaling"]
    (gpu,) = [g for g in spec["workerGroupSpecs"] if g["groupName"] == "gpu"]
    assert (gpu["minReplicas"], gpu["replicas"]) == (0, 0)
    assert gpu["maxReplicas"] > 1
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    # A cluster without a GPU node yet must be told that ranks have GPUs.
    assert settings()["SDN_GPU"] == "true"


@pytest.mark.parametrize("name", sorted(CONTAINERS))
def test_a_container_may_little(name):
    """No root, no way to become it, a read-only image, requests and limits for cores and memory."""
    one = CONTAINERS[name]
    security = one["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"]["drop"] == ["ALL"]
    for kind in ("requests", "limits"):
        assert {"cpu", "memory", "ephemeral-storage"} <= set(one["resources"][kind])
    template = TEMPLATES[name.rpartition("/")[0]]
    pod = template["spec"]["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}


@pytest.mark.parametrize("name", sorted(CONTAINERS))
def test_a_container_is_probed_where_it_listens(name):
    """What stays up has probes for its start and its life, at ports that it declares."""
    one = CONTAINERS[name]
    if one["name"] in NOT_CONTINUOUS:
        return
    probes = {kind: one[kind] for kind in ("startupProbe", "livenessProbe")}
    if one["name"] != "ray-node":  # beside a flow; nothing is routed to it
        probes["readinessProbe"] = one["readinessProbe"]
    ports = {port["name"]: port["containerPort"] for port in one.get("ports", [])}
    for probe in probes.values():
        if "httpGet" in probe or "tcpSocket" in probe:
            assert probe.get("httpGet", probe.get("tcpSocket"))["port"] in ports
            continue
        command = probe["exec"]["command"]
        if command[0] == "pg_isready":
            assert ports == {"postgres": 5432}
            continue
        assert command[:3] == ["python", "-m", "pipelines.health"]
        here = re.findall(r"127\.0\.0\.1:(\d+)", " ".join(command))
        assert {int(port) for port in here} <= set(ports.values())
        known = r"worker://sdn|http://prefect:4200|process://raylet"
        assert here or re.search(known, " ".join(command))


@pytest.mark.parametrize("name", sorted(n for n, c in CONTAINERS.items() if "args" in c))
def test_a_command_is_one_of_sdn(name):
    """Every container of the project's image runs a command that `sdn` has, with its options."""
    one = CONTAINERS[name]
    if "command" in one:
        assert one["command"][0] in {"prefect", "/bin/sh"}
        return
    assert refusal(one["args"]) is None


def test_one_image():
    """All parts of the project, and the flows, have the tag that the kustomization sets."""
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    (image,) = kustomization["images"]
    wanted = f"{image['name']}:{image['newTag']}"
    images = {one["image"] for one in CONTAINERS.values()}
    assert {found for found in images if found.startswith("sdn")} == {wanted}
    assert images - {wanted} == {"docker.io/library/postgres:17-bookworm"}


def credentials():
    return infra_files.lines_of(BASE / "credentials.env.example")


def settings():
    return infra_files.lines_of(BASE / "settings.env")


def references():
    """(Secret, key) of each place where one is used."""
    for one in CONTAINERS.values():
        for variable in one.get("env", []):
            if "valueFrom" in variable:
                found = variable["valueFrom"]["secretKeyRef"]
                yield found["name"], found["key"]
    for template in TEMPLATES.values():
        for volume in template["spec"]["volumes"]:
            if "secret" in volume:
                name = volume["secret"]["secretName"]
                yield from ((name, item["key"]) for item in volume["secret"]["items"])


def test_every_secret_that_is_used_is_made():
    """Secrets and keys that pods name are those of credentials.env, or an operator's; none idle."""
    made = {("sdn-credentials", key) for key in credentials()}
    used = set(references())
    assert used <= made | OPERATORS
    assert made <= used
    assert set(credentials().values()) == {""}


def test_every_config_that_is_used_is_made():
    """ConfigMaps that pods name are made by the kustomization."""
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    made = {one["name"] for one in kustomization["configMapGenerator"]}
    used = {
        volume["configMap"]["name"]
        for template in TEMPLATES.values()
        for volume in template["spec"]["volumes"]
        if "configMap" in volume
    }
    used |= {
        source["configMapRef"]["name"]
        for one in CONTAINERS.values()
        for source in one.get("envFrom", [])
    }
    assert used == made


def test_no_credential_is_written_down():
    """What is secret comes by reference; no manifest is a Secret, no setting one either."""
    assert not [name for name in DOCUMENTS if name.startswith("Secret/")]
    checked = 0
    for name, one in CONTAINERS.items():
        for variable in one.get("env", []):
            only_named = variable["name"].endswith(("_SECRET_NAME", "_SECRET_KEY"))
            if only_named or variable["name"] in NO_SECRETS:
                continue
            if SECRET.search(variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"], (name, variable["name"])
                checked += 1
    assert checked >= 15
    assert not [name for name in settings() if SECRET.search(name)]


def test_everything_named_is_there():
    """Files of the kustomizations exist, and every manifest is in one."""
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    named = set(kustomization["resources"])
    assert named == {p.name for p in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    for generator in kustomization["configMapGenerator"]:
        for name in [*generator.get("envs", []), *generator.get("files", [])]:
            assert (BASE / name).is_file()


def selects(selector, labels):
    """Whether a label selector means pods with these labels."""
    simple = selector.get("matchLabels", {})
    lists = selector.get("matchExpressions", [])
    assert all(one["operator"] == "In" for one in lists)
    return all(labels.get(k) == v for k, v in simple.items()) and all(
        labels.get(one["key"]) in one["values"] for one in lists
    )


def policies():
    return [d["spec"] for d in DOCUMENTS.values() if d["kind"] == "NetworkPolicy"]


def allowed(direction, labels, other, port):
    """Whether a policy lets pods with `labels` be reached by, or reach, `other` at this port."""
    key = {"ingress": "from", "egress": "to"}[direction]
    for policy in policies():
        if not selects(policy["podSelector"], labels):
            continue
        for rule in policy.get(direction, []):
            ports = [one["port"] for one in rule.get("ports", [])]
            peers = rule.get(key)
            there = peers is None or any(
                "podSelector" in peer and selects(peer["podSelector"], other) for peer in peers
            )
            if there and (not ports or port in ports):
                return True
    return False


def test_nothing_is_allowed_by_default():
    """A policy that selects every pod of the namespace denies both directions."""
    (denying,) = [p for p in policies() if p["podSelector"] == {} and "egress" not in p]
    assert set(denying["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in denying


def test_every_pod_has_a_policy_of_its_own():
    """Each pod is selected by a policy beside those for all, and says by a label what it is."""
    for name, template in TEMPLATES.items():
        labels = template["metadata"]["labels"]
        assert "sdn/part" in labels, name
        own = [p for p in policies() if p["podSelector"] and selects(p["podSelector"], labels)]
        assert own, name


WAYS = {
    ("mlflow", "postgres", 5432): True,
    ("prefect", "postgres", 5432): True,
    ("mlflow", "s3", 8333): True,
    ("ray", "s3", 8333): True,
    ("flow", "s3", 8333): True,
    ("flow", "mlflow", 5000): True,
    ("flow", "prefect", 4200): True,
    ("flow", "ray", 6379): True,
    ("ray", "flow", 52365): True,
    ("ray", "ray", 6379): True,
    ("worker", "prefect", 4200): True,
    ("deploy", "prefect", 4200): True,
    ("deploy", "s3", 8333): True,
    ("reconciler", "prefect", 4200): True,
    ("ray", "postgres", 5432): False,
    ("flow", "postgres", 5432): False,
    ("worker", "ray", 8265): False,
    ("ray", "prefect", 4200): False,
    ("s3", "postgres", 5432): False,
    ("postgres", "s3", 8333): False,
}


@pytest.mark.parametrize(("one", "other", "port"), WAYS)
def test_ways_between_parts(one, other, port):
    """Both ends allow what is needed, and at least one forbids what is not."""
    here, there = {"sdn/part": one}, {"sdn/part": other}
    both = allowed("egress", here, there, port) and allowed("ingress", there, here, port)
    assert both is WAYS[one, other, port]


def test_a_way_out_has_to_be_asked_for():
    """`outside` adds one policy: port 443, for those alone who tell people."""
    folder = infra_files.INFRA / "kubernetes" / "outside"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    base, policy = kustomization["resources"]
    assert (folder / base).resolve() == BASE
    (added,) = yaml.safe_load_all((folder / policy).read_text())
    check(added)
    parts = {t["metadata"]["labels"]["sdn/part"] for t in TEMPLATES.values()}
    out = {p for p in parts if selects(added["spec"]["podSelector"], {"sdn/part": p})}
    assert out == {"flow", "reconciler"}
    told = {
        one["name"]
        for one in CONTAINERS.values()
        if "SDN_NOTIFY_URL" in {variable["name"] for variable in one.get("env", [])}
    }
    assert told == {"prefect-job", "reconciler"}
    assert not allowed("egress", {"sdn/part": "flow"}, {}, 443)


def test_optional_settings_may_be_empty(monkeypatch):
    """What settings.env leaves empty is not set."""
    empty = {name for name, value in settings().items() if not value}
    assert empty == {"SDN_LANDING", "SDN_DATASET", "SDN_NOTIFY_COMMAND"}
    for name in empty:
        monkeypatch.setenv(name, "")
    found = Settings()
    assert (found.landing, found.dataset, found.notify_command) == (None, None, None)


UNITS = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}


def amount(text):
    """A quantity of Kubernetes as a number."""
    number, unit = re.fullmatch(r"(\d+)(\w*)", str(text)).groups()
    return int(number) * UNITS[unit]


def asked(pod, kind, what):
    """What a pod asks for: its containers, and those that run beside them."""
    spec = pod["spec"]
    beside = [one for one in spec.get("initContainers", []) if one.get("restartPolicy")]
    found = [one["resources"][kind].get(what, 0) for one in [*spec["containers"], *beside]]
    return sum(map(amount, found))


def how_many(name):
    """Of each pod at most: a group of Ray as far as it may grow, flows as many as the pool lets."""
    if TEMPLATES[name]["metadata"]["labels"]["sdn/part"] == "flow":
        return RUNS
    for group in DOCUMENTS["RayCluster/sdn-ray"]["spec"]["workerGroupSpecs"]:
        if name == f"RayCluster/sdn-ray/{group['groupName']}":
            return group["maxReplicas"]
    return 1


def test_the_quota_lets_all_grow_as_far_as_they_may():
    """All pods at their most stay below what the namespace may ask for, and not far below."""
    hard = DOCUMENTS["ResourceQuota/sdn"]["spec"]["hard"]
    options = DOCUMENTS["RayCluster/sdn-ray"]["spec"]["autoscalerOptions"]["resources"]
    for key, limit in hard.items():
        kind, _, what = key.partition(".")
        if key == "pods":
            total = sum(how_many(name) for name in TEMPLATES)
        else:
            pods = TEMPLATES.items()
            total = sum(how_many(name) * asked(pod, kind, what) for name, pod in pods)
            total += amount(options[kind].get(what, 0))  # beside the head
        assert total <= amount(limit) <= 1.3 * total, (key, total, limit)


def test_services_lead_to_ports():
    """Each service selects a pod that has the port it names, and the settings use its name."""
    for name, document in DOCUMENTS.items():
        if document["kind"] != "Service":
            continue
        selector = {"matchLabels": document["spec"]["selector"]}
        (template,) = [t for t in TEMPLATES.values() if selects(selector, t["metadata"]["labels"])]
        ports = {p["name"] for one in containers(template) for p in one.get("ports", [])}
        assert {port["targetPort"] for port in document["spec"]["ports"]} <= ports, name
    hosts = set(re.findall(r"http://(\w+):", " ".join(settings().values())))
    assert hosts == {"prefect", "mlflow", "s3"}


def test_slots_outlive_the_server():
    """Prefect's home, where the leases of slots lie, is on a claim that its pod does not own."""
    spec = TEMPLATES["Deployment/prefect"]["spec"]
    (server,) = spec["containers"]
    (home,) = [one["value"] for one in server["env"] if one["name"] == "PREFECT_HOME"]
    (volume,) = [one["name"] for one in server["volumeMounts"] if one["mountPath"] == home]
    (source,) = [one for one in spec["volumes"] if one["name"] == volume]
    claim = source["persistentVolumeClaim"]["claimName"]
    assert f"PersistentVolumeClaim/{claim}" in DOCUMENTS


def test_leases_lie_in_prefects_home(tmp_path):
    """As the server that `sdn serve prefect` becomes reads its settings."""
    from prefect.server.concurrency.lease_storage.filesystem import ConcurrencyLeaseStorage
    from prefect.settings import PREFECT_HOME, temporary_settings

    with temporary_settings({PREFECT_HOME: tmp_path}):
        assert ConcurrencyLeaseStorage().storage_path.is_relative_to(tmp_path)


def test_a_worker_may_make_jobs_in_its_namespace_only():
    """The worker's account is bound by a Role, not for the cluster; nobody else has a token."""
    assert not [d for d in DOCUMENTS.values() if d["kind"].startswith("Cluster")]
    role = DOCUMENTS["Role/prefect-worker"]
    verbs = {r: set(rule["verbs"]) for rule in role["rules"] for r in rule["resources"]}
    assert {"create", "delete", "watch"} <= verbs["jobs"]
    assert "secrets" not in verbs
    with_token = {
        name
        for name, template in TEMPLATES.items()
        if template["spec"].get("automountServiceAccountToken", True)
    }
    # The head's is for the autoscaler; KubeRay makes its account.
    assert with_token == {"Deployment/worker", "RayCluster/sdn-ray/head"}


def test_a_flow_is_a_node_without_cores():
    """A run's pod joins the cluster beside it, and the flow finds it at `auto`."""
    spec = flow_job(cpu="4")["spec"]["template"]["spec"]
    (node,) = spec["initContainers"]
    (flow,) = spec["containers"]
    assert node["restartPolicy"] == "Always"
    assert "--cpus=0" in node["args"]
    assert {"name": "SDN_RAY_ADDRESS", "value": "auto"} in flow["env"]
    assert node["volumeMounts"] == flow["volumeMounts"]
    assert spec["shareProcessNamespace"] is True
    assert flow["resources"]["limits"]["cpu"] == "4"
    assert flow["args"] == ["exec prefect flow-run execute"]
    assert {"name": "SDN_CPUS", "value": "2"} in flow["env"]


def test_the_worker_puts_no_login_into_jobs():
    """Prefect's worker is told to name the Secret with its login instead of writing it down."""
    (worker,) = TEMPLATES["Deployment/worker"]["spec"]["containers"]
    told = {one["name"]: one.get("value") for one in worker["env"]}
    prefix = "PREFECT_INTEGRATIONS_KUBERNETES_WORKER_API_AUTH_STRING_SECRET_"
    named = (told[f"{prefix}NAME"], told[f"{prefix}KEY"])
    assert named in set(references())
    with_prefix = {name.lower() for name in told if name.startswith("PREFECT_INTEGRATIONS_")}
    known = KubernetesSettings()
    for name in with_prefix:
        group, _, field = name.removeprefix("prefect_integrations_kubernetes_").partition("_")
        assert field in type(getattr(known, group)).model_fields


def test_another_store_takes_its_place():
    """external-s3 has the base's settings with another address, and drops the store's pods."""
    folder = infra_files.INFRA / "kubernetes" / "external-s3"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    assert [(folder / r).resolve() for r in kustomization["resources"]] == [BASE]
    changed = infra_files.lines_of(folder / "settings.env")
    assert set(changed) <= set(settings())
    assert not any("s3:8333" in value for value in changed.values())
    patches = [yaml.safe_load(one["patch"]) for one in kustomization["patches"]]
    dropped = {f"{p['kind']}/{p['metadata']['name']}" for p in patches if p.get("$patch")}
    assert dropped == {name for name in DOCUMENTS if name.endswith("/s3")}
    assert {f"{p['kind']}/{p['metadata']['name']}" for p in patches} <= set(DOCUMENTS)
