"""Divergences between next-token distributions, computed on logits in chunks of rows.

Logits take most of the memory of distillation: in float32, one copy for 4,096 tokens and a vocabulary of 128,000 takes
2 GB. So nothing here holds float32 values for more than a block of rows, and `chunked` lets a caller compute the logits
themselves chunk by chunk, from hidden states, so that they never exist as a whole either.

Shapes: N rows (tokens), V vocabulary. Distributions: p teacher, q student.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

RowLoss = Callable[..., Tensor]
"""Per-row loss: (student [N, V], teacher [N, V], **options) -> [N]."""

ChunkLoss = Callable[..., tuple[Tensor, Tensor]]
"""Sums over one chunk of rows: (*inputs [n, ...]) -> (loss [], to be differentiated; statistics [K], only reported)."""

ValueAndSlope = Callable[..., tuple[Tensor, Tensor]]
"""(log q [n, V], tensors that describe p) -> (divergence [n], its derivative [n, V] with respect to the logits of q).
May overwrite log q, and log p [n, V] if that is the tensor that describes p."""


def chunked(
    chunk_loss: ChunkLoss,
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor] = (),
    *,
    chunk_rows: int,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `chunk_loss(*inputs)` returns, without ever holding the intermediate results of all rows.

    Each chunk is differentiated as soon as it is computed, so its graph is gone before the next one starts: with the
    LM head inside `chunk_loss`, hidden states go in and the [N, V] logits never exist. Backward only scales the
    gradients found, in place, and can therefore run only once.

    Args:
        chunk_loss: returns sums, not means, over the rows it is given, so that chunks add up.
        inputs: tensors with the same number of rows in their first dimension.
        parameters: other tensors that `chunk_loss` uses and that need gradients, which are summed over chunks in
            float32; a tensor that requires grad and is not listed gets no gradient.
        chunk_rows: rows per chunk; see `default_chunk_rows`.
        mask: bool [N]; rows that are False are not computed, and their gradient is zero.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, got {chunk_rows}")
    lengths = {len(x) for x in inputs} | ({len(mask)} if mask is not None else set())
    if len(lengths) != 1:
        raise ValueError(f"inputs and mask must have the same number of rows, got {sorted(lengths)}")
    tensors = (*inputs, *parameters)
    if not torch.is_grad_enabled():
        tensors = tuple(x.detach() for x in tensors)
    total: tuple[Tensor, Tensor] = _Chunked.apply(chunk_loss, len(inputs), chunk_rows, mask, *tensors)
    return total


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, chunk_loss: ChunkLoss, n_inputs: int, chunk_rows: int, mask: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        inputs, parameters = tensors[:n_inputs], tensors[n_inputs:]
        needed = ctx.needs_input_grad[4:]
        allocate = torch.empty_like if mask is None else torch.zeros_like
        row_grads = [allocate(x) for x, need in zip(inputs, needed[:n_inputs], strict=True) if need]
        wanted = [x for x, need in zip(parameters, needed[n_inputs:], strict=True) if need]
        sums = [torch.zeros_like(x, dtype=_wide(x.dtype)) for x in wanted]

        losses, statistics = [], []
        for rows in _chunks(len(inputs[0]), chunk_rows, mask):
            chunk = [x[rows].detach().requires_grad_(need) for x, need in zip(inputs, needed[:n_inputs], strict=True)]
            with torch.set_grad_enabled(any(needed)):
                loss, statistic = chunk_loss(*chunk)
            losses.append(loss.detach())
            statistics.append(statistic.detach())
            if any(needed):
                leaves = [x for x in chunk if x.requires_grad]
                grads = torch.autograd.grad(loss, leaves + wanted, materialize_grads=True)
                for row_grad, grad in zip(row_grads, grads[: len(leaves)], strict=True):
                    row_grad[rows] = grad
                for total, grad in zip(sums, grads[len(leaves) :], strict=True):
                    total += grad

        found = iter(row_grads + [total.to(x.dtype) for total, x in zip(sums, wanted, strict=True)])
        ctx.save_for_backward(*(next(found) if need else None for need in needed))
        total_statistics = torch.stack(statistics).sum(0)
        ctx.mark_non_differentiable(total_statistics)
        return torch.stack(losses).sum(), total_statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, None, *(None if g is None else g.mul_(grad_loss) for g in ctx.saved_tensors)


def _chunks(n: int, chunk_rows: int, mask: Tensor | None) -> Sequence[slice | Tensor]:
    """Return the indices of each chunk of counted rows; at least one chunk, which may be empty."""
    if mask is not None:
        return torch.split(mask.nonzero().squeeze(1), chunk_rows)
    return [slice(i, i + chunk_rows) for i in range(0, max(n, 1), chunk_rows)]


TILE = 128
"""Rows in a tile of a GPU's matrix product: a partly filled tile takes as long as a full one."""


