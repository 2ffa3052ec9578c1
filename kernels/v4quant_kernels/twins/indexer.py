"""The lightning indexer in plain torch: which compressed keys a token attends to.

Queries (64 small heads) and keys are 128 channels wide, rotated by a Hadamard matrix and rounded to
E2M1 with one power-of-two scale per 32 channels: 64 bytes of codes and 4 of scales, so a key costs
68 bytes. With `w` the per-head weight (the model folds 128^-0.5 * 64^-0.5 into it),

    score[t, s] = sum over heads h of  w[t, h] * relu(q[t, h] . k[s])

for the keys that token t may see: a key stands for four tokens and exists once they are complete,
so s < (position(t) + 1) // 4. Everything else is -inf.

Rounding of the codes is to nearest, ties to the even code, as the hardware does it; the scale is
`2^ceil(log2(max / 6))` as in `activation`. Products are float32. The published reference rounds
q . k to bfloat16 before the relu, faster kernels do not: `round_products` chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.ref import e2m1, e8m0
from v4quant_kernels.twins.activation import fake_quant_e2m1, hadamard

GROUP = 32
TOKENS_PER_KEY = 4

_TINY = 2.0**-126
WORKSPACE = 2**26
"""Scores that `index_top_k` holds at a time (256 MiB)."""

_MAX_PRODUCTS = 2**24  # q . k of one chunk of tokens, held at a time


def quantize_index_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """Hadamard, then E2M1: (codes uint8 `[..., D/2]`, scales float8_e8m0fnu `[..., D/32]`).

    x: any floating dtype `[..., D]`, D a power of two and at least 32. Runs on any device. The
    decoded vector equals `fake_quant_e2m1(hadamard(x))` bit for bit.
    """
    rotated = hadamard(x).float()
    values = _by_group(fake_quant_e2m1(rotated, GROUP))
    exponent = _scale_exponent(_by_group(rotated))
    codes = e2m1.encode(values * e8m0.power_of_two(-exponent).unsqueeze(-1))
    return e2m1.pack(codes.flatten(-2)), e8m0.encode_exponent(exponent)


def _by_group(x: Tensor) -> Tensor:
    return x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)


def _scale_exponent(groups: Tensor) -> Tensor:
    """int32 ceil(log2(amax * f32(1/6))), amax not below 6 * 2^-126 (`ref.activation`)."""
    amax = groups.abs().amax(dim=-1).clamp(min=e2m1.MAX * _TINY)
    inverse = torch.tensor(1 / e2m1.MAX, dtype=torch.float32, device=groups.device)
    return e8m0.ceil_exponent(amax * inverse).clamp(max=126)


def pack_index_keys(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes and scales of `quantize_index_vectors` as cache rows: uint8 `[..., D/2 + D/32]`."""
    return torch.cat((codes, scales.view(torch.uint8)), dim=-1)


def visible_keys(positions: Tensor, num_keys: int) -> Tensor:
    """int32 count of keys that tokens at `positions` (int, any shape) may see."""
    return torch.div(positions + 1, TOKENS_PER_KEY, rounding_mode="floor").clamp(0, num_keys).int()


