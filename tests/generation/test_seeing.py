"""A decoder that sees generates from a cache, with images in its prompts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trivium
from tests.models.test_llava import IMAGE, checkpoint, prompts
from trivium.compiler.cli import main
from trivium.compiler.errors import BadInput
from trivium.compiler.generation import images
from trivium.compiler.generation.sampling import Settings

pytestmark = pytest.mark.slow

PATCHES = 9


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("llava")
    return checkpoint(folder), folder


def expected(theirs: Any, feed: dict[str, Any], count: int) -> list[list[int]]:
    """The greedy tokens of transformers, each row of the feed by itself."""
    import torch

    rows, first = [], 0
    for ids, mask in zip(feed["input_ids"], feed["attention_mask"], strict=True):
        own = ids[mask != 0]
        shown = int((own == IMAGE).sum()) // PATCHES
        pixels = feed["pixel_values"][first : first + shown]
        first += shown
        seen = {"pixel_values": torch.tensor(pixels)} if shown else {}
        tokens = own.tolist()
        for _ in range(count):
            with torch.no_grad():
                logits = theirs(input_ids=torch.tensor([tokens]), **seen).logits
            tokens.append(int(logits[0, -1].argmax()))
        rows.append(tokens[len(own) :])
    return rows


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_greedy_tokens_are_those_of_transformers(
    backend: str, llava: tuple[Any, Path], tmp_path: Path
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    theirs, folder = llava
    feed = prompts(PATCHES)
    artifact = trivium.compile(
        folder, "cpu", backend=backend, out=tmp_path / "out", use_cache=False, calibration=[feed]
    )
    verification = artifact.manifest["verification"]
    assert verification["status"] == "passed"
    assert verification["max_rel_error"] < 1e-4
    assert artifact.generator is not None
    assert artifact.generator.sight is not None
    generator = trivium.TextGenerator(artifact, rows=3)
    pixels = feed["pixel_values"]
    shown = [
        generator.see([int(t) for t in feed["input_ids"][0]], list(pixels[:2])),
        generator.see([int(t) for t in feed["input_ids"][1][:20]], [pixels[2]]),
    ]
    text = [9, 10, 11, 12, 13]
    found = generator.complete([*shown, text], Settings(max_new_tokens=12))
    feeds = [feed, {"input_ids": np.array([text]), "attention_mask": np.ones((1, 5), np.int64)}]
    feeds[1]["pixel_values"] = pixels[:0]
    wanted = [row for one in feeds for row in expected(theirs, one, 12)]
    assert [list(one.tokens) for one in found] == wanted


def test_a_place_is_one_token_or_as_many_as_an_image_has(
    llava: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = llava
    out = tmp_path / "out"
    generator = trivium.TextGenerator(trivium.compile(folder, "cpu", out=out))
    image = np.random.default_rng(1).standard_normal((3, 12, 12)).astype(np.float32)
    short = generator.see([9, IMAGE, 10], [image])
    assert generator.see([9, *[IMAGE] * PATCHES, 10], [image]) == short
    assert len(short) == 2 + PATCHES
    with pytest.raises(BadInput, match="the prompt: has 1 places for 2 images"):
        generator.see([9, IMAGE, 10], [image, image])
    settings = Settings(max_new_tokens=5)
    tokens = list(generator.complete([short], settings)[0].tokens)
    np.save(tmp_path / "image.npy", image)
    ids = f"9,{IMAGE},10"
    asked = ["generate", str(out), "--prompt-ids", ids, "--image", str(tmp_path / "image.npy")]
    assert main([*asked, "--max-new-tokens", "5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["tokens"] == tokens


def test_images_are_for_those_that_see(shakespeare: trivium.Artifact) -> None:
    with pytest.raises(BadInput, match="it sees no images"):
        trivium.TextGenerator(shakespeare).see([1], [np.zeros((3, 2, 2), np.float32)])


def test_files_are_prepared_as_transformers_does_and_generate(
    llava: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    transformers = pytest.importorskip("transformers")
    _, folder = llava
    source = tmp_path / "llava"
    shutil.copytree(folder, source)
    processor = (
        transformers.CLIPImageProcessorPil
        if hasattr(transformers, "CLIPImageProcessorPil")
        else transformers.CLIPImageProcessor
    )
    theirs = processor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    theirs.save_pretrained(source)
    out = tmp_path / "out"
    artifact = trivium.compile(source, "cpu", out=out)
    smooth = np.add.outer(np.arange(40) * 3, np.arange(31) * 4)[..., None] + np.array([0, 20, 40])
    cat = pillow.fromarray((smooth % 256).astype(np.uint8))
    cat.save(tmp_path / "cat.png")
    pixels = next(info for info in artifact.inputs if len(info.shape) == 4)
    read = images.read(tmp_path / "cat.png", artifact, pixels)
    wanted = np.asarray(theirs(cat, return_tensors="np")["pixel_values"])[0]
    np.testing.assert_allclose(read, wanted, atol=1e-5)
    np.save(tmp_path / "cat.npy", read)
    found = []
    for name in ("cat.png", "cat.npy"):
        asked = ["generate", str(out), "--prompt-ids", f"9,{IMAGE},10", "--max-new-tokens", "5"]
        assert main([*asked, "--image", str(tmp_path / name), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out)["outputs"][0]["tokens"])
    assert found[0] == found[1]
    (tmp_path / "bad.png").write_bytes(b"no image")
    asked = ["generate", str(out), "--prompt-ids", f"9,{IMAGE},10"]
    assert main([*asked, "--image", str(tmp_path / "bad.png")]) == 2
    assert "bad.png: not a readable image" in capsys.readouterr().err
