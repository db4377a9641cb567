"""Static and symbolic dimensions: reading ``--shape``, binding it to a model, and saying which
dimension is still open, in the model's own words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from trivium.compiler.errors import BadInput
from trivium.compiler.types import TensorInfo, Workload

if TYPE_CHECKING:
    import onnx_ir as ir

_FORM = re.compile(r"(?P<name>.+)=(?P<dims>[0-9]+(x[0-9]+)*|[0-9]+(,[0-9]+)+|\?)")
_OPEN = "?"
_MOST_DIGITS = 10


def parse(items: Iterable[str], inputs: Iterable[TensorInfo]) -> Workload:
    """Read ``ids=1x128`` (a whole input), ``seq=128`` (a symbolic dimension), ``seq=16,64``
    (one that takes several sizes) and ``batch=?`` (one that stays symbolic).

    Raises:
        BadInput: Not of that form, or a name that the model does not have.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dims: dict[str, int] = {}
    buckets: dict[str, tuple[int, ...]] = {}
    symbolic: list[str] = []
    infos = {info.name: info for info in inputs}
    symbols = {d for info in infos.values() for d in info.shape if isinstance(d, str)}
    for item in items:
        match = _FORM.fullmatch(item)
        if match is None:
            raise BadInput(
                "not of the form NAME=1x128, DIM=128, DIM=16,64 or DIM=?", about=f"--shape {item}"
            )
        name = match["name"]
        if match["dims"] == _OPEN:
            _require_symbol(item, name, symbols, infos.values())
            symbolic.append(name)
            continue
        # As text first: there are numbers too long for int() to read.
        digits = re.split("[x,]", match["dims"])
        if any(len(size) > _MOST_DIGITS for size in digits):
            raise BadInput(
                f"a dimension has at most {_MOST_DIGITS} digits", about=f"--shape {item[:80]}"
            )
        sizes = tuple(int(size) for size in digits)
        if any(size < 1 for size in sizes):
            raise BadInput("a dimension must be at least 1", about=f"--shape {item}")
        if "," in match["dims"] and name in symbols:
            buckets[name] = tuple(sorted(set(sizes)))
        elif name in infos and "," not in match["dims"]:
            _check_rank(item, infos[name], sizes)
            shapes[name] = sizes
        elif name in symbols and len(sizes) == 1:
            dims[name] = sizes[0]
        else:
            raise BadInput(
                f"the model has no input or symbolic dimension {name!r}",
                about=f"--shape {item}",
                remedy=_what_there_is(infos.values()),
            )
    bound = workload(dims, shapes, infos)
    for name in (*buckets, *symbolic):
        wishes = [str(bound.dims[name])] if name in bound.dims else []
        wishes += ["several sizes"] if name in buckets else []
        wishes += ["none"] if name in symbolic else []
        if len(wishes) > 1:
            raise BadInput(
                f"the dimension {name!r} is bound to both {wishes[0]} and {wishes[1]}",
                about="--shape",
            )
    return replace(bound, buckets=buckets, symbolic=tuple(dict.fromkeys(symbolic)))


def _require_symbol(item: str, name: str, symbols: set[str], infos: Iterable[TensorInfo]) -> None:
    if name not in symbols or name == _OPEN:
        raise BadInput(
            f"the model has no symbolic dimension {name!r}",
            about=f"--shape {item}",
            remedy=_what_there_is(infos),
        )


_OTHER_SIZE = 3
"""What symbolic dimensions are in a second trial: neither a batch of one nor a power of two."""


def trials(workload: Workload) -> list[Workload]:
    """Return the workloads to verify a compile on: each of its buckets, and where dimensions stay
    symbolic, another size of those."""
    if not workload.symbolic:
        return each(workload)
    other = dict.fromkeys(workload.symbolic, _OTHER_SIZE)
    return [
        replace(case, dims={**case.dims, **extra}) for case in each(workload)
        for extra in ({}, other)
    ]  # fmt: skip


