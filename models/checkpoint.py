"""A checkpoint folder as a builder sees it: the options of its config.json and its tensors.

Both are read with what the builder expects of them, so that a checkpoint that does not fit fails
here, in one line that names the key or the tensor, and not later in an engine. An option that no
one asked for may change what the model computes: `Config.finish` refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir

from trivium.compiler import files
from trivium.compiler.errors import BadInput, Unsupported
from trivium.models import safetensors

T = TypeVar("T", int, float, str, bool)

HARMLESS = frozenset(
    {
        "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward", "cls_token_id",
        "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task",
        "forced_bos_token_id", "forced_eos_token_id", "gradient_checkpointing", "id2label",
        "initializer_factor", "initializer_range", "is_encoder_decoder",
        "keys_to_ignore_at_inference", "label2id", "length_penalty", "mask_token_id",
        "max_length", "min_length", "model_type", "name_or_path", "num_beams", "num_labels",
        "output_attentions", "output_hidden_states", "output_router_logits", "output_scores",
        "pad_token_id", "prefix", "pretraining_tp", "problem_type", "repetition_penalty",
        "return_dict", "return_dict_in_generate", "router_aux_loss_coef", "router_jitter_noise",
        "sep_token_id", "task_specific_params", "temperature", "tf_legacy_loss",
        "tokenizer_class", "top_k", "top_p", "torch_dtype", "torchscript", "transformers_version",
        "unk_token_id", "use_bfloat16", "use_cache",
    }
)  # fmt: skip
"""Keys that say how to train, generate or label, not what the forward pass computes. Dropout is
recognized by name: it is the identity at inference."""


class Config:
    """The options of a config.json, each read with its type and default.

    Keys are remembered as they are read; `finish` refuses those that nobody read.
    """

    def __init__(self, values: Mapping[str, Any], about: str) -> None:
        self.values = values
        self.about = about
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is set to something."""
        return self.values.get(key) is not None

    def get(self, key: str, default: T) -> T:
        """Return an option; ``null`` counts as absent.

        Raises:
            BadInput: It has another type than its default.
        """
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            return default
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise BadInput(
                f"{key} is {value!r}", about=self.about, remedy=f"give {_kind(type(default))}"
            )
        return value

    def need(self, key: str, kind: type[T]) -> T:
        """Return an option that has no default.

        Raises:
            BadInput: It is absent or not of ``kind``.
        """
        if not self.has(key):
            raise BadInput(f"lacks {key}", about=self.about, remedy=f"give {_kind(kind)}")
        return self.get(key, kind(1))

    def optional(self, key: str, default: float | None) -> float | None:
        """Return a number that ``null`` turns off; ``default`` is for an absent key only."""
        if self.has(key):
            return self.need(key, float)
        return None if key in self.values else default

    def size(self, key: str, default: int | None = None) -> int:
        """Return an option that counts something: at least 1.

        Raises:
            BadInput: It is absent without a default, or below 1.
        """
        value = self.need(key, int) if default is None else self.get(key, default)
        if value < 1:
            raise BadInput(f"{key} is {value}", about=self.about, remedy="give at least 1")
        return value

    def table(self, key: str) -> Config | None:
        """Return a nested table of options, or None if it is absent."""
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise BadInput(f"{key} is {value!r}", about=self.about, remedy="give a table")
        return Config(value, f"{self.about}: {key}")

    def sizes(self, key: str) -> tuple[Any, ...] | None:
        """Return a list, or None if it is absent."""
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise BadInput(f"{key} is {value!r}", about=self.about, remedy="give a list")
        return tuple(value)

    def choose(self, key: str, default: str, known: Iterable[str]) -> str:
        """Return an option that names one of several ways to compute.

        Raises:
            Unsupported: It names another one.
        """
        value, choices = self.get(key, default), sorted(known)
        if value not in choices:
            raise Unsupported(
                f"{key} is {value!r}", about=self.about, remedy=f"known: {', '.join(choices)}"
            )
        return value

    def ignore(self, *keys: str) -> None:
        """Declare keys as read that change nothing for this architecture."""
        self._read.update(keys)

    def finish(self) -> None:
        """Raise ``Unsupported`` if a key is set that nobody read and that may change the numbers.

        A key that is null, false or empty is off, whatever it means.
        """
        for key, value in self.values.items():
            harmless = key in HARMLESS or key.startswith("_") or "drop" in key
            if key in self._read or harmless or value in (None, False) or value in ([], {}, ""):
                continue
            raise Unsupported(
                f"sets {key} to {value!r}, which the builder does not know",
                about=self.about,
                remedy="take the key out if it does not change what the model computes",
            )


def _kind(kind: type) -> str:
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind]


class Checkpoint:
    """A folder with config.json and safetensors.

    Raises:
        BadInput: One of them is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = Config(read_json(folder / "config.json"), str(folder / "config.json"))
        self.entries = safetensors.read_folder(folder)

    def has(self, name: str) -> bool:
        return name in self.entries

    def tensor(
        self, name: str, shape: tuple[int, ...], *, transpose: bool = False
    ) -> ir.TensorProtocol:
        """Map a float tensor as float32, unread; ``shape`` is that of the result.

        Raises:
            BadInput: It is missing, not a float tensor, or of another shape.
        """
        about = f"{self.folder}: tensor {name!r}"
        entry = self.entries.get(name)
        if entry is None:
            raise BadInput(
                "is not in the checkpoint", about=about, remedy="check model_type in config.json"
            )
        if entry.dtype not in ("F64", "F32", "F16", "BF16"):
            raise BadInput(
                f"is {entry.dtype}, not a float32, float16 or bfloat16 weight",
                about=about,
                remedy="save the checkpoint unquantized",
            )
        expected = shape[::-1] if transpose else shape
        if entry.shape != expected:
            raise BadInput(
                f"has shape {list(entry.shape)} where config.json implies {list(expected)}",
                about=about,
            )
        return safetensors.as_float32(entry, name, transpose=transpose)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        BadInput: The file is unreadable or holds something else.
    """
    document = files.read_json(path)
    if not isinstance(document, dict):
        raise BadInput("not a JSON object", about=str(path))
    return document
