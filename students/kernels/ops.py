"""The operators: one table of their names and arguments, the shapes of what they return, and what they cost.

They are operators so that torch's FlopCounterMode sees them and torch.compile leaves them whole. torch's dispatcher
chooses what runs: on CPUs the C functions of cpu/, on GPUs Triton's kernels of triton/, and elsewhere, or for types
that these do not know, the reference (reference.py). None has a gradient of its own (see autograd.py). Numbers of what
was read are on the inputs' device, and only references wait for it.
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
from students.kernels.triton import tuning

One = Callable[..., Tensor]
Pair = Callable[..., tuple[Tensor, Tensor]]
Cost = Callable[..., int]
"""What a call costs: (*arguments, out_val=what it returned) -> a number."""
FEW_ROWS = 4
"""For so many inputs on a CPU, reading weights costs more than arithmetic; on GPUs the table of launches says it."""


@dataclass(frozen=True)
class Operator:
    """A row of the table."""

    schema: str
    shapes: Callable[..., Any]
    """Empty tensors of the shapes, types and device of what is returned."""
    flops: Cost | None
    """None: no products, and torch counts no others."""
    read: Cost | None
    """Bytes that products read of weights and tokens; None as above."""


OPERATORS: dict[str, Operator] = {}
"""The table, by name."""
_library = torch.library.Library("elastic", "DEF")


def _operator(schema: str, shapes: Callable[..., Any], flops: Cost | None = None, read: Cost | None = None) -> Any:
    """Define an operator, with the implementations of its name."""
    name = _library.define(schema)
    OPERATORS[name] = Operator(schema, shapes, flops, read)
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


def on_gpu(name: str) -> Callable[..., Any]:
    """Triton's kernel, and the reference for what it does not take, and where it cannot be launched."""
    kernel, other = triton.implementation(name), getattr(reference, name)

    def run(first: Tensor, *rest: Any) -> Any:
        if first.dtype == torch.float64 or (first.is_cuda and not triton.available()):
            return other(first, *rest)
        with torch.cuda.device_of(first):  # Triton launches where the current device is
            return kernel(first, *rest)

    return run


def on_cpu(operator: Any) -> Callable[..., Any]:
    """What an operator runs on CPUs."""
    name = operator.__name__.partition(".")[0]
    return cpu.OPERATORS.get(name) or getattr(reference, name)


def compiled(x: Tensor) -> bool:
    """Whether operators run as kernels made for tensors like this one, and not as references."""
    if x.is_cuda:
        return triton.available() and x.dtype != torch.float64
    return toolchain.native(x) is not None


def observed() -> bool:
    """Whether somebody counts operations or compiles them, and has to see torch's own."""
    counted = is_in_torch_dispatch_mode() and toolchain.recording.calls is None
    return torch.compiler.is_compiling() or counted


def _like(x: Tensor) -> Tensor:
    """What is returned is contiguous, whatever is given."""
    return x.new_empty(x.shape)


def _size(x: Tensor | None) -> int:
    """Bytes."""
    return 0 if x is None else x.numel() * x.element_size()


def _channels_taken(x: Tensor, weight: Tensor, kept: Tensor) -> int:
    """How many channels are multiplied by: all, where a GPU's table of launches has a dense product take the kernel's
    place, and nothing is saved."""
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
"""Several linear layers that read one input x [I], side by side, from the channels with |x| >= limit [I] (float32).

weight [I, O], contiguous rows; bias [O]; low-rank corrections, which read every channel: down [parts * r, I], up
[r, O]; ends: where the outputs of each layer end. Returns out [O] and the number of channels read.
"""

few_channels: Pair = _operator(
    "few_channels(Tensor x, Tensor limit, Tensor weight, Tensor? bias, Tensor? down, Tensor? up, int[] ends)"
    " -> (Tensor, Tensor)",
    lambda x, limit, weight, *_: (x.new_empty(len(x), weight.shape[1]), x.new_empty((), dtype=torch.long)),
    _channels_flops,
    _channels_read,
)
"""As `read_channels`, for a few inputs x [B, I] at once: channels that any of them needs are read, once for all."""


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
"""As `few_channels`, with what stands in front of the layers and behind them.

kind: -1 where they read x [B, I]; 0 to 2 where they read its RMS norm as of `rms_norm`, with the weight `other` [I] and
squares [B, n], which add up to each input's sum of squares; 3 where they read SiLU(x) * other [B, I], 4 for GELU with
tanh. residual [B, O], for one layer: what is added to its output, both rounded; the sums of squares of that are
returned too, every 64 outputs [B, n].
"""

