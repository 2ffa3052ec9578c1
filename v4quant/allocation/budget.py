"""budget: how many bytes an output may have, from what people know.

A size; bits per weight, over all parameters of the output as llama.cpp counts them; or cards and
the context they shall serve. For the last, what else must fit is estimated from the release's own
dimensions, in llama.cpp's way of sharing out whole layers:

    room  = cards * size * 0.95 - KV(context) - cards * (runtime + activations)
    bytes = room * L / (L + cards - 1)

since each card but one may be left with a gap of nearly a layer. Where experts may lie in system
memory, too, the planner is asked which file between the smallest and the largest it could still
place. KV is the BF16 cache of one
sequence; activations are a batch of 512 tokens: logits and sixteen copies of the hyper-connection
streams, in float32. This is an estimate; the size it leads to is exact.
"""

from __future__ import annotations

from v4quant.allocation.card_budget import parse_cards
from v4quant.allocation.knapsack import BudgetError
from v4quant.planner import llama_cpp
from v4quant.planner import machines as planner_machines
from v4quant.planner.candidates import blended, largest_share
from v4quant.planner.footprint import Footprint, Outline, footprint
from v4quant.recipe import Recipe
from v4quant_formats.layouts.table import LAYOUTS
from v4quant_formats.model_config import Dimensions
from v4quant_kernels.scheme import SCHEMES

_USABLE = 0.95
_RUNTIME_BYTES = 600 * 10**6
_BATCH = 512
_STREAM_COPIES = 16
_HALVINGS = 24
_RESERVE = 0.995  # what is sized as a mixture of two schemes may lie a little differently


def bits_budget(bits: float, weights: int) -> int:
    """Bytes of `weights` parameters at `bits` each."""
    if not 0 < bits < 64:
        raise BudgetError(f"--bpw {bits} is not a number of bits per weight")
    return int(bits * weights / 8)


def cards_budget(text: str, context: int, config: Dimensions) -> int:
    """Bytes of weights that fit `text`, like `4x24GB`, beside a context. Raises BudgetError."""
    cards, size = parse_cards(text)
    per_token = config.kv_bytes_per_token()
    hidden = _STREAM_COPIES * config.hc_mult * config.hidden_size
    own = _RUNTIME_BYTES + 4 * _BATCH * (config.vocab_size + hidden)
    room = int(cards * size * _USABLE) - per_token * context - cards * own
    if room <= 0:
        raise BudgetError(
            f"{text} hold no weights beside a context of {context}: KV cache and activations take "
            f"{(per_token * context + cards * own) / 1e9:.2f} GB"
        )
    layers = config.num_hidden_layers
    return room * layers // (layers + cards - 1)


def machine_budget(
    cards: str, ram: str, context: int, outline: Outline, dense: str, draft: str
) -> int:
    """Bytes of a GGUF that `plan` could still place on cards and in memory, sizes as sold.

    dense: type of the dense matrices, which lie on the cards. Raises BudgetError where the smallest
    file does not fit, and MachineError.
    """
    machine = planner_machines.with_memory(planner_machines.parse_cards(cards), ram, None)

    def file_of(scheme: str) -> Footprint:
        return footprint(outline, Recipe(scheme, format="gguf", dense=dense, draft=draft))

    def fits(file: Footprint) -> bool:
        return llama_cpp.place(file, machine, outline.dimensions, context) is not None

    schemes = sorted(LAYOUTS["gguf"].schemes, key=lambda name: SCHEMES[name].bits_per_weight)
    lower, upper = file_of(schemes[0]), file_of(schemes[-1])
    if not fits(lower):
        raise BudgetError(
            f"{cards} and {ram} of memory do not hold the smallest file, {lower.trunk / 1e9:.2f} "
            f"GB, beside a context of {context}; `v4quant plan` says what would"
        )
    share = 1.0 if fits(upper) else largest_share(lower, upper, fits, _HALVINGS)
    found = blended(lower, upper, share)
    return int(_RESERVE * found.trunk) + found.tables + found.drafts
