"""Configurations that ship. Importing this costs nothing, so that a shell can complete their names."""

from importlib import resources


def preset_names() -> list[str]:
    files = resources.files("threestage.presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))
