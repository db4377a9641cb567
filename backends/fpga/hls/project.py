"""The Vitis project around a kernel: everything that an AMD user must be handed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trivium
from trivium.backends.fpga import cost, ir
from trivium.backends.fpga import folding as folds
from trivium.backends.fpga.folding import Folding
from trivium.backends.fpga.hls import kernel as kernels
from trivium.backends.fpga.hls.kernel import CPP_TYPES, TOP, Kernel, render
from trivium.compiler.types import Estimate, Target

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

COPIED = {
    "hls/layers.h": "templates/layers.h",
    "sim/ap_int.h": "templates/ap_int.h",
    "sim/hls_stream.h": "templates/hls_stream.h",
    "host/host_ops.h": "templates/host_ops.h",
    "host/host_ops.py": "host_ops.py",
}
"""Files that are the same in every project: where to, where from."""

PORTS = "host/ports.json"

Frame = Mapping[str, "Array"]


def write(
    folder: Path,
    flow: ir.Dataflow,
    folding: Folding,
    target: Target,
    estimate: Estimate,
    golden: Sequence[tuple[Frame, Frame]],
) -> list[str]:
    """Write the whole project.

    Args:
        folder: Where to.
        flow, folding: What to build.
        target: Its part, platform, clock and memory bank go into the configurations.
        estimate: For the README.
        golden: For each frame the integers of the inputs and of the outputs, by port name.

    Returns:
        The files written, relative to the folder.
    """
    kernel = kernels.emit(flow, folding)
    package = files("trivium.backends.fpga")
    texts = {to: (package / source).read_text(encoding="utf-8") for to, source in COPIED.items()}
    texts |= _sources(flow, folding, kernel, target)
    texts |= _test_bench(flow, kernel, golden)
    texts |= _host(flow, kernel, target)
    texts |= _vitis(kernel, target)
    texts["README.md"] = _readme(flow, folding, target, estimate)
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return sorted(texts)


def ports(flow: ir.Dataflow, kernel: Kernel | None = None) -> dict[str, Any]:
    """The ports as ``host_ops`` takes them, JSON-serializable."""
    return {
        "inputs": [_port(flow, port) for port in flow.inputs],
        "outputs": [_port(flow, port) for port in flow.outputs],
        "arguments": list(kernels.argument_names(flow)),
    }


def _port(flow: ir.Dataflow, port: ir.Port) -> dict[str, Any]:
    host = [
        {**dataclasses.asdict(op), "scale": op.scale.tolist() if op.scale is not None else None}
        for op in port.host
    ]
    return {
        "name": port.name,
        "shape": list(port.shape),
        "order": list(port.order),
        "image": list(flow.tensors[port.tensor].shape),
        "memory": port.memory,
        "dtype": port.dtype,
        "host": host,
    }


def _sources(flow: ir.Dataflow, folding: Folding, kernel: Kernel, target: Target) -> dict[str, str]:
    common = {"title": flow.name, "version": trivium.__version__, "top": TOP}
    rows = [
        f"//   {layer.name}: {one_line(layer.origin)}, "
        f"{' x '.join(map(str, flow.output_of(layer).shape))}, "
        f"PE {folding[layer.name].pe}, SIMD {folding[layer.name].simd}"
        for layer in flow.layers
    ]
    return {
        "hls/kernel.h": render(
            "kernel.h", **common, signature=kernel.signature, ports_doc=kernel.ports_doc
        ),
        "hls/kernel.cpp": render(
            "kernel.cpp",
            **common,
            target=target.name,
            summary="\n".join(rows),
            signature=kernel.signature,
            configurations=kernel.configurations,
            interfaces=kernel.interfaces,
            streams=kernel.streams,
            calls=kernel.calls,
        ),
        "hls/weights.h": render("weights.h", **common, arrays=kernel.weights),
    }


def one_line(text: str) -> str:
    """A node's name, fit for a comment; converters make them hundreds of characters long."""
    clean = " ".join(text.replace("\\", "/").split())
    return clean if len(clean) <= 48 else f"{clean[:45]}..."


