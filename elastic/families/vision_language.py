"""The family of vision-language models: their data, what a prompt of it costs, and what a student is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from elastic.accounting.routing import where
from elastic.accounting.sums import Sums, divergence_of, routing_loss
from elastic.baselines import image as baselines
from elastic.config import BudgetConfig, DataConfig, LossConfig, RunConfig
from elastic.distillation.budgets import trained
from elastic.distillation.dial import Meter, exact_start
from elastic.distillation.prefetch import Prefetched
from elastic.families.image import data_uri
from elastic.families.language import require_rows
from elastic.reporting.progress import Watched
from losses import DIVERGENCES, HIDDEN_DISTANCES
from students.calibration.price import Start
from students.calibration.vision_language import calibrate_door
from students.decisions import Decisions
from students.families.vision_language import VisionLanguageStudent
from teachers import Teacher
from teachers.data.left_out import LeftOut
from teachers.data.questions import QuestionData, QuestionSet, load_questions
from teachers.data.questions import load_all as load_all_questions
from teachers.families.vision_language import (
    Prompts,
    answer_text,
    call,
    encode,
    masked,
    prompt_text,
    token_ids,
)

UNIT = "questions"
"""What data consists of, for the user to read."""
MEASURED = 16
"""Questions that are measured together."""
CALIBRATED = 4
"""Questions that are looked at together in calibration."""
DIAL_QUESTIONS = 128
"""Training questions that the door's share and the dial are set on."""
LONGEST_ANSWER = 16
"""Tokens of an answer that is generated."""
RANDOM_TEXT, RANDOM_ANSWER = 56, 8
"""Tokens of a random question, and of its answer."""
EXAMPLES = 6
"""Questions that a report shows."""
BASELINES = ("random", "uniform")
"""What `baseline` makes; see elastic/baselines/image.py."""
METRICS = (
    ("accuracy", "accuracy", "higher"),
    ("agreement", "agreement of answers", "higher"),
    ("kl", "KL to the teacher, nats per token", "lower"),
)
"""What a report plots (see elastic/families)."""


Asked = tuple[Any, str, str]
"""Image, question and answer."""


