"""Train a small vision tower and projector for a frozen language model: how vlm-easyvqa was made.

Three stages, on easy-VQA's training questions alone: the tower learns to name what its images show, which the questions
give away; every image token then learns to stand where the word for it stands among the language model's words; and
tower and projector learn from the answers, through the frozen language model.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.cache import published
from teachers.load import load
from teachers.questions import EASY_VQA, QuestionSet, load_all, load_questions
from teachers.vision import pack, unpack
from teachers.vlm import IMAGE_TOKEN, LANGUAGE, answer_text, assemble, processor_for, prompt_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORDS = (
    ("circle", "rectangle", "triangle"),
    ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)
"""What there is to say about an image of easy-VQA: its shape and its colour."""
SETTINGS: dict[str, Any] = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": 64,
        "patch_size": 8,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
"""A SigLIP tower (arXiv 2303.15343) of 2.7 million parameters, all of whose 64 tokens LLaVA's projector takes."""
TOWER_EPOCHS = 30
WORD_EPOCHS = 4
TOWER_BATCH = 64
IMAGES = 8
"""Images in a batch of the last stage."""
ASKED = 5
"""Questions that are asked about each of them."""
REPORT = 50
"""Steps between lines about progress."""

Say = Callable[[str], None]


def pretrain_vlm(
    output: str | Path, *, epochs: int = 1, language: str = "smollm2-135m", seed: int = 0, say: Say = print
) -> float:
    """Train a tower and projector on easy-VQA and write them to the folder `output`, in int8.

    epochs: passes over the images in the last stage, through the language model. Returns the share of test questions
    whose answer is right, of what was written. ValueError where the folder exists.
    """
    from safetensors.torch import load_file, save_file

    final = Path(output)
    if final.exists():
        raise ValueError(f"{final} exists: name another folder with --output")
    base = load(language, device="cpu")
    asked = load_questions(EASY_VQA, held_out=1, seed=seed).train
    torch.manual_seed(seed)
    model = assemble(SETTINGS, base.model, base.processor)
    model.requires_grad_(False)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    images, about = _by_image(asked)
    truth = _labels(about)
    say(f"stage 1: the tower learns to name what {len(images):,} images show")
    _name(tower, images, truth, say)
    say("stage 2: image tokens learn the places of words")
    words = [_places(model, base.processor, names) for names in WORDS]
    with torch.no_grad():
        scale = float(_states(tower, images[:TOWER_BATCH]).std(-1).mean())
        projector.linear_1.weight.div_(scale)  # the states are not normalised, and this layer is their first
    _align(tower, projector, images, truth, words, scale, say)
    say(f"stage 3: tower and projector learn from answers, through {language}")
    _answer(model, base.processor, images, about, epochs, scale, say)
    state = {**_prefixed(tower, "model.vision_tower."), **_prefixed(projector, "model.multi_modal_projector.")}
    with published(final) as workshop:
        folder = workshop / final.name
        folder.mkdir()
        save_file(pack(state), folder / "model.safetensors")
        model.load_state_dict(unpack(load_file(folder / "model.safetensors")), strict=False)
        settings = {"model_type": "llava", LANGUAGE: language, **SETTINGS}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    say("measuring on the test questions ...")
    return accuracy(model, base.processor, load_all(EASY_VQA))


