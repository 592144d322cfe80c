"""The files of cluster/ against the schemas of those who read them, and against our own rules. Nothing is started."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import threestage
from cluster.prepare import make_bucket
from tests.audit import third_party
from tests.unit.kustomize import Manifest, containers, render, select

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = CLUSTER / "kuberay"
SCHEMAS = ROOT.parent / "shared" / "data" / "schemas"
KUBERNETES = ("1.30", "1.37")
RENDERED = ("base", "overlays/dev", "overlays/gpu", "overlays/s3-minio", "overlays/job", "overlays/queued")
VERSIONS = {
    name.lower(): version
    for name, _, version in (line.partition("==") for line in (ROOT / "constraints.txt").read_text().splitlines())
}
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH$|ACCESS_KEY|ROOT_USER|_USERNAME$")
NO_SECRET = {"RAY_AUTH_TOKEN_PATH"}


@cache
def _manifests(folder: str) -> list[Manifest]:
    return render(KUBERAY / folder)


def manifests(folder: str) -> list[Manifest]:
    return deepcopy(_manifests(folder))


def everything() -> Iterator[tuple[str, Manifest]]:
    for folder in RENDERED:
        for manifest in manifests(folder):
            yield f"{folder} {manifest['kind']}/{manifest['metadata']['name']}", manifest


def pods(node: Any) -> Iterator[Manifest]:
    """Every pod specification below a node, with its metadata."""
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node
        for value in node.values():
            yield from pods(value)
    elif isinstance(node, list):
        for value in node:
            yield from pods(value)


def load(file: Path) -> Any:
    return yaml.safe_load(file.read_text())


# Schemas.

# Megabytes, which are else read for each manifest.
kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)


@cache
def schema(kind: str) -> dict[str, Any]:
    """That of a kind of KubeRay's, made strict."""
    file = SCHEMAS / f"ray.io_{kind.lower()}s.yaml"
    if not file.is_file():
        pytest.skip(f"shared/data/schemas/{file.name} is absent")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 1.4 MB: seconds in place of half a minute
    [version] = [v for v in yaml.load(file.read_text(), loader)["spec"]["versions"] if v["name"] == "v1"]
    return strict(version["schema"]["openAPIV3Schema"])


def strict(node: Any) -> Any:
    """The schema, refusing keys that it does not name."""
    if isinstance(node, list):
        return [strict(value) for value in node]
    if not isinstance(node, dict):
        return node
    node = {key: strict(value) for key, value in node.items()}
    named = isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields")
    if node.get("type") == "object" and named:
        node.setdefault("additionalProperties", False)
    return node


NAMED = {"type": "object", "required": ["name"]}
KUEUE: dict[str, dict[str, Any]] = {  # what these files use of Kueue's own kinds
    "LocalQueue": {"spec": {"clusterQueue": {"type": "string"}}},
    "ResourceFlavor": {},
    "WorkloadPriorityClass": {"value": {"type": "integer"}, "description": {"type": "string"}},
    "ClusterQueue": {
        "spec": {
            "namespaceSelector": {"type": "object"},
            "preemption": {"withinClusterQueue": {"enum": ["Never", "LowerPriority", "LowerOrNewerEqualPriority"]}},
            "resourceGroups": {"type": "array", "minItems": 1},
        }
    },
}


def exactly(properties: dict[str, Any]) -> dict[str, Any]:
    """A schema of these properties, all of them and no others; nested ones are written without their frame."""
    frames = {"type", "enum"}
    inner = {key: value if frames & value.keys() else exactly(value) for key, value in properties.items()}
    return {"type": "object", "required": [*inner], "properties": inner, "additionalProperties": False}


def validate_kueue(manifest: Manifest) -> None:
    own: dict[str, Any] = {
        "apiVersion": {"enum": ["kueue.x-k8s.io/v1beta2"]},
        "kind": {"type": "string"},
        "metadata": NAMED,
    }
    jsonschema.Draft202012Validator(exactly(own | KUEUE[manifest["kind"]])).validate(manifest)


