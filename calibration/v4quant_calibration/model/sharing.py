"""Which matrices multiply the same rows, so that what one sees the others see."""

from __future__ import annotations

SHARING = {
    "attn.wkv": (
        "attn.wq_a", "attn.wkv", "attn.compressor.wkv", "attn.compressor.wgate",
        "attn.indexer.compressor.wkv", "attn.indexer.compressor.wgate",
        "attn.indexer.weights_proj",
    ),
    "attn.wq_b": ("attn.wq_b", "attn.indexer.wq_b"),
    "attn.wo_a": ("attn.wo_a",),
    "attn.wo_b": ("attn.wo_b",),
    "ffn.shared_experts.w1": ("ffn.shared_experts.w1", "ffn.shared_experts.w3"),
    "ffn.shared_experts.w2": ("ffn.shared_experts.w2",),
}  # fmt: skip
"""Matrices below a stage by the one that `Observer.on_linear` is called for."""
