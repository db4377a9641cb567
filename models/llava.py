"""LLaVA 1.5, a language model that sees: https://arxiv.org/abs/2310.03744.

A vision tower (CLIP) makes features of each image's patches, a projector of two layers turns them
into embeddings, and those take the places of the image tokens in a Llama's prompt.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx_ir as ir

from trivium.compiler import parts
from trivium.compiler.errors import BadInput, Unsupported
from trivium.compiler.generator import Sight
from trivium.models import clip, decoder
from trivium.models.builder import ACTIVATIONS, Builder
from trivium.models.checkpoint import Checkpoint, Config
from trivium.models.decoder import Names
from trivium.models.llama import read_llama

_LLAMA_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "vocab_size": 32000,
}  # fmt: skip
"""What a text_config leaves out where it is as in transformers' LlamaConfig."""


@dataclasses.dataclass(frozen=True)
class Vision:
    """How images become embeddings.

    Attributes:
        layers: How many layers of the tower are used (all but the last, as a rule).
        drop_first: Whether the class token is left out.
    """

    tower: clip.ClipVisionConfig
    layers: int
    drop_first: bool
    activation: str
    bias: bool

    @property
    def seen(self) -> int:
        """How many features the language model gets of an image."""
        return self.tower.patches + (not self.drop_first)


def build(folder: Path) -> ir.Model:
    """Build a LLaVA checkpoint.

    Inputs: pixel_values, float [images, 3, height, width]; input_ids and attention_mask, int64
    [batch, seq], with as many image tokens as the images have patches together. Outputs, each by
    a part of its own: image_features [images, patches, width of the tower], by ``vision``;
    inputs_embeds [batch, seq, hidden], the prompt with the images in their places, by
    ``projector``; logits [batch, seq, vocab], by ``decoder``.

    Raises:
        BadInput: Config and tensors do not make a LLaVA.
        Unsupported: An option, or a tower or language model that is not known.
    """
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    token = config.size("image_token_index", 32000)
    text = _part(config, "text_config", "llama", _LLAMA_7B)
    spec = dataclasses.replace(
        read_llama(text),
        name="llava",
        image_token=token,
        names=_names(checkpoint),
        tied=config.get("tie_word_embeddings", False),
    )
    vision = _vision(config)
    # How many tokens a processor puts for an image; what the text of a prompt looks like.
    config.ignore("image_seq_length", "image_grid_pinpoints", "vocab_size")
    config.finish()

    b = Builder("llava", checkpoint)
    size = vision.tower.image_size
    shape = ("images", vision.tower.num_channels, size, size)
    pixels = b.input("pixel_values", ir.DataType.FLOAT, shape)
    patches = _look(b, vision, pixels)
    b.output("image_features", patches, ("images", vision.seen, vision.tower.hidden_size))
    rows = _project(b, vision, patches, spec.hidden_size)
    model = decoder.build_onto(b, spec, rows)
    parts.declare(
        model,
        {"vision": ["image_features"], "projector": ["inputs_embeds"], "decoder": ["logits"]},
    )
    parts.declare_sight(model, Sight("pixel_values", "input_ids", token, vision.seen))
    return model


def _part(config: Config, key: str, known: str, defaults: dict[str, Any]) -> Config:
    """The nested table of a part, which has to be the one architecture that is known for it."""
    table = config.table(key)
    if table is None:
        raise BadInput(f"lacks {key}", about=config.about)
    table.choose("model_type", known, (known,))
    return Config({**defaults, **table.values}, table.about)


def _vision(config: Config) -> Vision:
    tower = clip.read(_part(config, "vision_config", "clip_vision_model", {}))
    layer = config.get("vision_feature_layer", -2)
    layers = layer if layer >= 0 else tower.num_hidden_layers + 1 + layer
    if not 0 <= layers <= tower.num_hidden_layers:
        raise Unsupported(
            f"vision_feature_layer is {layer} of {tower.num_hidden_layers} layers",
            about=config.about,
        )
    strategy = config.choose("vision_feature_select_strategy", "default", ("default", "full"))
    return Vision(
        tower,
        layers,
        strategy == "default",
        config.choose("projector_hidden_act", "gelu", ACTIVATIONS),
        config.get("multimodal_projector_bias", True),
    )


def _names(checkpoint: Checkpoint) -> Names:
    """The tensors of the language model, as transformers 4 and 5 save them."""
    root = "language_model."
    if not checkpoint.has(f"{root}model.norm.weight"):
        raise BadInput(
            f"has no tensor {root}model.norm.weight",
            about=str(checkpoint.folder),
            remedy="save it with transformers' save_pretrained",
        )
    return Names(
        embedding=f"{root}model.embed_tokens",
        final_norm=f"{root}model.norm",
        head=f"{root}lm_head",
        layer=f"{root}model.layers",
    )


def _look(b: Builder, vision: Vision, pixels: ir.Value) -> ir.Value:
    """The tower: float [images, patches, tower's hidden_size]."""
    root = "vision_tower."
    if b.checkpoint.has(f"{root}vision_model.embeddings.class_embedding"):
        root = f"{root}vision_model."
    x = clip.hidden_state(b, root, vision.tower, pixels, vision.layers)
    if not vision.drop_first:
        return x
    with b.scope("vision"):
        end = b.constant([vision.tower.patches + 1])
        return b.op("Slice", x, b.constant([1]), end, b.constant([1]))


def _project(b: Builder, vision: Vision, x: ir.Value, size: int) -> ir.Value:
    """The projector: float [images, patches, hidden_size of the language model]."""
    name, bias = "multi_modal_projector", vision.bias
    with b.scope("projector"):
        x = b.linear(x, f"{name}.linear_1", vision.tower.hidden_size, size, bias=bias)
        x = b.activation(x, vision.activation)
        return b.linear(x, f"{name}.linear_2", size, size, bias=bias)