def default_chunk_rows(vocabulary: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return how many rows of logits of this type to hold at a time: as many as fill 16 MB on a CPU or 256 MB
    elsewhere, there rounded down to a multiple of TILE if there are more than TILE.

    Above 32 MB glibc maps every tensor afresh and each of its pages faults; far below 16 MB the threads of a CPU spend
    their time meeting after each operation, above all where other programs want the same cores.
    """
    if device.type == "cpu":
        return max(1, 16 * 2**20 // (vocabulary * dtype.itemsize))
    rows = max(1, 256 * 2**20 // (vocabulary * dtype.itemsize))
    return rows - rows % TILE if rows > TILE else rows


def _block_rows(logits: Tensor) -> int:
    return default_chunk_rows(logits.shape[-1], _wide(logits.dtype), logits.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _RowDivergence(torch.autograd.Function):
    """Divergence of each row in closed form: one pass over blocks of rows finds both value and gradient.

    Autograd through log_softmax takes twice the time and keeps two float32 copies of its rows.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, temperature: float, rule: ValueAndSlope, *teacher: Tensor) -> Tensor:
        values = student.new_empty(len(student), dtype=_wide(student.dtype))
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for rows in _chunks(len(student), _block_rows(student), mask=None):
            values[rows], slope = rule(_log_softmax(student[rows], temperature), *(x[rows] for x in teacher))
            if gradient is not None:
                gradient[rows] = slope if temperature == 1 else slope.mul_(temperature)
        ctx.save_for_backward(gradient)
        return values.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # The factor gets the gradient's own dtype: a wider factor would make PyTorch widen all rows at once.
        slope = gradient.mul_(grad_values.to(gradient.dtype).unsqueeze(1))
        return slope, *(None for _ in ctx.needs_input_grad[1:])


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(_wide(logits.dtype))
    return torch.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def _row_divergence(student: Tensor, teacher: Tensor, temperature: float, rule: ValueAndSlope) -> Tensor:
    if student.ndim != 2 or student.shape != teacher.shape:
        raise ValueError(f"need student and teacher logits of one shape [N, V], got {student.shape}, {teacher.shape}")
    _require_positive(temperature)

    def on_logits(log_q: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return rule(log_q, _log_softmax(logits, temperature))

    values: Tensor = _RowDivergence.apply(student, temperature, on_logits, teacher)
    return values


def _require_positive(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def forward_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of each row, which makes the student cover every token the teacher finds likely.

    All row divergences in this module take finite logits [N, V] of any float type and return nats [N] in float32 or
    wider; both distributions are softened by `temperature` and the result is multiplied by its square, so that
    gradients keep their size (arXiv 1503.02531). The teacher is a constant: it gets no gradient. Backward runs once.
    """
    return _row_divergence(student, teacher, temperature, _forward_kl)


def reverse_kl(student: Tensor, teacher: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return KL(student || teacher) of each row, which keeps the student off tokens the teacher finds unlikely."""
    return _row_divergence(student, teacher, temperature, _reverse_kl)


def jensen_shannon(student: Tensor, teacher: Tensor, *, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """Return the generalised Jensen-Shannon divergence of each row (arXiv 2306.13649).

    With m = beta p + (1 - beta) q it is beta KL(p || m) + (1 - beta) KL(q || m), which never exceeds ln 2 and is zero
    at beta = 0 and beta = 1. At these ends the limit of its quotient by beta (at 0: forward KL) or by 1 - beta (at 1:
    reverse KL) is returned instead.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must lie in [0, 1], got {beta}")
    rule = _forward_kl if beta == 0 else _reverse_kl if beta == 1 else partial(_jensen_shannon, beta=beta)
    return _row_divergence(student, teacher, temperature, rule)


def topk_kl(student: Tensor, teacher: Tensor, *, k: int = 64, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of each row over the teacher's k likeliest tokens and one bucket for all others.

    The bucket keeps this a true divergence that never exceeds the full one and equals it from k = V - 1 on. Without it,
    both sides would be renormalised over the k tokens, and nothing would hold the student's mass on the rest.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return _row_divergence(student, teacher, temperature, partial(_topk_kl, k=k))


@torch.no_grad()
def top_of(teacher: Tensor, *, k: int = 64, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the teacher's part of `topk_kl` from logits [N, V]: the log-probabilities [N, k + 1] of the k likeliest
    tokens and, last, of all others together; and the ids [N, k] of the k likeliest tokens, in int32."""
    _require_positive(temperature)
    parts = [
        _top_of(_log_softmax(teacher[rows], temperature), k)
        for rows in _chunks(len(teacher), _block_rows(teacher), None)
    ]
    masses, tokens = (torch.cat(part) for part in zip(*parts, strict=True))
    return masses, tokens.int()


def topk_kl_to(student: Tensor, masses: Tensor, tokens: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Return `topk_kl` of student logits [N, V] and the teacher's `masses` and `tokens`, which `top_of` returns at the
    same temperature."""
    _require_positive(temperature)
    values: Tensor = _RowDivergence.apply(student, temperature, _kl_to_top, masses, tokens)
    return values


def _forward_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    value = torch.linalg.vecdot(p, log_p.sub_(log_q))
    return value, log_q.exp_().sub_(p)


def _reverse_kl(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    log_ratio = torch.sub(log_q, log_p, out=log_p)
    q = log_q.exp_()
    value = torch.linalg.vecdot(q, log_ratio)
    return value, log_ratio.sub_(value.unsqueeze(1)).mul_(q)


def _jensen_shannon(log_q: Tensor, log_p: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.lerp(q, p, beta).clamp_(min=torch.finfo(q.dtype).tiny).log_()  # p and q may both underflow
    kl_p = torch.linalg.vecdot(p, log_p.sub_(log_m))
    log_ratio = log_q.sub_(log_m)
    kl_q = torch.linalg.vecdot(q, log_ratio)
    value = beta * kl_p + (1 - beta) * kl_q
    return value, log_ratio.sub_(kl_q.unsqueeze(1)).mul_(q).mul_(1 - beta)


def _topk_kl(log_q: Tensor, log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return _kl_to_top(log_q, *_top_of(log_p, k))


def _top_of(log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top_log_p, top = log_p.topk(min(k, log_p.shape[1]), dim=1)
    tiny = torch.finfo(log_p.dtype).tiny  # a finite logarithm, so that an empty bucket (mass zero) adds zero, not NaN
    rest = log_p.exp_().scatter_(1, top, 0).sum(1, keepdim=True).clamp_(min=tiny).log_()
    return torch.cat([top_log_p, rest], dim=1), top


def _kl_to_top(log_q: Tensor, masses: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    top, top_log_p, rest_log_p = tokens.long(), masses[:, :-1], masses[:, -1]
    top_log_q = log_q.gather(1, top)
    top_p, top_q, rest_p = top_log_p.exp(), top_log_q.exp(), rest_log_p.exp()
    rest_q = log_q.exp_().scatter_(1, top, 0).sum(1).clamp_(min=torch.finfo(log_q.dtype).tiny)
    value = torch.linalg.vecdot(top_p, top_log_p - top_log_q) + rest_p * (rest_log_p - rest_q.log())
    slope = log_q.mul_((1 - rest_p / rest_q).unsqueeze(1)).scatter_(1, top, top_q - top_p)
    return value, slope


DIVERGENCES: dict[str, RowLoss] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "topk_kl": topk_kl,
}


def mean_divergence(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    chunk_rows: int | None = None,
    **options: float,
) -> Tensor:
    """Return the mean of a row divergence over the counted rows of logits [..., V]; zero if none counts.

    Args:
        mask: bool [...], the rows that count; all if None.
        kind: a name in `DIVERGENCES`.
        chunk_rows: rows held in float32 at a time; None chooses by `default_chunk_rows`.
        options: `temperature` and other keyword arguments of the row divergence.
    """
    if kind not in DIVERGENCES:
        raise ValueError(f"unknown divergence {kind!r}; there are {', '.join(DIVERGENCES)}")
    for name, x in (("teacher", teacher), ("mask", mask)):
        if x is not None and x.shape[: student.ndim - 1] != student.shape[:-1]:
            raise ValueError(f"logits are {tuple(student.shape)}, but {name} {tuple(x.shape)}")

    def chunk_loss(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        rows = DIVERGENCES[kind](student, teacher, **options)
        return rows.sum(), rows.new_tensor([len(rows)])

    total, count = chunked(
        chunk_loss,
        [student.flatten(0, -2), teacher.flatten(0, -2)],
        chunk_rows=chunk_rows or _block_rows(student),
        mask=None if mask is None else mask.flatten(),
    )
    return total / count.clamp(min=1).squeeze()
