"""Models of several parts, each a program of its own in one artifact.

A vision-language model is a vision tower, a projector and a decoder: the first two run once for an
image, the last for every token. Its graph is one, and names under `PARTS` in its metadata which of
its outputs each part computes; a later part takes what an earlier one gives as an input. Passes
see the whole graph, and since outputs keep their names, what they leave can still be cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from trivium.compiler.artifact import Artifact
from trivium.compiler.errors import BadInput
from trivium.compiler.generator import Sight
from trivium.compiler.samples import conform_feeds
from trivium.compiler.types import Built, Estimate, Program, TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from trivium.compiler.backend import Executable, Tensors
    from trivium.compiler.prepare import Prepared

PARTS = "trivium.parts"
"""Key of the metadata of a model: JSON, a list of [name of the part, its outputs] in order."""

SIGHT = "trivium.sight"
"""Key of the metadata of a model whose last part is a decoder that sees: JSON, a `Sight`."""


@dataclass(frozen=True)
class Part:
    """One part, cut out: its inputs are those of the whole that it reads and earlier outputs."""

    name: str
    model: ir.Model


def declare(model: ir.Model, parts: Mapping[str, Sequence[str]]) -> None:
    """Say which outputs of the model each part computes, in the order in which they run."""
    model.metadata_props[PARTS] = json.dumps([[name, list(parts[name])] for name in parts])


def declare_sight(model: ir.Model, sight: Sight) -> None:
    """Say how images come into the prompts of the last part."""
    model.metadata_props[SIGHT] = json.dumps(asdict(sight))


def sight_of(model: ir.Model) -> Sight | None:
    """What `declare_sight` said.

    Raises:
        BadInput: It is not a `Sight`.
    """
    text = model.metadata_props.get(SIGHT)
    if text is None:
        return None
    try:
        return Sight(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise BadInput("not what a model sees by", about=f"metadata {SIGHT}") from error


def split(model: ir.Model) -> list[Part]:
    """Cut a model into the parts that it declares; none if it declares none.

    Raises:
        BadInput: The declaration does not fit the graph.
    """
    declared = _declared(model)
    parts: list[Part] = []
    earlier: list[str] = []
    for name, outputs in declared:
        parts.append(Part(name, _cut(model, earlier, outputs)))
        earlier += outputs
    return parts


def _declared(model: ir.Model) -> list[tuple[str, list[str]]]:
    text = model.metadata_props.get(PARTS)
    if text is None:
        return []
    try:
        declared = [(str(name), [str(o) for o in outputs]) for name, outputs in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise BadInput("not a list of [name, outputs]", about=f"metadata {PARTS}") from error
    outputs = [output for _, own in declared for output in own]
    if sorted(outputs) != sorted(str(value.name) for value in model.graph.outputs):
        raise BadInput(
            f"names the outputs {outputs}, where the graph has "
            f"{[value.name for value in model.graph.outputs]}",
            about=f"metadata {PARTS}",
            remedy="take the key out to compile the model as one program",
        )
    if len({name for name, _ in declared}) != len(declared) or not all(
        name.isidentifier() for name, _ in declared
    ):
        raise BadInput("the parts need different, plain names", about=f"metadata {PARTS}")
    return declared


def _cut(model: ir.Model, given: Sequence[str], wanted: Sequence[str]) -> ir.Model:
    """The part of a model between values that are given and those that are wanted."""
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    part = model.clone()
    del part.metadata_props[PARTS]
    graph = part.graph
    outputs = {value.name: value for value in graph.outputs}
    graph.outputs[:] = [outputs[name] for name in wanted]
    for name in given:
        computed = outputs[name]
        fed = ir.Value(name=name, type=computed.type, shape=computed.shape)
        computed.name = f"{name}.computed"
        computed.replace_all_uses_with(fed)
        if any(True for _ in fed.uses()):
            graph.inputs.append(fed)
    common.RemoveUnusedNodesPass()(part)
    graph.inputs[:] = [v for v in graph.inputs if any(True for _ in v.uses())]
    return part


def total(estimates: Mapping[str, Estimate]) -> Estimate:
    """What running all parts once, one after the other, is predicted to take."""
    parts = list(estimates.values())
    notes = tuple(f"{name}: {note}" for name, one in estimates.items() for note in one.notes)

    def added(field: str) -> float | None:
        return _sum([getattr(one, field) for one in parts])

    longest = max(parts, key=lambda one: one.seconds or 0.0)
    return replace(
        longest,
        seconds=added("seconds"),
        lo=added("lo"),
        hi=added("hi"),
        bytes_peak=added("bytes_peak"),
        joules=added("joules"),
        dollars=added("dollars"),
        period_s=None,
        by_op=tuple(op for one in parts for op in one.by_op),
        intervals={},
        notes=notes,
    )


def samples_of(
    prepared: Prepared, feeds: Sequence[Tensors], expected: Sequence[Tensors]
) -> tuple[list[Tensors], list[Tensors]]:
    """What a part is fed and expected to give; nothing where no reference run was possible."""
    inputs = [info.name for info in prepared.inputs]
    outputs = [info.name for info in prepared.outputs]
    known = [{**feed, **output} for feed, output in zip(feeds, expected, strict=False)]
    # Caches that a decoder was given are in no sample.
    return (
        [{name: one[name] for name in inputs if name in one} for one in known],
        [{name: one[name] for name in outputs if name in one} for one in known],
    )


def joined(
    built: Mapping[str, Built],
    signatures: Mapping[str, tuple[Sequence[TensorInfo], Sequence[TensorInfo]]],
) -> Built:
    """What the backend left in the folders of the parts, as one artifact.

    Args:
        signatures: The inputs and outputs of each part, caches that it was given left out.
    """
    generator = next((one.generator for one in built.values() if one.generator), None)
    return Built(
        programs=tuple(p for name, one in built.items() for p in _programs(name, one.programs)),
        memory={
            key: _sum([one.memory.get(key) for one in built.values()])
            for key in dict.fromkeys(key for one in built.values() for key in one.memory)
        },
        notes=tuple(
            dict.fromkeys(f"{n}: {note}" for n, one in built.items() for note in one.notes)
        ),
        parts=tuple(
            {
                "name": name,
                "programs": [asdict(program) for program in one.programs],
                "weights": one.weights,
                "details": dict(one.details),
                "inputs": [asdict(info) for info in signatures[name][0]],
                "outputs": [asdict(info) for info in signatures[name][1]],
                "generator": one.generator.to_json() if one.generator is not None else None,
            }
            for name, one in built.items()
        ),
        generator=generator,
    )


def _programs(name: str, programs: Sequence[Program]) -> tuple[Program, ...]:
    """The programs of a part, as the whole artifact calls them."""
    return tuple(
        replace(
            program,
            name=name if len(programs) == 1 else f"{name}.{program.name}",
            file=f"{name}/{program.file}",
        )
        for program in programs
    )


def _sum(figures: Sequence[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return sum(known) if len(known) == len(figures) else None


def load(artifact: Artifact, how: str) -> Executable:
    """Load every part of an artifact by the backend's own road, ``load`` or ``load_to_verify``."""
    loaded = {}
    for table in artifact.manifest["parts"]:
        name = table["name"]
        whole = {**artifact.manifest, "generator": None}
        own = Artifact(artifact.path / name, {**whole, **table, "parts": []})
        loaded[name] = getattr(own, how)()
    if artifact.generator is None:
        return Chain(artifact.inputs, loaded)
    from trivium.compiler.generation.seeing import SeeingChain
    from trivium.compiler.generation.sourced import SourcedChain

    if artifact.generator.source is not None:
        return SourcedChain(artifact.inputs, loaded, artifact.generator)

    outputs = {table["name"]: _tensors(table["outputs"]) for table in artifact.manifest["parts"]}
    return SeeingChain(artifact.inputs, loaded, artifact.generator, outputs)


def _tensors(tables: Sequence[Mapping[str, Any]]) -> list[TensorInfo]:
    return [TensorInfo(t["name"], t["dtype"], tuple(t["shape"])) for t in tables]


class Chain:
    """Parts that run one after the other, each on the inputs and on what the earlier ones gave.

    Attributes:
        parts: Each of them, to be run alone.
    """

    def __init__(self, inputs: Sequence[TensorInfo], parts: Mapping[str, Executable]) -> None:
        self.inputs = inputs
        self.parts = parts
        self.where = next(iter(parts.values())).where
        self.measures_target = all(part.measures_target for part in parts.values())

    def run(self, feeds: Tensors) -> dict[str, np.ndarray[Any, Any]]:
        known = dict(conform_feeds(feeds, self.inputs))
        results: dict[str, np.ndarray[Any, Any]] = {}
        for part in self.parts.values():
            outputs = part.run(known)
            known |= outputs
            results |= outputs
        return results
