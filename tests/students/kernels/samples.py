"""Sample arguments for every operator: with odd sizes, and with each optional argument both given and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from students.kernels import reference

Arguments = tuple[Any, ...]
Samples = Callable[["Draw"], Iterator[Arguments]]


class Draw:
    """A source of random tensors on one device, in one type (a call) or in float32 (`single`)."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return self.single(*shape).to(self.dtype)

    def single(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device)

    def limit(self, *shape: int) -> Tensor:
        """Return float32 limits that the type of the compared inputs can represent exactly."""
        return self.single(*shape).abs().to(self.dtype).float()


def channels(draw: Draw, rows: int) -> Iterator[Arguments]:
    for inputs, outputs in ((77, 160), (64, 31)):
        x = draw(rows, inputs) if rows > 1 else draw(inputs)
        limit, weight = draw.limit(inputs), draw(inputs, outputs)
        yield x, limit, weight, None, None, None, [outputs]
        ends = [32, outputs] if outputs > 32 else [outputs]
        yield x, limit, weight, draw(outputs), draw(3 * len(ends), inputs), draw(3, outputs), ends
    yield x, torch.full_like(limit, torch.inf), weight, None, None, None, [outputs]
    yield x, torch.zeros_like(limit), weight, draw(outputs), None, None, [outputs]
    x = draw(rows, 2100) if rows > 1 else draw(2100)
    yield x, draw.limit(2100), 0.1 * draw(2100, 400)[:, 32:352], None, None, None, [320]


def fused_channels(draw: Draw) -> Iterator[Arguments]:
    for kind in range(-1, 5):
        sizes = [(77, 160), (300, 31)]
        for rows, (inputs, outputs) in zip((1, 3), sizes if kind % 4 < 2 else sizes[::-1], strict=True):
            x, gain, other = draw(rows, inputs), draw(inputs), 2 * draw(rows, inputs)
            squares = torch.stack([part.square().sum(1) for part in x.float().split(10, 1)], 1)
            given = (x, gain, squares) if 0 <= kind < 3 else (x, None if kind < 0 else other, None)
            ends = [outputs] if kind % 2 else [16, outputs]
            residual = draw(rows, outputs) if kind % 2 else None
            low = draw(3 * len(ends), inputs), draw(3, outputs)
            rest = (draw(outputs), *low) if kind < 4 else (None, None, None)
            limit = torch.full_like(draw.single(inputs), 0.5)
            yield *given, 1e-3, kind, residual, limit, draw(inputs, outputs), *rest, ends


def dot_rows(draw: Draw) -> Iterator[Arguments]:
    rows = torch.tensor([89, 0, 7, 7]).to(draw.device)
    yield draw(70), draw(90, 70), draw(90), rows
    yield draw(70), draw(90, 70), None, rows[:0]
    yield draw(70), draw(90, 70), draw(90), torch.arange(90).to(draw.device)
    yield draw(33), draw(5, 33), draw(5), None


def gated_rows(draw: Draw) -> Iterator[Arguments]:
    for number in (0, 1):
        yield draw(300), draw(90, 300), draw(90), torch.tensor([number == 1]).to(draw.device)
        yield draw(33), draw(70, 33), None, draw(70) > 0.8 * number
    yield draw(64), draw(40, 64), draw(40), torch.arange(40).to(draw.device) < 20


def exact_rows(draw: Draw) -> Iterator[Arguments]:
    for rows in (1, 3):
        yield draw(rows, 40), draw(301, 40), draw(301), draw(rows, 301), draw(rows), draw()
        yield draw(rows, 40), draw(301, 40), None, draw(rows, 301), draw(rows) + 9, draw()
    for rows, vocabulary, least in ((2, 2, -2.0), (13, 201, -2.0), (1, 2500, torch.inf), (2, 2500, -torch.inf)):
        limit = torch.full_like(draw(rows), least)
        yield draw(rows, 64), draw(vocabulary, 64), draw(vocabulary), draw(rows, vocabulary), limit, draw()


def channel_gate(draw: Draw) -> Iterator[Arguments]:
    for shape in ((77,), (3, 1, 77)):
        yield draw(3, 5, 77), draw.limit(*shape)


