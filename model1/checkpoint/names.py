"""What one tensor is called in the three namings a checkpoint can have.

The shipped name (DeepSeek's own) is the one used inside model1; the others are read into it:
transformers' module tree, and the hybrid of both that its `save_pretrained` writes. Each tensor
is recognised on its own, so a directory may mix them. Knows nothing of files or shapes.
"""

import re

# shipped name -> name in transformers' module tree
_TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}

# The same below `layers.N.`
_LEAVES = {
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    # transformers nests the indexer in the compressor, DeepSeek a compressor in the indexer.
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": ("self_attn.compressor.indexer.scorer.weights_proj.weight"),
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    # Only transformers stacks the experts; our bank does too and lends it the names.
    "ffn.experts.w13": "mlp.experts.gate_up_proj",
    "ffn.experts.w2": "mlp.experts.down_proj",
}

# save_pretrained undoes most of transformers' renaming, but not all of it, and one it undoes
# wrongly: the rule that turns `norm` into `kv_norm` below the compressors also hits attention.
_SAVED_TOP = {
    name: name if name == "head.weight" else module_name for name, module_name in _TOP.items()
}
_SAVED_LEAVES = {"attn.kv_norm.weight": "attn.norm.weight"}

_TOP_BY_ALIAS = {alias: name for name, alias in _TOP.items()} | {name: name for name in _TOP}
_LEAF_BY_ALIAS = {
    alias: name
    for table in (_LEAVES, _SAVED_LEAVES, {name: name for name in _LEAVES})
    for name, alias in table.items()
}
_IN_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")
_EXPERT_LEAF = re.compile(r"ffn\.experts\.\d+\.w[123]\.weight")
_DRAFT = re.compile(r"(?:^|\.)mtp\.")
_SCALE_COMPANION = re.compile(r"(?:\.scale|_scale_inv|\.weight_scale)$")
# Rounded to bfloat16 these would change the routing, the softmax or the residual mixing.
_FLOAT32 = re.compile(r"(?:^|\.)(?:hc_\w+_(?:fn|base|scale)|attn_sink|ape|gate\.bias)$")


def shipped_name(stored: str) -> str | None:
    """The shipped name of a tensor stored under any of the three; None if it is none of ours."""
    match = _IN_LAYER.fullmatch(stored)
    if match is None:
        return _TOP_BY_ALIAS.get(stored)
    layer, leaf = match.groups()
    known = leaf if _EXPERT_LEAF.fullmatch(leaf) else _LEAF_BY_ALIAS.get(leaf)
    return None if known is None else f"layers.{layer}.{known}"


def saved_name(shipped: str) -> str:
    """What save_pretrained calls the tensor."""
    if shipped in _SAVED_TOP:
        return _SAVED_TOP[shipped]
    _, layer, leaf = shipped.split(".", 2)
    return f"model.layers.{layer}.{_SAVED_LEAVES.get(leaf, leaf)}"


def is_draft(stored: str) -> bool:
    """Whether it belongs to the multi-token-prediction layers, which model1 does not run."""
    return _DRAFT.search(stored) is not None


def is_quantisation_scale(stored: str) -> bool:
    return _SCALE_COMPANION.search(stored) is not None and shipped_name(stored) is None


def keeps_float32(shipped: str) -> bool:
    """Whether the parameter stays float32 whatever dtype the model has."""
    return _FLOAT32.search(shipped) is not None
