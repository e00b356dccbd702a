"""The family of causal language models: their data, what a batch of it costs, and what a student is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teachers
from elastic.accounting.routing import where
from elastic.accounting.sums import Sums, divergence_of, routing_loss
from elastic.baselines import language as baselines
from elastic.config import BudgetConfig, DataConfig, LossConfig, RunConfig
from elastic.distillation.budgets import trained
from elastic.distillation.dial import Meter
from elastic.reporting.progress import Watched
from losses import (
    HIDDEN_DISTANCES,
    chunked,
    default_chunk_rows,
    per_layer,
)
from students.calibration.language import calibrate
from students.calibration.price import Start
from students.compute import PHASES, Phase
from students.families.language import LanguageStudent
from teachers import Teacher
from teachers.data.text import TextData, load_text, load_windows

BATCH_TOKENS = 1024
"""Tokens that are measured together."""
UNIT = "windows"
"""What data consists of, for the user to read."""
DIAL_WINDOWS = 16
"""Windows that the dial is set on."""
EXAMPLE_TOKENS = 512
"""Tokens that routing is looked at on."""
SHOWN = 200
"""How many of them are shown."""
METRICS = (
    ("perplexity_ratio", "perplexity over the teacher's", "lower"),
    ("kl", "KL to the teacher (nats per token)", "lower"),
    ("agreement", "top-1 agreement with the teacher", "higher"),
)
"""What a report plots against compute: key, label, and which direction is better."""
BASELINES = ("random", "uniform", "static", "teal")
"""What `baseline` makes; see elastic/baselines/language.py."""


def load(config: RunConfig, teacher: Teacher) -> TextData:
    """The run's training and held-out windows; the same every time. ValueError where the model reads less at once."""
    longest = getattr(teacher.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.data.window > longest:
        raise ValueError(f"data.window is {config.data.window}, but {config.model} reads at most {longest} tokens")
    data = load_text(
        config.data.source,
        teacher.processor,
        window=config.data.window,
        held_out=config.data.held_out,
        seed=config.train.seed,
        max_tokens=config.data.max_tokens,
    )
    for windows in (data.train, data.held_out):
        require_rows(teacher.model, teacher.processor, windows)
    return data


def require_rows(model: Any, tokenizer: Any, ids: Tensor) -> None:
    """ValueError where one of the token ids, of any shape, has no row in the model's embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    worst = int(ids.max()) if ids.numel() else 0
    if worst >= rows:
        raise ValueError(
            f"the tokenizer has more tokens than the model: {tokenizer.convert_ids_to_tokens(worst)!r} is number "
            f"{worst}, and the model's embedding has {rows} rows; take the tokenizer that the model was trained with, "
            "or save the model after resize_token_embeddings"
        )


def most_tokens(student: LanguageStudent) -> int | None:
    """How many tokens a model can read, where every position has learned numbers of its own; None: any number."""
    trunk = student.trunk
    most, words = getattr(trunk.config, "max_position_embeddings", None), trunk.get_input_embeddings()
    tables = (m for m in trunk.modules() if isinstance(m, nn.Embedding) and m is not words)
    return most if any(table.num_embeddings == most for table in tables) else None


def random_data(config: RunConfig, model: nn.Module) -> TextData:
    """Windows of random tokens: as many to train on as are calibrated on."""
    draw = torch.Generator().manual_seed(config.train.seed)
    counts = max(1, config.calibration.windows), config.data.held_out
    shape, vocabulary = (sum(counts), config.data.window), model.config.get_text_config().vocab_size
    train, held_out = torch.randint(vocabulary, shape, generator=draw).split(counts)
    return TextData(train, held_out, "random tokens", shape[0] * shape[1])


def load_all(source: str, config: RunConfig, teacher: Teacher) -> Tensor:
    """All of a source as windows [N, T]."""
    windows = load_windows(source, teacher.processor, window=config.data.window)
    require_rows(teacher.model, teacher.processor, windows)
    return windows


def summary(data: TextData, config: RunConfig) -> str:
    """What there is to train on, for the user to read."""
    windows = f"{len(data.train):,} windows of {config.data.window} to train on, {len(data.held_out)} held out"
    return f"{data.description}; {windows}"


def tokens(student: LanguageStudent, data: TextData, config: RunConfig) -> int:
    """Tokens that the model reads at once."""
    return config.data.window


class Batches:
    """Training windows [N, T], by number."""

    def __init__(self, data: TextData, config: RunConfig, device: torch.device) -> None:
        self.pieces = data.train.to(device).reshape(-1, config.train.window)

    def __len__(self) -> int:
        return len(self.pieces)

    def load(self, chosen: Sequence[int], following: Sequence[int]) -> Tensor:
        """The windows [B, T] with these numbers; following: those that come next."""
        return self.pieces[torch.tensor(chosen)]


def start(student: LanguageStudent, data: TextData, order: Tensor, config: RunConfig) -> Start:
    """Calibrate; order: the training windows, shuffled."""
    picked = data.train[order[: config.calibration.windows]].to(next(student.parameters()).device)
    return calibrate(student, Watched(picked.split(2)), trained(config.budget), config.budget.phase, config.train.seed)


def compute_meter(student: LanguageStudent, data: TextData, order: Tensor, config: RunConfig) -> Meter:
    """What measures the compute that the dial is set by; order: the training windows, shuffled."""
    windows = data.train[order[:DIAL_WINDOWS]].to(next(student.parameters()).device)

    def meter(share: float) -> float:
        some = windows[: math.ceil(share * len(windows))]
        return measured_compute(student, some, config.budget.phase, config.data.prompt)

    return meter


@dataclass
class Measured(Sums):
    """Sums over the tokens of a batch, on the device; add them up and divide by `tokens`."""

    tokens: Tensor
    """Tokens that quality is measured on."""
    kl: Tensor
    """Divergence from the teacher, in nats (the configured one in training, forward KL in evaluation)."""
    agreement: Tensor
    """Tokens at which student and teacher have the same most likely next token; like the two below, not in training."""
    nll: Tensor
    """Student's negative log-likelihood of the text."""
    teacher_nll: Tensor
    predicted: Tensor
    """Tokens that nll is summed over: those with a successor."""
    macs: dict[Phase, Tensor]
    """Student's compute, by phase."""
    dense: dict[Phase, Tensor]
    """Teacher's compute, by phase."""
    rows: dict[str, Tensor]
    """For each window its "kl", in nats per token, and its "compute", as a share of the teacher's."""


def prompt_mask(ids: Tensor, length: int) -> Tensor:
    """[B, T] bool: the first `length` tokens of each window, from which sequence-level routers decide."""
    return (torch.arange(ids.shape[1], device=ids.device) < length).expand(ids.shape)


class Distillation(nn.Module):
    """Student and loss in one module, so that accelerate can wrap it whole."""

    def __init__(self, student: LanguageStudent, loss: LossConfig, budget: BudgetConfig, data: DataConfig) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.budget = budget
        self.prompt = data.prompt
        self.divergence = divergence_of(loss)
        self.sequence_level = any(r.granularity == "sequence" for r in student.spec.routers)

    def forward(self, ids: Tensor, price: Tensor | float = 0.0) -> tuple[Tensor, Measured]:
        """ids [B, T] without padding; price: nats per unit of compute, for all rows or each [B]. Returns the loss and
        what was measured."""
        student, loss = self.student, self.loss
        prompt = prompt_mask(ids, self.prompt)
        counted = ~prompt if self.sequence_level else torch.ones_like(prompt)
        states = {"output_hidden_states": loss.hidden_weight > 0 and loss.hidden_layers == "all"}
        with student.teacher(), torch.no_grad():
            teacher, _ = student.features(ids, **states)
        out, decisions = student.features(ids, prompt=prompt, **states)

        valid = torch.ones_like(prompt)
        phase = self.budget.phase
        dense = {p: student.compute.dense(valid, p).sum() for p in PHASES}
        macs = {p: student.compute.routed_blocks(decisions, valid, p).sum(1) for p in PHASES}
        price = torch.as_tensor(price, device=ids.device).expand(len(ids))
        head, sums, rows = self._head_loss(
            out.last_hidden_state, teacher.last_hidden_state, ids, counted, price, dense[phase]
        )
        tokens = counted.sum()
        total = head / tokens + (price * macs[phase]).sum() / dense[phase]
        total = total + routing_loss(student, decisions, loss, self.budget)
        if loss.hidden_weight:
            distance = HIDDEN_DISTANCES[loss.hidden]
            pairs = (
                (out.hidden_states[1:], teacher.hidden_states[1:])
                if states["output_hidden_states"]
                else ([out.last_hidden_state], [teacher.last_hidden_state])
            )
            total = total + loss.hidden_weight * per_layer(distance, *pairs, counted)
        macs = {p: m.detach() + rows[:, 1 + i] for i, (p, m) in enumerate(macs.items())}
        each = {
            "kl": rows[:, 0] / counted.sum(1),
            "compute": macs[phase] / student.compute.dense(valid, phase).sum(1),
        }
        macs = {p: m.sum() for p, m in macs.items()}
        return total, Measured(tokens, rows[:, 0].sum(), *sums, counted[:, :-1].sum(), macs, dense, each)

    def _head_loss(
        self, hidden: Tensor, teacher_hidden: Tensor, ids: Tensor, counted: Tensor, price: Tensor, dense: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """LM head and everything on logits, chunk by chunk: the loss; sums: agreement, nll, teacher's nll; sums for
        each row of the batch [B, 3]: kl, and the head's MACs in both phases.

        The head's compute is that of the counted tokens, scaled up to all.
        """
        student, loss = self.student, self.loss
        targets = ids.roll(-1, dims=1)
        follows = torch.ones_like(ids, dtype=torch.bool)
        follows[:, -1] = False
        scale = counted.numel() / counted.sum()
        tensors = student.head_tensors()
        owners = torch.arange(len(ids), device=ids.device).repeat_interleave(ids.shape[1])

        def chunk_loss(h: Tensor, t: Tensor, target: Tensor, follows: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
            logits, share = student.logits(h, *tensors, owner=owner)
            with torch.no_grad():
                teacher_logits, _ = student.logits(t)
            kl = self.divergence(logits, teacher_logits)
            costs = {p: torch.as_tensor(student.compute.routed_head(share, p), device=h.device) for p in PHASES}
            cost = {p: c.expand(len(h)) * scale for p, c in costs.items()}
            total = loss.logits_weight * kl.sum()
            if loss.cross_entropy_weight:
                total = total + loss.cross_entropy_weight * _nll(logits, target, follows)
            if share is not None and self.budget.control == "price":
                total = total + (price[owner] * cost[self.budget.phase]).sum() * counted.sum() / dense
            with torch.no_grad():
                quality = [h.new_zeros(())] * 3
                if not self.training:
                    agreement = (logits.argmax(-1) == teacher_logits.argmax(-1)).sum()
                    quality = [agreement, _nll(logits, target, follows), _nll(teacher_logits, target, follows)]
                parts = torch.stack([kl, *cost.values()], 1).double()
                each = parts.new_zeros(len(ids), 3).index_add(0, owner, parts)
                return total, torch.cat([torch.stack(quality).double(), each.flatten()])

        rows = [*(x.flatten(0, 1) for x in (hidden, teacher_hidden, targets, follows)), owners]
        vocabulary = student.model.config.vocab_size
        total, sums = chunked(
            chunk_loss,
            rows,
            tensors,
            chunk_rows=default_chunk_rows(vocabulary, hidden.dtype, hidden.device),
            mask=counted.flatten() if self.sequence_level else None,
        )
        return total, sums[:3], sums[3:].view(len(ids), 3)


def _nll(logits: Tensor, target: Tensor, follows: Tensor) -> Tensor:
    """Sum over rows that have a successor."""
    return F.cross_entropy(logits.float(), torch.where(follows, target, -100), ignore_index=-100, reduction="sum")


def evaluate(student: LanguageStudent, windows: Tensor, config: RunConfig) -> dict[str, Any]:
    """Measure a student on token windows [N, T].

    Keys: compute (decode phase) and compute_prefill, both as shares of the teacher's; perplexity, teacher_perplexity
    and their ratio; kl, in nats per token, of the student to the teacher; agreement of the most likely next token;
    tokens. Where a router decides per sequence, quality is that of the tokens after the prompt.
    """
    total = _measure(student, windows, config)
    nll, teacher_nll = (float(x / total.predicted) for x in (total.nll, total.teacher_nll))
    compute = {p: float(total.macs[p] / total.dense[p]) for p in PHASES}
    return {
        "compute": compute["decode"],
        "compute_prefill": compute["prefill"],
        "perplexity": math.exp(nll),
        "teacher_perplexity": math.exp(teacher_nll),
        "perplexity_ratio": math.exp(nll - teacher_nll),
        "kl": float(total.kl / total.tokens),
        "agreement": float(total.agreement / total.tokens),
        "tokens": int(total.tokens),
    }


@torch.no_grad()
def _measure(student: LanguageStudent, windows: Tensor, config: RunConfig) -> Measured:
    module = Distillation(student, LossConfig(), replace(config.budget, control="price"), config.data).eval()
    total = None
    device = next(student.parameters()).device
    for batch in Watched(windows.split(max(1, BATCH_TOKENS // windows.shape[1]))):
        _, measured = module(batch.to(device))
        total = measured if total is None else total + measured
    return total


@torch.no_grad()
def measured_compute(student: LanguageStudent, windows: Tensor, phase: Phase, prompt: int, after: int = 0) -> float:
    """The compute ratio on token windows [N, T] with prompts of `prompt` tokens, without measuring quality; after: of
    the tokens after so many only."""
    spent = whole = 0.0
    for batch in windows.split(max(1, BATCH_TOKENS // windows.shape[1])):
        valid = torch.ones_like(batch, dtype=torch.bool)
        out, decisions = student.features(batch, prompt=prompt_mask(batch, prompt))
        head = _head_cost(student, out.last_hidden_state, phase)
        spent += float((student.compute.routed_blocks(decisions, valid, phase) + head)[:, after:].sum())
        whole += float(student.compute.dense(valid, phase)[:, after:].sum())
    return spent / whole


def _head_cost(student: LanguageStudent, hidden: Tensor, phase: Phase) -> Tensor:
    """What the LM head costs for each of the final hidden states [B, T, D], [B, T]."""
    tensors = student.head_tensors()
    if not tensors:
        return torch.as_tensor(student.compute.routed_head(None, phase)).expand(hidden.shape[:2])
    rows = hidden.flatten(0, 1)
    owners = torch.arange(len(hidden), device=rows.device).repeat_interleave(hidden.shape[1])
    parts = zip(rows.split(128), owners.split(128), strict=True)
    share = torch.cat([student.logits(part, *tensors, owner=owner)[1] for part, owner in parts]).view(hidden.shape[:2])
    return torch.as_tensor(student.compute.routed_head(share, phase)).expand(hidden.shape[:2])


@torch.no_grad()
def routing(student: LanguageStudent, windows: Tensor, teacher: Teacher, config: RunConfig) -> dict[str, Any]:
    """Where compute goes in the first of the windows [N, T] (see accounting/routing.py), and what it reads there.

    Adds the key examples: one text, in pieces of [text, compute as a share of the teacher's].
    """
    shown = windows[: max(1, EXAMPLE_TOKENS // windows.shape[1])].to(next(student.parameters()).device)
    valid, phase = torch.ones_like(shown, dtype=torch.bool), config.budget.phase
    out, decisions = student.features(shown, prompt=prompt_mask(shown, config.data.prompt))
    head = _head_cost(student, out.last_hidden_state, phase)
    spent = student.compute.routed_blocks(decisions, valid, phase) + head
    shares = (spent / student.compute.dense(valid, phase)).flatten()
    ids, text = shown.flatten().tolist(), ""
    pieces = []
    for number, share in enumerate(shares[:SHOWN].tolist()):
        # what a token adds to the text in front of it: alone, some tokenizers would take its space away
        before, text = text, teacher.processor.decode(ids[: number + 1])
        pieces.append([text[len(before) :], round(share, 3)])
    found = where(student, decisions, shown, valid, phase)
    found["outside"] = {"LM head": round(float(head.mean()) / student.compute.head, 4)}
    return {**found, "examples": [{"pieces": pieces}]}


def baseline(name: str, student: LanguageStudent, windows: Tensor, config: RunConfig, compute: float) -> dict[str, Any]:
    """As `evaluate`, for a baseline (see elastic/baselines/language.py) at the student's compute in the run's phase.

    Compute is matched on the first of the windows; calibration looks at training windows.
    """
    frozen = student.model
    teacher = teachers.load(config.model, device=frozen.device, dtype=frozen.dtype)
    first = windows[:DIAL_WINDOWS].to(frozen.device)
    if name == "random":
        other = baselines.at_random(student, teacher.model, config, compute, first.split(2))
    else:
        train = load(config, teacher).train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.train.seed))
        looked_at = train[order[:DIAL_WINDOWS]].to(first.device).split(2)

        def meter(other: LanguageStudent) -> float:
            return measured_compute(other, first, config.budget.phase, config.data.prompt)

        other = baselines.calibrated(name, student, teacher.model, config, compute, looked_at, meter)
    return evaluate(other, windows, config)


def lines() -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """What a table of results says of a language model, line by line."""
    return [
        ("measured on", lambda r: f"{r['data']}, {r['tokens']:,} tokens"),
        ("compute asked", lambda r: f"{r['compute_target']:.3f} ({r['phase']})"),
        ("compute, decode", lambda r: f"{r['compute']:.3f}"),
        ("compute, prefill", lambda r: f"{r['compute_prefill']:.3f}"),
        ("perplexity, teacher", lambda r: f"{r['teacher_perplexity']:.3f}"),
        ("perplexity, student", lambda r: f"{r['perplexity']:.3f}"),
        ("perplexity ratio", lambda r: f"{r['perplexity_ratio']:.4f}"),
        ("KL to the teacher", lambda r: f"{r['kl']:.4f} nats"),
        ("top-1 agreement", lambda r: f"{r['agreement']:.2%}"),
    ]
