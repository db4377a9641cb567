"""What a compile is asked for, resolved: the model loaded and bound, the target and backend found,
the data read, and the key that an equal compile would have.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trivium.compiler import cache, reference, samples, shapes
from trivium.compiler import model as models
from trivium.compiler import recipe as recipes
from trivium.compiler import targets as target_names
from trivium.compiler.errors import BackendFailed, BadInput
from trivium.compiler.feeds import read as read_feeds
from trivium.compiler.options import values_of
from trivium.compiler.prepare import Progress, choose_backend, silent
from trivium.compiler.recipe import Context, Recipe
from trivium.compiler.types import Target, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

    from trivium.compiler.backend import Backend, Tensors


@dataclass(frozen=True)
class Generating:
    """What is asked of a compile of a decoder.

    Attributes:
        wanted: Whether to make a generator of it; None: of a checkpoint folder that holds a
            decoder, and of a graph that has caches.
        context: How many tokens a sequence may have; None: as many as the model has positions.
        prefill: How many new tokens the prefill programs take, for engines that need it fixed.
        guesses: How many guessed tokens a program of its own checks in a call, for those engines;
            0: none.
    """

    wanted: bool | None = None
    context: int | None = None
    prefill: tuple[int, ...] = ()
    guesses: int = 0


SAMPLES = 2
"""How many feeds a compile is verified on."""


@dataclass(frozen=True)
class Job:
    """The arguments of a compile, resolved.

    Attributes:
        model: As loaded, with the shapes of ``workload`` bound; the compile changes it in place.
        sha256: Of the model's files.
        key: Hash of everything that goes into the artifact.
    """

    source: Path
    model: ir.Model
    target: Target
    backend: Backend
    recipe: Recipe
    workload: Workload
    calibration: Sequence[Tensors] | None
    max_error: float | None
    seed: int
    options: Mapping[str, str]
    generating: Generating
    sha256: str
    key: str

    def context(self, feeds: Sequence[Tensors]) -> Context:
        """What passes may ask for; they calibrate on ``feeds`` where the user gave no data."""
        data = self.calibration if self.calibration is not None else feeds
        return Context(self.target, data, self.workload, self.seed, self.backend.name)

    def feeds(self) -> list[dict[str, Any]]:
        """The samples to verify on: the user's first ones, or seeded ones."""
        if self.calibration:
            return [dict(feed) for feed in self.calibration[:SAMPLES]]
        cases = shapes.trials(self.workload)
        count = SAMPLES if len(cases) == 1 else 1
        return [
            feed
            for case in cases
            for feed in samples.seeded(self.model, case, count=count, seed=self.seed)
        ]

    def run_reference(self) -> tuple[list[dict[str, Any]], reference.Reference | None, str]:
        """Run the source model: the samples, what came out, or the reason why nothing did.

        Where dimensions are open and nobody gave data, the first size that runs is taken.
        """
        feeds = self.feeds()
        source, reason = self._try_reference(feeds)
        open_dims = shapes.open_dims(models.signature(self.model)[0])
        if source is not None or self.calibration or not open_dims:
            return feeds, source, reason
        for size in samples.OTHER_DIMS:
            other = samples.seeded(
                self.model, self.workload, count=SAMPLES, seed=self.seed, size=size
            )
            source, _ = self._try_reference(other)
            if source is not None:
                return other, source, ""
        return feeds, None, reason

    def _try_reference(
        self, feeds: Sequence[Mapping[str, Any]]
    ) -> tuple[reference.Reference | None, str]:
        try:
            if self.source.suffix == ".onnx" and not reference.is_large(self.model):
                return reference.run_file(self.source, feeds), ""
            return reference.run_model(self.model, feeds), ""
        except BackendFailed as error:
            return None, error.cause

    def lock(self) -> str:
        """The recipe's lock file."""
        data = samples.digest(self.calibration) if self.calibration is not None else None
        return recipes.lock(self.recipe, seed=self.seed, model_sha256=self.sha256, calibration=data)


def resolve(
    source: str | os.PathLike[str],
    target: str | Target,
    *,
    backend: str | None = None,
    recipe: str | Recipe = "none",
    shape: Sequence[str] = (),
    calibration: str | os.PathLike[str] | Iterable[Tensors] | None = None,
    max_error: float | None = None,
    seed: int = 0,
    options: Mapping[str, str] | None = None,
    generating: Generating = Generating(),
    progress: Progress = silent,
) -> Job:
    """Find, load and check everything that a compile is asked for; see `build.compile`."""
    path = Path(source)
    if max_error is not None and not 0 <= max_error < float("inf"):
        raise BadInput(f"{max_error} is no error", about="--max-error", remedy="give 0.01, say")
    found = target_names.find(target) if isinstance(target, str) else target
    chosen = choose_backend(found, backend)
    values_of(chosen, options or {})  # refuses what the backend has not
    steps = recipes.read(recipe) if isinstance(recipe, str) else recipe
    progress("reading the model")
    model = models.load(path)
    sha256 = models.content_hash(path, model)
    workload = shapes.parse(shape, models.signature(model)[0])
    # Bound first: a calibration file is cut into feeds of the batch that will be compiled.
    shapes.bind(model, workload)
    data = read_feeds(calibration, models.signature(model)[0]) if calibration is not None else None
    facts = {
        "trivium": cache.fingerprint(),
        "model": sha256,
        "target": repr(found),
        "backend": chosen.name,
        "toolchain": chosen.toolchain(),
        "recipe": recipes.lock(steps, seed=seed, model_sha256="", calibration=None),
        "shape": sorted(shape),
        "calibration": samples.digest(data) if data is not None else None,
        "max_error": max_error,
        "options": dict(sorted((options or {}).items())),
        "generating": repr(generating),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Job(
        source=path,
        model=model,
        target=found,
        backend=chosen,
        recipe=steps,
        workload=workload,
        calibration=data,
        max_error=max_error,
        seed=seed,
        options=dict(options or {}),
        generating=generating,
        sha256=sha256,
        key=key,
    )
