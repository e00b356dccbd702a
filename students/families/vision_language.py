"""Students of vision-language models: image tokens may be pruned in front of the language model."""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from students.decisions import Decisions
from students.execution.kv_cache import memory_of
from students.families.image import ImageStudent
from students.families.image_pruning import ImagePruner, is_flat
from students.families.language import LanguageStudent
from students.families.language_inputs import require_inputs
from students.flops import flop_counter
from students.kernels.capture import Fetched
from students.libraries import cache_in, with_cache
from students.recording.prompt import Prompted, PromptPruning, PromptSize
from students.routers import ImageRouter

VISION = "vision."
"""Prefix of the keys of decisions in the vision tower."""


class VisionLanguageStudent(LanguageStudent):
    """A frozen vision-language model and its routers: in front of the language model, in it, in the vision tower.

    `forward` and `features` take images as the model's processor prepares them. Outputs have no rows for pruned tokens:
    `decisions.index` holds the input token of each row, and `decisions.valid` marks the rows that are not padding.
    """

    masks = True  # questions are padded

    def __init__(self, *parts: Any, trunk: PreTrainedModel, vision: ImageStudent | None) -> None:
        super().__init__(*parts, trunk=trunk)
        self.vision = vision
        """The vision tower's student; None if the tower has no routers."""
        self.vision_macs: float | None = None
        """Multiply-accumulates of the frozen vision tower and projector per image token; counted at the first run."""
        self.pruner = ImagePruner(trunk, self.runtime, alone=not self.spec.routers and vision is None)
        self._prompted: Prompted | None = None
        self.upcoming: Prompted | None = None
        """The next call's prompts, where the call has only embeddings, which do not tell (see StudentPruning)."""
        self.model.base_model.register_forward_pre_hook(self._called, with_kwargs=True)
        self.model.base_model.register_forward_hook(self._returned, always_call=True)
        if vision is not None:  # `generate` may call the tower on its own
            vision.model.register_forward_pre_hook(self._follow, prepend=True)

    @property
    def image_router(self) -> ImageRouter | None:
        """The router of image tokens, or None."""
        return self.pruner.router

    def replace_image_router(self, router: nn.Module) -> None:
        """Replace the router of image tokens by a module with those methods of ImageRouter that are called."""
        place: Any = self.trunk.door
        place.routers["image"] = router

    def _pruning(self) -> PromptPruning:
        return StudentPruning(self)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Decisions]:
        self.count_vision(kwargs)
        return super().forward(input_ids, attention_mask, prompt, **kwargs)

    def features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, prompt: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, Decisions]:
        """Run `forward` without the LM head: return the base model's output and the routers' decisions."""
        require_inputs(self.model, input_ids, {"attention_mask": attention_mask, "prompt": prompt, **kwargs})
        self.count_vision(kwargs)
        with self._deciding_from(prompt) as decisions:
            out = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
            return out, decisions

    def spent(
        self, decisions: Decisions, image: Tensor, valid: Tensor, rows: Tensor | int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return multiply-accumulates [B] of a call of `features` and of the LM head on `rows` tokens of each prompt:
        the student's, the part of these in the vision tower and projector, and the teacher's. image, valid: bool
        [B, T], the call's image tokens and tokens that are not padding."""
        count, head = image.sum(1), rows * self.compute.head
        outside = (self.vision_macs or 0.0) * count
        frozen = self.compute.routed_blocks(Decisions(bypassed=True), valid, "prefill").sum(1)
        if decisions.bypassed:
            return frozen + outside + head, outside, frozen + outside + head
        weight = valid if decisions.valid is None else decisions.valid
        macs = self.compute.routed_blocks(decisions, weight, "prefill").sum(1) + head
        if self.image_router is not None:
            macs = macs + self.image_router.macs(self.trunk.config.hidden_size) * valid.sum(1)
        vision, inside = outside, decisions.vision
        if self.vision is not None and inside is not None and inside.share:
            images = max(len(share) for share in inside.share.values())
            tokens = max(share.shape[1] for share in inside.share.values())
            tokens = self.vision.tokens if tokens == 1 else tokens  # 1: one decision holds for all tokens
            ones = torch.ones(images, tokens, dtype=torch.bool, device=image.device)
            compute = self.vision.compute
            saved = (compute.dense(ones, "prefill") - compute.routed_blocks(inside, ones, "prefill")).sum()
            vision = outside - saved * count / count.sum()
        return macs + vision, vision, frozen + outside + head

    @property
    def by_count(self) -> bool:
        """Whether only image tokens are routed, and by quota: a prompt's cost follows from its numbers of tokens."""
        return self.pruner.by_count

    @property
    def stepwise(self) -> bool:
        """Whether compute changes in steps as the dial turns."""
        return self.by_count

    def passing(self, image: Tensor, valid: Tensor) -> Decisions:
        """Return the decisions for prompts with image tokens at image [B, T], right in numbers of tokens that pass, not
        in which tokens pass."""
        if self.runtime.bypass:
            return Decisions(bypassed=True)
        assert self.image_router is not None, "only an image router can decide by numbers"
        self.runtime.call.rows = self.runtime.offsets(len(image), image.device)
        order = -torch.arange(image.shape[1], device=image.device).float()
        gate = self.pruner.choose(self.image_router, order.expand(image.shape), image)
        return Decisions(share={"image": gate}, valid=torch.where(image, gate, valid.float()))

    def uniform(self, share: float, tokens: Any, phase: str) -> float:
        """Return the compute ratio if every router kept this share of its gates; tokens: numbers of text tokens and of
        image tokens in a prompt."""
        text, image = tokens
        valid = torch.ones(1, text + image)
        dense = self.compute.routed_blocks(Decisions(bypassed=True), valid, "prefill").sum() + self.compute.head
        outside = (self.vision_macs or 0.0) * image
        kept = valid.clone()
        macs = outside + self.compute.head
        if self.image_router is not None:
            kept[:, text:] = share
            macs = macs + self.image_router.macs(self.trunk.config.hidden_size) * (text + image)
        macs = macs + self.compute.uniform_blocks(share, kept, "prefill").sum()
        if self.vision is not None:
            ones = torch.ones(1, self.vision.tokens, dtype=torch.bool)
            whole = float(self.vision.compute.dense(ones, "prefill").sum())
            part = self.vision.compute.uniform(share, self.vision.tokens, "prefill")
            macs = macs - outside * min(1.0, whole / max(outside, 1.0)) * (1 - part)
        return float(macs / (dense + outside))

    def prepare(self) -> None:
        """Prepare language model and vision tower (see Student.prepare)."""
        super().prepare()
        if self.vision is not None:
            self._follow()
            self.vision.prepare()

    def pack(self) -> bool:
        """Let language model and vision tower have packed weights (see Student.pack)."""
        if self.vision is not None:
            self.vision.pack()
        return super().pack()

    def forget_layouts(self) -> None:
        """Undo `prepare`."""
        super().forget_layouts()
        if self.vision is not None:
            self.vision.forget_layouts()

    @torch.no_grad()
    def set_quotas(self, scores: Iterable[Tensor]) -> None:
        """Set the image router's quota to the share of tokens that its threshold keeps of these scores."""
        if self.image_router is not None and self.image_router.levels is not None:
            self.image_router.set_quota(torch.cat([score.flatten() for score in scores]))

    @contextmanager
    def _deciding(self) -> Iterator[Decisions]:
        images: Any = nullcontext() if self.vision is None else self.vision._deciding()
        with super()._deciding() as decisions, images as inside:
            decisions.vision = inside
            yield decisions
            if inside is not None:
                decisions.share |= {VISION + key: share for key, share in inside.share.items()}
                decisions.spec |= {VISION + key: spec for key, spec in inside.spec.items()}
                decisions.score |= {VISION + key: score for key, score in inside.score.items()}

    @torch.no_grad()
    def count_vision(self, kwargs: dict[str, Any]) -> None:
        """Count `vision_macs`, once, if kwargs (of a call of the model) hold images."""
        if self.vision_macs is not None or kwargs.get("pixel_values") is None:
            return
        base: Any = self.model.base_model
        takes = inspect.signature(base.get_image_features).parameters
        images = {name: value for name, value in kwargs.items() if name in takes}
        with self.teacher(), flop_counter() as flops:
            self._follow()
            made = base.get_image_features(**images).pooler_output
        parts = made if isinstance(made, (list, tuple)) else [made]
        self.vision_macs = flops.get_total_flops() / 2 / sum(part.shape[:-1].numel() for part in parts)

    def _follow(self, *called: Any) -> None:
        """Copy the student's runtime settings to the vision tower."""
        if self.vision is not None:
            for name in ("bypass", "execution", "offset", "capacity", "training", "pool"):
                setattr(self.vision.runtime, name, getattr(self.runtime, name))

    def _called(self, base_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the whole model: note places of image tokens and padding; fit the mask to a shortened cache."""
        self._follow()
        self._prompted = None
        if self.upcoming is not None:
            self.runtime.begin(len(self.upcoming.valid), self.upcoming.valid.device)
            self._prompted = self.upcoming
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        if self.runtime.bypass:
            return None
        if ids is None:
            ids = torch.zeros(kwargs["inputs_embeds"].shape[:2], dtype=torch.long, device=self.model.device)
        mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
        valid = torch.ones_like(ids, dtype=torch.bool)
        if is_flat(mask):
            valid = mask[:, -ids.shape[1] :].bool()
        if self.image_router is None:
            self._prompted = Prompted(None, valid) if is_flat(mask) else None
            return None
        self.runtime.begin(len(ids), ids.device)
        shown = any(kwargs.get(name) is not None for name in ("pixel_values", "mm_encoder_outputs"))
        image = (ids == self.model.config.image_token_id) & valid
        self._prompted = Prompted(image if shown else None, valid)
        if shown and self.pruner.counts and not torch.is_grad_enabled():
            # copied to the host while the vision tower runs
            self._prompted.counts = Fetched(torch.stack([image.sum(1), valid.sum(1)]))
        held = None if cache is None else memory_of(cache).held
        if held is not None:  # the cache has fewer places than the caller assumes
            if shown and not bool(held.all() & valid.all()):
                raise ValueError(
                    "images follow prompts of which image tokens were left out and some are padded: pass each "
                    "conversation alone, or whole and without its cache"
                )
            kwargs["attention_mask"] = torch.cat([held, valid], 1).to(torch.long)
        return args, kwargs

    def _returned(self, base_model: nn.Module, args: Any, out: Any) -> None:
        """Hook behind the whole model: forget the noted prompts if the trunk has not run."""
        self._prompted = None

    def _before(self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the language model: prune image tokens, then start the pass as for any language student."""
        if self.runtime.bypass or self._prompted is None:
            return super()._before(trunk, args, kwargs)
        prompted, self._prompted = self._prompted, None
        kept, padded = None, 0
        if self.image_router is not None:
            kwargs = with_cache(trunk, kwargs, self._cache_for(kwargs))
            if prompted.image is None:
                self.pruner.extend(prompted, kwargs)
            else:
                kept, padded = self.pruner.prune(self.image_router, prompted, self._prompt, kwargs)
        mask = kwargs.get("attention_mask")
        hidden = mask is not None and not is_flat(mask) and prompted.size is None and prompted.valid.shape[1] > 1
        if kept is None and hidden:
            kept, padded = prompted.valid, prompted.valid.numel() - int(prompted.valid.sum())  # waits for the device
        before = self._prompt
        if kept is not None and self.runtime.decisions is not None and self.runtime.decisions.index is not None:
            self._prompt = None if before is None else before.gather(1, self.runtime.decisions.index)
        try:
            out = super()._before(trunk, args, kwargs)
        finally:
            self._prompt = before
        if kept is not None and padded and not is_flat(kwargs.get("attention_mask")):
            self.runtime.call.valid, self.runtime.call.padded = kept, padded
        call, decisions = self.runtime.call, self.runtime.decisions
        if kept is not None and call.prompt is not None:  # later decisions must not depend on closed image tokens
            passing = kept if decisions is None or decisions.valid is None else decisions.valid.detach() != 0
            call.prompt = call.prompt & passing
        return out


class StudentPruning(PromptPruning):
    """How a student prunes image tokens in recorded passes: numbers of tokens determine how many are kept."""

    def __init__(self, student: VisionLanguageStudent) -> None:
        super().__init__(student.trunk)
        self._student = student

    def tower_state(self, pixels: Tensor) -> Hashable:
        """Return the state that a recorded pass through the vision tower depends on; None if the tower has no routers.
        Raises ValueError if the pass cannot be recorded."""
        student = self._student
        if student.vision is None:
            return None
        student._follow()
        made: Hashable = student.vision._recorded_for(pixels)
        return made

    def state(self) -> Hashable:
        """Return the state of language model, dial and image router that a recorded pass depends on besides shapes.
        Raises ValueError if it cannot be recorded, as when the number of kept tokens depends on the images."""
        student, run = self._student, self._student.runtime
        language: Hashable = student._recorded_for()
        if run.bypass or student.image_router is None:
            return language
        if isinstance(run.offset, tuple) or not student.pruner.counts:
            raise ValueError("how many image tokens pass depends on the images, or differs between them")
        shares = (student.image_router.levels, student.image_router.log_gain)
        return language, run.offset, run.capacity, tuple(x._version for x in shares if x is not None)

    def size_of(self, image: Sequence[int], valid: Sequence[int], tokens: int) -> PromptSize:
        """Return the size of rows after pruning, from their numbers of image tokens and of tokens without padding."""
        student = self._student
        whole = super().size_of(image, valid, tokens)
        if student.runtime.bypass or student.image_router is None:
            return whole
        made = student.pruner.size_of(student.image_router, image, valid)
        return made if made.fewer else whole

    @contextmanager
    def applied(self, prompted: Prompted) -> Iterator[None]:
        """A context in which the model is called with the embeddings that `prompted` describes."""
        student = self._student
        if student.runtime.bypass or student.image_router is None:
            with super().applied(prompted):
                yield
            return
        student.upcoming = prompted
        try:
            yield
        finally:
            student.upcoming = None
