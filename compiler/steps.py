"""The steps of a compile between the model and its backend: recipe, caches, parts, legalizing.

A compile and a dry run take the same ones. What comes out is what the backend is asked to build:
one piece, or one for each part of a model that has parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trivium.compiler import model as models
from trivium.compiler import parts
from trivium.compiler import recipe as recipes
from trivium.compiler.generation import compiling as generating
from trivium.compiler.prepare import Prepared, Progress, legalize, predict, run_recipe, silent
from trivium.compiler.recipe import Applied
from trivium.compiler.types import Estimate, TensorInfo

if TYPE_CHECKING:
    from trivium.compiler.backend import Tensors
    from trivium.compiler.generator import Generator
    from trivium.compiler.job import Job


@dataclass(frozen=True)
class Piece:
    """One model for the backend.

    Attributes:
        name: Of the part; empty where the model has none.
        signature: Its inputs and outputs, caches that it was given left out.
        estimate: Of one call, or of one step of a generator; None where the backend refuses nodes.
        generator: How it is driven, if it is a decoder with caches.
    """

    name: str
    signature: tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]]
    prepared: Prepared
    estimate: Estimate | None
    generator: Generator | None = None


@dataclass(frozen=True)
class Ready:
    """All that a backend is asked to build.

    Attributes:
        applied: What the recipe's passes did, and the one that gave a decoder caches.
        inserted: That one, if it ran.
    """

    pieces: Sequence[Piece]
    applied: Sequence[Applied]
    inserted: Sequence[Applied]

    @property
    def in_parts(self) -> bool:
        return bool(self.pieces[0].name)

    @property
    def generator(self) -> Generator | None:
        return self.pieces[-1].generator

    @property
    def refusals(self) -> tuple[str, ...]:
        return tuple(line for piece in self.pieces for line in piece.prepared.refusals)

    @property
    def legalized(self) -> tuple[Applied, ...]:
        """What the backend's own passes did."""
        return tuple(row for piece in self.pieces for row in piece.prepared.applied)

    @property
    def estimate(self) -> Estimate | None:
        """Of a step of the generator, if there is one, else of one call of all pieces."""
        if self.generator is not None or not self.in_parts:
            return self.pieces[-1].estimate
        known = {piece.name: piece.estimate for piece in self.pieces if piece.estimate is not None}
        return parts.total(known) if len(known) == len(self.pieces) else None


def optimize(job: Job, feeds: Sequence[Tensors]) -> list[Applied]:
    """Run what the recipe has before caches are made, in place: after it the numbers stand."""
    before, _ = recipes.split(job.recipe)
    return run_recipe(job.model, before, job.context(feeds))


def ready(
    job: Job, feeds: Sequence[Tensors], applied: Sequence[Applied], progress: Progress = silent
) -> Ready:
    """Bring an optimized model to what the backend takes.

    Args:
        applied: What `optimize` did.

    Raises:
        BadInput: A generator was asked for that cannot be had.
        Unsupported: The target cannot hold it.
    """
    model = job.model
    # What has to see the caches of a generator runs after they are made, and changes no number.
    _, after = recipes.split(job.recipe)
    generating.with_source(model, job)
    if parts.PARTS in model.metadata_props:
        late = recipes.run(after, model, job.context(feeds))
        named = {piece.name: piece.model for piece in parts.split(model)}
        signatures = {name: models.signature(piece) for name, piece in named.items()}
        last = next(reversed(named))
        generator, workload, inserted = generating.prepare_part(named[last], model, job)
        done = [*applied, *late, *inserted]
    else:
        named, last = {"": model}, ""
        signatures = {"": models.signature(model)}
        generator, workload, inserted = generating.prepare(model, job)
        done = [*applied, *inserted, *recipes.run(after, model, job.context(feeds))]
    progress(f"legalizing for {job.backend.name}")
    pieces = []
    for name, piece in named.items():
        driven = generator if name == last else None
        # The sizes that the programs of a generator take are none of the other parts'.
        bound = job.workload if name else workload
        prepared = legalize(piece, job.backend, job.target, bound)
        estimate = None
        if not prepared.refusals:
            step = prepared
            if driven is not None:
                step = generating.one_step(replace(prepared, workload=workload), driven)
            estimate = predict(step, job.target)
        pieces.append(Piece(name, signatures[name], prepared, estimate, driven))
    return Ready(pieces, done, inserted)
