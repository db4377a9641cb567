"""What a manifest has to hold before anything is done with the artifact that it describes.

A manifest is a file that anyone can edit. The verbs and the backends take its keys and types as
given, so they are checked here, once, when an artifact is opened; and every file that it names has
to be one of the artifact's own, under the checksums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, get_args

from trivium.compiler.generator import Form

Problem = str | None
"""What is wrong, as a clause, or None."""


def problem(manifest: Any) -> Problem:
    """Return the first thing that is wrong with a manifest, or None."""
    if not isinstance(manifest, Mapping):
        return "it is not an object"
    for key, holds in _KEYS.items():
        if key not in manifest:
            return f"it has no {key!r}"
        if not holds(manifest[key]):
            return f"its {key!r} is {_shown(manifest[key])}"
    named = [program["file"] for program in manifest["programs"]]
    named += [manifest["weights"]] if manifest["weights"] is not None else []
    for part in manifest["parts"]:
        own = [program["file"] for program in part["programs"]]
        own += [part["weights"]] if part["weights"] is not None else []
        named += [f"{part['name']}/{file}" for file in own]
    if (generator := manifest["generator"]) is not None:
        named += [generator[key] for key in ("tokenizer", "chat_template") if generator[key]]
    outside = [name for name in named if name not in manifest["files"]]
    return f"{outside[0]!r} is none of its files" if outside else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


Check = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _some_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _table(value: Any) -> bool:
    return isinstance(value, dict)


def _either(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _holding(**keys: Check) -> Check:
    """A table that has at least these keys."""
    return lambda value: (
        isinstance(value, dict) and all(k in value and check(value[k]) for k, check in keys.items())
    )


def _list_of(check: Check, *, least: int = 0) -> Check:
    return lambda value: (
        isinstance(value, list) and len(value) >= least and all(check(item) for item in value)
    )


def _table_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(check(item) for item in value.values())


def _dim(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and value >= 0)


def _dtype(value: Any) -> bool:
    """A dtype that arrays can have here; ``unknown`` is what a sequence or an optional says."""
    from trivium.compiler.samples import numpy_dtype

    if not isinstance(value, str):
        return False
    try:
        return value == "unknown" or numpy_dtype(value) is not None
    except TypeError:
        return False


def _files(value: Any) -> bool:
    """Checksums by relative path, none of which leads out of the folder."""
    return _table_of(_some_text)(value) and all(
        name and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        for name in value
    )


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _generator(value: Any) -> bool:
    """What `Generator.from_json` takes: these keys, and no others."""
    from dataclasses import fields

    from trivium.compiler.generator import Generator

    if not _GENERATOR(value) or not set(value) <= {f.name for f in fields(Generator)}:
        return False
    ragged = value["form"] == "ragged"
    told = all(_some_text(value.get(key)) for key in ("mask", "counts"))
    return told if ragged else value.get("counts") is None


_GENERATOR = _holding(
    form=lambda value: value in get_args(Form),
    kept=lambda value: value in ("all", "last"),
    vocabulary=_count,
    context=_count,
    caches=_list_of(
        _holding(
            past=_some_text,
            present=_some_text,
            dtype=_dtype,
            shape=_list_of(_dim, least=4),
            batch_axis=_count,
            length_axis=_count,
        ),
        least=1,
    ),
    programs=_list_of(_holding(program=_some_text, tokens=_either(_count), logits=_count), least=1),
    eos=_list_of(_count),
    bos=_either(_count),
    rows=_either(_count),
    source=_either(
        _holding(
            ids=_some_text,
            mask=_some_text,
            target=_some_text,
            start=_count,
            memory=_list_of(_some_text),
        )
    ),
    sight=_either(_holding(pixels=_some_text, ids=_some_text, token=_count, count=_count)),
    **dict.fromkeys(("tokens", "logits"), _some_text),
    **dict.fromkeys(
        ("mask", "positions", "start", "chosen", "tokenizer", "chat_template"), _either(_some_text)
    ),
)

_TENSORS = _list_of(_holding(name=_text, dtype=_dtype, shape=_list_of(_dim)))

_PROGRAMS = _list_of(
    _holding(name=_text, file=_some_text, inputs=_TENSORS, outputs=_TENSORS), least=1
)

_PART = _holding(
    name=lambda value: isinstance(value, str) and value.isidentifier(),
    programs=_PROGRAMS,
    weights=_either(_some_text),
    details=_table,
    inputs=_TENSORS,
    outputs=_TENSORS,
    generator=_either(_generator),
)

_KEYS: Mapping[str, Check] = {
    "model": _holding(name=_text, sha256=_text),
    "target": _some_text,
    "backend": _some_text,
    "recipe": _holding(name=_text, preserves=_text),
    "toolchain": _table_of(_text),
    "inputs": _TENSORS,
    "outputs": _TENSORS,
    "programs": _PROGRAMS,
    "weights": _either(_some_text),
    "memory": _table,
    "details": _table,
    "estimate": _either(_table),
    "parts": _list_of(_PART),
    "generator": _either(_generator),
    "notes": _list_of(_text),
    "verification": _holding(status=_text, compared=_either(_table)),
    "files": _files,
}
