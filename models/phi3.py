"""Phi-3, 3.5 and 4-mini: Llama's layers with packed projections, and LongRoPE
(https://arxiv.org/abs/2404.14219, https://arxiv.org/abs/2402.13753).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from trivium.models import decoder, llama
from trivium.models.checkpoint import Checkpoint
from trivium.models.decoder import Names


def build(folder: Path) -> ir.Model:
    """Build a Phi-3 checkpoint; errors as for every builder (see `decoder.build`)."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    spec = dataclasses.replace(
        llama.common(config, "phi3", epsilon=1e-5),
        names=Names(query_key_value="self_attn.qkv_proj", gate_up="mlp.gate_up_proj"),
    )
    if config.has("sliding_window"):
        spec = llama.with_windows(spec, [config.size("sliding_window")] * len(spec.layers))
    config.finish()
    return decoder.build(spec, checkpoint)