def _test_bench(
    flow: ir.Dataflow, kernel: Kernel, golden: Sequence[tuple[Frame, Frame]]
) -> dict[str, str]:
    import numpy as np

    inputs = [f"in{i}" for i in range(len(flow.inputs))]
    outputs = [f"out{i}" for i in range(len(flow.outputs))]
    arrays = []
    for side, names, found in ((0, inputs, flow.inputs), (1, outputs, flow.outputs)):
        for name, port in zip(names, found, strict=True):
            values = np.concatenate([np.ravel(frame[side][port.name]) for frame in golden])
            rows = [
                "    " + ", ".join(str(int(v)) for v in values[i : i + kernels.VALUES_PER_LINE])
                for i in range(0, len(values), kernels.VALUES_PER_LINE)
            ]
            head = f"static const {CPP_TYPES[port.memory]} GOLDEN_{name.upper()}[] = {{\n"
            arrays.append(head + ",\n".join(rows) + "};\n")
    size = {
        name: flow.tensors[port.tensor].size
        for name, port in zip([*inputs, *outputs], [*flow.inputs, *flow.outputs], strict=True)
    }
    cpp = {
        name: CPP_TYPES[port.memory]
        for name, port in zip([*inputs, *outputs], [*flow.inputs, *flow.outputs], strict=True)
    }
    vectors = [f"    std::vector<{cpp[n]}> {n}(frames * {size[n]});" for n in outputs]
    given = [
        f"    std::vector<{cpp[n]}> {n}(GOLDEN_{n.upper()}, "
        f"GOLDEN_{n.upper()} + frames * {size[n]});"
        for n in inputs
    ]
    read = [
        f"    const auto {n} = read_file<{cpp[n]}>(argv[{i + 2}], size_t(frames) * {size[n]});"
        for i, n in enumerate(inputs)
    ]
    written = [f"    write_file(argv[{i + 2 + len(inputs)}], {n});" for i, n in enumerate(outputs)]
    checks = [f'    wrong += differences("{n}", {n}, GOLDEN_{n.upper()});' for n in outputs]
    version = trivium.__version__
    return {
        "hls/golden.h": render(
            "golden.h", version=version, frames=len(golden), arrays="\n".join(arrays)
        ),
        "hls/tb.cpp": render(
            "tb.cpp",
            version=version,
            top=TOP,
            usage=" ".join(f"{name.upper()}.bin" for name in kernel.arguments),
            argument_count=2 + len(kernel.arguments),
            golden_buffers="\n".join([*given, *vectors]),
            golden_arguments=", ".join(
                [*(f"{name}.data()" for name in kernel.arguments), "frames"]
            ),
            golden_checks="\n".join(checks),
            file_buffers="\n".join([*read, *vectors]),
            file_writes="\n".join(written),
        ),
    }


# --- host -----------------------------------------------------------------------------------------


def _host(flow: ir.Dataflow, kernel: Kernel, target: Target) -> dict[str, str]:
    version = trivium.__version__
    texts = {
        PORTS: json.dumps(ports(flow), indent=1) + "\n",
        "host/run_xrt.py": render("run_xrt.py.in", version=version, top=TOP),
        "host/host.cpp": _host_cpp(flow, kernel),
    }
    if target.options.get("host") == "pynq":
        texts["host/run_pynq.py"] = render("run_pynq.py.in", version=version, top=TOP)
    return texts


def _host_cpp(flow: ir.Dataflow, kernel: Kernel) -> str:
    inputs, buffers, outputs = [], [], []
    for i, port in enumerate(flow.inputs):
        tensor = flow.tensors[port.tensor]
        inputs.append(
            f"    const auto model_in{i} = "
            f"read_file<{_cpp_dtype(port.dtype)}>(argv[{i + 3}], size_t(frames) * {tensor.size});"
        )
        value = f"model_in{i}"
        for op in port.host:
            value = _host_op(op, value, port)
        image = _brace(tensor.shape)
        inputs += [
            f"    const auto stream_in{i} = "
            f"host::to_stream({value}, {image}, {_brace(port.order)});",
            f"    xrt::bo in{i}(device, stream_in{i}.size() * sizeof(stream_in{i}[0]), "
            f"kernel.group_id({i}));",
            f"    in{i}.write(stream_in{i}.data());",
            f"    in{i}.sync(XCL_BO_SYNC_BO_TO_DEVICE);",
        ]
    for i, port in enumerate(flow.outputs):
        tensor = flow.tensors[port.tensor]
        cpp = CPP_TYPES[port.memory]
        buffers += [
            f"    std::vector<{cpp}> stream_out{i}(size_t(frames) * {tensor.size});",
            f"    xrt::bo out{i}(device, stream_out{i}.size() * sizeof({cpp}), "
            f"kernel.group_id({len(flow.inputs) + i}));",
        ]
        value = f"host::from_stream(stream_out{i}, {_brace(tensor.shape)}, {_brace(port.order)})"
        for op in port.host:
            value = _host_op(op, value, port)
        outputs += [
            f"    out{i}.sync(XCL_BO_SYNC_BO_FROM_DEVICE);",
            f"    out{i}.read(stream_out{i}.data());",
            f"    const auto model_out{i} = {value};",
            f"    write_file(argv[{3 + len(flow.inputs) + i}], model_out{i});",
        ]
    return render(
        "host.cpp",
        version=trivium.__version__,
        top=TOP,
        usage=" ".join(f"{name.upper()}.bin" for name in kernel.arguments),
        argument_count=3 + len(kernel.arguments),
        inputs="\n".join(inputs),
        output_buffers="\n".join(buffers),
        arguments=", ".join(kernel.arguments),
        outputs="\n".join(outputs),
    )


