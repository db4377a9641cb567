"""Timings taken elsewhere, such as on a machine with the GPU: a file that ``compare`` shows as
measured.

A file holds ``{"schema": 1, "rows": [...]}``; a row says what was timed (``model`` {name, sha256},
``target``, ``backend``, ``recipe``, ``workload`` {dims, shapes}) and what came of it
(``latency_s``, ``ci_s``, ``calls``, ``where``, ``device``, ``date``, ``peers``). It is shown only
beside a prediction for the very same model, target, backend, recipe and sizes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.compiler import files
from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BadInput
from trivium.compiler.rows import workload_json
from trivium.compiler.types import Candidate, Workload

SCHEMA = 1
_REMEDY = "write it with: python -m benchmarks.gpu FOLDER -o FILE.json"

FIGURES = ("latency_s", "ci_s", "calls", "where", "device", "date", "peers")
"""What of a row becomes the ``measured`` of a candidate."""


@dataclass(frozen=True)
class Measurements:
    """The rows of one file."""

    rows: tuple[Mapping[str, Any], ...]

    def of(self, candidate: Candidate, sha256: str, workload: Workload) -> dict[str, Any] | None:
        """What was measured of a candidate, the last row of several; None if nothing was."""
        wanted = _identity(
            sha256,
            candidate.target.name,
            candidate.backend,
            candidate.recipe,
            workload_json(workload),
        )
        found = [row for row in self.rows if _identity_of(row) == wanted]
        return {key: found[-1].get(key) for key in FIGURES} if found else None


def read(path: str | os.PathLike[str]) -> Measurements:
    """Read a file of measurements.

    Raises:
        BadInput: It is none, or a row of it lacks something.
    """
    path = Path(path)
    files.require_file(path, remedy=_REMEDY)
    document = files.read_json(path, remedy=_REMEDY)
    problem = _problem(document)
    if problem:
        raise BadInput(problem, about=str(path), remedy=_REMEDY)
    return Measurements(tuple(document["rows"]))


def described(artifact: Artifact) -> dict[str, Any]:
    """What a row says of the artifact that it is about."""
    manifest = artifact.manifest
    workload = manifest["workload"]
    return {
        "model": manifest["model"],
        "target": manifest["target"],
        "backend": manifest["backend"],
        "recipe": manifest["recipe"]["name"],
        "workload": {"dims": workload["dims"], "shapes": workload["shapes"]},
    }


def _identity_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    model, sizes = row["model"], row["workload"]
    return _identity(model["sha256"], row["target"], row["backend"], row["recipe"], sizes)


def _identity(
    sha256: str, target: str, backend: str, recipe: str, sizes: Mapping[str, Any]
) -> tuple[Any, ...]:
    return sha256, target, backend, recipe, sizes["dims"], sizes["shapes"]


_HOLDS: Mapping[str, Callable[[Any], bool]] = {
    "model": lambda v: isinstance(v, dict) and isinstance(v.get("sha256"), str),
    "target": lambda v: isinstance(v, str),
    "backend": lambda v: isinstance(v, str),
    "recipe": lambda v: isinstance(v, str),
    "workload": lambda v: isinstance(v, dict) and {"dims", "shapes"} <= v.keys(),
    "latency_s": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0,
    "where": lambda v: isinstance(v, str),
}


def _problem(document: Any) -> str:
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        return "not a file of measurements: it has no list of rows"
    if document.get("schema") != SCHEMA:
        return f"its schema is {document.get('schema')!r}, this Trivium reads {SCHEMA}"
    for index, row in enumerate(document["rows"]):
        for key, holds in _HOLDS.items():
            if not isinstance(row, dict) or not holds(row.get(key)):
                return f"row {index} has no sound {key!r}"
        interval = row.get("ci_s")
        if interval is not None and not (isinstance(interval, list) and len(interval) == 2):
            return f"row {index} has no sound 'ci_s'"
    return ""
