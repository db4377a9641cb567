"""GPT-2: learned positions, LayerNormalization, packed queries, keys and values
(https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf).
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from trivium.compiler.errors import BadInput
from trivium.models import decoder
from trivium.models.builder import ACTIVATIONS
from trivium.models.checkpoint import Checkpoint, Config
from trivium.models.decoder import Decoder, Layer, Names


def build(folder: Path) -> ir.Model:
    """Build a GPT-2 checkpoint; errors as for every builder (see `decoder.build`)."""
    checkpoint = Checkpoint(folder)
    # The files of the first release lack the prefix that transformers writes.
    root = "transformer." if checkpoint.has("transformer.wte.weight") else ""
    spec = _spec(checkpoint.config, root)
    checkpoint.config.finish()
    return decoder.build(spec, checkpoint)


def _spec(config: Config, root: str) -> Decoder:
    hidden, heads = config.size("n_embd"), config.size("n_head")
    if hidden % heads:
        raise BadInput(f"n_embd {hidden} is not a multiple of n_head {heads}", about=config.about)
    config.ignore(
        "n_ctx", "summary_activation", "summary_first_dropout", "summary_proj_to_labels",
        "summary_type", "summary_use_proj", "reorder_and_upcast_attn",
    )  # fmt: skip
    positions = config.size("n_positions", 1024)
    return Decoder(
        name="gpt2",
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=config.size("n_inner", 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        layers=tuple(Layer(scale=s) for s in _scales(config, hidden // heads)),
        activation=config.choose("activation_function", "gelu_new", ACTIVATIONS),
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        norm="layer",
        linear=False,
        max_positions=positions,
        query_key_value_bias=True,
        output_bias=True,
        mlp_bias=True,
        tied=config.get("tie_word_embeddings", True),
        names=Names(
            embedding=f"{root}wte",
            positions=f"{root}wpe",
            final_norm=f"{root}ln_f",
            layer=f"{root}h",
            attention_norm="ln_1",
            query_key_value="attn.c_attn",
            output="attn.c_proj",
            mlp_norm="ln_2",
            gate=None,
            up="mlp.c_fc",
            down="mlp.c_proj",
        ),
    )


def _scales(config: Config, head_dim: int) -> list[float | None]:
    """The scale on each layer's scores; None for the usual 1 / sqrt(head_dim)."""
    usual = config.get("scale_attn_weights", True)
    by_layer = config.get("scale_attn_by_inverse_layer_idx", False)
    scale = head_dim**-0.5 if usual else 1.0
    count = config.size("n_layer")
    if usual and not by_layer:
        return [None] * count
    return [scale / (index + 1) if by_layer else scale for index in range(count)]