dot_rows: One = _operator(
    "dot_rows(Tensor x, Tensor weight, Tensor? bias, Tensor? rows) -> Tensor",
    lambda x, weight, bias, rows: x.new_empty(len(weight) if rows is None else len(rows)),
    lambda x, *_, out_val: 2 * len(x) * len(out_val),
    lambda x, weight, *_, out_val: len(out_val) * weight.shape[1] * weight.element_size(),
)
"""A linear layer, weight [O, I] contiguous, of which some outputs are wanted, rows [n] (None: all): x [I] -> [n]."""

exact_rows: Pair = _operator(
    "exact_rows(Tensor x, Tensor head, Tensor? bias, Tensor preview, Tensor limit, Tensor tail) -> (Tensor, Tensor)",
    lambda x, head, bias, preview, *_: (_like(preview), x.new_empty(len(x), dtype=torch.long)),
    lambda x, *_, out_val: 2 * int(out_val[1].sum()) * x.shape[1],
    lambda x, head, *_, out_val: min(int(out_val[1].sum()), len(head)) * head.shape[1] * head.element_size(),
)
"""The LM head, head [V, D] contiguous, for hidden states x [B, D]: exact where the preview [B, V] reaches the limit
[B], preview + tail [] elsewhere. Returns logits [B, V] and the numbers of exact rows [B]."""

