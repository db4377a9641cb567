"""The ecosystem's own door: ``onnx.backend.base.Backend`` over the XLA lowering.

>>> from trivium.backends.xla import onnx_backend                  # doctest: +SKIP
>>> onnx_backend.run_model(model, [x])                             # doctest: +SKIP

A model is compiled with every input an argument. Only where an input turns out to be needed while
compiling (a shape that comes in from outside) is the program made for its value; `BackendRep.baked`
then names it, as ``static_argnums`` would in jax.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
from onnx.backend.base import Backend, BackendRep

from trivium.backends.xla.lowering import Lowered, lower, precise
from trivium.backends.xla.lowering.fold import is_known
from trivium.backends.xla.lowering.lazy import jax
from trivium.backends.xla.lowering.trace import NeedsValue
from trivium.backends.xla.platforms import Platform
from trivium.compiler.errors import BadInput


class XlaRep(BackendRep):
    """A prepared model.

    Attributes:
        baked: Inputs of the last run that the program was made for, by name; empty when every
            input was an argument.
    """

    def __init__(
        self, model: onnx.ModelProto, *, bake: bool = True, platform: Platform | None = None
    ) -> None:
        self._lowered: Lowered = lower(ir.from_proto(model), platform=platform)
        self._outputs = [info.name for info in self._lowered.outputs]
        self._weights: dict[str, Any] | None = None
        self._bake = bake
        self._jitted = jax.jit(self._lowered.function)
        self.baked: tuple[str, ...] = ()

    def run(self, inputs: Any, **_: Any) -> tuple[Any, ...]:
        """Run once.

        Args:
            inputs: Arrays in the order of the model's inputs, or a mapping by name.
        """
        feed = self._feed(inputs)
        weights = self._lowered.read() if self._weights is None else self._weights
        self._weights = weights
        self.baked = ()
        with precise():
            try:
                results = self._run_jitted(weights, feed)
            except NeedsValue as error:
                if not self._bake:
                    raise
                results = self._run_baked(weights, feed, error)
        return tuple(_numpy(results[name]) for name in self._outputs)

    def _feed(self, inputs: Any) -> dict[str, Any]:
        names = [info.name for info in self._lowered.inputs]
        if isinstance(inputs, Mapping):
            return {name: _array(value) for name, value in inputs.items()}
        values = [_array(v) for v in (inputs if isinstance(inputs, (list, tuple)) else [inputs])]
        if len(values) > len(names):
            raise BadInput(f"{len(values)} inputs for a model that takes {len(names)}")
        return dict(zip(names, values, strict=False))

    def _run_jitted(self, weights: dict[str, Any], feed: dict[str, Any]) -> dict[str, Any]:
        """Run with every input an argument."""
        for name, value in feed.items():
            if _is_text(value):
                raise NeedsValue("strings cannot be arguments of a program", about=name, value=None)
        results: dict[str, Any] = self._jitted(weights, feed)
        return results

    def _run_baked(
        self, weights: dict[str, Any], feed: dict[str, Any], error: NeedsValue
    ) -> dict[str, Any]:
        """Make a program for the values of the inputs that are asked for. Where it is computed
        ones that are, for those of all inputs that can say a shape.
        """
        fixed = {name for name, value in feed.items() if _is_text(value)}
        while True:
            name = error.value.name if error.value is not None else None
            wanted = {name} if name in feed else {n for n, v in feed.items() if _may_shape(v)}
            if wanted <= fixed and not (wanted and error.value is None):
                raise error
            fixed |= {n for n in wanted if n is not None}
            try:
                return self._run_fixed(weights, feed, fixed)
            except NeedsValue as next_error:
                if next_error.value is None:
                    raise
                error = next_error

    def _run_fixed(
        self, weights: dict[str, Any], feed: dict[str, Any], names: set[str]
    ) -> dict[str, Any]:
        fixed = {name: value for name, value in feed.items() if name in names}
        rest = {name: value for name, value in feed.items() if name not in names}
        self.baked = tuple(fixed)
        known: dict[str, Any] = {}

        def function(weights: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
            results = self._lowered.function(weights, {**rest, **fixed})
            known.update({name: value for name, value in results.items() if is_known(value)})
            return {name: value for name, value in results.items() if name not in known}

        return {**jax.jit(function)(weights, rest), **known}


def _array(value: Any) -> Any:
    """An input as numpy; the suite hands some over as protobufs."""
    if isinstance(value, onnx.TensorProto):
        return onnx.numpy_helper.to_array(value)
    return value


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return any(_is_text(item) for item in value)
    return value is not None and np.asarray(value).dtype.kind in "OSUT"


def _may_shape(value: Any) -> bool:
    if value is None or isinstance(value, list) or _is_text(value):
        return True
    array = np.asarray(value)
    return array.dtype.kind in "biu" or array.size <= 8


def _numpy(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_numpy(item) for item in value]
    return value if value is None else np.asarray(value)


class XlaBackend(Backend):
    """XLA on this machine's default device."""

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether jax has such a device here: ``CPU``, ``CUDA`` or ``TPU``, with ``:0``."""
        kind = {"CPU": "cpu", "CUDA": "gpu", "TPU": "tpu"}.get(device.partition(":")[0].upper())
        if kind is None:
            return False
        try:
            return bool(jax.devices(kind))
        except RuntimeError:  # what jax raises for a platform that is absent
            return False

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **options: Any) -> XlaRep:
        """Prepare a model; ``bake=False`` refuses inputs whose values a shape depends on."""
        if not cls.supports_device(device):
            raise BadInput(f"no device {device!r} here", about="onnx_backend")
        platform: Platform | None = "cpu" if device.upper().startswith("CPU") else None
        return XlaRep(model, platform=platform, **options)

    @classmethod
    def run_model(
        cls, model: onnx.ModelProto, inputs: Sequence[Any], device: str = "CPU", **options: Any
    ) -> tuple[Any, ...]:
        """Prepare a model and run it once."""
        return cls.prepare(model, device, **options).run(inputs)


prepare = XlaBackend.prepare
run_model = XlaBackend.run_model
supports_device = XlaBackend.supports_device
