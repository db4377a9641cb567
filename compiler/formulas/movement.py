"""Operators that compute nothing: views, which move no bytes, and copies, which move some."""

from __future__ import annotations

from trivium.compiler.work import Demand, Site, formula

VIEWS = (
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Shape", "Size", "Constant"),
    *("BitCast", "Dropout", "Optional", "OptionalGetElement", "OptionalHasElement"),
    *("SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase", "SequenceAt"),
    *("SequenceLength",),
)
"""They rename or describe a value. (Engines drop Dropout from inference.)"""


def _none(site: Site) -> dict[int, float]:
    return dict.fromkeys(range(max(len(site.node.inputs), len(site.node.outputs))), 0.0)


@formula(*VIEWS)
def view(site: Site) -> Demand:
    return Demand(reads=_none(site), writes=_none(site))


@formula("If", "Loop", "Scan", "SequenceMap")
def control_flow(site: Site) -> Demand:
    """Nothing of its own; the work is that of its bodies."""
    return view(site)


@formula("Transpose", "Concat", "Split", "SplitToSequence", "ConcatFromSequence")
@formula("DepthToSpace", "SpaceToDepth", "ReverseSequence", "Trilu", "StringConcat")
@formula("StringNormalizer", "StringSplit", "RegexFullMatch", "ImageDecoder")
def copy(site: Site) -> Demand:
    """Every byte read once and written once."""
    return Demand()


@formula("Tile", "Expand", "Pad")
def spread(site: Site) -> Demand:
    """The input is read once, however often it is written; shapes and axes count for nothing."""
    return Demand(reads=dict.fromkeys(range(1, len(site.node.inputs)), 0.0))


@formula("ConstantOfShape", "Range", "EyeLike", "OneHot")
def fill(site: Site) -> Demand:
    """Writes only; what it reads is a few numbers."""
    reads = {} if site.node.op_type == "OneHot" else _none(site)
    return Demand(reads=reads)


@formula("Slice", "CenterCropPad", "Compress")
def cut(site: Site) -> Demand:
    """Reads what it keeps."""
    return Demand(reads={**_none(site), 0: min(site.bytes(), site.out_bytes())})


@formula("Gather", "GatherElements", "GatherND")
def pick(site: Site) -> Demand:
    """Reads the picked elements and the indices, never the whole table."""
    return Demand(reads={0: site.out_bytes(), 1: site.bytes(1)})


@formula("ScatterElements", "ScatterND", "Scatter")
def scatter(site: Site) -> Demand:
    """Copies the data and puts the updates in; one operation each where it reduces."""
    reduces = site.attr("reduction", "none") != "none"
    return Demand(vector=float(site.count(2)) if reduces else 0.0)


@formula("TensorScatter")
def tensor_scatter(site: Site) -> Demand:
    """Writes the update into the cache in place."""
    return Demand(reads={0: 0.0}, writes={0: site.bytes(1)})