def fused_gate(draw: Draw) -> Iterator[Arguments]:
    for kind in range(5):
        for width in (77, 300):
            x, other = draw(5, 2 * width).chunk(2, 1)
            limit = torch.full_like(draw.single(width), 0.5)
            yield x, draw(width) if kind < 3 else other, draw(5, width) if kind < 2 else None, 1e-3, kind, limit
        yield x, draw(width) if kind < 3 else other, None, 1e-3, kind, None


def sum_norm(draw: Draw) -> Iterator[Arguments]:
    for shape in ((77,), (5, 300), (3, 7, 96)):
        yield draw(*shape), draw(*shape), draw(shape[-1]), draw(shape[-1]) if len(shape) > 1 else None, 1e-3
    yield draw(9, 3).T, draw(3, 9), draw(9), None, 1e-3


def channel_gate_grad(draw: Draw) -> Iterator[Arguments]:
    for x, limit in (*channel_gate(draw), (draw(2, 700, 9), draw.limit(2, 1, 9))):
        yield draw(*x.shape), draw.single(*x.shape[:2]), x, limit


def gated_grad(draw: Draw) -> Iterator[Arguments]:
    for kind, (x, limit) in enumerate(channel_gate(draw)):
        yield draw(3, 5, 77), draw.single(3, 5), 2 * draw(3, 5, 77), x, limit, kind


def row_gate(draw: Draw) -> Iterator[Arguments]:
    yield draw(5, 301), draw(5, 301), draw.single(5, 1), draw.single()


def row_gate_grad(draw: Draw) -> Iterator[Arguments]:
    for arguments in row_gate(draw):
        yield draw(5, 301), draw.single(5), *arguments


def forward_kl(draw: Draw) -> Iterator[Arguments]:
    yield 3 * draw(7, 1234), 4 * draw(7, 1234)
    teacher = 2 * draw(2, 9001)
    teacher[0, :5000] -= 200  # the first blocks' sums must vanish when a later maximum is found
    yield 2 * draw(2, 9001), teacher


def forward_kl_grad(draw: Draw) -> Iterator[Arguments]:
    wide = torch.promote_types(draw.dtype, torch.float32)
    for student, teacher in forward_kl(draw):
        logs = torch.stack([student.to(wide).logsumexp(1), teacher.to(wide).logsumexp(1)])
        yield student, teacher, logs, draw.single(len(student))


def routed_kl(draw: Draw) -> Iterator[Arguments]:
    exact, preview, limit, tail = next(row_gate(draw))
    yield exact, preview, draw(5, 301), limit, tail


def routed_kl_grad(draw: Draw) -> Iterator[Arguments]:
    for exact, preview, teacher, limit, tail in routed_kl(draw):
        logs = reference.routed_kl(exact, preview, teacher, limit, tail)[2]
        yield exact, preview, teacher, limit, tail, logs, draw.single(5), draw.single(5)


def softmax_grad(draw: Draw) -> Iterator[Arguments]:
    for tokens in (0, 11):
        yield draw(2, 3, 11, 13), draw(2, 3, 11, 13), tokens


def rms_norm(draw: Draw) -> Iterator[Arguments]:
    for width, kind in ((16, 0), (100, 1), (576, 2)):
        yield draw(5, 2, width).transpose(0, 1), draw(width), 1e-3, kind


def rms_norm_grad(draw: Draw) -> Iterator[Arguments]:
    for x, *rest in rms_norm(draw):
        yield draw(*x.shape), x, *rest


def rotary(draw: Draw) -> Iterator[Arguments]:
    for rows, size, width in ((2, 16, 16), (1, 20, 12)):
        query, key = draw(2, 5, 11, size).transpose(1, 2), draw(2, 3, 5, size)
        yield query, key, draw(rows, 5, width), draw(rows, 5, width)


def rotary_grad(draw: Draw) -> Iterator[Arguments]:
    return rotary(draw)


def write_slot(draw: Draw) -> Iterator[Arguments]:
    slot = torch.tensor([3]).to(draw.device)
    both = draw(2, 1, 3, 36).transpose(1, 2)
    yield draw(2, 3, 7, 20), draw(2, 3, 7, 16), both[..., :20], both[..., 20:], slot
    yield draw(2, 3, 7, 20), draw(2, 3, 7, 16), draw(2, 3, 1, 20), draw(2, 3, 1, 16), slot


