"""The base class of all students: a frozen model with routers, a dial for its compute, and checkpoints of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from students.architectures.record import Architecture
from students.checkpoint import read_tensors, write_tensors
from students.compute import ComputeModel, Phase
from students.decisions import Decisions
from students.execution.runtime import Runtime
from students.execution.wrapper import Wrapper
from students.kernels.attention_gradient import attention_gradients, recomputing
from students.kernels.devices import AnyLength
from students.kernels.packing import MOST_ROWS, pack_linears, prepare_linears
from students.prepared import Stamp, writes
from students.shards import are_spread
from students.spec import StudentSpec
from students.turns import Turn

ADDED = {"routers", "substitutes", "lora"}
"""Names of the children that hold added modules in a wrapper; nothing else in the model is trainable or saved."""


class Student(nn.Module):
    """A frozen model and its routers; with routers bypassed, the same weights are the teacher (see `teacher`)."""

    masks = False
    """Whether attention takes masks in training."""

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
        self.dial: tuple[tuple[float, float], ...] = ()
        """Measured points (compute ratio, offset), ascending, between which `set_compute` interpolates."""
        self.span: tuple[float, float] | None = None
        """The lowest and highest budget of the range that the student was trained for; None: not for a range."""
        self._turn = Turn()
        self._lengths = AnyLength()
        self._laid_out, self._dialled = Stamp(), Stamp()
        self._layouts = 0
        """Number of changes of the weights' memory layout. Recorded passes, the teacher's too, read weights at the
        addresses of recording time and hold for one layout only."""
        self._choices = 0
        """Number of times that static routers have chosen what is read. Weights are then sliced anew, and recorded
        passes that read the slices before no longer hold."""
        self._packed = {bypass: Stamp() for bypass in (False, True)}
        """Stamps of the packed weights that the routed model (False) and the teacher (True) read."""
        self._most_packed = 0.0
        """Maximum rows of a pass of the routed model that reads packed weights; 0: `pack` has not been called."""
        self._added = list(self.added_tensors().values())
        self._frozen = next(p for p in model.parameters() if not p.requires_grad)
        self._spread = are_spread(model)
        vars(model).update(save_pretrained=_keep_frozen)

    @contextmanager
    def teacher(self) -> Iterator[Student]:
        """Context in which routers are bypassed: the student computes what the frozen model computes."""
        before, self.runtime.bypass = self.runtime.bypass, True
        try:
            yield self
        finally:
            self.runtime.bypass = before

    @contextmanager
    def _deciding(self) -> Iterator[Decisions]:
        """Context that records the routers' decisions, with fast gradients of attention, of one thread at a time."""
        run = self.runtime
        with self._turn:
            run.decisions = Decisions(bypassed=run.bypass)
            try:
                with attention_gradients(self._frozen.device, self.masks):
                    yield run.decisions
            finally:
                run.decisions = None

    def _enter(self, tokens: int, batch: int, device: torch.device, prepared: bool = False) -> None:
        """Start a forward pass: begin a call, and prepare what skip execution reads.

        tokens: number of tokens in the batch, 0 if it does not matter. prepared: whether nothing has changed since
        `prepare`, so that preparation is skipped. ValueError if routers skip under torch.autocast.
        """
        run = self.runtime
        skipping = run.begin(batch, device, tokens).skipping
        if skipping and torch.is_autocast_enabled(device.type):
            raise ValueError(
                "torch.autocast is on: kernels that skip take one type, which autocast mixes with others; convert the "
                "student instead, as in student.to(torch.bfloat16), and call it without autocast"
            )
        if skipping and not prepared:
            self._prepare()
            self._pack_for(tokens or batch)

    def _leave(self, trunk: nn.Module, args: Any, out: Any) -> None:
        """Forward hook that ends every pass; if the pass failed (out is None), it clears the state between wrappers."""
        self._lengths.end()
        if out is None:
            self.runtime.drop()

    def train(self, mode: bool = True) -> Student:
        """Switch routing between training and inference; the frozen model always stays in eval mode."""
        self.training = mode
        self.runtime.training = mode
        self.model.eval()
        for block in self.blocks:
            # transformers recomputes a block only if block.training is set; dropouts are its children and stay in eval
            block.training = mode and self.runtime.recompute
        return self

    def checkpoint_blocks(self) -> None:
        """Recompute each block's activations in backward instead of keeping them (non-reentrant)."""
        self.runtime.recompute = True
        again = partial(checkpoint, use_reentrant=False, context_fn=self._recomputing)
        block: Any
        for block in self.blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = again
        self.train(self.training)

    def _recomputing(self) -> Any:
        return recomputing(self._frozen.device, self.masks)

    def prepare(self) -> None:
        """Lay out frozen weights for skip execution, convert corrections, routers and the dial, and pack weights.

        Calling this is optional: a forward pass that skips prepares whatever is missing or stale (see
        students/prepared.py), so that a call after loading or moving the model only saves the first pass this time.
        Packed weights (kernels/packing.py) are read by passes with few tokens only, and by the teacher too.
        """
        self._prepare()
        if self._most_packed:
            self._pack()

    def pack(self) -> bool:
        """Let frozen bfloat16 layers on a CPU have packed weights, and low-rank corrections of 16-bit weights be added
        to copies of these (kernels/packing.py), which `prepare` or the next forward pass that reads them makes. Return
        False if no layer can be packed."""
        for stamp in self._packed.values():
            stamp.reset()  # earlier calls have renewed it though they found nothing to pack
        self._most_packed = math.inf if any(x.packs_alone() for x in self._wrappers()) else MOST_ROWS
        return pack_linears(self.model)

    def _prepare(self) -> None:
        """Lay out weights, and convert routers and the dial, if stale. ValueError if the weights are sharded."""
        if self._spread:
            raise ValueError("weights that are spread over processes are not laid out for skipping: execute as masks")
        run, written = self.runtime, writes(self._added)
        moved = self._laid_out.renew([self._frozen], written)
        if not self._dialled.renew([self._frozen], written, run.offset, run.capacity):
            return
        self._layouts += moved
        self._choices += any(router.network == "static" for router in self.spec.routers)
        with self._plainly():
            run.set_dial(self._frozen.device)
            wrappers = self._wrappers()
            for wrapper in wrappers if moved else ():
                wrapper.lay_out()
            for wrapper in wrappers:
                wrapper.set_dial()

    @contextmanager
    def _plainly(self) -> Iterator[None]:
        """Context for what later passes read, whether they are in inference mode or not, and never under autocast."""
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self._frozen.device.type, enabled=False):
            yield

    def _pack_for(self, rows: int) -> None:
        """Pack weights before a forward pass with about `rows` rows, if such a pass reads them: with few rows, or with
        corrections, which are packed together with their weights."""
        most = min(self._most_packed, MOST_ROWS) if self.runtime.bypass else self._most_packed
        if rows <= most and not torch.is_grad_enabled():
            self._pack()

    def _pack(self) -> None:
        """Pack the weights that the routed model reads, or those of the teacher if routers are bypassed, if stale."""
        bypass = self.runtime.bypass
        if self._packed[bypass].renew([self._frozen], self._layouts):
            with self._plainly():
                needless = set() if bypass else {x.base_layer for x in self._wrappers() if x.pack()}
                prepare_linears(self.model, but=needless)

    def forget_layouts(self) -> None:
        """Undo `prepare`: give the frozen weights the memory layout of the original model."""
        for stamp in self._packed.values():
            stamp.reset()
        self._laid_out.reset()
        self._dialled.reset()
        self._layouts += 1
        for wrapper in self._wrappers():
            wrapper.forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move or convert all tensors. Layouts are undone before, and with none the teacher's recorded passes no longer
        hold either: addresses may be the same after a way back."""
        if self._layouts:
            self.forget_layouts()
        else:
            self._layouts = 1
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _wrappers(self) -> list[Wrapper]:
        """Return the wrappers of this student; those in a vision tower with routers belong to the tower's student."""
        return [x for x in self.model.modules() if isinstance(x, Wrapper) and x.runtime is self.runtime]

    def added_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of all added modules by name: the trainable ones."""
        return {n: p for n, p in self.model.named_parameters() if ADDED & set(n.split("."))}

    def added_state(self) -> dict[str, Tensor]:
        """Return the tensors of all added modules, detached: what a checkpoint holds, without the frozen model."""
        return {n: x.detach() for n, x in self.added_tensors().items()}

    def added_tensors(self) -> dict[str, Tensor]:
        """Return parameters and buffers of all added modules by name."""
        buffers = {n: b for n, b in self.model.named_buffers() if ADDED & set(n.split("."))}
        return {**self.added_parameters(), **buffers}

    def load_added_state(self, state: dict[str, Tensor], source: str | Path = "the checkpoint") -> None:
        """Copy the result of `added_state` back into the added modules. ValueError, which names the `source`, if names
        or shapes differ, or some hold integers where others hold fractions."""
        own = self.added_state()
        if own.keys() != state.keys():
            odd = sorted(own.keys() ^ state.keys())
            names = "1 name differs" if len(odd) == 1 else f"{len(odd)} names differ"
            raise ValueError(f"{source} does not fit this student: {names}, such as {odd[0]}")
        for name, tensor in own.items():
            given = state[name]
            if tensor.shape != given.shape or tensor.is_floating_point() != given.is_floating_point():
                found, needed = (f"{x.dtype} {list(x.shape)}" for x in (given, tensor))
                raise ValueError(f"{source} does not fit this student: {name} is {found}, this student needs {needed}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def uniform(self, share: float, tokens: Any, phase: Phase) -> float:
        """Return the compute ratio of a pass over `tokens` tokens if every router kept the same share of its gates;
        subclasses say what `tokens` is where it is not a number."""
        return self.compute.uniform(share, tokens, phase)

    @property
    def setting(self) -> dict[str, Any]:
        """Position and reach of the dial, as plain data for checkpoints; assigning it restores them."""
        run = self.runtime
        about = {"offset": run.offset, "capacity": run.capacity, "dial": self.dial, "span": self.span}
        if run.multiples is not None:
            about["multiples"] = run.multiples  # only where it is set: other files stay as earlier versions wrote them
        return about

    @setting.setter
    def setting(self, about: dict[str, Any]) -> None:
        self.dial = tuple((float(compute), float(offset)) for compute, offset in about["dial"])
        self.span = about["span"] and tuple(about["span"])
        offset = about["offset"]
        self.runtime.offset = tuple(map(float, offset)) if isinstance(offset, list) else float(offset)
        self.runtime.capacity = about["capacity"]
        most = about.get("multiples")
        self.runtime.multiples = 1 if most is False else most  # False: in files of earlier versions

    def save(self, path: str | Path) -> None:
        """Write the tensors of all added modules and the dial to one safetensors file."""
        write_tensors(Path(path), self.added_state(), self.setting)

    def restore(self, path: str | Path) -> None:
        """Load a file that `save` wrote. ValueError, which names it, if it is damaged or belongs to another student."""
        tensors, about = read_tensors(Path(path), "offset", "capacity", "dial", "span")
        self.load_added_state(tensors, path)
        try:
            self.setting = about
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged (its dial cannot be read: {error}): distil again") from None
        self.runtime.bypass = False

    def set_compute(self, compute: float | Sequence[float] | Tensor) -> None:
        """Turn the dial: from now on the student spends this share of the teacher's compute; at 1.0 it is the teacher.

        A sequence or tensor [B] sets one budget for each row of the batches to come; in a batch with a multiple of B
        rows, as beam search makes it, equal groups of neighbouring rows share one. A row at 1.0 has all gates open and
        no corrections.

        Offsets are interpolated between the measured points of `dial`. ValueError for a budget outside of these points
        or of the range that the student was trained for.
        """
        given: Any = compute.tolist() if hasattr(compute, "tolist") else compute  # also of numpy
        budgets = list(given) if isinstance(given, Sequence) else [given]
        if not budgets or not all(isinstance(budget, int | float) for budget in budgets):
            raise ValueError(f"set_compute needs a budget such as 0.7, or one for each row of a batch, not {compute!r}")
        offsets = [math.inf if budget == 1.0 else self._offset(budget) for budget in budgets]
        if len(set(offsets)) > 1 and any(router.selection == "topk" for router in self.spec.routers):
            raise ValueError("top-k routers keep the same share for all rows of a batch: set one budget for all")
        self.runtime.bypass = min(offsets) == math.inf
        if not self.runtime.bypass:
            self.runtime.offset = tuple(offsets) if len(set(offsets)) > 1 else offsets[0]

    @property
    def stepwise(self) -> bool:
        """Whether compute changes in steps as the dial turns: all routers keep quotas, whole numbers of patches."""
        return all(router.selection == "quota" for router in self.spec.routers)

    def _offset(self, compute: float) -> float:
        """Return the offset for a budget below 1: interpolated, or if `stepwise` that of the nearest measured point."""
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
    """Replace a model's save_pretrained, which would write the frozen weights under the wrappers' names: ValueError."""
    raise ValueError(
        "a student's model is not saved: its weights are as they were. Save what was added to them with "
        "student.save(FILE), or open the folder of its run with elastic.load"
    )
