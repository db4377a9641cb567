"""Recovery: what a recipe cost a model in accuracy, trained back on the ONNX graph itself.

>>> tuned = trivium.tune("model.onnx", "data.npz", recipe="int4+distill")    # doctest: +SKIP

`tuning` is the way in. `twin` makes the graph trainable (float weights behind what the recipe
quantized), `losses` says what is minimized, `data` what is learned from, `loop` trains,
`checkpoint` keeps what a killed run needs to go on, and `sparsity` holds zeros where pruning put
them.
"""

from __future__ import annotations
