"""The operators: one table of their schemas, the shapes of their results, and their costs.

They are torch operators so that FlopCounterMode counts them and torch.compile leaves them whole. torch's dispatcher
chooses the implementation: on CPUs the C functions of cpu/, on GPUs the Triton kernels of triton/, and elsewhere, or
for dtypes that these do not support, the reference (reference.py). No operator has a gradient of its own (see
autograd.py). Counts of channels and rows read stay on the inputs' device; only references wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import register_flop_formula

from students.kernels import cpu, reference, triton
from students.kernels.cpu import toolchain
from students.kernels.merging import flops_of_merging, shapes_of_merged
from students.kernels.trial import on_gpu
from students.kernels.triton import tuning

One = Callable[..., Tensor]
Pair = Callable[..., tuple[Tensor, Tensor]]
Cost = Callable[..., int]
"""Computes the cost of a call: (*arguments, out_val=results) -> number."""
FEW_ROWS = 4
"""Inputs up to which reading weights costs more than arithmetic on a CPU; for GPUs see triton/tuning.py."""


@dataclass(frozen=True)
class Operator:
    """The costs of an operator."""

    flops: Cost | None
    """FLOPs of the products; None for an operator without products, as torch counts no other FLOPs."""
    read: Cost | None
    """Bytes of weights and tokens that the products read; None for an operator without products."""


OPERATORS: dict[str, Operator] = {}
"""Costs by operator name."""
_library = torch.library.Library("elastic", "DEF")


def _operator(schema: str, shapes: Callable[..., Any], flops: Cost | None = None, read: Cost | None = None) -> Any:
    """Define an operator, register the implementations that have its name, and return the operator.

    shapes: returns empty tensors with the shapes, dtypes and device of the results. flops, read: as in Operator.
    """
    name = _library.define(schema)
    OPERATORS[name] = Operator(flops, read)
    _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    if name in cpu.OPERATORS:
        _library.impl(name, cpu.OPERATORS[name], "CPU")
    if name in triton.OPERATORS and triton.installed():
        _library.impl(name, on_gpu(name), "CUDA")
    torch.library.register_fake(f"elastic::{name}", shapes, lib=_library)
    packet = getattr(torch.ops.elastic, name)
    if flops is not None:
        register_flop_formula(packet, get_raw=True)(flops)
    return packet.default


def on_cpu(operator: Any) -> Callable[..., Any]:
    """Return the function that runs an operator on CPUs."""
    name = operator.__name__.partition(".")[0]
    return cpu.OPERATORS.get(name) or getattr(reference, name)


def compiled(x: Tensor) -> bool:
    """Return whether operators run as compiled kernels, not as references, for the dtype and device of x."""
    if x.is_cuda:
        return triton.available() and x.dtype != torch.float64
    return toolchain.native(x) is not None


def observed() -> bool:
    """Return whether operations are being counted or compiled, for which torch's own operators have to be called."""
    return torch.compiler.is_compiling() or (is_in_torch_dispatch_mode() and toolchain.recording.calls is None)


def _like(x: Tensor) -> Tensor:
    """Return an empty contiguous tensor like x: results are contiguous whatever the inputs are."""
    return x.new_empty(x.shape)


def _by_token(x: Tensor) -> Tensor:
    """Return an empty tensor like x [B, H, T, d] that lies in memory as [B, T, H, d]."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _size(x: Tensor | None) -> int:
    """Return the number of bytes of x; 0 for None."""
    return 0 if x is None else x.numel() * x.element_size()


def _channels_taken(x: Tensor, weight: Tensor, kept: Tensor) -> int:
    """Return how many channels are multiplied: `kept`, or all of them where the tuning table of a GPU replaces the
    kernel with a dense product, which saves nothing."""
    rows, (inputs, outputs) = x.numel() // x.shape[-1], weight.shape
    dense = weight.is_cuda and triton.available() and tuning.gather(weight.device, rows, outputs) is None
    return inputs if dense else int(kept)


def _channels_flops(x: Tensor, limit: Tensor, weight: Tensor, *rest: Any, out_val: tuple[Tensor, Tensor]) -> int:
    _, down, up, _ = rest
    corrections = 0 if up is None else down.numel() + up.numel()
    rows = x.numel() // x.shape[-1]
    return 2 * rows * (_channels_taken(x, weight, out_val[1]) * weight.shape[1] + corrections)


def _channels_read(x: Tensor, limit: Tensor, weight: Tensor, *rest: Any, out_val: tuple[Tensor, Tensor]) -> int:
    _, down, up, _ = rest
    taken = _channels_taken(x, weight, out_val[1])
    return taken * weight.shape[1] * weight.element_size() + _size(down) + _size(up)


read_channels: Pair = _operator(
    "read_channels(Tensor x, Tensor limit, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, int[] ends)"
    " -> (Tensor, Tensor)",
    lambda x, limit, weight, *_: (x.new_empty(weight.shape[1]), x.new_empty((), dtype=torch.long)),
    _channels_flops,
    _channels_read,
)
"""Several linear layers with the same input x [I], computed from the channels with |x| >= limit [I] (float32).

