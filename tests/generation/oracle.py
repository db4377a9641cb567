"""The source model, which a generator is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


class Oracle:
    """Logits of a whole sequence, by the model without caches."""

    def __init__(self, path: Path) -> None:
        self._session = ort.InferenceSession(path)

    def __call__(self, tokens: list[int]) -> np.ndarray[Any, Any]:
        feed = {"input_ids": np.array([tokens]), "attention_mask": np.ones((1, len(tokens)), int)}
        logits: np.ndarray[Any, Any] = self._session.run(["logits"], feed)[0][0]
        return logits
