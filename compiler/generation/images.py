"""Images as a model wants to see them: read from a file, resized, cropped and normalized."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import files
from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BadInput, ToolchainMissing
from trivium.compiler.generation.compiling import IMAGES
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of CLIP's images: what a preprocessor's configuration leaves out."""


def read(path: Path, artifact: Artifact, pixels: TensorInfo) -> Array:
    """Return an image as float32 [channels, height, width].

    An ``.npy`` file holds just that; any other is decoded by Pillow, its shortest edge resized,
    the middle cut out and the colours normalized, as the checkpoint's preprocessor says.

    Raises:
        BadInput: No image, or one of another size.
        ToolchainMissing: Pillow is not installed.
    """
    import numpy as np

    image: Array
    files.require_file(path)
    wanted = tuple(pixels.shape[1:])
    if path.suffix == ".npy":
        try:
            image = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BadInput("not a readable .npy file", about=str(path)) from error
        if image.shape != wanted or image.dtype.kind != "f":
            raise BadInput(
                f"holds {image.dtype} {list(image.shape)}, the model takes float {list(wanted)}",
                about=str(path),
            )
        return image.astype(np.float32)
    return _normalized(path, _settings(artifact), (int(wanted[1]), int(wanted[2])))


def _settings(artifact: Artifact) -> Mapping[str, Any]:
    path = artifact.path / IMAGES
    if not path.is_file():
        return {}
    table = json.loads(path.read_text(encoding="utf-8"))
    return table if isinstance(table, dict) else {}


def _normalized(path: Path, settings: Mapping[str, Any], size: tuple[int, int]) -> Array:
    import numpy as np

    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise ToolchainMissing(
            "Pillow is not installed",
            about=str(path),
            remedy="pip install 'trivium[vision]', or give .npy",
        ) from error
    height, width = size
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise BadInput("not a readable image", about=str(path)) from error
    asked = settings.get("size", {})
    shortest = asked.get("shortest_edge") if isinstance(asked, dict) else asked
    shortest = shortest or min(size)
    short, long = min(image.size), max(image.size)
    longest = int(shortest * long / short)
    resized = (shortest, longest) if image.size[0] <= image.size[1] else (longest, shortest)
    image = image.resize(resized, resample=settings.get("resample", Image.Resampling.BICUBIC))
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    values = np.asarray(image, np.float32) * np.float32(settings.get("rescale_factor", 1 / 255))
    mean = np.array(settings.get("image_mean", _MEAN), np.float32)
    std = np.array(settings.get("image_std", _STD), np.float32)
    return np.ascontiguousarray(((values - mean) / std).transpose(2, 0, 1))