def _host_op(op: ir.HostOp, value: str, port: ir.Port) -> str:
    """The call of ``host_ops.h`` that computes an operation."""
    if op.op_type == "Softmax":
        return f"host::softmax({value}, {port.shape[-1]})"
    assert op.scale is not None
    scales = ", ".join(f"{float(s)!r}f" for s in op.scale.reshape(-1))
    if op.op_type == "QuantizeLinear":
        return f"host::quantize<{_cpp_dtype(op.dtype)}>({value}, {scales}, {op.zero_point})"
    return f"host::dequantize({value}, {{{scales}}}, {op.zero_point})"


def _cpp_dtype(dtype: str) -> str:
    return "float" if dtype == "float32" else f"{dtype}_t"


def _brace(values: Sequence[int]) -> str:
    return f"{{{', '.join(map(str, values))}}}"


# --- Vitis ----------------------------------------------------------------------------------------


def _vitis(kernel: Kernel, target: Target) -> dict[str, str]:
    pynq = target.options.get("host") == "pynq"
    package_file = f"{TOP}.{'zip' if pynq else 'xo'}"
    bank = target.options.get("memory_bank")
    banks = [f"sp={TOP}_1.m_axi_gmem{i}:{bank}" for i in range(len(kernel.arguments)) if bank]
    version = trivium.__version__
    return {
        "hls_config.cfg": render(
            "hls_config.cfg",
            part=target.options["part"],
            clock_mhz=f"{cost.clock(target) / 1e6:g}",
            flow_target="vivado" if pynq else "vitis",
            package_format="ip_catalog" if pynq else "xo",
            package_file=package_file,
            top=TOP,
        ),
        "system.cfg": render("system.cfg", top=TOP, banks="\n".join(banks)),
        "Makefile": render(
            "Makefile",
            version=version,
            platform=target.options.get("platform", ""),
            package_file=package_file,
        ),
    }


def _readme(flow: ir.Dataflow, folding: Folding, target: Target, estimate: Estimate) -> str:
    interval = folds.interval(flow, folding)
    hertz = cost.clock(target)
    rows = []
    for layer in flow.layers:
        used = cost.layer_resources(layer, flow, folding)
        fold = folding[layer.name]
        rows.append(
            f"| {layer.name} | {one_line(layer.origin)} | {layer.kind} | {fold.pe} | {fold.simd} | "
            f"{folds.cycles(layer, flow, folding).frame} | {used.get('dsp', 0):.0f} | "
            f"{used.get('bram_18k', 0):.0f} |"
        )
    steps = [
        "make xo                              # synthesis: a kernel object",
        "make xclbin PLATFORM=...             # place and route",
        "make host && build/host build/kernel.xclbin 1 in.bin out.bin",
    ]
    if target.options.get("host") == "pynq":
        steps = [
            "make xo                              # synthesis: an IP for a Vivado block design",
            "python host/run_pynq.py design.bit inputs.npz outputs.npz        # on the board",
        ]
    host = [op.op_type for port in (*flow.inputs, *flow.outputs) for op in port.host]
    notes = "".join(f"- {note}\n" for note in estimate.notes)
    return render(
        "README.md",
        title=flow.name,
        version=trivium.__version__,
        target=target.title or target.name,
        clock_mhz=f"{hertz / 1e6:g}",
        interval=f"{interval:,}",
        frames_per_second=f"{hertz / interval:,.0f}",
        latency_us=f"{(estimate.seconds or 0) * 1e6:,.1f}",
        resource_rows="\n".join(
            f"| {name} | {amount:,.0f}{_of(name, target)} |"
            for name, amount in estimate.resources.items()
        ),
        build_steps="\n".join(steps),
        host_summary=", ".join(dict.fromkeys(host)) or "only the order of axes",
        layer_rows="\n".join(rows),
        notes=f"\n## Notes\n\n{notes}" if notes else "",
    )


def _of(name: str, target: Target) -> str:
    return f" of {target.resources[name]:,.0f}" if name in target.resources else ""
