"""From a lowered model to a portable program: a ``jax.export`` for a device's platform and the CPU.

It depends neither on the number of devices nor, where that is wished, on the sizes of the
model's symbolic dimensions; with a partition it is one for as many devices as that says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trivium.backends.xla import partition, sharding
from trivium.backends.xla.platforms import Device
from trivium.compiler.errors import TriviumError, Unsupported
from trivium.compiler.onnx_api import one_line
from trivium.compiler.types import TensorInfo

if TYPE_CHECKING:
    import onnx_ir as ir

Json = dict[str, Any]


_OPERATORS = ("floordiv", "max", "min", "mod", "non_negative")
"""Words that mean something else in jax's notation of symbolic dimensions."""


def export(
    lowered: Any,
    device: Device,
    precision: str,
    caches: Sequence[str] = (),
    split: partition.Partition | None = None,
    symbols: Mapping[str, Any] | None = None,
) -> Any:
    """Return the ``jax.export.Exported`` of a lowered model, for its platform and the CPU.

    It takes weights and inputs by name, and a third table with those inputs that are caches, if
    there are any, so that a caller can donate them.

    Args:
        split: How it is spread, if it is exported for as many devices as that says.
        precision: Of float32 products: ``highest`` computes them in float32; ``default`` lets a
            TPU round the factors to bfloat16 and a GPU to TF32; ``high`` is between.
        symbols: What stays symbolic, by the model's name of the dimension.

    Raises:
        Unsupported: An operator needs a number where there is a symbol.
    """
    import jax
    import jax.export

    from trivium.backends.xla.lowering import precise

    names = [device.platform] if device.platform == "cpu" else [device.platform, "cpu"]
    with precise(), jax.default_matmul_precision(precision):
        spread = {}
        if split is not None:
            spread = in_and_out(split, partition.mesh_of(split), lowered, caches)
        plain = lowered.function
        function = jax.jit(_taking_caches(plain) if caches else plain, **spread)
        try:
            return jax.export.export(function, platforms=names)(*avals(lowered, caches, symbols))
        except TriviumError:
            raise
        except Exception as error:  # jax raises many kinds for what it cannot do with symbols
            if not symbols:
                raise
            raise Unsupported(
                f"XLA cannot have it with {' and '.join(symbols)} symbolic: {one_line(error)}",
                remedy="fix the dimension with --shape DIM=SIZE",
            ) from error


def symbols_of(names: Iterable[str]) -> dict[str, Any]:
    """Return jax's symbolic dimension for each of a model's, all of one scope."""
    import jax.export

    scope = jax.export.SymbolicScope()
    spelled = {
        name: name if name.isidentifier() and name not in _OPERATORS else f"dim{index}"
        for index, name in enumerate(names)
    }
    return {name: jax.export.symbolic_shape(word, scope=scope)[0] for name, word in spelled.items()}


def avals(
    lowered: Any, caches: Sequence[str] = (), sizes: Mapping[str, Any] | None = None
) -> tuple[Json, ...]:
    """Return the shapes and dtypes of a lowered model's weights, inputs and caches.

    Args:
        sizes: Of the dimensions that the model leaves open: numbers, or jax's symbols.
    """
    import jax

    from trivium.compiler.samples import numpy_dtype

    aval: Any = jax.ShapeDtypeStruct
    weights = {}
    for name, tensor in lowered.weights.items():
        shape = tensor.shape.numpy()
        order = lowered.packed.get(name, range(len(shape)))
        weights[name] = aval(tuple(shape[axis] for axis in order), tensor.dtype.numpy())
    known = sizes or {}
    inputs = {
        info.name: aval(tuple(known.get(d, d) for d in info.shape), numpy_dtype(info.dtype))
        for info in lowered.inputs
    }
    return weights, *_apart(inputs, caches)


def outputs_of(lowered: Any, exported: Any) -> tuple[TensorInfo, ...]:
    """The outputs with the shapes that tracing found; the model may leave theirs open."""
    import jax

    found = jax.tree.unflatten(exported.out_tree, exported.out_avals)
    return tuple(
        replace(
            info,
            shape=tuple(d if isinstance(d, int) else str(d) for d in found[info.name].shape),
        )
        for info in lowered.outputs
    )


def in_and_out(
    split: partition.Partition, mesh: Any, lowered: Any, caches: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what jit is told of how arguments and results are spread."""
    inputs = [info.name for info in lowered.inputs]
    outputs = [info.name for info in lowered.outputs]
    return {
        "in_shardings": (
            partition.shardings(mesh, lowered.weights, split.weights),
            *_apart(partition.shardings(mesh, inputs, split.inputs), caches),
        ),
        "out_shardings": partition.shardings(mesh, outputs, split.outputs),
    }


def constraints(layout: sharding.Layout, split: partition.Partition) -> dict[ir.Value, Any]:
    """Return jax's sharding of every annotated value, over no devices in particular."""
    mesh = partition.mesh_of(split)
    return {value: partition.sharding(mesh, spec) for value, spec in layout.specs.items()}


def _taking_caches(function: Callable[[Json, Json], Json]) -> Callable[[Json, Json, Json], Json]:
    return lambda weights, inputs, held: function(weights, {**inputs, **held})


def _apart(inputs: Json, caches: Sequence[str]) -> tuple[Json, ...]:
    """A table of inputs, and one of those that are caches, if there are any."""
    if not caches:
        return (inputs,)
    own = {name: value for name, value in inputs.items() if name not in caches}
    return own, {name: inputs[name] for name in caches}