def validate(manifest: Manifest) -> None:
    _validate(json.dumps(manifest))


@cache  # most manifests are the same in every overlay
def _validate(text: str) -> None:
    manifest = json.loads(text)
    if manifest["apiVersion"] == "ray.io/v1":
        rules = schema(manifest["kind"])
        rules["properties"]["metadata"] = {"type": "object"}  # the CRD leaves it to Kubernetes
        jsonschema.Draft202012Validator(rules).validate(manifest)
        for template in pods(manifest):
            kubernetes_validate.validate({"apiVersion": "v1", "kind": "Pod", **template}, KUBERNETES[-1], strict=True)
    elif manifest["apiVersion"].startswith("kueue."):
        validate_kueue(manifest)
    else:
        for version in KUBERNETES:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("folder", RENDERED)
def test_manifests_are_what_kubernetes_and_kuberay_read(folder: str) -> None:
    assert len(manifests(folder)) > 20
    for manifest in manifests(folder):
        validate(manifest)


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("RayCluster", "threestage", "spec.gcsFaultToleranceOption"),
        ("RayCluster", "threestage", "spec.headGroupSpec.template.spec.automountServiceAccountTokens"),
        ("RayCluster", "threestage", "spec.authOptions.modes"),
        ("Deployment", "mlflow", "spec.template.spec.securityContexts"),
        ("NetworkPolicy", "ray", "spec.podSelectors"),
    ],
)
def test_a_misspelt_key_is_refused(kind: str, name: str, path: str) -> None:
    found = select(manifests("base"), {"kind": kind, "name": name})
    node = found
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    node[last] = "x"
    with pytest.raises(jsonschema.ValidationError, match=last):
        validate(found)


def test_a_misspelt_key_of_a_job_is_refused() -> None:
    job = select(manifests("overlays/job"), {"kind": "RayJob", "name": "threestage-run"})
    validate(job)
    job["spec"]["shutdownAfterJobFinish"] = True
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
        validate(job)


@pytest.mark.parametrize("folder", RENDERED)
def test_our_renderer_does_what_kustomize_does(folder: str) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl here")
    real = subprocess.run(["kubectl", "kustomize", KUBERAY / folder], capture_output=True, text=True)
    if "unknown command" in real.stderr:
        pytest.skip("this kubectl has no kustomize")
    assert real.returncode == 0, real.stderr
    theirs = {(m["kind"], m["metadata"]["name"]): m for m in yaml.safe_load_all(real.stdout)}
    assert theirs == {(m["kind"], m["metadata"]["name"]): m for m in manifests(folder)}


def test_compose_is_what_compose_reads() -> None:
    file = SCHEMAS / "compose-spec.json"
    if not file.is_file():
        pytest.skip("shared/data/schemas/compose-spec.json is absent")
    rules = jsonschema.Draft7Validator(json.loads(file.read_text()))
    compose = load(CLUSTER / "compose.yaml")
    rules.validate(compose)
    compose["services"]["head"]["read_onli"] = True
    assert not rules.is_valid(compose)


def test_aws_is_what_the_launcher_reads() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(CLUSTER / "aws.yaml")
    validate_config(prepare_config(deepcopy(config)))
    config["available_node_types"]["gpu"]["min_worker"] = 0
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(prepare_config(config))


