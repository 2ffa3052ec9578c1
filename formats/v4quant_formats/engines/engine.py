"""What an engine's rules look like, and the GPU generations they speak of.

An `Engine` is data: how it renames modules, which stored kinds it takes for experts and for other
linear layers, which config keys it reads, what it does with names it does not know. The checks that
use it are in preflight/. Where a rule was tried or only read is said in docs/serving.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from v4quant_formats.model_config import ModelConfig
from v4quant_formats.release_config import FIXED

Release = Literal["v4", "v41"]
GPUS = {
    "sm80": "A100",
    "sm86": "RTX 3090, A40",
    "sm89": "RTX 4090, L40S",
    "sm90": "H100, H200, H20",
    "sm100": "B200, GB200",
    "sm103": "B300",
    "sm120": "RTX 5090, RTX PRO 6000",
    "sm121": "DGX Spark",
}
"""GPU generations by compute capability, and the cards people know them by."""

V4_ATTENTION = ("sm90", "sm100", "sm103", "sm120", "sm121")
"""Where vLLM and SGLang have attention kernels for DeepSeek-V4, whatever the experts are."""


@dataclass(frozen=True)
class ConfigRule:
    """A config.json key an engine reads: its allowed values (None: any), and what happens else.

    positive: it must be a number above 0. every_release: V4.1 has it too. instead: keys that newer
    configs have in its place.
    """

    key: str
    allowed: tuple[Any, ...] | None
    consequence: str
    severity: str = "error"
    positive: bool = False
    every_release: bool = True
    instead: tuple[str, ...] = ()

    def allows(self, value: Any) -> bool:
        """Whether the engine gets what it needs."""
        if self.allowed is not None:
            return value in self.allowed
        if self.positive:
            return isinstance(value, int | float) and value > 0
        return value is not None


def _constant(key: str, positive: bool = False, instead: tuple[str, ...] = ()) -> ConfigRule:
    """A constant of the forward pass: an engine may have the right one built in, so a warning."""
    text = "the engine takes whatever its own code has for it"
    return ConfigRule(key, None, text, "warning", positive, False, instead)


CONSTANTS = (
    *(
        _constant(key, instead=("rope_parameters",))
        for key in ("rope_theta", "compress_rope_theta", "rope_scaling")
    ),
    *(
        _constant(key, positive=True)
        for key in ("sliding_window", "index_topk", "qk_rope_head_dim", "hc_sinkhorn_iters")
    ),
    *(_constant(key) for key in ("rms_norm_eps", "hc_eps")),
)
ROUTING_KEYS = (
    ConfigRule(
        "topk_method",
        (FIXED["topk_method"],),
        "the router's bias is not created, so it cannot load",
    ),
    ConfigRule("scoring_func", (FIXED["scoring_func"],), "experts are chosen and weighted wrongly"),
    ConfigRule("norm_topk_prob", (FIXED["norm_topk_prob"],), "routing weights are not normalised"),
    ConfigRule(
        "n_shared_experts",
        (FIXED["n_shared_experts"],),
        "the shared expert is built in another width",
    ),
    ConfigRule("routed_scaling_factor", None, "the experts' output has the wrong size"),
    ConfigRule("swiglu_limit", None, "activations are not clamped", positive=True),
    ConfigRule(
        "num_hash_layers", None, "hash-routed layers are built as learned ones", every_release=False
    ),
    ConfigRule("compress_ratios", None, "layers get the wrong kind of attention"),
)


@dataclass(frozen=True)
class Engine:
    """The rules of one engine; see the module's docstring.

    module_name(module, layers) -> the engine's own name of a module, for target patterns.
    v41_name: the same for V4.1, where it differs.
    releases: the releases it has a class for.
    methods: values of `quant_method` it can be predicted for ("" is an unquantized checkpoint).
    others: further values it accepts, not modelled here.
    experts, dense: stored kind -> GPU generations that run it (see preflight/storage.py).
    refusals: kind, or another engine's container -> why it is not taken and what is, where more can
    be said than that.
    wo_a: kinds its output projection takes.
    strict_wo_a: of V4.1 that projection takes tiles of 32 only beside FP4 experts.
    drafts: draft stages' experts are coded "like" the trunk's, stay "mxfp4", or are "ignored".
    unknown_names: what it does with tensors it has no place for.
    unmatched: a linear layer that neither target nor `ignore` names is "plain" or an "error".
    first_group: it takes the first group that speaks of experts for all experts, as transformers.
    reads_linear_fp8: it reads `linear_fp8_config`.
    reads_ignore_for_nvfp4: releases whose ModelOpt hybrids may keep stages in MXFP4 by `ignore`.
    needs_nvfp4_keys: it takes a ModelOpt hybrid only with `group_size` and `quant_algo`.
    shards: it splits a model over GPUs by tensor parallelism.
    kv_cache(config, gpus, context) -> bytes on each GPU, where more is known than entries' sizes.
    decodes: it holds every weight in BF16, whatever the file holds.
    reads_architectures: it chooses the model class by `architectures`, not by `model_type`.
    chat_options: of its server, by release: what chats need. From the engines' recipes, not run.
    container: what it loads; "safetensors", or a file type this package writes elsewhere.
    """

    name: str
    title: str
    module_name: Callable[[str, int], str]
    methods: tuple[str, ...]
    experts: Mapping[str, tuple[str, ...]]
    dense: Mapping[str, tuple[str, ...]]
    others: tuple[str, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    wo_a: tuple[str, ...] = ("plain", "fp8", "ct-fp8-block")
    strict_wo_a: bool = False
    config: tuple[ConfigRule, ...] = (*ROUTING_KEYS, *CONSTANTS)
    drafts: Literal["like", "mxfp4", "ignored"] = "like"
    unknown_names: Literal["error", "warning"] = "error"
    unmatched: Literal["plain", "error"] = "plain"
    first_group: bool = False
    reads_linear_fp8: bool = False
    reads_ignore_for_nvfp4: tuple[Release, ...] = ()
    needs_nvfp4_keys: bool = False
    shards: bool = True
    kv_cache: Callable[[ModelConfig, int, int], int] | None = None
    decodes: bool = False
    reads_architectures: bool = True
    chat_options: Mapping[Release, tuple[str, ...]] = field(default_factory=dict)
    container: str = "safetensors"
    advice: str = ""
    v41_name: Callable[[str, int], str] | None = None
    releases: tuple[Release, ...] = ("v4", "v41")