def each(workload: Workload) -> list[Workload]:
    """Return the workload once for each combination of its buckets, the largest last."""
    names = list(workload.buckets)
    return [
        replace(workload, dims={**workload.dims, **dict(zip(names, sizes, strict=True))})
        for sizes in product(*workload.buckets.values())
    ]


def workload(
    dims: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]], infos: Mapping[str, TensorInfo]
) -> Workload:
    """Make a workload in which dimensions that a bound shape implies are bound too."""
    merged = dict(dims)
    for name, sizes in shapes.items():
        for dim, size in zip(infos[name].shape, sizes, strict=True):
            if isinstance(dim, int):
                if dim != size:
                    raise BadInput(
                        f"{size} where the model fixes {dim}",
                        about=f"--shape {name}={'x'.join(map(str, sizes))}",
                        remedy=_what_there_is([infos[name]]),
                    )
            elif merged.setdefault(dim, size) != size and dim != "?":
                raise BadInput(
                    f"the dimension {dim!r} is bound to both {merged[dim]} and {size}",
                    about=f"--shape {name}",
                )
    merged.pop("?", None)
    return Workload(dims=merged, shapes=dict(shapes))


def _check_rank(item: str, info: TensorInfo, sizes: tuple[int, ...]) -> None:
    if len(sizes) != len(info.shape):
        raise BadInput(
            f"{len(sizes)} dimensions for an input of {len(info.shape)}",
            about=f"--shape {item}",
            remedy=_what_there_is([info]),
        )


def _what_there_is(infos: Iterable[TensorInfo]) -> str:
    rows = [f"{info.name}={'x'.join(map(str, info.shape))}" for info in infos if info.shape]
    return f"the model takes {', '.join(rows)}" if rows else "the model takes only scalars"


def bind(model: ir.Model, bound: Workload) -> None:
    """Write the bound dimensions into a model's inputs and into every shape that mentions them."""
    import onnx_ir as ir

    for value in model.graph.inputs:
        if value.name is not None and value.name in bound.shapes:
            value.shape = ir.Shape(bound.shapes[value.name])
    if not bound.dims:
        return
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.outputs, *_values(graph)):
            if value.shape is None:
                continue
            if value.const_value is not None and not value.is_graph_input():
                # An output that is stored has the size that it has, whatever it declares.
                value.shape = ir.Shape(value.const_value.shape.numpy())
                continue
            sizes = [
                bound.dims.get(str(dim.value), dim) if isinstance(dim, ir.SymbolicDim) else dim
                for dim in value.shape
            ]
            if sizes != list(value.shape):
                value.shape = ir.Shape(sizes)


def _values(graph: ir.Graph) -> Iterable[ir.Value]:
    for node in graph:
        yield from node.outputs


def open_dims(infos: Iterable[TensorInfo]) -> list[str]:
    """Return ``input.dimension`` for every dimension that is still symbolic."""
    return [f"{i.name}[{d}]" for i in infos for d in i.shape if not isinstance(d, int)]


def require_static(inputs: Iterable[TensorInfo], engine: str, otherwise: str = "") -> None:
    """Raise ``BadInput`` naming the open dimensions and the flag, if there are any; ``otherwise``
    is what else than fixing them would do.
    """
    infos = list(inputs)
    still_open = open_dims(infos)
    if not still_open:
        return
    raise BadInput(
        f"{engine} needs every dimension fixed, and {', '.join(still_open)} "
        f"{'is' if len(still_open) == 1 else 'are'} symbolic",
        remedy=f"bind them, e.g. {flag_for(infos)}{otherwise}",
    )


def flag_for(inputs: Iterable[TensorInfo]) -> str:
    """An example of ``--shape`` that fixes an input with open dimensions, each to 1."""
    example = next(i for i in inputs if any(isinstance(d, str) for d in i.shape))
    sizes = "x".join(str(d if isinstance(d, int) else 1) for d in example.shape)
    return f"--shape {example.name}={sizes}"