def test_the_dockerfile_lints() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.is_file():
        pytest.skip("no hadolint here: pip install -c constraints.txt -e '.[dev]'")
    result = subprocess.run([hadolint, CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# Commands in the files, against the programs that they call.


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


def mlflow_commands() -> Iterator[list[str]]:
    deployment = select(manifests("base"), {"kind": "Deployment", "name": "mlflow"})
    yield next(containers(deployment))["args"]
    yield load(CLUSTER / "compose.yaml")["services"]["mlflow"]["command"]


def test_ray_knows_the_options_that_it_is_started_with() -> None:
    from ray.scripts.scripts import start

    given = set(re.findall(r"--[a-z-]+", " ".join(load(CLUSTER / "aws.yaml")["head_start_ray_commands"])))
    for service in ("head", "worker"):
        command = load(CLUSTER / "compose.yaml")["services"][service]["command"]
        given |= {word.partition("=")[0] for word in command if word.startswith("--")}
    for _, manifest in everything():
        spec = manifest.get("spec", {})
        for group in [spec.get("headGroupSpec", {}), *spec.get("workerGroupSpecs", [])]:
            given |= {f"--{name}" for name in group.get("rayStartParams", {})}
    assert "--dashboard-host" in given and "--resources" in given
    assert given <= options_of(start)


@pytest.mark.filterwarnings("ignore")  # of what MLflow's server imports
def test_mlflow_knows_the_options_that_it_is_started_with() -> None:
    from mlflow.cli import server

    for command in mlflow_commands():
        assert command[:2] == ["mlflow", "server"]
        assert {word.partition("=")[0] for word in command[2:]} <= options_of(server)


def test_mlflow_asks_for_a_password_and_answers_to_the_names_of_its_service() -> None:
    for command in mlflow_commands():
        assert "--app-name=basic-auth" in command
        [names] = [word.partition("=")[2].split(",") for word in command if word.startswith("--allowed-hosts=")]
        assert {"mlflow:5000", "localhost:5000"} <= set(names) and "*" not in "".join(names)
    kubernetes, _ = mlflow_commands()
    assert "mlflow.threestage.svc.cluster.local:5000" in " ".join(kubernetes)
    configuration = select(manifests("base"), {"kind": "ConfigMap", "name": "mlflow-auth"})["data"]["basic_auth.ini"]
    ours = (CLUSTER / "basic_auth.ini").read_text().splitlines()
    assert configuration.splitlines() == [line for line in ours if not line.startswith("#")]


# Versions.


def test_versions_agree() -> None:
    ray = {load["spec"]["rayVersion"] for _, load in everything() if load["kind"] == "RayCluster"}
    ray |= {load["spec"]["rayClusterSpec"]["rayVersion"] for _, load in everything() if load["kind"] == "RayJob"}
    assert ray == {VERSIONS["ray"]}
    for package in ("mlflow", "torch", "flask-wtf", "psycopg2-binary", "boto3"):
        assert package in VERSIONS
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    [python] = re.findall(r"^ARG BASE=python:(\d+\.\d+)\.\d+-slim", dockerfile, re.MULTILINE)
    assert f"Python {python}," in (ROOT / "constraints.txt").read_text().splitlines()[0]
    assert python == re.findall(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())[0]
    installs = re.findall(r"pip install .*", dockerfile)
    assert installs and all("-c /opt/constraints.txt" in line for line in installs)


def images() -> Iterator[tuple[str, str]]:
    for where, manifest in everything():
        yield from ((where, container["image"]) for container in containers(manifest))
    for name, service in load(CLUSTER / "compose.yaml")["services"].items():
        yield f"compose {name}", service["image"]
    yield "aws", load(CLUSTER / "aws.yaml")["docker"]["image"]


OURS = r"(?:CHANGE-ME\.\S+/)?threestage(?:-mlflow|-cpu)?:\S+"
USES = re.compile(r"uses: +(\S+)")
DIGEST, COMMIT = r"\S+:[\w.-]+@sha256:[0-9a-f]{64}", r"\S+@[0-9a-f]{40}"


def test_what_others_publish_is_pinned_by_its_digest_or_commit() -> None:
    """A tag can be moved. Our own images are built by the reader: they have no digest yet."""
    for where, image in images():
        assert re.fullmatch(OURS, image) or re.fullmatch(DIGEST, image), (where, image)
    [base] = re.findall(r"^ARG BASE=(\S+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(DIGEST, base)
    used = [word for file in (ROOT / ".github/workflows").glob("*.y*ml") for word in USES.findall(file.read_text())]
    assert used and all(re.fullmatch(COMMIT, action) for action in used), used


def test_the_audit_lists_every_image_and_action() -> None:
    listed = dict(line.split("  ") for line in third_party())
    assert {image for _, image in images()} <= set(listed)
    assert {listed[image] for _, image in images() if re.fullmatch(OURS, image)} == {"built here"}
    assert set(listed.values()) == {"built here", "pinned"}


def test_every_image_has_a_tag_and_ours_is_the_version() -> None:
    others: dict[str, set[str]] = {}
    for where, image in images():
        name, _, tag = image.partition("@")[0].rpartition(":")
        assert name and "/" not in tag and tag != "latest", (where, image)
        if name.rpartition("/")[2] in ("threestage", "threestage-mlflow"):
            assert tag == threestage.__version__, (where, image)
        others.setdefault(name.rpartition("/")[2], set()).add(tag)
    assert all(len(tags) == 1 for tags in others.values()), others  # compose and Kubernetes run the same
    for file in (CLUSTER / "README.md", CLUSTER / "Dockerfile"):
        assert set(re.findall(r"threestage(?:-mlflow)?:(\d\S*)", file.read_text())) == {threestage.__version__}


# Secrets.


def test_no_manifest_holds_a_secret() -> None:
    for where, manifest in everything():
        assert manifest["kind"] != "Secret", where
        for container in containers(manifest):
            for variable in container.get("env", []):
                if SECRET.search(variable["name"]) and variable.get("value") != "admin":
                    assert "secretKeyRef" in variable.get("valueFrom", {}), (where, variable["name"])
        if manifest["kind"] == "ConfigMap":
            assert not any(SECRET.search(name) for name in manifest["data"]), where


def test_the_secrets_form_names_what_is_asked_for_and_holds_no_value() -> None:
    form = {
        (secret["metadata"]["name"], key): value
        for secret in yaml.safe_load_all((KUBERAY / "secrets.yaml").read_text())
        for key, value in secret["stringData"].items()
    }
    assert set(form.values()) == {"CHANGE-ME"}
    text = json.dumps([manifest for _, manifest in everything()])
    asked = re.findall(r'"secretKeyRef": (\{.*?\})', text)
    assert {(ref["name"], ref["key"]) for ref in map(json.loads, asked)} == set(form)
    readme = (CLUSTER / "README.md").read_text()
    for name, key in form:
        assert re.search(rf"create secret generic {name} [^$]*?--from-literal={key}=", readme.replace("$", "")), (
            name,
            key,
        )


def test_compose_takes_its_secrets_from_the_environment() -> None:
    compose = load(CLUSTER / "compose.yaml")
    seen = set()
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if SECRET.search(variable) and value not in ("admin", "threestage"):
                assert re.fullmatch(r"\$\{\w+:\?\}", value), (name, variable)
                seen.add(value[2:-3])
    readme = (CLUSTER / "README.md").read_text()
    assert seen and all(name in readme for name in seen)


def test_aws_holds_no_secret_and_asks_for_the_token() -> None:
    config = load(CLUSTER / "aws.yaml")
    options = " ".join(config["docker"]["run_options"])
    assert "RAY_AUTH_MODE=token" in options and "RAY_AUTH_TOKEN_PATH=/home/ray/.ray/auth_token" in options
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert not re.search(r"(PASSWORD|SECRET|ACCESS_KEY|AUTH_TOKEN)\w*=\S*", options.replace("RAY_AUTH_TOKEN_PATH=", ""))
    for node in config["available_node_types"].values():
        assert node["node_config"]["IamInstanceProfile"]["Name"].startswith("threestage-")


# Rights, resources, networks.


def test_no_container_runs_as_root_or_with_privileges() -> None:
    for where, manifest in everything():
        for pod in pods(manifest):
            spec = pod["spec"]
            assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0, where
            assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
            assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False, where
            assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), where
            assert all({"hostPath"}.isdisjoint(volume) for volume in spec.get("volumes", [])), where
        autoscaler = [m["spec"]["autoscalerOptions"] for m in [manifest] if m["kind"] == "RayCluster"]
        for container in [*containers(manifest), *autoscaler]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True, where
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert not context.get("privileged"), where
    for name, service in load(CLUSTER / "compose.yaml")["services"].items():
        assert service["cap_drop"] == ["ALL"] and service["read_only"] is True, name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(folder.startswith("/") for folder in service["tmpfs"]), name
    users = re.findall(r"^USER (.*)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert users == ["1000", "1000"]


def test_every_container_says_what_it_needs_and_every_server_how_it_is() -> None:
    for where, manifest in everything():
        for container in containers(manifest):
            requests, limits = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory", "ephemeral-storage"} <= requests.keys(), (where, container["name"])
            assert {"memory", "ephemeral-storage"} <= limits.keys(), (where, container["name"])
            if "ports" in container or container["name"].startswith("ray-worker"):
                assert {"readinessProbe", "livenessProbe"} <= container.keys(), (where, container["name"])


def test_what_the_pods_write_to_is_mounted_and_exists() -> None:
    for where, manifest in everything():
        for pod in pods(manifest):
            spec = pod["spec"]
            claims = [claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", [])]
            for volume in spec.get("volumes", []):
                assert volume.get("emptyDir", {"sizeLimit": ""}).keys() == {"sizeLimit"}, (where, volume["name"])
            there = {volume["name"] for volume in spec.get("volumes", [])} | set(claims)
            for container in spec["containers"]:
                assert {mount["name"] for mount in container.get("volumeMounts", [])} <= there, where
    for options in (m["spec"]["autoscalerOptions"] for _, m in everything() if m["kind"] == "RayCluster"):
        assert "/var/run/secrets/kubernetes.io/serviceaccount" in {m["mountPath"] for m in options["volumeMounts"]}


def test_nobody_reaches_a_pod_that_no_policy_names() -> None:
    for folder in RENDERED:
        policies = [m["spec"] for m in manifests(folder) if m["kind"] == "NetworkPolicy"]
        assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
        for policy in policies:
            for rule in policy.get("ingress", []):
                assert rule.get("from") and {} not in rule["from"], policy
            assert "podSelector" in policy
    text = json.dumps([manifest for _, manifest in everything()])
    assert "LoadBalancer" not in text and "NodePort" not in text


def test_compose_publishes_to_this_machine_only() -> None:
    ports = [p for s in load(CLUSTER / "compose.yaml")["services"].values() for p in s.get("ports", [])]
    assert len(ports) == 3 and all(port.startswith("127.0.0.1:") for port in ports)


def test_aws_opens_ssh_only() -> None:
    [rule] = load(CLUSTER / "aws.yaml")["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert "0.0.0.0/0" not in json.dumps(rule)
    assert "--dashboard-host=127.0.0.1" in " ".join(load(CLUSTER / "aws.yaml")["head_start_ray_commands"])


# The cluster itself.


def clusters() -> Iterator[tuple[str, dict[str, Any]]]:
    for where, manifest in everything():
        if manifest["kind"] == "RayCluster":
            yield where, manifest["spec"]
        elif manifest["kind"] == "RayJob":
            yield where, manifest["spec"]["rayClusterSpec"]


def test_clusters_ask_for_a_token_survive_their_head_and_grow_from_nothing() -> None:
    drain = int(
        select(manifests("base"), {"kind": "ConfigMap", "name": "ray"})["data"]["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
    )
    assert len(list(clusters())) == 6
    for where, spec in clusters():
        queued = where.startswith("overlays/queued")  # Kueue admits a fixed size
        assert spec["authOptions"] == {"mode": "token"}, where
        assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379", where
        assert spec["enableInTreeAutoscaling"] != queued, where
        assert queued or spec["autoscalerOptions"]["version"] == "v2", where
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", where
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] == 0 < group["maxReplicas"] and (group["replicas"] > 0) == queued, where
            assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain, where
            assert group["template"]["spec"]["restartPolicy"] == "Never", (
                where
            )  # the autoscaler's second version wants it


def test_the_driver_of_a_job_has_a_place() -> None:
    for where, spec in clusters():
        [cpu] = [group for group in spec["workerGroupSpecs"] if group["groupName"] == "cpu"]
        resources = json.loads(json.loads(cpu["rayStartParams"]["resources"]))
        assert resources["driver"] > 0, where
    job = select(manifests("overlays/job"), {"kind": "RayJob", "name": "threestage-run"})["spec"]
    assert json.loads(job["entrypointResources"]) == {"driver": 1}


def test_overlays_differ_where_they_should() -> None:
    def groups(folder: str) -> dict[str, Any]:
        cluster = select(manifests(folder), {"kind": "RayCluster", "name": "threestage"})
        return {group["groupName"]: group["template"]["spec"] for group in cluster["spec"]["workerGroupSpecs"]}

    assert groups("overlays/dev").keys() == {"cpu"}
    spot = groups("overlays/gpu")["gpu"]
    assert spot["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spot["nodeSelector"] and spot["affinity"] and len(spot["tolerations"]) > 1
    assert "affinity" not in groups("overlays/s3-minio")["gpu"]
    storage = select(manifests("overlays/s3-minio"), {"kind": "ConfigMap", "name": "storage"})["data"]
    assert storage["AWS_ENDPOINT_URL_S3"] == "http://minio:9000"
    kinds = {manifest["kind"] for manifest in manifests("overlays/job")}
    assert "RayJob" in kinds and "RayCluster" not in kinds


def test_every_setting_of_the_job_is_one() -> None:
    from threestage.checks.preflight import check_shares
    from threestage.config import load as load_config
    from threestage.models.network import check_settings

    words = select(manifests("overlays/job"), {"kind": "RayJob", "name": "threestage-run"})["spec"][
        "entrypoint"
    ].split()
    assert words[:3] == ["threestage", "run", "own_images"]
    settings = [value for flag, value in pairwise(words) if flag == "--set"]
    config = load_config("own_images", settings)
    check_settings(config.network)
    for stage in config.stage_names:
        check_shares(config, stage)
    assert config.data.labelled == "all" and config.data.downscale == 1
    assert config.cluster.gpus_per_worker == 1 and config.cluster.most_workers == 2
    gpu = next(clusters())[1]["workerGroupSpecs"][1]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.cluster.cpus_per_worker <= int(limits["cpu"])


def test_a_queued_run_has_the_room_that_it_asks_for() -> None:
    """Kueue refuses a cluster that grows by itself, and one that stays after its run."""
    job = select(manifests("overlays/queued"), {"kind": "RayJob", "name": "threestage-run"})
    spec, labels = job["spec"], job["metadata"]["labels"]
    queue = select(manifests("overlays/queued"), {"kind": "LocalQueue", "name": "threestage"})
    administrator = {
        (m["kind"], m["metadata"]["name"]): m for m in yaml.safe_load_all((KUBERAY / "kueue.yaml").read_text())
    }
    for manifest in administrator.values():
        validate_kueue(manifest)
    assert labels["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    assert ("WorkloadPriorityClass", labels["kueue.x-k8s.io/priority-class"]) in administrator
    quotas = administrator["ClusterQueue", queue["spec"]["clusterQueue"]]["spec"]["resourceGroups"][0]
    covered = {resource["name"] for flavor in quotas["flavors"] for resource in flavor["resources"]}
    asked = {name for container in containers(job) for name in container["resources"]["requests"]}
    assert asked | {"nvidia.com/gpu"} == covered == set(quotas["coveredResources"]), (
        "what no quota covers is never admitted"
    )
    assert spec["shutdownAfterJobFinishes"] and "clusterSelector" not in spec
    assert [group["replicas"] for group in spec["rayClusterSpec"]["workerGroupSpecs"]] == [1, 2]
    assert "cluster.workers=[1,2]" in spec["entrypoint"] and json.loads(spec["entrypointResources"]) == {"driver": 1}
    assert "activeDeadlineSeconds" not in spec, "it ends a long run for good"


def test_the_cpu_image_runs_where_no_gpu_is() -> None:
    found = manifests("overlays/gpu")
    cluster = select(render(KUBERAY / "components" / "cpu-image", found), {"kind": "RayCluster", "name": "threestage"})[
        "spec"
    ]
    head, (cpu, gpu) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert {container["image"] for group in (head, cpu) for container in containers(group)} == {"threestage-cpu:0.1.0"}
    assert {container["image"] for container in containers(gpu)} == {"threestage:0.1.0"}


def test_workers_wait_for_their_head_in_little_memory() -> None:
    """KubeRay's own container runs `ray health-check`, which takes 205 MiB of the 256 MiB that it may have."""
    for where, spec in clusters():
        for group in spec["workerGroupSpecs"]:
            [wait] = group["template"]["spec"]["initContainers"]
            assert "FQ_RAY_IP" in wait["command"][2] and "ray" not in wait["command"], where
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        program = wait["command"][2].replace("6379", str(head.getsockname()[1]))
        limited = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, (64 << 20, 64 << 20))\n{program}"
        command = [sys.executable, "-S", "-c", limited]
        done = subprocess.run(command, env={"FQ_RAY_IP": "127.0.0.1"}, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    for file in (CLUSTER / "README.md", ROOT / "docs" / "deploy-kubernetes.md"):
        assert "ENABLE_INIT_CONTAINER_INJECTION" in file.read_text(), file


def test_names_and_roles_can_be_reached() -> None:
    """Where NodeLocal DNSCache, OpenShift's name server and EKS Pod Identity listen; S3 over IPv6 too."""
    rules = {
        (json.dumps(to), port["port"])
        for m in manifests("base")
        if m["kind"] == "NetworkPolicy"
        for rule in m["spec"].get("egress", [])
        for to in rule.get("to", [])
        for port in rule.get("ports", [{"port": 0}])
    }

    def allowed(part: str, port: int) -> bool:
        return any(part in to and number == port for to, number in rules)

    assert allowed("169.254.20.10/32", 53) and allowed("openshift-dns", 5353)
    assert allowed("169.254.170.23/32", 80) and allowed("fd00:ec2::23/128", 80)
    assert allowed("::/0", 443) and allowed("0.0.0.0/0", 443)
    for to, _ in rules:
        for block in [json.loads(to).get("ipBlock", {})]:
            if block.get("cidr") in ("0.0.0.0/0", "::/0"):
                assert block["except"] in (["169.254.169.254/32"], ["fd00:ec2::254/128"]), "the machine's own role"


def test_skypilot_runs_what_can_be_run() -> None:
    """Its schema is that of sky 0.14.1, read by hand: here, that the settings are ours and a lost machine is replaced."""
    from threestage.config import load as load_config

    task = load(CLUSTER / "skypilot.yaml")
    assert task["resources"]["use_spot"] and task["resources"]["job_recovery"]["max_restarts_on_errors"] == 3
    words = task["run"].replace("\\\n", " ").split()
    assert words[:3] == ["threestage", "run", "own_images"] and words[-1] == "--local"
    load_config("own_images", [value for flag, value in pairwise(words) if flag == "--set"])
    assert words[words.index("--out") + 1].startswith("s3://$BUCKET/") and "BUCKET" in task["envs"]


def test_the_bucket_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from moto import mock_aws

    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with mock_aws():
        assert [make_bucket("threestage") for _ in range(2)] == ["threestage: made", "threestage: is there"]


def test_no_file_names_the_machine_that_it_was_written_on() -> None:
    for file in [*CLUSTER.rglob("*.yaml"), CLUSTER / "Dockerfile", CLUSTER / "README.md", CLUSTER / "prepare.py"]:
        assert not re.search(r"/(?:work|root)/|pypi\.|localhost:\d{5}", file.read_text()), file
        assert file.read_text().startswith(("# ", '"""')), file
