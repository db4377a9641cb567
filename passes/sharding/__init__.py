"""What the pass ``shard`` stands on: which axes of which values split together (`axes`), what each
operator ties and needs whole (`rules`), and the mesh of devices in ONNX's own terms (`mesh`).
"""