def check_indexer_inputs(
    q_codes: Tensor,
    q_scale: Tensor,
    k_packed: Tensor,
    head_weights: Tensor,
    positions: Tensor,
    first_key: Tensor | None = None,
) -> None:
    """Raise V4QuantError unless shapes and dtypes are those `indexer_logits` documents."""
    tokens, heads, half = q_codes.shape if q_codes.ndim == 3 else (0, 0, 0)
    groups = 2 * half // GROUP
    expected = {
        "q_codes": (q_codes, (tokens, heads, groups * GROUP // 2)),
        "q_scale": (q_scale, (tokens, heads, groups)),
        "k_packed": (k_packed, (k_packed.shape[0], half + groups)),
        "head_weights": (head_weights, (tokens, heads)),
        "positions": (positions, (tokens,)),
    }
    if first_key is not None:
        expected["first_key"] = (first_key, (tokens,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise V4QuantError(
                f"indexer: {name} must have shape {list(shape)}, not {list(tensor.shape)}"
            )
    if half == 0 or half & (half - 1):
        raise V4QuantError(f"indexer: the head dimension must be a power of two, not {2 * half}")
    for name, tensor in (("q_codes", q_codes), ("q_scale", q_scale), ("k_packed", k_packed)):
        if tensor.element_size() != 1:
            raise V4QuantError(f"indexer: {name} must hold bytes, not {tensor.dtype}")


def indexer_logits(
    q_codes: Tensor,
    q_scale: Tensor,
    k_packed: Tensor,
    head_weights: Tensor,
    positions: Tensor | None = None,
    round_products: bool = False,
    *,
    first_key: Tensor | None = None,
    num_keys: int | None = None,
    skipped: int = 0,
) -> Tensor:
    """float32 `[T, S]` scores, -inf where a key is not yet visible.

    q_codes: uint8 `[T, H, D/2]`. q_scale: uint8 or float8_e8m0fnu `[T, H, D/32]`. k_packed: uint8
    `[keys, D/2 + D/32]` (`pack_index_keys`). head_weights: float32 `[T, H]`. positions: int `[T]`,
    each token's position in its sequence (default 0..T-1).

    first_key (int `[T]`) makes the batch ragged: token t's own sequence begins at that row of
    `k_packed`. Column c is key `skipped + c` of the sequence, and there are `num_keys` columns
    (default: all after the skipped). Raises V4QuantError for other shapes.
    """
    if positions is None:
        positions = torch.arange(q_codes.shape[0], device=q_codes.device)
    check_indexer_inputs(q_codes, q_scale, k_packed, head_weights, positions, first_key)
    columns = k_packed.shape[0] - skipped if num_keys is None else num_keys
    if first_key is None:
        first_key = torch.zeros_like(positions)
    query, weights = _decode(q_codes, q_scale), head_weights.float()
    scores = torch.full((query.shape[0], columns), -torch.inf, device=query.device)
    for first in torch.unique(first_key).tolist():
        rows = (first_key == first).nonzero().squeeze(1)
        begin = first + skipped
        keys = _unpack(k_packed[begin : begin + columns])
        size = max(1, _MAX_PRODUCTS // max(1, query.shape[1] * keys.shape[0]))
        for part in torch.split(rows, size):
            found = _scores(query[part], keys, weights[part], round_products)
            scores[part, : keys.shape[0]] = found
    end = visible_keys(positions, skipped + columns)
    hidden = torch.arange(skipped, skipped + columns, device=end.device) >= end.unsqueeze(-1)
    return scores.masked_fill_(hidden, -torch.inf)


def _unpack(k_packed: Tensor) -> Tensor:
    """float32 `[keys, D]` of packed keys."""
    groups = k_packed.shape[1] // (GROUP // 2 + 1)
    half = groups * GROUP // 2
    return _decode(k_packed[:, :half].contiguous(), k_packed[:, half:].contiguous())


def _scores(query: Tensor, keys: Tensor, head_weights: Tensor, round_products: bool) -> Tensor:
    products = query @ keys.T
    if round_products:
        products = products.bfloat16().float()
    return (head_weights.unsqueeze(-1) * products.relu_()).sum(dim=1)


def _decode(codes: Tensor, scale: Tensor) -> Tensor:
    groups = _by_group(e2m1.decode_packed(codes))
    return (groups * e8m0.decode(scale).unsqueeze(-1)).flatten(-2)


def top_k(logits: Tensor, k: int) -> Tensor:
    """int64 `[T, k]` indices of the k largest finite scores: value descending, index ascending.

    Exact and stable, so equal scores (the relu makes many zeros) give the same answer everywhere.
    Rows with fewer than k visible keys are padded with -1.
    """
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    chosen = indices[:, :k].masked_fill(values[:, :k] == -torch.inf, -1)
    return torch.nn.functional.pad(chosen, (0, k - chosen.shape[1]), value=-1)


def pieces(tokens: int, columns: int, workspace: int) -> tuple[list[slice], list[slice]]:
    """How to cut tokens and keys so that no piece has more than `workspace` scores.

    Keys are cut in quarters of the workspace's square root at the least, so that a piece still
    has many tokens to share the decoding of its keys.
    """
    width = max(1, min(columns, max(workspace // max(tokens, 1), int(workspace**0.5) * 8)))
    width = min(width, workspace)
    rows = max(1, workspace // width)
    cut = [slice(a, min(a + rows, tokens)) for a in range(0, tokens, rows)]
    return cut, [slice(a, min(a + width, columns)) for a in range(0, columns, width)] or [
        slice(0, 0)
    ]


def index_top_k(
    q_codes: Tensor,
    q_scale: Tensor,
    k_packed: Tensor,
    head_weights: Tensor,
    k: int,
    positions: Tensor | None = None,
    round_products: bool = False,
    *,
    first_key: Tensor | None = None,
    num_keys: int | None = None,
    workspace: int = WORKSPACE,
) -> Tensor:
    """int64 `[T, k]`: `top_k(indexer_logits(...), k)` without ever holding all scores.

    Tokens and keys are scored in pieces of at most `workspace` scores; the best k of each piece
    and of what came before it are merged. Pieces follow each other in index order and both steps
    are stable, so the result is exact, ties included. -1 pads.
    """
    tokens = q_codes.shape[0]
    if positions is None:
        positions = torch.arange(tokens, device=q_codes.device)
    columns = k_packed.shape[0] if num_keys is None else num_keys
    token_pieces, key_pieces = pieces(tokens, columns, workspace)
    rows = [q_codes.new_empty(0, k, dtype=torch.int64)]
    for t in token_pieces:
        best = torch.empty(t.stop - t.start, 0, device=q_codes.device)
        indices = best.long()
        for s in key_pieces:
            logits = indexer_logits(
                q_codes[t], q_scale[t], k_packed, head_weights[t], positions[t], round_products,
                first_key=None if first_key is None else first_key[t],
                num_keys=s.stop - s.start, skipped=s.start,
            )  # fmt: skip
            here = torch.arange(s.start, s.stop, device=logits.device).expand(logits.shape)
            both, known = torch.cat((best, logits), 1), torch.cat((indices, here), 1)
            order = torch.sort(both, dim=-1, descending=True, stable=True).indices[:, :k]
            best, indices = both.gather(1, order), known.gather(1, order)
        chosen = indices.masked_fill(best == -torch.inf, -1)
        rows.append(torch.nn.functional.pad(chosen, (0, k - chosen.shape[1]), value=-1))
    return torch.cat(rows)