weight [I, O]: the layers side by side, with contiguous rows; bias [O]; down [parts * r, I] and up [r, O]: low-rank
corrections, which read every channel; ends: the end of each layer's outputs. Returns out [O] and the number of channels
read."""

few_channels: Pair = _operator(
    "few_channels(Tensor x, Tensor limit, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, int[] ends)"
    " -> (Tensor, Tensor)",
    lambda x, limit, weight, *_: (x.new_empty(len(x), weight.shape[1]), x.new_empty((), dtype=torch.long)),
    _channels_flops,
    _channels_read,
)
"""`read_channels` for a few inputs x [B, I] -> [B, O]: the channels that any of them needs are read, once for all."""


def _fused_shapes(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    residual, weight = rest[4], rest[6]
    outputs = weight.shape[1]
    found = 0 if residual is None else (len(x), -(-outputs // reference.TOGETHER))
    wide = x.new_empty(found, dtype=torch.float32)
    return x.new_empty(len(x), outputs), x.new_empty((), dtype=torch.long), wide


fused_channels: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator(
    "fused_channels(Tensor x, Tensor? other, Tensor? squares, float epsilon, int kind, Tensor? residual, Tensor limit,"
    " Tensor weight, Tensor? bias, Tensor? down, Tensor? up, int[] ends) -> (Tensor, Tensor, Tensor)",
    _fused_shapes,
    lambda x, *rest, out_val: _channels_flops(x, *rest[5:], out_val=out_val[:2]),
    lambda x, *rest, out_val: _channels_read(x, *rest[5:], out_val=out_val[:2]),
)
"""`few_channels` fused with the operators in front of the layers and behind them.