def biased_attention(draw: Draw) -> Iterator[Arguments]:
    for keys, size in ((7, 16), (150, 24), (66, 136)):
        query, key, value = draw(2, keys, 3, 3, size).permute(2, 0, 3, 1, 4)
        number = draw.single(2, keys).abs().round()
        number[:, 1] = 1.0
        yield query[..., :5, :], key, value, number, 0.3


def decode_attention(draw: Draw) -> Iterator[Arguments]:
    sizes = (1, 4, 4, 32, 64, 96), (2, 10, 2, 64, 32, 67), (1, 6, 1, 24, 80, 7)
    for rows, heads, groups, size, width, slots in sizes:
        query, keys = draw(rows, heads, 1, size), draw(rows, groups, slots, size)
        values = draw(rows, groups, slots, width)
        seen, slot = draw(rows, 1, 1, slots) > -1, torch.tensor([slots // 2]).to(draw.device)
        seen[..., [0, slots // 2]] = True
        added = torch.zeros_like(seen, dtype=draw.dtype).masked_fill(~seen, torch.finfo(draw.dtype).min)
        if rows == 1:
            yield query, keys, values, None, None, 0.25, 0, 0.0
            yield query, keys, values, added, slot, 0.25, 5, 0.0
        else:
            yield query, keys, values, seen, None, 0.25, 0, 5.0
            yield query.transpose(0, 1).contiguous().transpose(0, 1), keys, values, added[1:], slot, 0.25, 0, 5.0


def merging(draw: Draw) -> Iterator[tuple[Tensor, ...]]:
    for prefix, patches, sized in ((0, 6, False), (1, 16, True), (5, 31, True)):
        n = prefix + patches
        size = draw.single(3, n).abs().ceil() if sized else None
        before = draw.single(3, n) if sized else None
        top = 1e30 * torch.arange(prefix, 0, -1).to(draw.device)
        yield draw(3, n, 24), size, before, draw.single(24), draw.single(1), draw.single(), top
    if draw.dtype == torch.float32:  # more patches than one program takes
        yield draw(1, 300, 8), None, None, draw.single(8), draw.single(1), draw.single(), 1e30 + draw.single(1)


def merge_lowest(draw: Draw) -> Iterator[Arguments]:
    for arguments in merging(draw):
        n, prefix = arguments[0].shape[1], len(arguments[-1])
        for keep in (n, n - (n - prefix) // 3)[n > 100 :]:
            yield *arguments, keep


def merge_normed(draw: Draw) -> Iterator[Arguments]:
    samples = [*merge_lowest(draw)]
    for number in (0, 3, 5):  # the norm follows what all others test
        width = samples[number][0].shape[2]
        yield *samples[number], draw(width), draw(width) if number % 2 else None, 1e-3


def merge_below(draw: Draw) -> Iterator[Arguments]:
    for arguments in merging(draw):
        batch, n, _ = arguments[0].shape
        lengths = torch.tensor([n, n - 2, len(arguments[-1]) + 1][:batch]).to(draw.device)
        for multiple in (1, 4)[n > 100 :]:
            yield *arguments, lengths, draw.single(batch), multiple


def open_tokens(draw: Draw) -> Iterator[Arguments]:
    for tokens, width, hidden in ((1, 70, 0), (3, 33, 16), (300, 64, 32)):  # the last too many for C
        x, weight, bias = draw(2, tokens, width), draw(1 + hidden, width) / width**0.5, draw(1 + hidden)
        up = draw(hidden) if hidden else None
        shift = between(F.linear(x.double(), weight.double(), bias.double()), up)
        yield x, weight, bias, up, shift, None, 0
        yield x, weight, bias, up, shift, torch.arange(tokens).to(draw.device)[None], 2
        yield x, weight, bias, up, torch.full_like(shift, torch.inf), None, 0


def between(low: Tensor, up: Tensor | None) -> Tensor:
    """Return a shift for which rounding changes no decision on tokens with these products: in the widest gap between
    two scores."""
    low = low.double()
    score = low[..., 0] if up is None else low[..., 0] + F.gelu(low[..., 1 : 1 + len(up)]) @ up.double()
    order = score.flatten().sort().values
    most = order.diff().argmax()
    return -(order[most] + order[most + 1]).float() / 2


def open_by_score(draw: Draw) -> Iterator[Arguments]:
    for tokens, hidden in ((1, 0), (3, 16), (45, 21)):
        low, up = draw(2, tokens, 7 + 1 + hidden + 3)[..., 7:], draw(hidden) if hidden else None
        yield low, up, between(low, up), None, 0
        yield low, up, between(low, up), torch.arange(2, tokens + 2).to(draw.device)[None], 3
        yield low, up, between(low, up) - torch.inf, torch.arange(2 * tokens).to(draw.device).view(2, tokens), 3


def thin_product(draw: Draw) -> Iterator[Arguments]:
    for tokens, inputs, outputs in ((1, 33, 5), (21, 96, 16), (21, 5, 70)):
        x, weight = draw(tokens, inputs), draw(outputs, inputs)
        yield x, None, weight, None
        yield x, torch.tensor([0, tokens - 1, 0]).to(draw.device), weight, draw(outputs)
        yield x, torch.tensor([], dtype=torch.long).to(draw.device), weight, None


def list_open(draw: Draw) -> Iterator[Arguments]:
    for rows, tokens in ((1, 1), (3, 700)):
        score = draw(rows, tokens, 1)
        yield score, draw(1), draw.single(1)
        yield score, None, draw.single(1) - 9
        yield (score > 0).expand(rows, tokens, 2)[..., :1], None, None
        yield score > 99, None, None


def put_open(draw: Draw) -> Iterator[Arguments]:
    for rows, tokens, width in ((1, 1, 5), (3, 700, 24), (2, 9, 2304)):
        is_open, _, before, upto = reference.list_open(draw(rows, tokens, 1) > 0, None, None)
        count, other = int(upto[-1]), draw(rows * tokens, width)
        for some in (draw(count, width), draw(rows * tokens, width), draw(count // 2, width)):
            yield some, before, is_open, None
            yield some, before, is_open, other


def substitute_closed(draw: Draw) -> Iterator[Arguments]:
    for rows, tokens, width, rank in ((1, 1, 5, 3), (3, 70, 24, 32), (2, 9, 300, 64)):
        is_open, _, before, upto = reference.list_open(draw(rows, tokens, 1) > 0, None, None)
        low, up, bias = draw(rows * tokens, 2 * rank + 1)[:, :rank], draw(width, rank) / rank**0.5, draw(width)
        given, residual = (is_open, low, up, bias), draw(rows * tokens, width)
        for count, added in ((int(upto[-1]), None), (rows * tokens, residual), (tokens // 3, None)):
            yield draw(count, width), before, *given, added
        yield draw(rows * tokens, width), None, *given, residual


SAMPLES: dict[str, Samples] = {
    "read_channels": lambda draw: channels(draw, 1),
    "few_channels": lambda draw: channels(draw, 13),
    "fused_channels": fused_channels,
    "dot_rows": dot_rows,
    "gated_rows": gated_rows,
    "exact_rows": exact_rows,
    "channel_gate": channel_gate,
    "fused_gate": fused_gate,
    "sum_norm": sum_norm,
    "channel_gate_grad": channel_gate_grad,
    "gated_grad": gated_grad,
    "row_gate": row_gate,
    "row_gate_grad": row_gate_grad,
    "forward_kl": forward_kl,
    "forward_kl_grad": forward_kl_grad,
    "routed_kl": routed_kl,
    "routed_kl_grad": routed_kl_grad,
    "softmax_grad": softmax_grad,
    "rms_norm": rms_norm,
    "rms_norm_grad": rms_norm_grad,
    "rotary": rotary,
    "rotary_grad": rotary_grad,
    "write_slot": write_slot,
    "biased_attention": biased_attention,
    "decode_attention": decode_attention,
    "open_tokens": open_tokens,
    "thin_product": thin_product,
    "list_open": list_open,
    "put_open": put_open,
    "open_by_score": open_by_score,
    "substitute_closed": substitute_closed,
    "merge_lowest": merge_lowest,
    "merge_normed": merge_normed,
    "merge_below": merge_below,
}
"""Functions that yield the arguments of calls, by operator."""
