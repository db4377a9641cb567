"""Devices: one TOML file each in ``devices/``, read by `load`; the host CPU is detected."""

from __future__ import annotations

TARGETS: dict[str, str] = {"cpu": "trivium.targets.host:host"}
