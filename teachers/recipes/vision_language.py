"""Train a small vision tower and projector for a frozen language model: how vlm-easyvqa was made.

Four stages, on easy-VQA's training questions alone. The tower learns to name what its images show, which the questions
give away. What the language model has to read of an image of each kind, to answer questions about it, is learned
through the frozen model without any image, as in prompt tuning (arXiv 2104.08691). Tower and projector learn to write
that; and then they learn from the answers, through the language model.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.cache import published
from teachers.data.questions import EASY_VQA, QuestionSet, load_all, load_questions
from teachers.families.image import pack, unpack
from teachers.families.vision_language import assemble
from teachers.load import load
from teachers.recipes.easy_vqa import WORDS, ImagesByKind, Kind, Pair, augmented, sort_by_image, sort_by_kind
from teachers.recipes.reader import Reader
from teachers.registry import LANGUAGE
from teachers.snapshot import Snapshot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
WRITING_EPOCHS = 20
TOWER_BATCH = 64
FIRST_STEPS = 100
"""Steps in which the language model learns to read images of one kind, before all others."""
READING_STEPS = 300
ANSWERING_STEPS = 250
ROWS = 5
"""Images, or kinds of them, in a batch that the language model reads."""
QUESTIONS = (6, 6, 2)
"""Questions asked about each: of what it shows and what it does not ("is there ...?"), and what it shows ("what ...?").
"""
INNER = (slice(1, 7), slice(2, 6))
"""Rows and columns of the image tokens, 8 x 8, that are never left out in training."""
REPORT = 25
"""Steps between lines about progress, and between snapshots."""

Say = Callable[[str], None]


def pretrain_vlm(output: str | Path, *, language: str = "smollm2-135m", seed: int = 0, say: Say = print) -> float:
    """Train a tower and projector on easy-VQA and write them to the folder `output`, in int8.

    What was learned so far is kept in `output`.stages until all is done: after an interruption the same call goes on
    with the loop that was interrupted. Returns the share of test questions whose answer is right, of what was written.
    ValueError where the folder exists.
    """
    from safetensors.torch import load_file, save_file

    final = Path(output)
    if final.exists():
        raise ValueError(f"{final} exists: name another folder with --output")
    stages = final.parent / f"{final.name}.stages"
    base = load(language, device="cpu")
    torch.manual_seed(seed)
    model = assemble(SETTINGS, base.model, base.processor)
    model.requires_grad_(False)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    by_kind = sort_by_kind(load_questions(EASY_VQA, held_out=1, seed=seed).train)
    reader = Reader(model, base.processor)
    tokens = KindTokens(
        tower.config.image_size // tower.config.patch_size,
        [_embeddings(model, base.processor, names) for names in WORDS],
    )
    say(f"stage 1: the tower learns to name what {sum(map(len, by_kind.images.values())):,} images show")
    _stage(stages / "1.safetensors", seed, say, functools.partial(_name, tower, by_kind), tower=tower)
    with torch.no_grad():  # what the projector reads is not normalised, and this layer is its first
        scale = float(_states(tower, torch.cat(list(by_kind.images.values()))[:TOWER_BATCH]).std(-1).mean())
        projector.linear_1.weight.div_(scale)
    say(f"stage 2: what {language} has to read of an image, to answer questions about it")
    _stage(stages / "2.safetensors", seed, say, functools.partial(_read, reader, tokens, by_kind), tokens=tokens)
    say("stage 3: tower and projector learn to write that")
    both = {"tower": tower, "projector": projector}
    write = functools.partial(_write, tower, projector, tokens, by_kind, scale)
    _stage(stages / "3.safetensors", seed, say, write, **both)
    say(f"stage 4: tower and projector learn from answers, through {language}")
    answer = functools.partial(_answer, reader, tower, projector, by_kind, scale)
    _stage(stages / "4.safetensors", seed, say, answer, **both)
    state = {**_prefixed(tower, "model.vision_tower."), **_prefixed(projector, "model.multi_modal_projector.")}
    with published(final) as workshop:
        folder = workshop / final.name
        folder.mkdir()
        save_file(pack(state), folder / "model.safetensors")
        model.load_state_dict(unpack(load_file(folder / "model.safetensors")), strict=False)
        settings = {"model_type": "llava", LANGUAGE: language, **SETTINGS}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(stages)
    say("measuring on the test questions ...")
    return accuracy(reader, load_all(EASY_VQA))


def _stage(path: Path, seed: int, say: Say, learn: Callable[[Loops], None], **modules: nn.Module) -> None:
    """Let the modules learn and keep the result in the file `path`; where that exists, only take it from there."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(seed)
    if path.exists():
        state = load_file(path)
        for name, module in modules.items():
            start = f"{name}."
            module.load_state_dict({k.removeprefix(start): v for k, v in state.items() if k.startswith(start)})
        return
    learn(Loops(path.with_suffix(""), say))
    with published(path) as workshop:
        state = {}
        for name, module in modules.items():
            state |= _prefixed(module, f"{name}.")
        save_file(state, workshop / path.name)


