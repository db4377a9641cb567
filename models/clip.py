"""The vision tower of CLIP, a vision transformer: https://arxiv.org/abs/2103.00020."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.models.builder import ACTIVATIONS, Builder
from trivium.models.checkpoint import Config


@dataclass(frozen=True)
class ClipVisionConfig:
    """The sizes and options of the tower, under their names in config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return (self.image_size // self.patch_size) ** 2


def read(config: Config) -> ClipVisionConfig:
    """Read all of a vision_config.

    Raises:
        BadInput: Its sizes make no tower.
    """
    # Of the projection into the space that CLIP shares with text, which the tower ends before.
    config.ignore("projection_dim", "vocab_size")
    made = ClipVisionConfig(
        hidden_size=config.size("hidden_size", 768),
        intermediate_size=config.size("intermediate_size", 3072),
        num_hidden_layers=config.size("num_hidden_layers", 12),
        num_attention_heads=config.size("num_attention_heads", 12),
        num_channels=config.size("num_channels", 3),
        image_size=config.size("image_size", 224),
        patch_size=config.size("patch_size", 32),
        hidden_act=config.choose("hidden_act", "quick_gelu", ACTIVATIONS),
        layer_norm_eps=config.get("layer_norm_eps", 1e-5),
    )
    config.finish()
    for size, parts in (("image_size", "patch_size"), ("hidden_size", "num_attention_heads")):
        if getattr(made, size) % getattr(made, parts):
            raise BadInput(
                f"{size} {getattr(made, size)} is not a multiple of {parts} {getattr(made, parts)}",
                about=config.about,
            )
    return made


def hidden_state(
    b: Builder, root: str, config: ClipVisionConfig, pixels: ir.Value, layers: int
) -> ir.Value:
    """What leaves the first ``layers`` layers: float [images, 1 + patches, hidden_size].

    Args:
        root: What the names of the tower's tensors begin with.
        pixels: float [images, channels, image_size, image_size], normalized as CLIP's are.
    """
    size = config.hidden_size
    with b.scope("vision.embeddings"):
        patch, name = config.patch_size, f"{root}embeddings"
        kernel = b.weight(f"{name}.patch_embedding.weight", size, config.num_channels, patch, patch)
        grid = b.op("Conv", pixels, kernel, strides=[patch, patch])
        flat = b.op("Reshape", grid, b.constant([0, size, config.patches]))
        patches = b.op("Transpose", flat, perm=[0, 2, 1])
        first = b.weight(f"{name}.class_embedding", size)
        shape = b.op("Concat", b.op("Shape", pixels, end=1), b.constant([1, size]), axis=0)
        x = b.op("Concat", b.op("Expand", first, shape), patches, axis=1)
        places = b.weight(f"{name}.position_embedding.weight", 1 + config.patches, size)
        x = b.op("Add", x, places)
        x = b.layer_norm(x, f"{root}pre_layrnorm", size, config.layer_norm_eps)
    for index in range(layers):
        with b.scope(f"vision.layer.{index}"):
            x = _layer(b, f"{root}encoder.layers.{index}", config, x)
    return x


def _layer(b: Builder, name: str, config: ClipVisionConfig, x: ir.Value) -> ir.Value:
    size, wide, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    y = b.layer_norm(x, f"{name}.layer_norm1", size, config.layer_norm_eps)
    query, key, value = (
        b.linear(y, f"{name}.self_attn.{part}_proj", size, size) for part in ("q", "k", "v")
    )
    mixed = b.op("Attention", query, key, value, q_num_heads=heads, kv_num_heads=heads)
    x = b.op("Add", x, b.linear(mixed, f"{name}.self_attn.out_proj", size, size))
    y = b.layer_norm(x, f"{name}.layer_norm2", size, config.layer_norm_eps)
    y = b.activation(b.linear(y, f"{name}.mlp.fc1", size, wide), config.hidden_act)
    return b.op("Add", x, b.linear(y, f"{name}.mlp.fc2", wide, size))
