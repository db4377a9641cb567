"""Decoders against transformers, at small random shapes: every architecture, every rope scaling,
padding on either side, half precision and shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trivium.compiler import model as models
from trivium.compiler.errors import BadInput, Unsupported
from trivium.models import BUILDERS

from .conftest import assert_normal_form, run, write_safetensors

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
ROPE = {"rope_theta": 10000.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
LONGROPE = {
    "original_max_position_embeddings": 32,
    "partial_rotary_factor": 0.5,
    "rope_parameters": ROPE | {
        "rope_type": "longrope", "partial_rotary_factor": 0.5, "short_factor": [1.0, 1.5],
        "long_factor": [3.0, 5.0]},
}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-biases-tied": (
        "Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-wide-heads": ("Llama", {"head_dim": 20, "num_key_value_heads": 1}),
    "llama-linear": ("Llama", {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 4.0}}),
    "llama-dynamic": ("Llama", {"rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0}}),
    "llama-yarn": (
        "Llama",
        {"rope_parameters": ROPE | {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "llama-yarn-mscale": (
        "Llama",
        {"rope_parameters": ROPE | {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            "mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 4, "beta_slow": 0.5,
            "truncate": False}},
    ),
    "llama-3.1": (
        "Llama",
        {"head_dim": 32, "rope_parameters": {"rope_theta": 500.0} | {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32}},
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral-no-window": ("Mistral", {"sliding_window": None, "hidden_act": "gelu"}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-windows": ("Qwen2", WINDOWS),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 12}),
    "gemma2-uncapped": (
        "Gemma2",
        {"head_dim": 8, "attn_logit_softcapping": None, "final_logit_softcapping": None,
         "tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma2-capped-hard": (
        "Gemma2",
        {"head_dim": 8, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3": (
        "Gemma3",
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention",
         "full_attention"], "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    ),
    "phi3": ("Phi3", {"sliding_window": 6, "pad_token_id": 0}),
    "phi3-longrope-short": ("Phi3", {"pad_token_id": 0, **LONGROPE}),
    "phi3-longrope-long": (
        "Phi3", {"pad_token_id": 0, **LONGROPE, "original_max_position_embeddings": 8},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen3-windows-biases": ("Qwen3", {"head_dim": 8, "attention_bias": True, **WINDOWS}),
}  # fmt: skip

GPT2 = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
GPT2_CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-untied": {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu"},
    "gpt2-scales": {"scale_attn_by_inverse_layer_idx": True},
    "gpt2-unscaled": {"scale_attn_weights": False},
}


def make(
    kind: str, options: dict[str, Any], folder: Path, *, sdpa: bool = False, **save: Any
) -> Any:
    """Save a random checkpoint of an architecture and return transformers' model of it."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config_class = f"{kind}TextConfig" if kind == "Gemma3" else f"{kind}Config"
    config = getattr(transformers, config_class)(
        **options, attn_implementation="sdpa" if sdpa else "eager"
    )
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in model.named_parameters():
        # transformers starts biases at 0 and norms at 1, which would hide a wrong one.
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        centre = 1.0 if parameter.ndim == 1 and parameter_name.endswith("weight") else 0.0
        parameter.data = noise + centre
    model.save_pretrained(folder, **save)
    return model


