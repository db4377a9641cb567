"""Builders of architectures, by the ``model_type`` of a checkpoint's config.json.

A builder takes the checkpoint folder and returns an ``onnx_ir.Model`` in normal form whose weights
are mapped from the safetensors files, never read.
"""

from __future__ import annotations

BUILDERS: dict[str, str] = {
    "bert": "trivium.models.bert:build",
}