kind: the layers' input. -1: x [B, I]; 0 to 2: the RMS norm of x as in `rms_norm`, with weight `other` [I] and partial
sums of squares `squares` [B, n], which add up to each input's sum; 3: SiLU(x) * other [B, I]; 4: GELU(x), with tanh,
times other. residual [B, O], for one layer only: added to the layer's output; output and sum are each rounded. The
third result is the sums of squares [B, n] of each 64 outputs of that sum."""


def _gated(weight: Tensor, is_open: Tensor) -> int:
    """Return how many numbers of a weight [O, I] the open ones of its outputs read; is_open [1 or O]."""
    return int(is_open.sum()) * weight.numel() // len(is_open)


dot_rows: One = _operator(
    "dot_rows(Tensor x, Tensor weight, Tensor? bias, Tensor? rows) -> Tensor",
    lambda x, weight, bias, rows: x.new_empty(len(weight) if rows is None else len(rows)),
    lambda x, *_, out_val: 2 * len(x) * len(out_val),
    lambda x, weight, *_, out_val: len(out_val) * weight.shape[1] * weight.element_size(),
)
"""The outputs `rows` [n] (None: all) of a linear layer with contiguous weight [O, I]: x [I] -> [n]."""

gated_rows: One = _operator(
    "gated_rows(Tensor x, Tensor weight, Tensor? bias, Tensor is_open) -> Tensor",
    lambda x, weight, *_: x.new_empty(len(weight)),
    lambda x, weight, bias, is_open, *, out_val: 2 * _gated(weight, is_open),
    lambda x, weight, bias, is_open, *, out_val: _gated(weight, is_open) * weight.element_size(),
)
"""The outputs [O] of a linear layer with contiguous weight [O, I] for x [I], 0 where is_open [1 or O] is false."""

exact_rows: Pair = _operator(
    "exact_rows(Tensor x, Tensor head, Tensor? bias, Tensor preview, Tensor limit, Tensor tail) -> (Tensor, Tensor)",
    lambda x, head, bias, preview, *_: (_like(preview), x.new_empty(len(x), dtype=torch.long)),
    lambda x, *_, out_val: 2 * int(out_val[1].sum()) * x.shape[1],
    lambda x, head, *_, out_val: min(int(out_val[1].sum()), len(head)) * head.shape[1] * head.element_size(),
)
"""Logits [B, V] of the LM head, head [V, D] contiguous, for hidden states x [B, D]: exact where preview [B, V] reaches
limit [B], preview + tail [] elsewhere. Also returns the numbers of exact logits [B]."""

channel_gate: Pair = _operator(
    "channel_gate(Tensor x, Tensor limit) -> (Tensor, Tensor)",
    lambda x, limit: (_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)
"""x [..., C] with 0 where |x| < limit, and the share of channels kept [...]; limit: float32 [C], or [B, 1, C] for x
[B, T, C]."""

fused_gate: Pair = _operator(
    "fused_gate(Tensor x, Tensor other, Tensor? residual, float epsilon, int kind, Tensor? limit) -> (Tensor, Tensor)",
    lambda x, other, residual, *_: (_like(x), x.new_empty(0 if residual is None else x.shape)),
)
"""x [B, I], after an operator, with 0 where the magnitude is below limit [I] (float32; None: nowhere). kind: as in
`fused_channels`. 0 to 2: the RMS norm of x + residual [B, I], with weight `other` [I]; 3 and 4: activation(x) times
other [B, I]. The second result is x + residual; empty without `residual`."""

sum_norm: Pair = _operator(
    "sum_norm(Tensor x, Tensor other, Tensor weight, Tensor? bias, float epsilon) -> (Tensor, Tensor)",
    lambda x, *_: (_like(x), _like(x)),
)
"""The layer norm of x + other [..., D] with weight and bias [D] of x's dtype (arXiv 1607.06450), and the sum itself."""

channel_gate_grad: Pair = _operator(
    "channel_gate_grad(Tensor grad_out, Tensor grad_share, Tensor x, Tensor limit) -> (Tensor, Tensor)",
    lambda grad_out, grad_share, x, limit: (_like(x), _like(limit)),
)
"""Gradients of `channel_gate` by x and by log(limit), to which the channels with |x| from exp(-1/2) to exp(1/2) times
the limit contribute."""

gated_grad: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator(
    "gated_grad(Tensor grad_out, Tensor grad_share, Tensor gate, Tensor up, Tensor limit, int kind)"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad_out, grad_share, gate, up, limit, *_: (_like(gate), _like(up), _like(limit)),
)
"""Gradients by gate, up and log(limit) of `channel_gate` applied to activation(gate) * up. kind: the activation, 0 for
SiLU and 1 for GELU with tanh."""

row_gate: Pair = _operator(
    "row_gate(Tensor exact, Tensor preview, Tensor limit, Tensor tail) -> (Tensor, Tensor)",
    lambda exact, *_: (_like(exact), exact.new_empty(exact.shape[:-1], dtype=torch.float32)),
)
"""exact [..., V] where preview >= limit [..., 1] (float32), else preview + tail []; the share of exact logits [...]."""

row_gate_grad: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _operator(
    "row_gate_grad(Tensor grad_out, Tensor grad_share, Tensor exact, Tensor preview, Tensor limit, Tensor tail)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_out, grad_share, exact, preview, limit, tail: tuple(_like(x) for x in (exact, preview, limit, tail)),
)
"""Gradients of `row_gate` by exact, preview, limit (from the previews within half a nat of the limit) and tail."""


def _kl_shapes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty(len(student), dtype=wide), student.new_empty(2, len(student), dtype=wide)


forward_kl: Pair = _operator("forward_kl(Tensor student, Tensor teacher) -> (Tensor, Tensor)", _kl_shapes)
"""KL(teacher || student) [N] of logits [N, V] in nats, and the log-sum-exp of each row [2, N]: student, teacher."""

forward_kl_grad: One = _operator(
    "forward_kl_grad(Tensor student, Tensor teacher, Tensor logs, Tensor grad) -> Tensor",
    lambda student, *_: _like(student),
)
"""Gradient of `forward_kl` by the student's logits; grad [N]: the gradient by the divergences."""

