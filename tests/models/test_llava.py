"""LLaVA against transformers at a random small shape, images and padding in a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trivium
from trivium.compiler import model as models
from trivium.compiler import parts
from trivium.compiler.errors import BadInput

from .conftest import assert_normal_form, run

IMAGE = 7


def checkpoint(folder: Path, **options: Any) -> Any:
    """A random LLaVA of transformers, saved and returned."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=12, patch_size=4,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, **options
    )
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(torch.randn_like(weight) * 0.3 + (weight.ndim == 1))
    theirs.save_pretrained(folder)
    return theirs


def prompts(patches: int) -> dict[str, np.ndarray[Any, Any]]:
    """Two sentences, one with two images in it, one with one and padding."""
    rng = np.random.default_rng(0)
    length = 3 + 2 * patches + 4
    ids = rng.integers(8, 60, (2, length))
    ids[0, 2 : 2 + patches] = IMAGE
    ids[0, 4 + patches : 4 + 2 * patches] = IMAGE
    ids[1, 1 : 1 + patches] = IMAGE
    mask = np.ones_like(ids)
    mask[1, 20:] = 0
    pixels = rng.standard_normal((3, 3, 12, 12)).astype(np.float32)
    return {"pixel_values": pixels, "input_ids": ids, "attention_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patches", "options"),
    [
        (9, {}),
        (
            10,
            {
                "vision_feature_select_strategy": "full",
                "vision_feature_layer": -1,
                "multimodal_projector_bias": False,
            },
        ),
    ],
)
def test_random_llava_equals_transformers(
    patches: int, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = checkpoint(tmp_path, **options)
    import torch

    model = models.load(tmp_path)
    assert_normal_form(model, tmp_path)
    feed = prompts(patches)
    actual = run(model, feed)["logits"]
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(array) for name, array in feed.items()})
    valid = feed["attention_mask"] == 1
    np.testing.assert_allclose(actual[valid], expected.logits.numpy()[valid], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "xla"])
def test_llava_is_three_programs_of_one_artifact(backend: str, tmp_path: Path) -> None:
    theirs = checkpoint(tmp_path / "llava")
    import torch

    feed = prompts(9)
    shape = [f"{name}={size}" for name, size in (("images", 3), ("batch", 2), ("seq", 25))]
    artifact = trivium.compile(
        tmp_path / "llava", "cpu", backend=backend, out=tmp_path / "artifact",
        shape=shape if backend == "xla" else (), calibration=[feed], use_cache=False,
    )  # fmt: skip
    assert [program.name for program in artifact.programs] == ["vision", "projector", "decoder"]
    assert artifact.manifest["verification"]["status"] == "passed"
    assert [info.name for info in artifact.programs[1].inputs] == ["input_ids", "image_features"]
    loaded = trivium.Artifact.open(tmp_path / "artifact").load()
    assert isinstance(loaded, parts.Chain)
    with torch.no_grad():
        expected = theirs(**{name: torch.tensor(array) for name, array in feed.items()})
    valid = feed["attention_mask"] == 1
    actual = loaded.run(feed)["logits"]
    np.testing.assert_allclose(actual[valid], expected.logits.numpy()[valid], atol=1e-4)
    # A second question about the same images: the tower is not run again.
    seen = loaded.parts["vision"].run(feed)
    embedded = loaded.parts["projector"].run({**feed, **seen})
    again = loaded.parts["decoder"].run({**feed, **embedded})
    np.testing.assert_array_equal(again["logits"], actual)


def test_parts_must_be_the_outputs(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    model = models.load(tmp_path)
    parts.declare(model, {"vision": ["image_features"], "decoder": ["logits"]})
    with pytest.raises(BadInput, match=r"trivium\.parts"):
        parts.split(model)
