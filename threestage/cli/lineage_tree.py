"""A model's lineage as a tree on a terminal: what it learnt from below it, down to the data; then what learnt from it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from threestage.run_folder.lineage import short_digest

if TYPE_CHECKING:
    from rich.tree import Tree

Node = Mapping[str, Any]


def lineage_tree(node: Node) -> "Tree":
    """`node`: what `Models.lineage` returns."""
    from rich.tree import Tree

    tree = Tree(_title(node))
    _add_origin(tree, node)
    if node["pupils"]:
        branch = tree.add("[bold]learnt from its pseudo-masks[/]")
        for pupil in node["pupils"]:
            _add_pupil(branch, pupil)
    return tree


def _title(node: Node) -> str:
    if "version" not in node:
        return f"{node['stage']}, model {short_digest(node['model_digest'])}, not registered here ({escape(node['model'])})"
    aliases = f" @{', @'.join(node['aliases'])}" if node["aliases"] else ""
    score = "" if node["mean_iou"] is None else f", mean IoU {node['mean_iou']:.3f} on {node['validation']}"
    return f"[bold]{escape(node['name'])} version {node['version']}[/]{aliases} ({node['stage']}{escape(score)})"


def _add_origin(tree: "Tree", node: Node) -> None:
    """The stage's run, its data, and the pseudo-masks with the teacher that made them, which has an origin of its own."""
    found = node.get("lineage")
    if not found:
        return
    data, labelled, validation = found["data"], found["labelled"], found["validation"]
    tree.add(
        f"run [bold]{escape(str(node['run']))}[/] {node['run_id']}, threestage {found['code_version']}, {escape(found['run'])}"
    )
    tree.add(
        f"data set {escape(data['name'])} version {data['version']}, {short_digest(data['digest'])}, {escape(data['root'])}"
    )
    tree.add(
        f"labelled {labelled['images']} images, {short_digest(labelled['digest'])}, split seed {found['split_seed']}"
    )
    tree.add(
        f"validated on {validation['images']} images of {escape(validation['name'])}, {short_digest(validation['digest'])}"
    )
    masks, teacher = found["learnt_from"], node.get("teacher")
    if masks is not None:
        branch = tree.add(f"pseudo-masks {_masks(masks)}, kept from confidence {found['confidence_threshold']:g}")
        if teacher is not None:
            _add_origin(branch.add(f"made by {_title(teacher)}"), teacher)


def _masks(masks: Mapping[str, Any]) -> str:
    confidence = masks["statistics"].get("mean_confidence")
    sure = "" if confidence is None else f", mean confidence {confidence:.3f}"
    left_out = f" ({masks['rejected']} left out)" if masks["rejected"] else ""
    return f"{short_digest(masks['digest'])}: {masks['images']} images{left_out}{sure}, {escape(masks['uri'])}"


def _add_pupil(tree: "Tree", pupil: Node) -> None:
    branch = tree.add(_title(pupil))
    for next_one in pupil["pupils"]:
        _add_pupil(branch, next_one)
