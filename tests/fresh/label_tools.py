"""Run by test_label_tools.py where the tools' own libraries are, and threestage is not: `label_tools.py TOOL FOLDER`.

Reads what threestage wrote in FOLDER/ours and draws it into FOLDER/drawn.npz; writes the masks of FOLDER/masks.npz as the tool
does into FOLDER/theirs. A mask of class 2 and name N has the key N.
"""

import base64
import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

CLASSES = ("ground", "thing", "house")
Masks = dict[str, Any]


def coco(folder: Path, masks: Masks) -> Masks:
    from pycocotools import mask as mask_api
    from pycocotools.coco import COCO

    api = COCO(str(folder / "ours/annotations.json"))
    drawn = {}
    for image in api.loadImgs(api.getImgIds()):
        found = np.full((image["height"], image["width"]), 255, np.uint8)
        for annotation in api.loadAnns(api.getAnnIds(imgIds=image["id"])):
            found[api.annToMask(annotation) > 0] = annotation["category_id"] - 1
        drawn[image["file_name"]] = found
    content: dict[str, list[Any]] = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(CLASSES)]
    for number, (name, mask) in enumerate(masks.items()):
        height, width = mask.shape
        content["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        for class_id in range(len(CLASSES)):
            code = mask_api.encode(np.asfortranarray(mask == class_id).astype(np.uint8))
            code = {"size": code["size"], "counts": code["counts"].decode()}
            content["annotations"].append({"image_id": number, "category_id": class_id, "segmentation": code})
    (folder / "theirs/annotations.json").write_text(json.dumps(content))
    return drawn


def label_studio(folder: Path, masks: Masks) -> Masks:
    from label_studio_sdk.converter import brush

    drawn = {}
    for task in json.loads((folder / "ours/tasks.json").read_text()):
        results = task["predictions"][0]["result"]
        found = np.full((results[0]["original_height"], results[0]["original_width"]), 255, np.uint8)
        for result in results:
            channels = brush.decode_rle(result["value"]["rle"]).reshape(*found.shape, 4)
            found[channels[..., 3] > 0] = CLASSES.index(result["value"]["brushlabels"][0])
        drawn[task["data"]["image"].partition("?d=")[2]] = found
    tasks = []
    for name, mask in masks.items():
        results = [
            {
                "id": str(class_id),
                "type": "brushlabels",
                "original_height": mask.shape[0],
                "original_width": mask.shape[1],
                "value": {
                    "format": "rle",
                    "rle": brush.mask2rle((mask == class_id).astype(np.uint8) * 255),
                    "brushlabels": [CLASSES[class_id]],
                },
            }
            for class_id in range(len(CLASSES))
        ]
        tasks.append({"data": {"image": name}, "annotations": [{"result": results}]})
    (folder / "theirs/tasks.json").write_text(json.dumps(tasks))
    return drawn


def labelme(folder: Path, masks: Masks) -> Masks:
    from labelme import LabelFile, utils
    from PIL import Image

    drawn = {}
    for name, mask in masks.items():
        for place in ("ours", "theirs"):
            Image.fromarray(np.zeros((*mask.shape, 3), np.uint8)).save(folder / place / name)
        file = LabelFile(str((folder / "ours" / name).with_suffix(".json")))
        names = {"_background_": 0, **{label: number for number, label in enumerate(CLASSES, 1)}}
        classes, _ = utils.shapes_to_label((*mask.shape, 3), file.shapes, names)
        drawn[name] = np.where(classes > 0, classes - 1, 255).astype(np.uint8)
        shapes = []
        for class_id in np.unique(mask[mask < 255]).tolist():
            rows, columns = np.nonzero(mask == class_id)
            top, left, bottom, right = rows.min(), columns.min(), rows.max(), columns.max()
            part = (mask == class_id)[top : bottom + 1, left : right + 1]
            code = utils.img_arr_to_b64(part.astype(np.uint8))
            code = code if isinstance(code, str) else base64.b64encode(code).decode()
            corners = [[float(left), float(top)], [float(right), float(bottom)]]
            shape: dict[str, Any] = {
                "label": CLASSES[class_id],
                "points": corners,
                "group_id": None,
                "shape_type": "mask",
                "flags": {},
            }
            shapes.append({**shape, "mask": code})
        target = str((folder / "theirs" / name).with_suffix(".json"))
        LabelFile().save(target, shapes, name, mask.shape[0], mask.shape[1])
    return drawn


def cvat(folder: Path, masks: Masks) -> Masks:
    from cvat_sdk.masks import decode_mask, encode_mask

    drawn = {}
    for image in ElementTree.parse(folder / "ours/annotations.xml").getroot().iter("image"):
        found = np.full((int(image.attrib["height"]), int(image.attrib["width"])), 255, np.uint8)
        for mask in image.iter("mask"):
            place = [int(mask.attrib[key]) for key in ("left", "top", "width", "height")]
            ends = [place[0] + place[2] - 1, place[1] + place[3] - 1]
            points = [int(number) for number in mask.attrib["rle"].split(",")] + place[:2] + ends
            inside = decode_mask(points, image_width=found.shape[1], image_height=found.shape[0])
            found[inside] = CLASSES.index(mask.attrib["label"])
        drawn[image.attrib["name"]] = found
    root = ElementTree.Element("annotations")
    for name, mask in masks.items():
        size = {"width": str(mask.shape[1]), "height": str(mask.shape[0])}
        element = ElementTree.SubElement(root, "image", {"id": "0", "name": name, **size})
        for class_id in np.unique(mask[mask < 255]).tolist():
            *counts, left, top, right, bottom = map(int, encode_mask(mask == class_id))
            box = {"left": left, "top": top, "width": right - left + 1, "height": bottom - top + 1}
            mask_element = {"label": CLASSES[class_id], "rle": ", ".join(map(str, counts)), "z_order": 0, **box}
            ElementTree.SubElement(element, "mask", {key: str(value) for key, value in mask_element.items()})
    ElementTree.ElementTree(root).write(folder / "theirs/annotations.xml")
    return drawn


if __name__ == "__main__":
    tool, place = sys.argv[1], Path(sys.argv[2])
    (place / "theirs").mkdir()
    with np.load(place / "masks.npz") as found_masks:
        all_masks = dict(found_masks)
    tools = {"coco": coco, "label-studio": label_studio, "labelme": labelme, "cvat": cvat}
    np.savez(place / "drawn.npz", **tools[tool](place, all_masks))
