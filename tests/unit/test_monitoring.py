"""What Prometheus and Grafana ask for is what a stage exports. Nothing is started."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.fixed_steps import FixedSteps, network, new_state
from tests.unit.kustomize import Manifest, render, select
from threestage.data.batches import Batch, BatchSlice
from threestage.ray_backend import gauges
from threestage.training.loop import LoopSettings, StageLength, fit
from threestage.training.schedule import EmaSettings, OptimiserSettings
from threestage.training.worker import LocalWorker

KUBERAY = Path(__file__).parents[2] / "cluster" / "kuberay"
MONITORING = KUBERAY / "components" / "monitoring"
PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"
OF_RAY = {"ray_node_disk_utilization_percentage"}


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    found = render(KUBERAY / "base")
    return render(MONITORING, found)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names on a node's page that training exports: what the loop measures, where it is, what the stream has read."""
    names = {gauges.STEP, gauges.SECONDS_IN_PHASE, gauges.UNSAVED_SECONDS}

    class Measuring(LocalWorker):
        def measured(self, values: Mapping[str, float]) -> None:
            names.update(values)

    def no_images(share: BatchSlice, first_image: int) -> Iterator[Batch]:
        return iter(())

    worker = Measuring(str(tmp_path_factory.mktemp("run")), 2, no_images)
    worker.checkpoints.claim()
    length, loop = StageLength(1, (2, 4), (0,)), LoopSettings(log_every=1)
    fit(
        new_state(network()), worker, FixedSteps(), lambda shipped: {}, length, loop, OptimiserSettings(), EmaSettings()
    )
    assert worker.checkpoints.wait() == "written" and worker.checkpoints.unsaved_seconds() < 60
    counters = {f"ray_{gauges.metric_name(name)}_total" for name in (gauges.IMAGES_READ, gauges.IMAGES_REJECTED)}
    return {f"ray_{gauges.metric_name(name)}" for name in names} | counters


def alerts() -> list[Manifest]:
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())
    return [rule for group in rules["spec"]["groups"] for rule in group["rules"]]


def dashboard() -> Manifest:
    return dict(json.loads((MONITORING / "dashboard.json").read_text()))


def asked(text: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", text))


def test_alerts_and_dashboard_ask_for_what_is_exported(exported: set[str]) -> None:
    queries = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    queries += [variable["query"]["query"] for variable in dashboard()["templating"]["list"][1:]]
    expressions = [alert["expr"] for alert in alerts()]
    for query in [*queries, *expressions]:
        assert asked(query) and asked(query) <= exported | OF_RAY, query
    assert asked(" ".join(expressions)) <= asked(" ".join(queries)), "what alerts can be seen on the dashboard"


def test_the_page_lists_what_is_exported(exported: set[str]) -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = {f"ray_threestage_{name}" for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert listed >= exported
    assert {alert["alert"] for alert in alerts()} <= set(re.findall(r"Threestage\w+", PAGE.read_text()))


def test_an_alert_says_what_to_do() -> None:
    for alert in alerts():
        assert alert["labels"]["severity"] == "warning" and alert["annotations"].keys() == {"summary", "action"}
        by = re.search(r"by \(([\w, ]+)\)", alert["expr"])
        assert by, alert
        named = set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["summary"]))
        assert named == set(by[1].split(", ")), "a label that the expression drops is empty in the message"


def test_promtool_reads_the_alerts(tmp_path: Path) -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("no promtool here (Debian's package prometheus)")
    spec = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(spec))
    done = subprocess.run([promtool, "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


PANEL = {
    "type": "object",
    "required": ["id", "type", "title", "datasource", "gridPos", "fieldConfig", "options", "targets"],
    "additionalProperties": False,
    "properties": {
        "id": {"type": "integer"},
        "type": {"const": "timeseries"},
        "title": {"type": "string", "minLength": 1},
        "datasource": {"$ref": "#/$defs/datasource"},
        "gridPos": {
            "type": "object",
            "required": ["x", "y", "w", "h"],
            "additionalProperties": False,
            "properties": {
                "x": {"type": "integer", "minimum": 0, "maximum": 23},
                "y": {"type": "integer", "minimum": 0},
                "w": {"type": "integer", "minimum": 1, "maximum": 24},
                "h": {"type": "integer", "minimum": 1},
            },
        },
        "fieldConfig": {"type": "object", "required": ["defaults", "overrides"]},
        "options": {"type": "object", "required": ["legend", "tooltip"]},
        "targets": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["refId", "datasource", "expr", "legendFormat"],
                "additionalProperties": False,
                "properties": {
                    "refId": {"enum": ["A", "B", "C"]},
                    "datasource": {"$ref": "#/$defs/datasource"},
                    "expr": {"type": "string"},
                    "legendFormat": {"type": "string"},
                },
            },
        },
    },
}
DASHBOARD = {
    "$defs": {
        "datasource": {"const": {"type": "prometheus", "uid": "${datasource}"}},
        "panel": PANEL,
    },
    "type": "object",
    "required": ["uid", "title", "schemaVersion", "time", "templating", "panels"],
    "properties": {
        "schemaVersion": {"type": "integer", "minimum": 36},
        "panels": {"type": "array", "items": {"$ref": "#/$defs/panel"}},
    },
}


def test_the_dashboard_is_one() -> None:
    """The part of Grafana's schema that it uses; it was read once by Grafana's own Python types."""
    content = dashboard()
    jsonschema.Draft202012Validator(DASHBOARD).validate(content)
    panels = content["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    cells = [
        (x, y)
        for grid in (panel["gridPos"] for panel in panels)
        for x in range(grid["x"], grid["x"] + grid["w"])
        for y in range(grid["y"], grid["y"] + grid["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"


def test_prometheus_finds_ray_and_may_come_in(manifests: list[Manifest]) -> None:
    cluster = select(manifests, {"kind": "RayCluster", "name": "threestage"})["spec"]
    selector = select(manifests, {"kind": "PodMonitor", "name": "ray"})["spec"]["selector"]["matchLabels"]
    by_kuberay = {"ray.io/is-ray-node": "yes"}
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert selector.items() <= (group["template"]["metadata"]["labels"] | by_kuberay).items()
        assert "metrics-export-port" not in group["rayStartParams"], "KubeRay's default is 8080, as in the policy"
    policy = select(manifests, {"kind": "NetworkPolicy", "name": "ray-metrics"})["spec"]
    assert policy["podSelector"]["matchLabels"] == selector
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == [8080]
    found = select(manifests, {"kind": "ConfigMap", "name": "threestage-dashboard"})
    assert json.loads(found["data"]["dashboard.json"])["title"] == "threestage"
    settings = select(manifests, {"kind": "ConfigMap", "name": "ray"})["data"]
    assert settings["RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE"] == "1", "else Ray reports an empty disk in a pod"
