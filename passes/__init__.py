"""All passes on one page: name -> where it lives, imported when it is asked for.

One file for each pass; the pipelines that string them together are in ``recipes/``.
"""

from __future__ import annotations

PASSES: dict[str, str] = {
    "inline-functions": "trivium.passes.inline_functions:InlineFunctions",
    "convert-opset": "trivium.passes.convert_opset:ConvertOpset",
    "decompose-functions": "trivium.passes.decompose_functions:DecomposeFunctions",
    "drop-empty-operands": "trivium.passes.drop_empty_operands:DropEmptyOperands",
    "fold-constants": "trivium.passes.fold_constants:FoldConstants",
    "fold-affine": "trivium.passes.fold_affine:FoldAffine",
    "fold-batchnorm": "trivium.passes.fold_batchnorm:FoldBatchNorm",
    "fold-pad": "trivium.passes.fold_pad:FoldPad",
    "fuse-activation": "trivium.passes.fuse_activation:FuseActivation",
    "fuse-bias": "trivium.passes.fuse_bias:FuseBias",
    "fill-shapes": "trivium.passes.fill_shapes:FillShapes",
    "infer-symbolic-shapes": "trivium.passes.infer_symbolic_shapes:InferSymbolicShapes",
    "unflatten-transpose": "trivium.passes.unflatten_transpose:UnflattenTranspose",
    "infer-shapes": "trivium.passes.infer_shapes:InferShapes",
    "lift-constants": "trivium.passes.lift_constants:LiftConstants",
    "recognize-activations": "trivium.passes.recognize_activations:RecognizeActivations",
    "recognize-attention": "trivium.passes.recognize_attention:RecognizeAttention",
    "recognize-normalization": "trivium.passes.recognize_normalization:RecognizeNormalization",
    "recognize-rotary": "trivium.passes.recognize_rotary:RecognizeRotary",
    "insert-kv-cache": "trivium.passes.insert_kv_cache:InsertKVCache",
    "remove-dead-code": "trivium.passes.remove_dead_code:RemoveDeadCode",
    "remove-identities": "trivium.passes.remove_identities:RemoveIdentities",
    "remove-no-ops": "trivium.passes.remove_no_ops:RemoveNoOps",
    "simplify": "trivium.passes.simplify:Simplify",
    "shard": "trivium.passes.shard:Shard",
    "share-duplicates": "trivium.passes.share_duplicates:ShareDuplicates",
    "convert-float": "trivium.passes.convert_float:ConvertFloat",
    "prune-layers": "trivium.passes.prune_layers:PruneLayers",
    "prune-magnitude": "trivium.passes.prune_magnitude:PruneMagnitude",
    "prune-n-m": "trivium.passes.prune_n_m:PruneNM",
    "prune-sparsegpt": "trivium.passes.prune_sparsegpt:PruneSparseGPT",
    "prune-structured": "trivium.passes.prune_structured:PruneStructured",
    "prune-wanda": "trivium.passes.prune_wanda:PruneWanda",
    "quantize-static": "trivium.passes.quantize_static:QuantizeStatic",
    "split-projections": "trivium.passes.split_projections:SplitProjections",
    "trace-dims": "trivium.passes.trace_dims:TraceDims",
    "unflatten-softmax": "trivium.passes.unflatten_softmax:UnflattenSoftmax",
    "quantize-weights": "trivium.passes.quantize_weights:QuantizeWeights",
    "unique-names": "trivium.passes.unique_names:UniqueNames",
    "widen-attention-mask": "trivium.passes.widen_attention_mask:WidenAttentionMask",
}