routed_kl: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator(
    "routed_kl(Tensor exact, Tensor preview, Tensor teacher, Tensor limit, Tensor tail) -> (Tensor, Tensor, Tensor)",
    lambda exact, preview, teacher, *_: (
        (shapes := _kl_shapes(exact, teacher))[0],
        exact.new_empty(len(exact), dtype=torch.float32),
        shapes[1],
    ),
)
"""`forward_kl` of the logits that `row_gate` makes of exact and preview [N, V], without storing these logits: the
divergences [N], the shares of exact logits [N] and the log-sum-exps [2, N]."""

routed_kl_grad: Pair = _operator(
    "routed_kl_grad(Tensor(a!) exact, Tensor(b!) preview, Tensor teacher, Tensor limit, Tensor tail, Tensor logs,"
    " Tensor grad, Tensor grad_share) -> (Tensor, Tensor)",
    lambda exact, preview, teacher, limit, tail, *_: (_like(limit), _like(tail)),
)
"""Gradients of `routed_kl` by limit and tail; exact and preview, both contiguous, are overwritten with theirs."""

softmax_grad: Callable[..., None] = _operator(
    "softmax_grad(Tensor(a!) score, Tensor(b!) grad, int tokens) -> ()", lambda *_: None
)
"""Overwrite scores [..., T, K] with their softmax, and grad, the gradient by that softmax, with the gradient by the
scores; both are contiguous. tokens: T, at most K, for causal attention, where the last of T queries sees all keys, the
one before it one key fewer, and so on; 0 if every query sees all keys."""

rms_norm: One = _operator(
    "rms_norm(Tensor x, Tensor weight, float epsilon, int kind) -> Tensor", lambda x, *_: _like(x)
)
"""x [..., D] / sqrt(mean(x^2) + epsilon), times weight [D] (arXiv 1910.07467), summed in torch's order.

kind: 0 if the quotient is rounded to x's dtype before it is multiplied by the weight, 1 if it is not, 2 if it is not
and the factor is 1 + weight.
"""

rms_norm_grad: One = _operator(
    "rms_norm_grad(Tensor grad, Tensor x, Tensor weight, float epsilon, int kind) -> Tensor",
    lambda grad, x, *_: _like(x),
)
"""Gradient of `rms_norm` by x."""

rotary: Pair = _operator(
    "rotary(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    lambda query, key, *_: (_by_token(query), _by_token(key)),
)
"""Rotary embeddings (arXiv 2104.09864) of query [B, H, T, d] and key [B, K, T, d] by cos and sin [B or 1, T, r]. The
first r channels are rotated, their first half with their second half; every step rounds, as torch's operators do. The
results lie in memory as [B, T, H, d], like the outputs of the linear layers that make queries and keys: torch's
attention gives its output the layout of the query, and the next linear layer reads [B, T, H, d] without a copy."""

rotary_grad: Pair = _operator(
    "rotary_grad(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    lambda query, key, *_: (_by_token(query), _by_token(key)),
)
"""Gradients of `rotary` by its inputs, in the same layout; query and key: the gradients by its outputs."""

write_slot: Callable[..., None] = _operator(
    "write_slot(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor slot) -> ()", lambda *_: None
)
"""Write key and value [B, H, 1, d] of one token into slot [1] of the contiguous cache keys and values [B, H, L, d]."""

biased_attention: One = _operator(
    "biased_attention(Tensor query, Tensor key, Tensor value, Tensor size, float scale) -> Tensor",
    lambda query, *_: query.new_empty(len(query), query.shape[2], query.shape[1], query.shape[3]),
    lambda query, key, *_, out_val: 4 * query.numel() * key.shape[2],
    lambda query, key, value, *_, out_val: _size(query) + _size(key) + _size(value),
)
"""Attention of query [B, H, T, d] to key and value [B, H, K, d] -> [B, T, H, d], where each key counts size [B, K]
times: log(size) is added to the scaled scores."""


def _attended(heads: Tensor, keys: Tensor, values: Tensor, slot: Tensor | None, window: int) -> int:
    """Return how many numbers of keys and values the heads [B, H, ...] see; keys that heads share count for each."""
    seen = min(keys.shape[2] if slot is None else int(slot) + 1, window or keys.shape[2])
    return heads.shape[:2].numel() * seen * (keys.shape[3] + values.shape[3])