def batches(vocab: int) -> dict[str, np.ndarray[Any, Any]]:
    """Two sequences of 13 tokens: the first padded on the left, the second on the right."""
    ids = np.random.default_rng(0).integers(0, vocab, (3, 13))
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    mask[1, 10:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def expected(model: Any, feed: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    import torch

    mask = torch.tensor(feed["attention_mask"])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(feed["input_ids"]), attention_mask=mask, position_ids=positions
        ).logits
    array: np.ndarray[Any, Any] = logits.float().numpy()
    return array


def assert_same(folder: Path, theirs: Any) -> None:
    """Compare logits and greedy tokens at every position that is not padding."""
    feed = batches(61)
    model = models.load(folder)
    assert_normal_form(model, folder)
    valid = feed["attention_mask"] == 1
    want = expected(theirs, feed)[valid]
    have = run(model, feed)["logits"][valid]
    np.testing.assert_allclose(have, want, atol=1e-4)
    np.testing.assert_array_equal(have.argmax(-1), want.argmax(-1))
    assert np.ptp(want) > 1  # logits that say something


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str, tmp_path: Path) -> None:
    kind, options = CASES[case]
    assert_same(tmp_path, make(kind, SMALL | options, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("case", GPT2_CASES)
def test_gpt2_equals_transformers(case: str, tmp_path: Path) -> None:
    assert_same(tmp_path, make("GPT2", GPT2 | GPT2_CASES[case], tmp_path))


@pytest.mark.slow
def test_shards_equal_transformers(tmp_path: Path) -> None:
    theirs = make("Llama", SMALL, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(tmp_path, theirs)


@pytest.mark.slow
def test_options_as_older_versions_wrote_them(tmp_path: Path) -> None:
    """rope_theta and rope_scaling instead of rope_parameters; ``type`` for ``rope_type``."""
    options = ROPE | {"rope_type": "linear", "factor": 4.0}
    theirs = make("Llama", SMALL | {"rope_parameters": options}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    older = {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config | older | {"torch_dtype": "float32"}))
    assert_same(tmp_path, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoint_computes_in_float32(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    make("Llama", SMALL, tmp_path).to(getattr(torch, dtype)).save_pretrained(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert_same(tmp_path, theirs.eval())


LLAMA = {"model_type": "llama", **SMALL, "num_hidden_layers": 1}


def write_llama(folder: Path, change: dict[str, Any]) -> None:
    """A made-up Llama checkpoint whose config is then changed."""
    rng = np.random.default_rng(0)
    shapes = {
        "model.embed_tokens": (61, 32), "model.norm": (32,), "lm_head": (61, 32),
        "model.layers.0.input_layernorm": (32,), "model.layers.0.self_attn.q_proj": (32, 32),
        "model.layers.0.self_attn.k_proj": (16, 32), "model.layers.0.self_attn.v_proj": (16, 32),
        "model.layers.0.self_attn.o_proj": (32, 32), "model.layers.0.mlp.gate_proj": (48, 32),
        "model.layers.0.post_attention_layernorm": (32,), "model.layers.0.mlp.up_proj": (48, 32),
        "model.layers.0.mlp.down_proj": (32, 48),
    }  # fmt: skip
    tensors = {f"{n}.weight": rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(LLAMA | change))


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"some_new_trick": True}, Unsupported, "some_new_trick"),
        ({"quantization_config": {"quant_method": "gptq"}}, Unsupported, "quantization_config"),
        ({"hidden_act": "xielu"}, Unsupported, "hidden_act is 'xielu'"),
        ({"rope_scaling": {"rope_type": "spiral"}}, Unsupported, "rope_type is 'spiral'"),
        ({"rope_scaling": {"type": "linear", "twist": 2}}, BadInput, "lacks factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2, "twist": 2}},
            Unsupported,
            "rope_scaling: sets twist",
        ),
        (
            {"rope_scaling": {"type": "su", "long_factor": [1] * 4, "short_factor": [1, 2]}},
            BadInput,
            "short_factor is not a list of 4",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8,
                    "low_freq_factor": 4,
                    "high_freq_factor": 1,
                }
            },
            BadInput,
            "low_freq_factor 4.0",
        ),
        ({"rope_theta": 0.5}, BadInput, "theta 0.5"),
        ({"rope_scaling": [1]}, BadInput, "give a table"),
        ({"num_key_value_heads": 3}, BadInput, "cannot share 3"),
        ({"num_hidden_layers": 0}, BadInput, "num_hidden_layers is 0"),
        ({"hidden_size": None}, BadInput, "lacks hidden_size"),
        ({"hidden_size": 33}, BadInput, "not a multiple"),
        ({"vocab_size": 60}, BadInput, r"embed_tokens.weight'.* \[61, 32\]"),
        ({"num_hidden_layers": 2}, BadInput, "layers.1.*not in the checkpoint"),
        ({"model_type": "llama5"}, Unsupported, "no builder for the architecture 'llama5'"),
    ],
)
def test_config_that_does_not_fit_is_one_line(
    change: dict[str, Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    write_llama(tmp_path, change)
    with pytest.raises(kind, match=message) as caught:
        models.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_harmless_options_are_ignored(tmp_path: Path) -> None:
    change = {"attention_dropout": 0.1, "_name_or_path": "x", "some_new_trick": False, "note": ""}
    write_llama(tmp_path, change)
    logits = run(models.load(tmp_path), batches(61))["logits"]
    assert np.isfinite(logits).all()


def test_every_builder_is_importable() -> None:
    import importlib

    for reference in BUILDERS.values():
        module, _, attribute = reference.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))
