"""ONNX Runtime on the CPU: the default backend, always there."""