@dataclass(frozen=True)
class Questions:
    """Questions and the processor that makes prompts of them."""

    asked: QuestionSet
    processor: Any
    image_token: int
    rows: int
    """Of the model's embedding of tokens."""

    def __len__(self) -> int:
        return len(self.asked)

    def subset(self, chosen: Sequence[int]) -> Questions:
        """Only these questions, in this order."""
        return replace(self, asked=self.asked.subset(chosen))

    def load(self, chosen: Sequence[int]) -> Prompts:
        """Prompts of as many questions: others stand in for those that are left out."""
        return self.read(chosen)[0]

    def read(self, chosen: Sequence[int]) -> tuple[Prompts, list[Asked]]:
        """As `load`, and what the prompts consist of."""
        found = self._encoded(chosen, self.asked.filled)
        assert found is not None  # `filled` raises where there is nothing
        return found

    def read_readable(self, chosen: Sequence[int]) -> tuple[Prompts, list[Asked]] | None:
        """As `read`, of those of the questions that can be used; None where there are none."""
        return self._encoded(chosen, self.asked.readable)

    def _encoded(
        self, chosen: Sequence[int], read: Callable[[Sequence[int]], list[tuple[int, Asked]]]
    ) -> tuple[Prompts, list[Asked]] | None:
        while found := read(chosen):
            samples = [sample for _, sample in found]
            try:
                return self._encode(samples), samples
            except Exception:  # a processor may refuse a single image or text, in whatever way
                if not self._leave_out(found):
                    raise
        return None

    def _encode(self, samples: Sequence[Asked]) -> Prompts:
        prompts = encode(self.processor, samples, self.image_token)
        if int(prompts.inputs["input_ids"].max()) >= self.rows:
            raise ValueError(f"a token has no row in the model's embedding, which has {self.rows}")
        return prompts

    def _leave_out(self, found: list[tuple[int, Asked]]) -> bool:
        """Leave out those of which alone no prompt can be made; whether there are any."""
        some = False
        for number, sample in dict(found).items():
            try:
                self._encode([sample])
            except Exception as error:
                self.asked.leave_out(number, error)
                some = True
        return some

    def ask(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """What a model is called with to answer these questions, padded at the left."""
        _, samples = self.read(chosen)
        texts = [prompt_text(self.processor, question) for _, question, _ in samples]
        return call(self.processor, texts, [image for image, _, _ in samples], "left")


@dataclass(frozen=True)
class RandomQuestions:
    """Questions of random tokens [N, T] about images of noise [N, C, H, W], as `Questions` has them, the last
    RANDOM_ANSWER tokens being the answer."""

    tokens: Tensor
    pixels: Tensor
    image_token: int

    def __len__(self) -> int:
        return len(self.tokens)

    def subset(self, chosen: Sequence[int]) -> RandomQuestions:
        """Only these questions, in this order."""
        rows = torch.as_tensor(chosen)
        return RandomQuestions(self.tokens[rows], self.pixels[rows], self.image_token)

    def _inputs(self, chosen: Sequence[int], end: int | None) -> dict[str, Tensor]:
        rows = torch.as_tensor(chosen)
        ids = self.tokens[rows, :end]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": self.pixels[rows]}

    def load(self, chosen: Sequence[int]) -> Prompts:
        """Prompts of these questions."""
        return masked(self._inputs(chosen, None), [RANDOM_ANSWER] * len(chosen), self.image_token)

    def ask(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """What a model is called with to answer these questions."""
        return self._inputs(chosen, -RANDOM_ANSWER)


@dataclass(frozen=True)
class Data:
    """Questions to train on, and others to measure on."""

    train: Questions | RandomQuestions
    held_out: Questions | RandomQuestions
    description: str
    left_out: tuple[LeftOut, ...] = ()
    """Records and questions that cannot be used."""


def load(config: RunConfig, teacher: Teacher) -> Data:
    """The run's training and held-out questions; the same every time."""
    data = config.data
    read: QuestionData = load_questions(
        data.source, held_out=data.held_out, seed=config.train.seed, max_images=data.max_images
    )
    parts = (_with(teacher, part) for part in (read.train, read.held_out))
    return Data(*parts, read.description, read.left_out)


def random_tokens(model: nn.Module) -> int:
    """Tokens of a random question, its image and its answer, for a LLaVA."""
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 + RANDOM_TEXT + RANDOM_ANSWER


def random_data(config: RunConfig, model: nn.Module) -> Data:
    """Random questions about random images, for a LLaVA: as many to train on as are calibrated on."""
    draw = torch.Generator().manual_seed(config.train.seed)
    counts = max(1, config.calibration.windows), config.data.held_out
    settings, vision = model.config, model.config.vision_config
    text = RANDOM_TEXT + RANDOM_ANSWER
    # the image comes first, and its token's number is no word's
    words = torch.randint(settings.image_token_id, (sum(counts), text), generator=draw)
    image = torch.full((len(words), random_tokens(model) - text), settings.image_token_id)
    tokens = torch.cat([image, words], 1)
    pixels = torch.randn(len(words), vision.num_channels, *[vision.image_size] * 2, generator=draw).to(model.dtype)
    parts = zip(tokens.split(counts), pixels.split(counts), strict=True)
    return Data(*(RandomQuestions(*part, settings.image_token_id) for part in parts), "random questions")


def load_all(source: str, config: RunConfig, teacher: Teacher) -> Questions:
    """The validation part of a source, or all of it."""
    return _with(teacher, load_all_questions(source))


def _with(teacher: Teacher, asked: QuestionSet) -> Questions:
    model, tokenizer = teacher.model, teacher.processor.tokenizer
    known = [number for number in (model.config.image_token_id, tokenizer.eos_token_id) if number is not None]
    require_rows(model, tokenizer, torch.tensor(known))
    rows = model.get_input_embeddings().weight.shape[0]
    return Questions(asked, teacher.processor, model.config.image_token_id, rows)


def summary(data: Data, config: RunConfig) -> str:
    """What there is to train on, for the user to read."""
    return f"{data.description} to train on, {data.held_out.asked.usable:,} held out"


@torch.no_grad()
def tokens(student: VisionLanguageStudent, data: Data, config: RunConfig) -> tuple[int, int]:
    """(text tokens, image tokens) of a prompt, the mean of a few."""
    prompts = data.train.load(range(min(4, len(data.train)))).to(student.model.device)
    with student.teacher():
        student.features(**prompts.inputs)
    image = prompts.image.sum().item() / len(prompts.image)
    whole = prompts.inputs["attention_mask"].sum().item() / len(prompts.image)
    return round(whole - image), round(image)


class Batches(Prefetched):
    """Training prompts by number."""

    def __init__(self, data: Data, config: RunConfig, device: torch.device) -> None:
        super().__init__(data.train, device)


@dataclass
class Measured(Sums):
    """Sums over the prompts of a batch, on the device; add them up and divide by `tokens`."""

    tokens: Tensor
    """Tokens of answers."""
    kl: Tensor
    """Divergence of their distributions, in nats."""
    kept: Tensor
    """Image tokens that passed the door."""
    image: Tensor
    """Image tokens."""
    vision: Tensor
    """Student's compute in vision tower and projector."""
    macs: dict[str, Tensor]
    """Student's compute."""
    dense: dict[str, Tensor]
    """Teacher's compute."""
    rows: dict[str, Tensor]
    """For each prompt its "kl", in nats per token of the answer, and its "compute", as a share of the teacher's."""


class Distillation(nn.Module):
    """Student and loss in one module, so that accelerate can wrap it whole."""

    def __init__(
        self, student: VisionLanguageStudent, loss: LossConfig, budget: BudgetConfig, data: DataConfig
    ) -> None:
        super().__init__()
        self.student = student
        self.loss = loss
        self.budget = budget
        self.divergence = divergence_of(loss)

    def forward(self, prompts: Prompts, price: Tensor | float = 0.0) -> tuple[Tensor, Measured]:
        """price: loss per unit of compute, for all prompts or each [B]. Returns the loss and what was measured."""
        student, loss = self.student, self.loss
        with student.teacher(), torch.no_grad():
            teacher = student.features(**prompts.inputs)[0].last_hidden_state
            teacher_logits = student.logits(teacher[prompts.answers])[0]
        out, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
        hidden = out.last_hidden_state
        logits, _ = student.logits(hidden[_through(prompts.answers, decisions)], *student.head_tensors())
        kl = self.divergence(logits, teacher_logits)
        macs, vision, dense = _spent(student, prompts, decisions)
        total = loss.logits_weight * kl.mean()
        if not student.by_count:  # a share that is fixed has nothing to learn from a price
            total = total + (price * macs / dense).mean()
        total = total + routing_loss(student, decisions, loss, self.budget)
        if loss.hidden_weight:
            text = prompts.inputs["attention_mask"].bool() & ~prompts.image
            distance = HIDDEN_DISTANCES[loss.hidden]
            total = total + loss.hidden_weight * distance(hidden[_through(text, decisions)], teacher[text], None)
        return total, _measured(prompts, decisions, kl.detach(), macs.detach(), vision.detach(), dense)


def _through(chosen: Tensor, decisions: Decisions) -> Tensor:
    """Where text tokens chosen [B, T] are in the output, which may have no rows for some image tokens."""
    return chosen if decisions.index is None else chosen.gather(1, decisions.index) & decisions.valid


def _spent(student: VisionLanguageStudent, prompts: Prompts, decisions: Decisions) -> tuple[Tensor, Tensor, Tensor]:
    """Multiply-accumulates of each prompt: the student's, those in vision tower and projector, the teacher's."""
    valid = prompts.inputs["attention_mask"].bool()
    return student.spent(decisions, prompts.image, valid, prompts.answers.sum(1))


def _measured(
    prompts: Prompts, decisions: Decisions, kl: Tensor, macs: Tensor, vision: Tensor, dense: Tensor
) -> Measured:
    """Sums of a batch; kl: of each token of the answers, the others as `_spent` gives them."""
    image, share = prompts.image.sum(), decisions.share.get("image")
    kept = image if share is None else (share.detach() * prompts.image).sum()
    owner = prompts.answers.nonzero()[:, 0]
    each = kl.new_zeros(len(prompts)).index_add(0, owner, kl) / prompts.answers.sum(1)
    phases = {"prefill": macs.sum()}, {"prefill": dense.sum()}
    rows = {"kl": each, "compute": macs / dense}
    return Measured(prompts.answers.sum(), kl.sum(), kept, image, vision.sum(), *phases, rows)


def start(student: VisionLanguageStudent, data: Data, order: Tensor, config: RunConfig) -> Start:
    """Calibrate; order: the training questions, shuffled."""
    if student.door is None:
        raise ValueError("calibration is for image routers, and there is none: use --set calibration.windows=0")
    batches = [
        ({**prompts.inputs, "prompt": prompts.prompt}, prompts.answers, prompts.image)
        for prompts in _batches(student, data.train, order[: config.calibration.windows].tolist(), CALIBRATED)
    ]
    targets = trained(config.budget)
    start = calibrate_door(student, Watched(batches), targets, tokens(student, data, config), config.train.seed)
    if not student.by_count:
        return start
    return exact_start(start, student, [student.door], targets, compute_meter(student, data, order, config))


@torch.no_grad()
def compute_meter(student: VisionLanguageStudent, data: Data, order: Tensor, config: RunConfig) -> Meter:
    """What measures the compute that the dial is set by; sets the door's share first. order: training questions,
    shuffled."""
    batches = list(_batches(student, data.train, order[:DIAL_QUESTIONS].tolist(), MEASURED))
    scores = []
    for prompts in batches:
        _, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
        if "image" in decisions.score:
            scores.append(decisions.score["image"].squeeze(-1)[prompts.image])
    student.set_quotas(scores)

    def meter(share: float) -> float:
        return measured_compute(student, batches[: math.ceil(share * len(batches))])

    return meter


@torch.no_grad()
def measured_compute(student: VisionLanguageStudent, batches: Sequence[Prompts]) -> float:
    """The compute ratio on batches of prompts."""
    spent = whole = 0.0
    for prompts in batches:
        if student.by_count:
            decisions = student.passing(prompts.image, prompts.inputs["attention_mask"].bool())
        else:
            _, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
        macs, _, dense = _spent(student, prompts, decisions)
        spent, whole = spent + float(macs.sum()), whole + float(dense.sum())
    return spent / whole


def _batches(
    student: VisionLanguageStudent, questions: Questions, chosen: Sequence[int], size: int
) -> Iterator[Prompts]:
    """Prompts of as many questions as are chosen, on the student's device."""
    for first in range(0, len(chosen), size):
        yield questions.load(chosen[first : first + size]).to(student.model.device)


@torch.no_grad()
def evaluate(student: VisionLanguageStudent, questions: Questions, config: RunConfig) -> dict[str, Any]:
    """Measure a student on questions.

    Keys: accuracy and teacher_accuracy, the share of answers that are exactly right: the likeliest of a closed set of
    answers (by the first token that they differ in), else what is generated, ignoring case and a full stop; agreement
    of the two's answers; kl, in nats per token of the answer, of the student to the teacher; compute, as a share of the
    teacher's, of prompt and answer in one pass; compute_vision, the part of that in vision tower and projector;
    image_tokens_kept, as a share; questions, and how many more were broken.
    """
    asked = questions.asked
    first = _first_tokens(questions.processor, asked)
    total, right, agreed, seen = None, {"": 0, "teacher_": 0}, 0, 0
    for begin in Watched(range(0, len(questions), MEASURED)):
        read = questions.read_readable(range(begin, min(begin + MEASURED, len(asked))))
        if read is None:
            continue
        prompts, samples = read[0].to(student.model.device), read[1]
        seen += len(samples)
        said, hidden = {}, {}
        with student.teacher():
            out, _ = student.features(**prompts.inputs)
            hidden["teacher_"] = student.logits(out.last_hidden_state[prompts.answers])[0]
        out, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
        rows = out.last_hidden_state[_through(prompts.answers, decisions)]
        hidden[""] = student.logits(rows, *student.head_tensors())[0]
        kl = DIVERGENCES["forward_kl"](hidden[""], hidden["teacher_"])
        measured = _measured(prompts, decisions, kl, *_spent(student, prompts, decisions))
        total = measured if total is None else total + measured
        starts = prompts.answers.sum(1).cumsum(0) - prompts.answers.sum(1)
        for name, logits in hidden.items():
            if first is not None:
                best = logits[starts][:, torch.tensor(list(first.values()), device=logits.device)].argmax(-1)
                said[name] = [list(first)[number] for number in best.tolist()]
            else:
                with student.teacher() if name else nullcontext():
                    said[name] = answers(student, questions.processor, samples)
            right[name] += sum(_same(one, answer) for one, (_, _, answer) in zip(said[name], samples, strict=True))
        agreed += sum(_same(one, other) for one, other in zip(said[""], said["teacher_"], strict=True))
    if total is None:
        raise ValueError(f"none of {len(asked):,} questions to measure on can be used, {asked.left_out.example}")
    dense = float(total.dense["prefill"])
    return {
        "compute": float(total.macs["prefill"]) / dense,
        "compute_vision": float(total.vision) / dense,
        "image_tokens_kept": float(total.kept / total.image),
        **{f"{name}accuracy": count / seen for name, count in right.items()},
        "agreement": agreed / seen,
        "kl": float(total.kl / total.tokens),
        "questions": seen,
        "broken": asked.broken,
    }


def _first_tokens(processor: Any, asked: QuestionSet) -> dict[str, int] | None:
    """The first token of each answer of a closed set; None where there is no such set or two begin alike."""
    if not asked.choices:
        return None
    tokenizer, prompt = processor.tokenizer, prompt_text(processor, asked.samples[0].question)
    before, end = len(token_ids(tokenizer, prompt)), tokenizer.eos_token or ""
    texts = {choice: prompt + answer_text(prompt, choice) + end for choice in asked.choices}  # an answer may be empty
    tokens = {choice: token_ids(tokenizer, text)[before:] for choice, text in texts.items()}
    first = {choice: ids[0] for choice, ids in tokens.items() if ids}
    return first if len(set(first.values())) == len(tokens) else None


def _same(one: str, other: str) -> bool:
    return one.strip().rstrip(".").lower() == other.strip().rstrip(".").lower()


@torch.no_grad()
def answers(
    student: VisionLanguageStudent,
    processor: Any,
    samples: Sequence[tuple[Any, str, str]],
) -> list[str]:
    """What the model says to (image, question, anything), greedily."""
    texts = [prompt_text(processor, question) for _, question, _ in samples]
    inputs = call(processor, texts, [image for image, _, _ in samples], "left")
    inputs = {name: tensor.to(student.model.device) for name, tensor in inputs.items()}
    padding = processor.tokenizer.pad_token_id
    out = student.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False, pad_token_id=padding)
    return processor.tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def baseline(
    name: str, student: VisionLanguageStudent, questions: Questions, config: RunConfig, compute: float
) -> dict[str, Any]:
    """As `evaluate`, for as many image tokens as the student keeps, but any of them. Changes the student for good."""
    baselines.keep_blindly(student, name, config.train.seed)
    return evaluate(student, questions, config)


@torch.no_grad()
def routing(
    student: VisionLanguageStudent, questions: Questions, teacher: Teacher, config: RunConfig
) -> dict[str, Any]:
    """Where compute goes in a few of the questions (see elastic/accounting/routing.py), and which image tokens pass.

    Adds the key examples: for each, original and image, a data URI each, the second without the patches that stay
    outside, caption, question and answer, and compute, the prompt's share of the teacher's. None where patches are no
    square.
    """
    chosen = [len(questions) * n // EXAMPLES for n in range(min(EXAMPLES, len(questions)))]
    prompts, samples = questions.read(chosen)
    prompts = prompts.to(student.model.device)
    before, student.runtime.execution = student.runtime.execution, "mask"  # where all tokens have a place
    try:
        _, decisions = student.features(**prompts.inputs, prompt=prompts.prompt)
    finally:
        student.runtime.execution = before
    valid = prompts.inputs["attention_mask"].bool()
    kept = valid if decisions.valid is None else decisions.valid
    found = where(student, decisions, prompts.inputs["input_ids"], valid, "prefill", kept)
    examples = []
    for row, (picture, question, answer) in enumerate(samples):
        side = math.isqrt(int(prompts.image[row].sum()))
        if side * side != prompts.image[row].sum():
            continue
        shown = kept[row][prompts.image[row]].float().view(side, side)
        pixels = pil_to_tensor(picture).float()
        share = float(kept[row].sum() / valid[row].sum())
        examples.append(
            {
                "original": data_uri(pixels),
                "image": data_uri(pixels, shown.cpu()),
                "caption": f"{question} {answer}",
                "compute": round(share, 3),
            }
        )
    return {**found, "examples": examples}


def lines() -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
    """What a table of results says of a vision-language model, line by line."""
    return [
        (
            "measured on",
            lambda r: f"{r['data']}, {r['questions']:,} questions" + f", {r['broken']} broken" * (r["broken"] > 0),
        ),
        ("compute asked", lambda r: f"{r['compute_target']:.3f}"),
        ("compute", lambda r: f"{r['compute']:.3f} (vision {r['compute_vision']:.3f})"),
        ("image tokens kept", lambda r: f"{r['image_tokens_kept']:.1%}"),
        ("accuracy", lambda r: f"{r['accuracy']:.2%} (teacher {r['teacher_accuracy']:.2%})"),
        ("agreement of answers", lambda r: f"{r['agreement']:.2%}"),
        ("KL to the teacher", lambda r: f"{r['kl']:.4f} nats"),
    ]
