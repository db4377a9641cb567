"""Devices: one TOML file each in ``devices/``, read by `load`; the host CPU is detected.

The table below needs the names of the files only, so that listing targets reads none of them.
"""

from __future__ import annotations

from importlib.resources import files

TARGETS: dict[str, str] = {"cpu": "trivium.targets.host:host"} | {
    name: f"trivium.targets.load:{name}"
    for name in sorted(
        file.name.removesuffix(".toml")
        for file in (files("trivium.targets") / "devices").iterdir()
        if file.name.endswith(".toml")
    )
}
