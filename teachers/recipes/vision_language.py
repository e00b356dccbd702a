"""Train a small vision tower and projector for a frozen language model: how vlm-easyvqa was made.

Four stages use easy-VQA's training questions alone:

1. The tower learns to classify the shape and colour in its images, which follow from the questions and answers.
2. Soft image tokens for each kind of image (shape and colour) are learned through the frozen language model, without
   any image, as in prompt tuning (arXiv 2104.08691): with them the model answers questions about such images.
3. Tower and projector learn to output these tokens.
4. Tower and projector learn from the answers, through the frozen language model.
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
"""LlavaConfig with a SigLIP tower (arXiv 2303.15343) of 2.7 million parameters, whose 64 tokens all go to LLaVA's
projector."""
TOWER_EPOCHS = 30
WRITING_EPOCHS = 20
TOWER_BATCH = 64
FIRST_STEPS = 100
"""Steps of stage 2 on one kind of image, before all kinds are learned."""
READING_STEPS = 300
ANSWERING_STEPS = 250
ROWS = 5
"""Images, or kinds of images, in a batch of the language model."""
QUESTIONS = (6, 6, 2)
"""Questions about each image in a batch: yes/no questions ("is there ...?") about something that it shows, the same
about something that it does not show, and others ("what ...?")."""
INNER = (slice(1, 7), slice(2, 6))
"""Rows and columns of the image tokens, 8 x 8, that are never left out in training."""
REPORT = 25
"""Steps between lines about progress, and between snapshots."""

Say = Callable[[str], None]


def pretrain_vlm(output: str | Path, *, language: str = "smollm2-135m", seed: int = 0, say: Say = print) -> float:
    """Train a tower and projector on easy-VQA and write them to the folder `output`, in int8.

    Intermediate results are kept in the folder `output`.stages until the end: after an interruption the same call
    resumes the interrupted loop. Returns the accuracy of the written model on the test questions. Raises ValueError if
    `output` exists.
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
    with torch.no_grad():  # the tower's states are not normalised: the projector's first layer divides by their scale
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
    """Train the modules by `learn` and save them to the file `path`; if `path` exists, load them instead."""
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
    """Training loops of a stage: AdamW, warm-up and cosine decay, clipped gradients; a stopped loop resumes."""

    def __init__(self, folder: Path, say: Say) -> None:
        self.folder = folder
        self.say = say
        self.count = 0

    def __call__(
        self, parameters: list[dict[str, Any]], steps: int, warmup: int, decay: float = 0.05
    ) -> Iterator[Callable[[Tensor], None]]:
        """Yield, for each remaining step, a function that takes the step's loss and updates the parameters.

        parameters: groups for the optimizer, each with its peak learning rate `lr`. decay: AdamW's weight decay.
        """
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
    """Return the tower's states [B, tokens, D] for images [B, 3, H, W] as LLaVA reads them: those after the last block,
    before the final norm."""
    return tower(pixels, output_hidden_states=True).hidden_states[-1]


def _name(tower: nn.Module, by_kind: ImagesByKind, loops: Loops) -> None:
    """Train the tower to classify shape and colour, by a linear head on the mean of its tokens."""
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
    """Return all images [N, 3, H, W] and the kind of each [N, 2]."""
    kinds = [torch.tensor(kind).expand(len(images), -1) for kind, images in by_kind.images.items()]
    return torch.cat(list(by_kind.images.values())), torch.cat(kinds)


def _embeddings(model: PreTrainedModel, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """Return the language model's embeddings of the words [words, D], each the mean over the word's tokens."""
    embed = model.get_input_embeddings()
    return torch.stack([embed(torch.tensor(tokenizer(f" {word}").input_ids)).float().mean(0) for word in words])


def inner(side: int) -> Tensor:
    """Return a bool mask [side * side] of the image tokens in the middle (INNER), which are never left out."""
    chosen = torch.zeros(side, side, dtype=torch.bool)
    chosen[INNER] = True
    return chosen.flatten()


class KindTokens(nn.Module):
    """Learned image tokens for each kind of image: in the middle (INNER), a common token at each place plus a term for
    the shape and a term for the colour; around it, one token that is the same everywhere and for every kind."""

    inner: Tensor

    def __init__(self, side: int, words: Sequence[Tensor]) -> None:
        """side: image tokens in a row. words: embeddings [W, D] of the shapes and of the colours; tokens at even places
        start as the shape's word, those at odd places as the colour's."""
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
        """Return the image tokens [B, tokens, D] for B kinds."""
        parts = ([self.of[place][number] for place, number in enumerate(kind)] for kind in kinds)
        learned = torch.stack([self.common + sum(part) for part in parts])
        return torch.where(self.inner.unsqueeze(-1), learned, self.around)


def _read(reader: Reader, tokens: KindTokens, by_kind: ImagesByKind, loops: Loops) -> None:
    """Train the image tokens so that the language model answers right: for one kind of image first, then for all.

    The change learned for the first kind goes into the common tokens, and the terms for shape and colour are reset to
    the embeddings of their words, so that all kinds start from it.
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
    """Return the mean cross-entropy of the answers, with image tokens around the middle masked at random.

    The masking, as in PatchDropout (arXiv 2208.07220), makes these tokens dispensable, as an image's background is;
    none of the tokens could be left out if all were always learned together.
    """
    count, length = image.shape[:2]
    kept = inner(math.isqrt(length)) | (torch.rand(count, length) < torch.rand(count, 1))
    return F.cross_entropy(*reader(image, questions, kept))


def _groups(
    tower: nn.Module, projector: nn.Module, lr: float, projector_lr: float, scale: float
) -> list[dict[str, Any]]:
    """Return parameter groups with learning rates; the projector's first layer, which reads states of size `scale`, has
    its learning rate divided by `scale`."""
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
    """Train tower and projector to output, for each image, the learned tokens of its kind (relative squared error)."""
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
    """Train tower and projector on the answers to several questions about each image, read in one sequence."""
    kinds = list(by_kind.images)
    for take in loops(_groups(tower, projector, 1e-4, 2e-4, scale), ANSWERING_STEPS, 50):
        chosen = [kinds[number] for number in torch.randperm(len(kinds))[:ROWS].tolist()]
        some = [by_kind.images[kind][torch.randint(len(by_kind.images[kind]), ())] for kind in chosen]
        with torch.autocast("cpu", torch.bfloat16):
            made = projector(_states(tower, augmented(torch.stack(some))))
        take(_loss(reader, made, [by_kind.draw(kind, QUESTIONS) for kind in chosen]))


@torch.no_grad()
def accuracy(reader: Reader, questions: QuestionSet) -> float:
    """Return the share of questions for which every token of the answer is the likeliest one."""
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
