"""Llama 1 to 3.x and what shares its layers: Mistral (sliding window), Qwen 2 (biases on queries,
keys and values) and Qwen 3 (normalized queries and keys).

Sources: https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783,
https://arxiv.org/abs/2310.06825, https://arxiv.org/abs/2407.10671,
https://arxiv.org/abs/2505.09388.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.models import decoder, rope
from trivium.models.builder import ACTIVATIONS
from trivium.models.checkpoint import Checkpoint, Config
from trivium.models.decoder import Decoder, Layer


def build_llama(folder: Path) -> ir.Model:
    """Build a Llama checkpoint; errors as for every builder (see `decoder.build`)."""
    checkpoint = Checkpoint(folder)
    return decoder.build(read_llama(checkpoint.config), checkpoint)


def read_llama(config: Config) -> Decoder:
    """Read all of a Llama's config.json."""
    spec = dataclasses.replace(
        common(config, "llama"),
        query_key_value_bias=config.get("attention_bias", False),
        output_bias=config.get("attention_bias", False),
        mlp_bias=config.get("mlp_bias", False),
    )
    config.finish()
    return spec


def build_mistral(folder: Path) -> ir.Model:
    """Build a Mistral checkpoint, every layer with the same sliding window, if any."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    spec = common(config, "mistral")
    if config.has("sliding_window"):
        spec = with_windows(spec, [config.size("sliding_window")] * len(spec.layers))
    config.finish()
    return decoder.build(spec, checkpoint)


def build_qwen2(folder: Path) -> ir.Model:
    """Build a Qwen 2 or 2.5 checkpoint."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    spec = dataclasses.replace(common(config, "qwen2"), query_key_value_bias=True)
    spec = with_windows(spec, _qwen_windows(config, len(spec.layers)))
    config.finish()
    return decoder.build(spec, checkpoint)


def build_qwen3(folder: Path) -> ir.Model:
    """Build a Qwen 3 checkpoint (dense)."""
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    bias = config.get("attention_bias", False)
    spec = dataclasses.replace(
        common(config, "qwen3", head_dim=128),
        query_key_norm=True,
        query_key_value_bias=bias,
        output_bias=bias,
    )
    spec = with_windows(spec, _qwen_windows(config, len(spec.layers)))
    config.finish()
    return decoder.build(spec, checkpoint)


def common(
    config: Config,
    name: str,
    *,
    head_dim: int | None = None,
    epsilon: float = 1e-6,
    theta: float = 10_000.0,
) -> Decoder:
    """Read what config.json says in the same words for all of the family.

    Args:
        head_dim: Where it is absent; None for hidden_size / num_attention_heads.
        epsilon: rms_norm_eps where it is absent.
        theta: rope_theta where it is absent.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    if head_dim is None:
        if hidden % heads and not config.has("head_dim"):
            raise BadInput(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}",
                about=config.about,
            )
        head_dim = hidden // heads
    head_dim = config.size("head_dim", head_dim)
    return Decoder(
        name=name,
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("intermediate_size"),
        heads=heads,
        kv_heads=config.size("num_key_value_heads", heads),
        head_dim=head_dim,
        layers=(Layer(read_rope(config, head_dim, theta=theta)),)
        * config.size("num_hidden_layers"),
        activation=config.choose("hidden_act", "silu", ACTIVATIONS),
        norm_epsilon=config.get("rms_norm_eps", epsilon),
        tied=config.get("tie_word_embeddings", False),
    )


def read_rope(config: Config, head_dim: int, *, theta: float = 10_000.0) -> rope.Rope:
    """Read rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    options = config.table("rope_parameters")
    older = config.table("rope_scaling")
    positions = config.size("max_position_embeddings", 2048)
    beside = config.has("original_max_position_embeddings")
    trained = config.size("original_max_position_embeddings") if beside else None
    return rope.read(
        options if options is not None else older,
        head_dim=head_dim,
        theta=config.get("rope_theta", theta),
        positions=positions,
        fraction=config.get("partial_rotary_factor", 1.0),
        trained=trained,
    )


def with_windows(spec: Decoder, windows: list[int | None]) -> Decoder:
    """Give each layer its sliding window."""
    layers = (
        dataclasses.replace(layer, window=window)
        for layer, window in zip(spec.layers, windows, strict=True)
    )
    return dataclasses.replace(spec, layers=tuple(layers))


def layer_types(config: Config, count: int, default: list[str]) -> list[str]:
    """Which layers have ``full_attention`` and which ``sliding_attention``."""
    types = config.sizes("layer_types") or tuple(default)
    known = {"full_attention", "sliding_attention"}
    if len(types) != count or not known.issuperset(types):
        raise BadInput(
            f"layer_types is {list(types)} for {count} layers",
            about=config.about,
            remedy=f"give each layer one of {', '.join(sorted(known))}",
        )
    return list(types)


def _qwen_windows(config: Config, count: int) -> list[int | None]:
    """Sliding windows, if use_sliding_window, from layer max_window_layers on."""
    config.ignore("sliding_window", "max_window_layers")
    used = config.get("use_sliding_window", False)
    first = config.get("max_window_layers", 28) if used else count
    default = ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    window = config.size("sliding_window", 4096) if used else None
    types = layer_types(config, count, default)
    return [window if kind == "sliding_attention" else None for kind in types]