decode_attention: One = _operator(
    "decode_attention(Tensor query, Tensor keys, Tensor values, Tensor? mask, Tensor? slot, float scale, int window,"
    " float cap) -> Tensor",
    lambda query, keys, values, *_: query.new_empty(len(query), 1, query.shape[1], values.shape[3]),
    lambda q, k, v, _, slot, scale, window, cap, *, out_val: 2 * _attended(q, k, v, slot, window),
    lambda q, k, v, _, slot, scale, window, cap, *, out_val: _size(q) + q.itemsize * _attended(k, k, v, slot, window),
)
"""Attention of one new token, query [B, H, 1, d], to a cache: keys [B, K, L, d] and values [B, K, L, v], each shared by
H / K heads -> [B, 1, H, v]. mask [B or 1, 1, 1, L]: bool, or added to the scores; every row sees at least one key. slot
[1]: index of the newest key, behind which nothing is read (None: the last). window: maximum number of keys seen, the
newest ones (0: all). Scores are products times scale, bounded to [-cap, cap] by cap * tanh(score / cap) unless cap is
0."""

_merging = partial(_operator, flops=flops_of_merging, read=lambda x, *_, out_val: _size(x))

merge_lowest: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = _merging(
    "merge_lowest(Tensor x, Tensor? size, Tensor? before, Tensor weight, Tensor bias, Tensor distance_weight,"
    " Tensor top, int keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, *rest: shapes_of_merged(x, rest[-1]),
)
"""Match tokens x [B, n, D] and merge those with the lowest scores into their matches, until each image has `keep` left.

size [B, n]: how many patches each token stands for (None: 1). before [B, n]: each token's lowest score so far (None:
infinity). Scores are those of `stream_score` with weight [D] and bias [1], plus `distance_weight` [] times the distance
to the match; top [prefix]: the prefix's scores. Returns, for the tokens left, in order: tokens [B, keep, D], sizes,
scores and old indices [B, keep]; and [B, n]: for each old token the old index of the token that it is now part of."""

merge_normed: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]] = _merging(
    "merge_normed(Tensor x, Tensor? size, Tensor? before, Tensor weight, Tensor bias, Tensor distance_weight,"
    " Tensor top, int keep, Tensor gamma, Tensor? beta, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, *rest: (shapes_of_merged(x, rest[6])[0], *shapes_of_merged(x, rest[6])),
)
"""`merge_lowest`, with the layer norm of the tokens left as an additional first result; gamma, beta [D]: x's dtype."""

merge_below: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]] = _merging(
    "merge_below(Tensor x, Tensor? size, Tensor? before, Tensor weight, Tensor bias, Tensor distance_weight,"
    " Tensor top, Tensor lengths, Tensor shift, int multiple) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, *_: (*shapes_of_merged(x, x.shape[1]), x.new_empty(len(x), dtype=torch.long)),
)
"""`merge_lowest` of the tokens with a score below -shift, as far as `multiple` allows (see `merging.in_multiples`);
each image has its own length [B] and shift [B] (float32). Results hold n tokens an image: the tokens left, then the
rest. A last result is the number of tokens left [B]."""

open_tokens: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _operator(
    "open_tokens(Tensor x, Tensor weight, Tensor bias, Tensor? up, Tensor shift, Tensor? position, int prefix)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda x, *_: (
        x.new_empty(x.shape[:-1], dtype=torch.bool),
        *(x.new_empty(x.shape[:-1].numel(), dtype=torch.long) for _ in range(2)),
        x.new_empty((), dtype=torch.long),
    ),
    lambda x, weight, bias, up, *_, out_val: 2 * out_val[0].numel() * (weight.numel() + (0 if up is None else len(up))),
    lambda x, weight, bias, up, *_, out_val: _size(weight) + _size(up),
)
"""Whether each token x [..., D] is open: if its position, [...] or broadcast to that, is below `prefix`, or its score +
shift [] (float32) >= 0. The score is weight[0] . x + bias[0], and with `up` [H] also the sum of
up[h] gelu(weight[h + 1] . x + bias[h + 1]), as of a Router; weight [1 + H, D]. Also the order [N] of the tokens, flat
indices of open ones first; the place [N] of each one in it; and the number of open tokens []."""

