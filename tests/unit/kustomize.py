"""Renders the kustomizations of cluster/kuberay, so that tests need no kubectl: only what those files use, anything else raises.

One test compares it with `kubectl kustomize`, where there is one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

KNOWN = {
    "apiVersion", "kind", "namespace", "resources", "components", "patches", "replacements", "images",
    "configMapGenerator",
}  # fmt: skip
UNNAMESPACED = {"Namespace"}

Manifest = dict[str, Any]


def load(file: Path) -> list[Manifest]:
    """The documents of a file, each without YAML's aliases: a patch changes one place only."""
    return [json.loads(json.dumps(document)) for document in yaml.safe_load_all(file.read_text()) if document]


def render(folder: Path, found: list[Manifest] | None = None) -> list[Manifest]:
    """The manifests of a kustomization; a component (`found`) works on those that came before it."""
    found = [] if found is None else found
    [kustomization] = load(folder / "kustomization.yaml")
    if unknown := kustomization.keys() - KNOWN:
        raise NotImplementedError(f"{folder}: {sorted(unknown)}")
    for name in kustomization.get("resources", []):
        found += render(folder / name) if (folder / name).is_dir() else load(folder / name)
    found += [_config_map(folder, generator) for generator in kustomization.get("configMapGenerator", [])]
    for name in kustomization.get("components", []):
        render(folder / name, found)
    for patch in kustomization.get("patches", []):
        _patch(found, patch["target"], yaml.safe_load(patch["patch"]))
    for manifest in found:
        if "namespace" in kustomization and manifest["kind"] not in UNNAMESPACED:
            manifest["metadata"]["namespace"] = kustomization["namespace"]
    for image in kustomization.get("images", []):
        for container in containers(found):
            if container["image"].rpartition(":")[0] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    for replacement in kustomization.get("replacements", []):
        _replace(found, replacement)
    return found


def _config_map(folder: Path, generator: dict[str, Any]) -> Manifest:
    """Of whole files, under its own name."""
    if generator.keys() != {"name", "files", "options"} or not generator["options"]["disableNameSuffixHash"]:
        raise NotImplementedError(generator)
    metadata = {"name": generator["name"], "labels": generator["options"]["labels"]}
    data = {name: (folder / name).read_text() for name in generator["files"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def containers(node: Any) -> Iterator[Manifest]:
    """Every container below a node, whatever kind of manifest it is in."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ("containers", "initContainers"):
                yield from value
            else:
                yield from containers(value)
    elif isinstance(node, list):
        for value in node:
            yield from containers(value)


def select(found: list[Manifest], target: dict[str, str]) -> Manifest:
    """The one manifest of that kind and name."""
    [manifest] = [m for m in found if (m["kind"], m["metadata"]["name"]) == (target["kind"], target["name"])]
    return manifest


def _patch(found: list[Manifest], target: dict[str, str], patch: Any) -> None:
    manifest = select(found, target)
    if isinstance(patch, dict):
        if patch.pop("$patch") != "delete":
            raise NotImplementedError("a strategic merge")
        found.remove(manifest)
        return
    for operation in patch:
        node: Any = manifest
        *parents, last = operation["path"].removeprefix("/").split("/")
        for key in parents:
            node = node[int(key) if isinstance(node, list) else key]
        _apply(node, int(last) if isinstance(node, list) and last != "-" else last, operation)


def _apply(node: Any, key: Any, operation: dict[str, Any]) -> None:
    match operation["op"]:
        case "add" if key == "-":
            node.append(operation["value"])
        case "add" if isinstance(node, dict):
            node[key] = operation["value"]
        case "replace":
            node[key]  # it is there
            node[key] = operation["value"]
        case "remove":
            del node[key]
        case "test":
            assert node[key] == operation["value"]
        case _:
            raise NotImplementedError(operation)


def _replace(found: list[Manifest], replacement: dict[str, Any]) -> None:
    """Copies a top-level field of one manifest into another."""
    source = replacement["source"]
    value = select(found, source)[source["fieldPath"]]
    for target in replacement["targets"]:
        for path in target["fieldPaths"]:
            parent, name = path.split(".")
            select(found, target["select"])[parent][name] = json.loads(json.dumps(value))