channel_gate: Pair = _operator(
    "channel_gate(Tensor x, Tensor limit) -> (Tensor, Tensor)",
    lambda x, limit: (_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)
"""x [..., C] with 0 where |x| < limit, which is float32 [C], or [B, 1, C] for x [B, T, C]; the share kept [...]."""

channel_gate_grad: Pair = _operator(
    "channel_gate_grad(Tensor grad_out, Tensor grad_share, Tensor x, Tensor limit, Tensor low, Tensor high)"
    " -> (Tensor, Tensor)",
    lambda grad_out, grad_share, x, limit, *_: (_like(x), _like(limit)),
)
"""Gradients of `channel_gate` by x and log(limit), the latter from the channels with low <= |x| < high."""

gated_grad: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator(
    "gated_grad(Tensor grad_out, Tensor grad_share, Tensor gate, Tensor up, Tensor limit, Tensor low, Tensor high,"
    " int kind) -> (Tensor, Tensor, Tensor)",
    lambda grad_out, grad_share, gate, up, limit, *_: (_like(gate), _like(up), _like(limit)),
)
"""Gradients of `channel_gate` of activation(gate) * up by gate, up and log(limit); kind: 0 for SiLU, 1 for GELU with
tanh."""

row_gate: Pair = _operator(
    "row_gate(Tensor exact, Tensor preview, Tensor limit, Tensor tail) -> (Tensor, Tensor)",
    lambda exact, *_: (_like(exact), exact.new_empty(exact.shape[:-1], dtype=torch.float32)),
)
"""exact [..., V] where preview >= limit [..., 1], float32, else preview + tail []; the share of exact ones [...]."""

row_gate_grad: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _operator(
    "row_gate_grad(Tensor grad_out, Tensor grad_share, Tensor exact, Tensor preview, Tensor limit, Tensor tail)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad_out, grad_share, exact, preview, limit, tail: tuple(_like(x) for x in (exact, preview, limit, tail)),
)
"""Gradients of `row_gate` by exact, preview, limit (from the rows within half a nat of it) and tail."""


def _kl_shapes(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty(len(student), dtype=wide), student.new_empty(2, len(student), dtype=wide)


forward_kl: Pair = _operator("forward_kl(Tensor student, Tensor teacher) -> (Tensor, Tensor)", _kl_shapes)
"""KL(teacher || student) [N] of logits [N, V] in nats, and the logarithms of each row's sum of exponentials [2, N]."""

forward_kl_grad: One = _operator(
    "forward_kl_grad(Tensor student, Tensor teacher, Tensor logs, Tensor grad) -> Tensor",
    lambda student, *_: _like(student),
)
"""The gradient of `forward_kl` by the student's logits, for the gradient [N] by the divergences."""

routed_kl: Callable[..., tuple[Tensor, Tensor, Tensor]] = _operator(
    "routed_kl(Tensor exact, Tensor preview, Tensor teacher, Tensor limit, Tensor tail) -> (Tensor, Tensor, Tensor)",
    lambda exact, preview, teacher, *_: (
        (shapes := _kl_shapes(exact, teacher))[0],
        exact.new_empty(len(exact), dtype=torch.float32),
        shapes[1],
    ),
)
"""`forward_kl` of what `row_gate` makes of exact and preview [N, V], which is written nowhere: the divergences [N], the
shares of exact ones [N] and the logarithms [2, N]."""

routed_kl_grad: Pair = _operator(
    "routed_kl_grad(Tensor(a!) exact, Tensor(b!) preview, Tensor teacher, Tensor limit, Tensor tail, Tensor logs,"
    " Tensor grad, Tensor grad_share) -> (Tensor, Tensor)",
    lambda exact, preview, teacher, limit, tail, *_: (_like(limit), _like(tail)),
)
"""Gradients of `routed_kl` by limit and tail; exact and preview, which are contiguous, become the gradients by them."""

softmax_grad: Callable[..., None] = _operator(
    "softmax_grad(Tensor(a!) score, Tensor(b!) grad, int tokens) -> ()", lambda *_: None
)
"""Scores [..., T, K], contiguous as grad is, become their softmax, and gradients by that softmax those by the scores.

tokens: T, at most K, where the last of T tokens sees all keys, the one before it one fewer and so on; 0 where all see
all.
"""

rms_norm: One = _operator(
    "rms_norm(Tensor x, Tensor weight, float epsilon, int kind) -> Tensor", lambda x, *_: _like(x)
)
"""x [..., D] / sqrt(mean(x^2) + epsilon), times weight [D] (arXiv 1910.07467), with the sums in torch's order.

kind: 0 where the quotient is rounded to x's type before that product, 1 where it is not, 2 where it is not and the
factor is 1 + weight.
"""

rms_norm_grad: One = _operator(
    "rms_norm_grad(Tensor grad, Tensor x, Tensor weight, float epsilon, int kind) -> Tensor",
    lambda grad, x, *_: _like(x),
)
"""The gradient of `rms_norm` by x."""

rotary: Pair = _operator(
    "rotary(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    lambda query, key, *_: (_like(query), _like(key)),
)
"""Rotary embeddings (arXiv 2104.09864) of query [B, H, T, d] and key [B, K, T, d], of whose channels the first r are
turned, the first half of these with the second: by cos and sin [B or 1, T, r]. Each step rounds, as torch does."""

rotary_grad: Pair = _operator(
    "rotary_grad(Tensor query, Tensor key, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    lambda query, key, *_: tuple(x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key)),
)
"""Gradients of `rotary` by query and key, for those by what it returns: in memory [B, T, H, d], as linear layers put
queries and keys out."""

write_slot: Callable[..., None] = _operator(
    "write_slot(Tensor(a!) keys, Tensor(b!) values, Tensor key, Tensor value, Tensor slot) -> ()", lambda *_: None
)
"""Key and value [B, H, 1, d] of one token into keys and values [B, H, L, d], contiguous, at the place slot [1]."""

biased_attention: One = _operator(
    "biased_attention(Tensor query, Tensor key, Tensor value, Tensor size, float scale) -> Tensor",
    lambda query, *_: query.new_empty(len(query), query.shape[2], query.shape[1], query.shape[3]),
    lambda query, key, *_, out_val: 4 * query.numel() * key.shape[2],
    lambda query, key, value, *_, out_val: _size(query) + _size(key) + _size(value),
)
"""Attention of query [B, H, T, d] to key and value [B, H, K, d], each of which counts as so many, size [B, K], whose
logarithm is added to its scaled scores: [B, T, H, d]."""


def _attended(heads: Tensor, keys: Tensor, values: Tensor, slot: Tensor | None, window: int) -> int:
    """Numbers of keys and values that heads [B, H, ...] see."""
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
H / K heads -> [B, 1, H, v]. mask [B or 1, 1, 1, L]: bool, or what is added to scores; each row sees something. slot
[1]: the place of the newest key, behind which nothing is read (None: the last). window: how many keys are seen at most,
the newest ones (0: all). Scores are products times scale, bounded to -cap ... cap by tanh where cap is not 0."""


_merging = partial(_operator, flops=flops_of_merging, read=lambda x, *_, out_val: _size(x))

merge_lowest: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = _merging(
    "merge_lowest(Tensor x, Tensor? size, Tensor? before, Tensor weight, Tensor bias, Tensor distance_weight,"
    " Tensor top, int keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, *rest: shapes_of_merged(x, rest[-1]),
)
"""Match tokens x [B, n, D], and have those with the lowest scores taken in until `keep` are left, of every image.

size [B, n]: what each stands for (None: 1). before [B, n]: the lowest score it had so far (None: infinity). Scores are
those of `stream_score` with weight [D] and bias [1], plus `distance_weight` [] times the distance; top: those of the
prefix. Returns what is left: tokens [B, keep, D], sizes, scores and old places [B, keep], in order, and where each of
the n tokens stands then [B, n]. (See merging.py.)"""

merge_normed: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]] = _merging(
    "merge_normed(Tensor x, Tensor? size, Tensor? before, Tensor weight, Tensor bias, Tensor distance_weight,"
    " Tensor top, int keep, Tensor gamma, Tensor? beta, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, *rest: (shapes_of_merged(x, rest[6])[0], *shapes_of_merged(x, rest[6])),
)
"""As `merge_lowest`, with the layer norm of the tokens that are left in front, with gamma and beta [D] in x's type."""

merge_below: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]] = _merging(
    "merge_below(Tensor x, Tensor? size, Tensor? before, Tensor weight, Tensor bias, Tensor distance_weight,"
    " Tensor top, Tensor lengths, Tensor shift, int multiple) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda x, *_: (*shapes_of_merged(x, x.shape[1]), x.new_empty(len(x), dtype=torch.long)),
)
"""As `merge_lowest`, where the tokens with a score below -shift are taken in, as far as `multiple` allows (see
`merging.in_multiples`), and each image has its own length [B] and shift [B], float32.

What is left comes first, then what has left; also returned is how many are left [B].
"""