thin_product: One = _operator(
    "thin_product(Tensor x, Tensor? rows, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, rows, weight, *_: x.new_empty(len(x) if rows is None else len(rows), len(weight)),
    lambda x, rows, weight, *_, out_val: 2 * len(out_val) * weight.numel(),
    lambda x, rows, weight, *_, out_val: _size(weight),
)
"""The outputs [n, O] of a linear layer with few inputs or few outputs, weight [O, I], for the tokens `rows` [n] (None:
all) of x [N, I]."""

list_open: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _operator(
    "list_open(Tensor score, Tensor? bias, Tensor? limit) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda score, *_: (
        score.new_empty(score.shape, dtype=torch.bool),
        *(score.new_empty(score.numel(), dtype=kind) for kind in (torch.long, torch.int32, torch.int32)),
    ),
)
"""Whether each token is open: score + bias [1] >= limit [1] (float32), or without a limit score itself, which is bool.
Also the flat indices [N] of the open tokens, filled up with the index of the last token of all; the number of open
tokens in front of each token [N]; and that number including the token itself [N]."""

put_open: Callable[..., Tensor] = _operator(
    "put_open(Tensor some, Tensor before, Tensor is_open, Tensor? other) -> Tensor",
    lambda some, before, *_: some.new_empty(len(before), some.shape[1]),
)
"""The rows [N, D] of all tokens: of open ones, in their order, those of some [n, D], and of closed ones those of other
[N, D], or zeros. before [N] (int32) and is_open, bool of N numbers, as `list_open` returns them. Where more tokens are
open than n, the last row stands for those behind it; without any row, all count as closed."""

open_by_score: One = _operator(
    "open_by_score(Tensor low, Tensor? up, Tensor shift, Tensor? position, int prefix) -> Tensor",
    lambda low, *_: low.new_empty(low.shape[:-1], dtype=torch.bool),
    lambda low, up, *_, out_val: 0 if up is None else 2 * out_val.numel() * len(up),
    lambda low, up, *_, out_val: _size(up),
)
"""Whether each token [...] is open, as by `open_tokens`, from low [..., L]: the products of that operator's layers with
the token, and what does not matter behind them."""

substitute_closed: One = _operator(
    "substitute_closed(Tensor some, Tensor? before, Tensor is_open, Tensor low, Tensor up, Tensor bias,"
    " Tensor? residual) -> Tensor",
    lambda some, before, is_open, low, *_: some.new_empty(len(low), some.shape[1]),
    lambda some, before, is_open, low, up, *_, out_val: 2 * len(low) * up.numel(),
    lambda some, before, is_open, low, up, *_, out_val: _size(up),
)
"""The rows [N, D] of all tokens: of open ones as of `put_open` (before None: those of some [N, D]), and of closed ones
low [N, r] @ up^T + bias, with up [D, r] and bias [D]. residual [N, D]: added to these; both are rounded."""


def exact_together(x: Tensor) -> int:
    """Return up to how many inputs `exact_rows` is faster than the whole LM head on the device of x. Each input needs
    few rows, and on GPUs reading these rows is nearly the whole cost."""
    return tuning.MOST_ROWS if x.is_cuda and triton.available() else 4


def reads_few(rows: int, weight: Tensor, ends: list[int]) -> bool:
    """Return whether `few_channels` has a kernel for such a weight (on a GPU: with Triton; on a CPU: in bfloat16, if
    the CPU has bfloat16 products and outputs come in multiples of 32) and is faster than a dense product for `rows`
    inputs: many inputs together need nearly all channels, which a dense product reads faster."""
    if weight.is_cuda:
        return triton.available() and tuning.gather(weight.device, rows, weight.shape[1]) is not None
    return rows <= FEW_ROWS and cpu.reads_few(weight, ends)


def attends_to_cache(query: Tensor, keys: Tensor, values: Tensor, slot: Tensor | None) -> bool:
    """Return whether `decode_attention` is faster than torch's attention: on GPUs in steps of fixed shape, where torch
    reads every slot of the cache; on CPUs where there is a C function and enough to read."""
    fits = slot is not None and compiled(query) if query.is_cuda else cpu.attends_to_cache(query, keys, values)
    return fits and not query.requires_grad
