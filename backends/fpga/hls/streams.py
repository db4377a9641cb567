"""The streams between the layers of a kernel: queues, forks, changes of lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trivium.backends.fpga import cost, ir
from trivium.backends.fpga.folding import Folding, relanes


def cpp_type(range: ir.Range) -> str:
    """The narrowest integer type."""
    return f"ap_int<{range.bits}>" if range.signed else f"ap_uint<{range.bits}>"


@dataclass
class Wiring:
    """The streams of the kernel, and which one each reader takes from."""

    streams: list[str]
    forks: dict[str, list[str]]
    reader: dict[tuple[str, str], str]
    relanes: dict[str, list[str]]


def wire(flow: ir.Dataflow, folding: Folding) -> Wiring:
    wiring = Wiring([], {}, {}, {})
    queues = cost.fifos(flow, folding)
    for name, tensor in flow.tensors.items():
        lanes, readers = folding[name].pe, flow.readers(name)
        type = f"Stream<{cpp_type(tensor.range)}, {lanes}>"
        count = f"frames * {tensor.size // lanes}"
        first = f"{identifier(flow, name)}_stream"
        branches = [f"{first}{i}" for i in range(len(readers))] if len(readers) > 1 else [first]
        if len(readers) > 1:
            _declare(wiring, type, first, 2)
            wiring.forks[name] = _forks(wiring, type, first, branches, count)
        for i, (reader, branch) in enumerate(zip(readers, branches, strict=True)):
            _declare(wiring, type, branch, queues[name, i].depth)
            # An addition of a stream with itself reads two branches.
            key = (reader, name) if (reader, name) not in wiring.reader else (reader, f"{name}+")
            wiring.reader[key] = branch
    for layer, name in relanes(flow, folding):
        tensor, lanes = flow.tensors[name], folding[layer.name].pe
        source = wiring.reader[layer.name, name]
        changed = f"{source}_relaned"
        _declare(wiring, f"Stream<{cpp_type(tensor.range)}, {lanes}>", changed, 2)
        arguments = f"{cpp_type(tensor.range)}, {tensor.channels}, {folding[name].pe}, {lanes}"
        call = f"    relane<{arguments}>({source}, {changed}, frames * {tensor.pixels});"
        wiring.relanes.setdefault(layer.name, []).append(call)
        wiring.reader[layer.name, name] = changed
    return wiring


def _declare(wiring: Wiring, type: str, name: str, depth: int) -> None:
    wiring.streams.append(f'    {type} {name}("{name}");')
    wiring.streams.append(f"#pragma HLS STREAM variable = {name} depth = {depth}")


def _forks(wiring: Wiring, type: str, first: str, branches: Sequence[str], count: str) -> list[str]:
    """A chain of two-way forks for any number of readers."""
    calls, source = [], first
    for i, branch in enumerate(branches[:-1]):
        rest = branches[-1] if i == len(branches) - 2 else f"{first}_rest{i}"
        if rest != branches[-1]:
            _declare(wiring, type, rest, 2)
        calls.append(f"    fork({source}, {branch}, {rest}, {count});")
        source = rest
    return calls


def identifier(flow: ir.Dataflow, tensor: str) -> str:
    """A stream's name in C++; a model's input may be called anything."""
    inputs = [port.tensor for port in flow.inputs]
    return f"input{inputs.index(tensor)}" if tensor in inputs else tensor