def _prefixed(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in module.state_dict().items()}


class Loops:
    """A stage's training loops: AdamW with warm-up and cosine decay, gradients clipped. What was stopped goes on."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self.say = say
        self.count = 0

    def __call__(
        self, parameters: list[dict[str, Any]], steps: int, warmup: int, decay: float = 0.05
    ) -> Iterator[Callable[[Tensor], None]]:
        """For each step that is not done yet what takes its loss. decay: of weights, per step of learning rate 1."""
        self.count += 1
        optimizer = torch.optim.AdamW(parameters, weight_decay=decay, betas=(0.9, 0.98))
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        peaks = [group["lr"] for group in optimizer.param_groups]
        snapshot = Snapshot(self.folder / f"{self.count}.safetensors", [optimizer], {"steps": steps})
        first = snapshot.restore()
        if first:
            self.say(f"going on after step {first}/{steps}")
        mark, losses = time.monotonic(), []

        def take(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(flat, 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))

        for step in range(first, steps):
            share = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            yield take
            if (step + 1) % REPORT == 0 or step + 1 == steps:
                snapshot.save(step + 1)
                left = (time.monotonic() - mark) / len(losses) * (steps - step - 1) / 60
                self.say(f"step {step + 1}/{steps}: loss {sum(losses) / len(losses):.3f}, {left:.0f} min left")
                mark = time.monotonic()
                losses.clear()


def _learn(*modules: nn.Module) -> list[nn.Parameter]:
    parameters = [p for module in modules for p in module.parameters()]
    for parameter in parameters:
        parameter.requires_grad_()
    return parameters


def _states(tower: nn.Module, pixels: Tensor) -> Tensor:
    """What LLaVA takes of images [B, 3, H, W]: the states after the last block [B, tokens, D], not normalised."""
    return tower(pixels, output_hidden_states=True).hidden_states[-1]


def _name(tower: nn.Module, by_kind: ImagesByKind, loops: Loops) -> None:
    """The tower learns shape and colour from the mean of its tokens."""
    images, kinds = _listed(by_kind)
    sizes = [len(words) for words in WORDS]
    config: Any = tower.config
    head = nn.Linear(config.hidden_size, sum(sizes))
    steps = TOWER_EPOCHS * len(images) // TOWER_BATCH
    for take in loops([{"params": _learn(tower, head), "lr": 1e-3}], steps, 100):
        rows = torch.randint(len(images), (TOWER_BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(_states(tower, augmented(images[rows])).mean(1))
        parts = zip(logits.float().split(sizes, 1), kinds[rows].unbind(1), strict=True)
        shape, color = (F.cross_entropy(part, target) for part, target in parts)
        take(shape + color)


def _listed(by_kind: ImagesByKind) -> tuple[Tensor, Tensor]:
    """All images [N, 3, H, W], and the kind of each [N, 2]."""
    kinds = [torch.tensor(kind).expand(len(images), -1) for kind, images in by_kind.images.items()]
    return torch.cat(list(by_kind.images.values())), torch.cat(kinds)


def _embeddings(model: PreTrainedModel, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """[words, D]: where the language model has them."""
    embed = model.get_input_embeddings()
    return torch.stack([embed(torch.tensor(tokenizer(f" {word}").input_ids)).float().mean(0) for word in words])


def inner(side: int) -> Tensor:
    """[side * side] bool: which image tokens are in the middle."""
    chosen = torch.zeros(side, side, dtype=torch.bool)
    chosen[INNER] = True
    return chosen.flatten()


class KindTokens(nn.Module):
    """What stands for an image of each kind: in the middle learned tokens, changed by its shape and by its colour,
    and around them one that is always the same."""

    inner: Tensor

    def __init__(self, side: int, words: Sequence[Tensor]) -> None:
        """side: tokens along an image. words: [W, D] for shape and for colour; every other token starts as the one, the
        others as the other."""
        super().__init__()
        count, width = side * side, words[0].shape[1]
        self.register_buffer("inner", inner(side))
        self.around = nn.Parameter(torch.zeros(width))
        self.common = nn.Parameter(0.02 * torch.randn(count, width))
        self.of = nn.ParameterList(torch.zeros(len(places), count, width) for places in words)
        with torch.no_grad():
            for number, (part, places) in enumerate(zip(self.of, words, strict=True)):
                part[:, number :: len(words)] += places.unsqueeze(1)

    def forward(self, kinds: Sequence[Kind]) -> Tensor:
        """[B, tokens, D]"""
        parts = ([self.of[place][number] for place, number in enumerate(kind)] for kind in kinds)
        learned = torch.stack([self.common + sum(part) for part in parts])
        return torch.where(self.inner.unsqueeze(-1), learned, self.around)


def _read(reader: Reader, tokens: KindTokens, by_kind: ImagesByKind, loops: Loops) -> None:
    """The tokens learn what lets the language model answer: for images of one kind, then for all.

    What was learned of one kind is a start for all: the words of the one are put in the place of the other's.
    """
    kinds = list(by_kind.pairs)
    words = [part.detach().clone() for part in tokens.of]
    for take in loops([{"params": _learn(tokens), "lr": 5e-3}], FIRST_STEPS, 20, decay=0.0):
        take(_loss(reader, tokens(kinds[:1]), [by_kind.draw(kinds[0], [16, 16, 4])]))
    with torch.no_grad():
        whole = tokens(kinds[:1])[0]
        for part, start in zip(tokens.of, words, strict=True):
            part.copy_(start)
        tokens.common.add_(whole - tokens(kinds[:1])[0])
    for take in loops([{"params": _learn(tokens), "lr": 4e-3}], READING_STEPS, 20, decay=0.0):
        chosen = [kinds[number] for number in torch.randperm(len(kinds))[:ROWS].tolist()]
        take(_loss(reader, tokens(chosen), [by_kind.draw(kind, QUESTIONS) for kind in chosen]))


def _loss(reader: Reader, image: Tensor, questions: Sequence[Sequence[Pair]]) -> Tensor:
    """How far the answers are from what the language model says, with tokens around the middle left out at random.

    So that those, as the background of an image, can be done without (as in PatchDropout, arXiv 2208.07220); of tokens
    that were learned together none could.
    """
    count, length = image.shape[:2]
    kept = inner(math.isqrt(length)) | (torch.rand(count, length) < torch.rand(count, 1))
    return F.cross_entropy(*reader(image, questions, kept))


def _groups(
    tower: nn.Module, projector: nn.Module, lr: float, projector_lr: float, scale: float
) -> list[dict[str, Any]]:
    """Parameters and learning rates; the layer that reads states of this scale learns in steps that much smaller."""
    first = projector.get_parameter("linear_1.weight")
    others = [p for p in _learn(projector) if p is not first]
    return [
        {"params": _learn(tower), "lr": lr},
        {"params": [first], "lr": projector_lr / scale},
        {"params": others, "lr": projector_lr},
    ]


def _write(
    tower: nn.Module, projector: nn.Module, tokens: KindTokens, by_kind: ImagesByKind, scale: float, loops: Loops
) -> None:
    """Tower and projector learn to make of an image the tokens of its kind."""
    images, kinds = _listed(by_kind)
    with torch.no_grad():
        spread = tokens(list(by_kind.pairs)).var(0).mean()
    steps = WRITING_EPOCHS * len(images) // TOWER_BATCH
    for take in loops(_groups(tower, projector, 1e-3, 1e-3, scale), steps, 100):
        rows = torch.randint(len(images), (TOWER_BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            made = projector(_states(tower, augmented(images[rows])))
        with torch.no_grad():
            target = tokens([tuple(kind) for kind in kinds[rows].tolist()])
        take((made.float() - target).square().mean() / spread)


def _answer(
    reader: Reader, tower: nn.Module, projector: nn.Module, by_kind: ImagesByKind, scale: float, loops: Loops
) -> None:
    """Tower and projector learn from the answers to questions about each image, read in one sequence."""
    kinds = list(by_kind.images)
    for take in loops(_groups(tower, projector, 1e-4, 2e-4, scale), ANSWERING_STEPS, 50):
        chosen = [kinds[number] for number in torch.randperm(len(kinds))[:ROWS].tolist()]
        some = [by_kind.images[kind][torch.randint(len(by_kind.images[kind]), ())] for kind in chosen]
        with torch.autocast("cpu", torch.bfloat16):
            made = projector(_states(tower, augmented(torch.stack(some))))
        take(_loss(reader, made, [by_kind.draw(kind, QUESTIONS) for kind in chosen]))


@torch.no_grad()
def accuracy(reader: Reader, questions: QuestionSet) -> float:
    """The share of questions whose answer's tokens are all the likeliest."""
    images, about = sort_by_image(questions)
    model, end = reader.model.model, reader.tokenizer.eos_token_id
    right = seen = 0
    for first in range(0, len(images), ROWS):
        states = _states(model.vision_tower, images[first : first + ROWS])
        logits, targets = reader(model.multi_modal_projector(states), about[first : first + ROWS])
        hits = (logits.argmax(-1) == targets).long()
        lengths = ((targets == end).nonzero().squeeze(1) + 1).diff(prepend=torch.zeros(1, dtype=torch.long))
        whole = [bool(part.all()) for part in hits.split(lengths.tolist())]
        right, seen = right + sum(whole), seen + len(whole)
    return right / seen