list_open: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _operator(
    "list_open(Tensor score, Tensor? bias, Tensor? limit) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda score, *_: (
        score.new_empty(score.shape, dtype=torch.bool),
        *(score.new_empty(score.numel(), dtype=kind) for kind in (torch.long, torch.int32, torch.int32)),
    ),
)
"""Which tokens have a score that, with the bias [1], reaches the limit [1], float32 (without: where score, bool, is);
their flat indices [N], filled up with the last of all; and how many come before each token, and with it [N]."""


def exact_together(x: Tensor) -> int:
    """For how many inputs at once `exact_rows` is faster than the whole head on the device of x: each of them needs few
    rows, and on GPUs reading these is nearly all that it costs."""
    return tuning.MOST_ROWS if x.is_cuda and triton.available() else 4


def reads_few(rows: int, weight: Tensor, ends: list[int]) -> bool:
    """Whether `few_channels` is the faster way for so many inputs (more of them need nearly everything, which is then
    faster read as a whole), and has a kernel for such a weight: on a GPU with Triton; on a CPU that multiplies
    bfloat16, in that type, where outputs come in multiples of 32."""
    if weight.is_cuda:
        return triton.available() and tuning.gather(weight.device, rows, weight.shape[1]) is not None
    return rows <= FEW_ROWS and cpu.reads_few(weight, ends)


def attends_to_cache(query: Tensor, keys: Tensor, values: Tensor, slot: Tensor | None) -> bool:
    """Whether `decode_attention` is the faster way: on GPUs in steps of fixed shape, of whose caches torch's attention
    reads every slot; on CPUs where there is a C function, and enough to read."""
    fits = slot is not None and compiled(query) if query.is_cuda else cpu.attends_to_cache(query, keys, values)
    return fits and not query.requires_grad
