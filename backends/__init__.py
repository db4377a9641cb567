"""All backends on one page: name -> where it lives, imported when it is asked for."""

from __future__ import annotations

BACKENDS: dict[str, str] = {
    "fpga": "trivium.backends.fpga.backend:BACKEND",
    "onnxruntime": "trivium.backends.onnxruntime.backend:BACKEND",
    "openvino": "trivium.backends.openvino.backend:BACKEND",
    "xla": "trivium.backends.xla.backend:BACKEND",
    "tensorrt": "trivium.backends.tensorrt.backend:BACKEND",
    "tvm": "trivium.backends.tvm.backend:BACKEND",
}
