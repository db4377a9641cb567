"""Builders of architectures, by the ``model_type`` of a checkpoint's config.json.

A builder takes the checkpoint folder and returns an ``onnx_ir.Model`` in normal form whose weights
are mapped from the safetensors files, never read.
"""

from __future__ import annotations

BUILDERS: dict[str, str] = {
    "bert": "trivium.models.bert:build",
    "gemma": "trivium.models.gemma:build_gemma",
    "gemma2": "trivium.models.gemma:build_gemma2",
    "gemma3_text": "trivium.models.gemma:build_gemma3",
    "gpt2": "trivium.models.gpt2:build",
    "llama": "trivium.models.llama:build_llama",
    "llava": "trivium.models.llava:build",
    "mistral": "trivium.models.llama:build_mistral",
    "mixtral": "trivium.models.mixtral:build",
    "phi3": "trivium.models.phi3:build",
    "qwen2": "trivium.models.llama:build_qwen2",
    "qwen3": "trivium.models.llama:build_qwen3",
    "t5": "trivium.models.t5:build",
}