def _prefixed(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


def _by_image(asked: QuestionSet) -> tuple[Tensor, list[list[tuple[str, str]]]]:
    """Images [N, 3, H, W] in -1 ... 1, and the questions and answers of each."""
    from torchvision.transforms.functional import pil_to_tensor

    numbers: dict[str, int] = {}
    about: list[list[tuple[str, str]]] = []
    for sample in asked.samples:
        if sample.image not in numbers:
            numbers[sample.image] = len(numbers)
            about.append([])
        about[numbers[sample.image]].append((sample.question, sample.answer))
    pixels = torch.stack([pil_to_tensor(asked.decode(image).convert("RGB")) for image in numbers])
    return pixels.float() / 127.5 - 1, about


def _labels(about: Sequence[Sequence[tuple[str, str]]]) -> Tensor:
    """[N, 2]: the numbers of the words for shape and colour, -100 where no question gives it away."""
    found = torch.full((len(about), len(WORDS)), -100)
    for row, pairs in enumerate(about):
        for question, answer in pairs:
            said = set(re.findall("[a-z]+", question))
            affirmed = answer in ("yes", "no") and (answer == "yes") != bool(said & {"not", "no"})
            for kind, words in enumerate(WORDS):
                for number, word in enumerate(words):
                    if word == answer or (affirmed and word in said):
                        found[row, kind] = number
    return found


def _steps(parameters: list[dict[str, Any]], steps: int, warmup: int, say: Say) -> Iterator[Callable[[Tensor], None]]:
    """For each of `steps` steps what takes its loss: AdamW with warm-up and cosine decay, gradients clipped."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.05, betas=(0.9, 0.98))
    flat = [p for group in optimizer.param_groups for p in group["params"]]
    peaks = [group["lr"] for group in optimizer.param_groups]
    mark, total = time.monotonic(), 0.0

    def take(loss: Tensor) -> None:
        nonlocal total
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flat, 1.0)
        optimizer.step()
        total += float(loss.detach())

    for step in range(steps):
        decay = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * decay
        yield take
        if (step + 1) % REPORT == 0:
            left = (time.monotonic() - mark) / REPORT * (steps - step - 1) / 60
            say(f"step {step + 1}/{steps}: loss {total / REPORT:.3f}, {left:.0f} min left")
            mark, total = time.monotonic(), 0.0


def _learn(*modules: nn.Module) -> list[nn.Parameter]:
    return [p.requires_grad_() for module in modules for p in module.parameters()]


def _states(tower: nn.Module, pixels: Tensor) -> Tensor:
    """What LLaVA takes of images [B, 3, H, W]: the states after the last block [B, tokens, D], not normalised."""
    return tower(pixels, output_hidden_states=True).hidden_states[-1]


def _name(tower: nn.Module, images: Tensor, truth: Tensor, say: Say) -> None:
    """The tower learns shape and colour from the mean of its tokens."""
    sizes = [len(words) for words in WORDS]
    head = nn.Linear(tower.config.hidden_size, sum(sizes))
    steps = TOWER_EPOCHS * len(images) // TOWER_BATCH
    for take in _steps([{"params": _learn(tower, head), "lr": 1e-3}], steps, 100, say):
        rows = torch.randint(len(images), (TOWER_BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(_states(tower, turned(images[rows])).mean(1))
        parts = zip(logits.float().split(sizes, 1), truth[rows].unbind(1), strict=True)
        take(sum(F.cross_entropy(part, target) for part, target in parts))


def _places(model: PreTrainedModel, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """[words, D]: where the language model has them."""
    embed = model.get_input_embeddings()
    return torch.stack([embed(torch.tensor(tokenizer(word).input_ids)).float().mean(0) for word in words])


def _groups(
    tower: nn.Module, projector: nn.Module, lr: float, projector_lr: float, scale: float
) -> list[dict[str, Any]]:
    """Parameters and learning rates; the layer that reads states of this scale learns in steps that much smaller."""
    first = projector.linear_1.weight
    others = [p for p in _learn(projector) if p is not first]
    return [
        {"params": _learn(tower), "lr": lr},
        {"params": [first], "lr": projector_lr / scale},
        {"params": others, "lr": projector_lr},
    ]


def _align(
    tower: nn.Module,
    projector: nn.Module,
    images: Tensor,
    truth: Tensor,
    words: Sequence[Tensor],
    scale: float,
    say: Say,
) -> None:
    """Image tokens learn the place of a word: every other one the shape's, the others the colour's."""
    spread = torch.cat(list(words)).var()
    steps = WORD_EPOCHS * len(images) // TOWER_BATCH
    for take in _steps(_groups(tower, projector, 1e-3, 1e-3, scale), steps, 30, say):
        rows = torch.randint(len(images), (TOWER_BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            tokens = projector(_states(tower, turned(images[rows])))
        loss = torch.zeros(())
        for kind, places in enumerate(words):
            target = truth[rows, kind]
            mine, target = tokens[target >= 0, kind :: len(words)].float(), target[target >= 0]
            likeness = 20 * F.normalize(mine, dim=-1) @ F.normalize(places, dim=-1).T
            every = target.repeat_interleave(mine.shape[1])
            loss = loss + (mine - places[target].unsqueeze(1)).square().mean() / spread
            loss = loss + F.cross_entropy(likeness.flatten(0, 1), every)
        take(loss)


def _answer(
    model: PreTrainedModel,
    tokenizer: Any,
    images: Tensor,
    about: Sequence[Sequence[tuple[str, str]]],
    epochs: int,
    scale: float,
    say: Say,
) -> None:
    """Tower and projector learn from the answers to a few questions about each image, read in one sequence."""
    groups = _groups(model.model.vision_tower, model.model.multi_modal_projector, 2e-4, 4e-4, scale)
    packer = _Packer(model, tokenizer)
    steps = max(1, epochs * len(images) // IMAGES)
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs + 1)])
    for step, take in enumerate(_steps(groups, steps, 50, say)):
        rows = order[step * IMAGES : (step + 1) * IMAGES]
        asked = []
        for row in rows.tolist():
            chosen = torch.randperm(len(about[row]))[:ASKED].tolist()
            asked.append([about[row][number] for number in chosen])
        logits, targets = packer(turned(images[rows]), asked)
        take(F.cross_entropy(logits, targets))


class _Packer:
    """Runs several questions about an image in one sequence: all see the image, none another."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor_for(model, tokenizer)
        self.before: list[int] = self._ids("")[0]

    def _ids(self, question: str) -> tuple[list[int], list[int]]:
        """Tokens of a prompt in front of its image, and behind it."""
        front, _, behind = prompt_text(self.processor, question).partition(IMAGE_TOKEN)
        return self.tokenizer(front).input_ids, self.tokenizer(behind).input_ids

    def __call__(self, pixels: Tensor, asked: Sequence[Sequence[tuple[str, str]]]) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, H, W], questions and answers of each -> logits [N, V] of answers' tokens, and those tokens."""
        model, dtype = self.model, self.model.lm_head.weight.dtype
        with torch.autocast("cpu", torch.bfloat16):
            states = _states(model.model.vision_tower, pixels)
            image = model.model.multi_modal_projector(states).to(dtype)
        start = len(self.before) + image.shape[1]
        ids, places, numbers, targets = (
            nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=filling)
            for part, filling in zip(
                zip(*(self._row(pairs, start) for pairs in asked), strict=True), (0, 0, -1, -100), strict=True
            )
        )
        embed, count = model.get_input_embeddings(), len(pixels)
        x = torch.cat([embed(torch.tensor(self.before)).expand(count, -1, -1), image, embed(ids)], 1)
        numbers = torch.cat([torch.zeros(count, start, dtype=torch.long), numbers], 1)
        seen = (numbers[:, :, None] == numbers[:, None, :]) | (numbers[:, None, :] == 0)
        mask = (seen & torch.ones_like(seen[0]).tril()).unsqueeze(1)
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        positions = torch.cat([torch.arange(start).expand(count, -1), places], 1)
        out = model.model.language_model(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        told = targets >= 0
        return model.lm_head(out[:, start:][told]).float(), targets[told]

    def _row(self, pairs: Sequence[tuple[str, str]], start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens, positions, numbers of the questions and tokens to be said, of one image's questions."""
        ids, places, numbers, targets = [], [], [], []
        for number, (question, answer) in enumerate(pairs):
            _, prompt = self._ids(question)
            text = answer_text(prompt_text(self.processor, question), answer) + self.tokenizer.eos_token
            told = self.tokenizer(text).input_ids
            ids += prompt + told[:-1]
            places += range(start, start + len(prompt) + len(told) - 1)
            numbers += [number + 1] * (len(prompt) + len(told) - 1)
            targets += [-100] * (len(prompt) - 1) + told
        return tuple(torch.tensor(part) for part in (ids, places, numbers, targets))


@torch.no_grad()
def accuracy(model: PreTrainedModel, tokenizer: Any, asked: QuestionSet) -> float:
    """The share of questions whose answer's tokens are all the likeliest."""
    images, about = _by_image(asked)
    packer = _Packer(model, tokenizer)
    right = seen = 0
    for first in range(0, len(images), IMAGES):
        pairs = about[first : first + IMAGES]
        logits, targets = packer(images[first : first + IMAGES], pairs)
        hits = (logits.argmax(-1) == targets).long()
        ends = (targets == tokenizer.eos_token_id).nonzero().squeeze(1) + 1
        lengths = ends.diff(prepend=torch.zeros(1, dtype=torch.long))
        whole = [bool(part.all()) for part in hits.split(lengths.tolist())]
        right, seen = right + sum(whole), seen + len(whole)
    return right / seen


def turned(images: Tensor) -> Tensor:
    """Each of the images [B, C, H, W] mirrored or not, shifted, scaled by 0.75 to 1.35, and every other one turned."""
    count = len(images)
    angle = 2 * math.pi * torch.rand(count) * (torch.rand(count) < 0.5)
    scale = 1 / (0.75 + 0.6 * torch.rand(count))
    mirror = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    shift = 0.3 * (torch.rand(2, count) - 0.5)
    rows = [
        torch.stack([mirror * scale * angle.cos(), -scale * angle.sin(), shift[0]], 1),
        torch.stack([mirror * scale * angle.sin(), scale * angle.cos(), shift[1]], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
