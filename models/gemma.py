"""Gemma 1 to 3 (text): norms whose weight is stored less one, scaled embeddings, a norm on either
side of attention and feed-forward (2 and 3), soft caps (2), two rotary embeddings (3).

Sources: https://arxiv.org/abs/2403.08295, https://arxiv.org/abs/2408.00118,
https://arxiv.org/abs/2503.19786.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from trivium.models import decoder, llama, rope
from trivium.models.builder import ACTIVATIONS
from trivium.models.checkpoint import Checkpoint, Config
from trivium.models.decoder import Decoder, Layer, Names

FOUR_NORMS = Names(
    after_attention_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    after_mlp_norm="post_feedforward_layernorm",
)


def build_gemma(folder: Path) -> ir.Model:
    """Build a Gemma 1 checkpoint; errors as for every builder (see `decoder.build`)."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    # The released files say "gelu" and mean its tanh approximation; transformers corrects it too.
    given = config.choose("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS)
    given = "gelu_pytorch_tanh" if given == "gelu" else given
    spec = _common(config, "gemma", config.choose("hidden_activation", given, ACTIVATIONS))
    count = config.size("num_hidden_layers")
    layer = Layer(llama.read_rope(config, spec.head_dim))
    spec = dataclasses.replace(spec, layers=(layer,) * count)
    config.finish()
    return decoder.build(spec, checkpoint)


def build_gemma2(folder: Path) -> ir.Model:
    """Build a Gemma 2 checkpoint: every other layer slides, scores and logits are capped."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    config.ignore("cache_implementation", "hidden_act")
    spec = dataclasses.replace(
        _common(config, "gemma2", _activation(config)),
        names=FOUR_NORMS,
        softcap=config.optional("attn_logit_softcapping", 50.0),
        logits_softcap=config.optional("final_logit_softcapping", 30.0),
    )
    rotary = llama.read_rope(config, spec.head_dim)
    spec = dataclasses.replace(spec, layers=_layers(config, 2, rotary, rotary))
    config.finish()
    return decoder.build(spec, checkpoint)


def build_gemma3(folder: Path) -> ir.Model:
    """Build a Gemma 3 text checkpoint: five of six layers slide, with a rotary of their own."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    config.ignore("cache_implementation", "hidden_act")
    spec = dataclasses.replace(
        _common(config, "gemma3", _activation(config)),
        names=FOUR_NORMS,
        query_key_norm=True,
        logits_softcap=config.optional("final_logit_softcapping", None),
    )
    near, far = _two_ropes(config, spec.head_dim)
    pattern = config.size("sliding_window_pattern", 6)
    spec = dataclasses.replace(spec, layers=_layers(config, pattern, near, far))
    config.finish()
    return decoder.build(spec, checkpoint)


def _activation(config: Config) -> str:
    return config.choose("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS)


def _common(config: Config, name: str, activation: str) -> Decoder:
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    bias = config.get("attention_bias", False)
    return Decoder(
        name=name,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        heads=heads,
        kv_heads=config.size("num_key_value_heads", heads),
        head_dim=config.size("head_dim", 256),
        layers=(),
        activation=activation,
        norm="rms+1",
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        query_key_value_bias=bias,
        output_bias=bias,
        tied=config.get("tie_word_embeddings", True),
        embedding_scale=hidden**0.5,
    )


def _layers(config: Config, pattern: int, near: rope.Rope, far: rope.Rope) -> tuple[Layer, ...]:
    """All slide but every ``pattern``-th, unless layer_types says otherwise."""
    count = config.size("num_hidden_layers")
    default = [
        "sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(count)
    ]
    scale = config.get("query_pre_attn_scalar", 256.0) ** -0.5
    sliding = Layer(near, config.size("sliding_window", 4096), scale)
    full = Layer(far, None, scale)
    types = llama.layer_types(config, count, default)
    return tuple(sliding if kind == "sliding_attention" else full for kind in types)


def _two_ropes(config: Config, head_dim: int) -> tuple[rope.Rope, rope.Rope]:
    """The rotary embeddings of sliding and of full layers."""
    positions = config.size("max_position_embeddings", 131072)
    both = config.table("rope_parameters")
    older = config.table("rope_scaling")
    local = config.get("rope_local_base_freq", 10_000.0)
    far_theta = config.get("rope_theta", 1_000_000.0)
    near_options = both.table("sliding_attention") if both is not None else None
    far_options = both.table("full_attention") if both is not None else older
    if both is not None:
        both.finish()
    near = rope.read(near_options, head_dim=head_dim, theta=local, positions=positions)
    far = rope.read(far_options, head_dim=head_dim, theta=far_theta, positions=positions)
    return near, far
