"""Mixtral: Mistral with a mixture of experts for its feed-forward (https://arxiv.org/abs/2401.04088)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.models import decoder, llama
from trivium.models.checkpoint import Checkpoint
from trivium.models.decoder import Experts


def build(folder: Path) -> ir.Model:
    """Build a Mixtral checkpoint; errors as for every builder (see `decoder.build`)."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    experts = Experts(
        count=config.size("num_local_experts", 8),
        per_token=config.size("num_experts_per_tok", 2),
    )
    if experts.per_token > experts.count:
        raise BadInput(
            f"num_experts_per_tok {experts.per_token} of {experts.count} experts",
            about=config.about,
        )
    spec = dataclasses.replace(
        llama.common(config, "mixtral", epsilon=1e-5, theta=1e6), experts=experts
    )
    if config.has("sliding_window"):
        spec = llama.with_windows(spec, [config.size("sliding_window")] * len(spec.layers))
    config.finish()
    return decoder.build(spec, checkpoint)
