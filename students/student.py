"""What every student has: a frozen model, what was added to it, a dial, and a file to keep them in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from students.architectures import Architecture
from students.checkpoint import read_tensors, write_tensors
from students.compute import ComputeModel, Phase
from students.decisions import Decisions
from students.execution.runtime import Runtime
from students.execution.wrapper import Wrapper
from students.kernels.attention_gradient import fast_attention_gradients, recomputing
from students.kernels.devices import AnyLength
from students.kernels.packing import MOST_ROWS, pack_linears, prepare_linears
from students.prepared import Stamp, writes
from students.shards import are_spread
from students.spec import StudentSpec

ADDED = {"routers", "substitutes", "lora"}
"""Names under which a wrapper holds what was added; nothing else in the model is trainable or saved."""


class Student(nn.Module):
    """A frozen model and its routers; the same weights are the teacher (see `teacher`)."""

    def __init__(
        self,
        model: nn.Module,
        record: Architecture,
        blocks: list[nn.Module],
        spec: StudentSpec,
        runtime: Runtime,
        compute: ComputeModel,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.record = record
        self.blocks = tuple(blocks)
        self.spec = spec
        self.runtime = runtime
        self.compute = compute
        self.recompute = False
        self.dial: tuple[tuple[float, float], ...] = ()
        """(measured compute, offset), ascending."""
        self.span: tuple[float, float] | None = None
        """The lowest and the highest budget, where the student was trained for a range of them."""
        self._lengths = AnyLength()
        self._laid_out, self._dialled = Stamp(), Stamp()
        self._layouts = 0
        """How often weights have moved: recorded passes, of the teacher too, read them where they were."""
        self._packed = {bypass: Stamp() for bypass in (False, True)}
        """Of the routed model, and of the teacher."""
        self._added = list(self.added_tensors().values())
        self._frozen = next(p for p in model.parameters() if not p.requires_grad)
        self._spread = are_spread(model)
        vars(model).update(save_pretrained=_keep_frozen)

    @contextmanager
    def teacher(self) -> Iterator[Student]:
        """Within this context the student is the frozen model it was made from."""
        before, self.runtime.bypass = self.runtime.bypass, True
        try:
            yield self
        finally:
            self.runtime.bypass = before

    @contextmanager
    def _deciding(self) -> Iterator[Decisions]:
        """Record what the model decides."""
        run = self.runtime
        run.decisions = Decisions(bypassed=run.bypass)
        try:
            with fast_attention_gradients(self._frozen.device):
                yield run.decisions
        finally:
            run.decisions = None

    @property
    def recomputes(self) -> bool:
        """Whether backward computes activations of blocks again (see `checkpoint_blocks`)."""
        return self.recompute or self.runtime.recompute

    def _enter(self, tokens: int, batch: int, device: torch.device, prepared: bool = False) -> None:
        """What every forward pass starts with; tokens: how many it is for, 0 where that does not matter; prepared:
        nothing has changed since `prepare`."""
        run = self.runtime
        if run.begin(batch, device, tokens).skipping and not prepared:
            self._prepare()
            self._pack_for(tokens or batch)

    def _leave(self, trunk: nn.Module, args: Any, out: Any) -> None:
        """What every forward pass ends with; out is None where it failed, and then leaves nothing behind."""
        self._lengths.end()
        if out is None:
            self.runtime.drop()

    def train(self, mode: bool = True) -> Student:
        """Switch what differs between training and inference: only routing does, the frozen model stays in eval()."""
        self.training = mode
        self.runtime.training = mode
        self.model.eval()
        for block in self.blocks:
            # transformers recomputes a block only where block.training is set; its dropouts are children, still in eval
            block.training = mode and self.recompute
        return self

    def checkpoint_blocks(self) -> None:
        """Recompute each block's activations in backward instead of keeping them (non-reentrant)."""
        self.recompute = True
        again = partial(checkpoint, use_reentrant=False, context_fn=self._recomputing)
        block: Any
        for block in self.blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = again
        self.train(self.training)

    def _recomputing(self) -> Any:
        return recomputing(self._frozen.device)

    def prepare(self) -> None:
        """Lay out frozen weights for skip execution, and make what it reads of corrections, routers and the dial.

        The first call that skips does so, and so does every other one that finds it stale (see students/prepared.py): a
        call beforehand, after loading, or moving the model, only saves that one the time. So it is with weights that
        are packed (kernels/packing.py), which only calls for few tokens read, and calls of the teacher as well.
        """
        self._prepare()
        self._pack()

    def pack(self) -> bool:
        """Let frozen bfloat16 layers on a CPU have packed weights (kernels/packing.py), which the next call for few
        tokens makes, or `prepare`; False where none can."""
        for stamp in self._packed.values():
            stamp.reset()  # of calls before, which found nothing to pack
        return pack_linears(self.model)

    def _prepare(self) -> None:
        if self._spread:
            raise ValueError("weights that are spread over processes are not laid out for skipping: execute as masks")
        run, written = self.runtime, writes(self._added)
        moved = self._laid_out.renew([self._frozen], written)
        if not self._dialled.renew([self._frozen], written, run.offset, run.capacity):
            return
        self._layouts += moved
        with torch.inference_mode(False), torch.no_grad():  # calls of either kind read it
            run.set_dial(self._frozen.device)
            for wrapper in self._wrappers():
                if moved:
                    wrapper.lay_out()
                wrapper.set_dial()

    def _pack_for(self, rows: int) -> None:
        """As `prepare`, packed weights alone, for a call with about so many rows."""
        if rows <= MOST_ROWS and not torch.is_grad_enabled():
            self._pack()

    def _pack(self) -> None:
        bypass = self.runtime.bypass
        if self._packed[bypass].renew([self._frozen], self._layouts):
            with torch.inference_mode(False), torch.no_grad():
                needless = set() if bypass else {x.base_layer for x in self._wrappers() if x.pack()}
                prepare_linears(self.model, but=needless)

    def forget_layouts(self) -> None:
        """Undo `prepare`: the frozen weights lie as the model had them."""
        for stamp in self._packed.values():
            stamp.reset()
        self._laid_out.reset()
        self._dialled.reset()
        self._layouts += 1
        for wrapper in self._wrappers():
            wrapper.forget()

    def _wrappers(self) -> list[Wrapper]:
        """Those of this student: a vision tower's are its own student's."""
        return [x for x in self.model.modules() if isinstance(x, Wrapper) and x.runtime is self.runtime]

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """All trainable parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if ADDED & set(n.split("."))}

    def added_state(self) -> dict[str, Tensor]:
        """Everything that was added and nothing of the base: what a checkpoint holds."""
        return {n: x.detach() for n, x in self.added_tensors().items()}

    def added_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of everything that was added, by name."""
        buffers = {n: b for n, b in self.model.named_buffers() if ADDED & set(n.split("."))}
        return {**self.added_parameters(), **buffers}

    def load_added_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `added_state`; ValueError where names or shapes differ."""
        own = self.added_state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            raise ValueError(f"the checkpoint does not fit this student: {len(odd)} names differ, such as {odd[0]}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"the checkpoint does not fit this student: {name} is {list(state[name].shape)}, "
                    f"this student needs {list(tensor.shape)}"
                )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def uniform(self, share: float, tokens: Any, phase: Phase) -> float:
        """The compute ratio if every router kept the same share of its gates; tokens: how many the model reads."""
        return self.compute.uniform(share, tokens, phase)

    @property
    def setting(self) -> dict[str, Any]:
        """Where the dial is and what it reaches, as plain data."""
        run = self.runtime
        about = {"offset": run.offset, "capacity": run.capacity, "dial": self.dial, "span": self.span}
        if not run.multiples:
            about["multiples"] = False  # files of students that keep them are as those of earlier versions
        return about

    @setting.setter
    def setting(self, about: dict[str, Any]) -> None:
        self.dial = tuple((compute, offset) for compute, offset in about["dial"])
        self.span = about["span"] and tuple(about["span"])
        offset = about["offset"]
        self.runtime.offset = tuple(offset) if isinstance(offset, list) else offset
        self.runtime.capacity = about["capacity"]
        self.runtime.multiples = about.get("multiples", True)

    def save(self, path: str | Path) -> None:
        """Write what was added to the model, and the dial, to one safetensors file."""
        write_tensors(Path(path), self.added_state(), self.setting)

    def restore(self, path: str | Path) -> None:
        """Read what `save` wrote; ValueError where the file is damaged or belongs to another student."""
        tensors, self.setting = read_tensors(Path(path))
        self.load_added_state(tensors)
        self.runtime.bypass = False

    def set_compute(self, compute: float | Sequence[float] | Tensor) -> None:
        """Turn the dial: from here on the student spends this share of the teacher's compute; at 1.0 it is the teacher.

        Several: one for each row of the batches to come (where a batch has a multiple of as many rows, as beam search
        makes of them, neighbours share one). A row at 1.0 has all gates open and no corrections.

        Interpolates between the measured points of `dial`. ValueError outside of them, or of the range that the student
        was trained for.
        """
        budgets = compute.tolist() if isinstance(compute, Tensor) else compute
        budgets = [budgets] if isinstance(budgets, int | float) else list(budgets)
        if not budgets:
            raise ValueError("set_compute needs a budget, or one for each row of a batch")
        offsets = [math.inf if budget == 1.0 else self._offset(budget) for budget in budgets]
        if len(set(offsets)) > 1 and any(router.selection == "topk" for router in self.spec.routers):
            raise ValueError("top-k routers keep the same share for all rows of a batch: set one budget for all")
        self.runtime.bypass = min(offsets) == math.inf
        if not self.runtime.bypass:
            self.runtime.offset = tuple(offsets) if len(set(offsets)) > 1 else offsets[0]

    @property
    def stepwise(self) -> bool:
        """Whether compute goes in steps as the dial turns: there are quotas alone, whole numbers of patches."""
        return all(router.selection == "quota" for router in self.spec.routers)

    def _offset(self, compute: float) -> float:
        """Where the dial is for a budget below 1."""
        points = sorted(self.dial)
        low, high = self.span or (points and (points[0][0], points[-1][0])) or (1.0, 1.0)
        if not low <= compute <= high:
            reach = "to 1.0 only" if low == 1.0 else f"from {low:.3f} to {high:.3f}" + " and to 1.0" * (high < 1)
            raise ValueError(f"compute {compute} is outside what this student can be set to: {reach}")
        if self.stepwise:
            return min(points, key=lambda point: abs(point[0] - compute))[1]
        compute = min(max(compute, points[0][0]), points[-1][0])
        for (below, offset), (above, following) in pairwise(points):
            if below <= compute <= above:
                along = (compute - below) / (above - below) if above > below else 0.0
                return offset + along * (following - offset)
        return points[0][1]


def _keep_frozen(*args: Any, **kwargs: Any) -> None:
    """In the place of a model's save_pretrained, which would write the frozen weights under the wrappers' names."""
    raise ValueError(
        "a student's model is not saved: its weights are as they were. Save what was added to them with "
        "student.save(FILE), or open the folder of its run with elastic.load"
    )
