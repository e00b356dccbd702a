"""Work that is recorded once and replayed: on GPUs as a CUDA graph, one launch where there were some two thousand; on
CPUs as a list of calls."""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from students.kernels import ops
from students.kernels.replay import Replay
from students.kernels.triton import counters

T = TypeVar("T")

WARM_UP = 2
"""Number of warm-up runs before capture, in which libraries allocate workspaces and kernels are compiled."""
KEPT = 4
"""Number of recordings of one kind that are kept, with their tensors; the least recently used is dropped first."""
KEPT_ON_CPU = 16
"""The same of passes over images and prompts on a CPU, where each has few tokens."""
FEW = 512
"""Maximum number of tokens of a pass that is recorded on a CPU. With more, what modules take is little beside what
operators take, and a replay copies some of their results."""
OURS = "students.", "transformers."
"""Modules, by the start of their names, whose hooks may be left out when work is replayed."""
THREAD = "thread_local"
"""Capture mode in which other threads may make calls that would break a capture, as a thread that pins memory does."""


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """Return the stream for captures on a device: one for all, as libraries keep a workspace for each stream."""
    return torch.cuda.Stream(device)


@contextmanager
def _own_workspace() -> Iterator[None]:
    """Context of a capture that gives cuBLAS a workspace in the graph's own memory.

    torch keeps a workspace for each stream. With any graph that was captured on a stream, torch 2.14 frees the stream's
    workspace, to which all other graphs captured there still write (pytorch issue 193402). RuntimeError if this torch
    cannot free workspaces when asked to.
    """
    free = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if free is None:
        raise RuntimeError(f"torch {torch.__version__} does not let graphs have cuBLAS workspaces of their own")
    free()
    try:
        yield
    finally:
        free()


class Recorder(Protocol):
    """Turns work on tensors that stay where they are into a function that repeats it and returns the same tensors."""

    def __call__(self, work: Callable[[], Any]) -> Callable[[], Any]: ...


class CudaGraph:
    """A recorder that captures work on a device (None: the current one) into a CUDA graph.

    The work may neither wait for the device nor copy from the host. The next call overwrites the result.
    """

    def __init__(self, work: Callable[[], Any], device: torch.device | None = None) -> None:
        with torch.cuda.device(device):
            before, side = torch.cuda.current_stream(), _stream(torch.cuda.current_device())
            side.wait_stream(before)
            try:
                with torch.cuda.stream(side):
                    for _ in range(WARM_UP):
                        work()
            finally:  # where memory runs out, what has been launched still runs, and the caller goes on
                before.wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            own, capture = counters.lent(side.device), partial(torch.cuda.graph, stream=side, capture_error_mode=THREAD)
            try:
                with own as self._counters, _own_workspace(), capture(self._graph):
                    self._out = work()
            except RuntimeError:
                # after a failed capture torch stays on its stream, and has no random numbers until a capture succeeds
                torch.cuda.set_stream(before)
                with capture(torch.cuda.CUDAGraph()):
                    torch.zeros((), device=side.device)
                raise

    def __call__(self) -> Any:
        self._graph.replay()
        return self._out


def recorder_for(device: torch.device, tokens: float = math.inf) -> Recorder | None:
    """Return the recorder for work on this device over so many tokens; None if there is none."""
    if device.type == "cuda":
        return partial(CudaGraph, device=device)
    return Replay if device.type == "cpu" and tokens <= FEW else None


def are_watched(modules: Iterable[nn.Module]) -> bool:
    """Return whether somebody counts operations or has put hooks on modules, which no replay would run."""
    hooked = [m for m in modules if m._forward_hooks or m._forward_pre_hooks]
    hooks = (hook for m in hooked for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))
    return ops.observed() or not all(hook.__module__.startswith(OURS) for hook in hooks)


class Watch:
    """Whether a model is watched, asked again and again: its modules are looked at after a hook was registered only."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._newest = -1

    def __call__(self) -> bool:
        newest = RemovableHandle.next_id  # the number of hooks that have been registered, on any module
        if newest != self._newest and are_watched(self._modules):
            return True
        self._newest = newest
        return ops.observed()


def check_types(device: torch.device) -> None:
    """Raise ValueError under torch.autocast, whose choice of types a recording would keep for calls without it."""
    if torch.is_autocast_enabled(device.type):
        raise ValueError("under torch.autocast the types of tensors are not the model's")


class Recordings(OrderedDict[Hashable, tuple[T, Callable[[], Any] | None]], Generic[T]):
    """The most recently used recordings, by the key that each was made for: the tensors that the work reads, and its
    replay, None if it could not be recorded. what: the beginning of warnings, of which each is given once; most,
    on_cpu: how many are kept on a GPU (None: the caller drops them) and on a CPU."""

    def __init__(self, what: str, most: int | None = KEPT, on_cpu: int = KEPT) -> None:
        super().__init__()
        self._most, self._on_cpu = most, on_cpu
        self._what = what
        self._said: set[str] = set()

    def warn(self, reason: str) -> None:
        """Say, once, why nothing is recorded."""
        if reason not in self._said:
            self._said.add(reason)
            warnings.warn(f"{self._what}: {reason}", stacklevel=4)

    def take(
        self, key: Hashable, record: Recorder, make: Callable[[], tuple[T, Callable[[], Any]]]
    ) -> tuple[T, Callable[[], Any] | None]:
        """Return the recording of a key; if it is missing, the work that `make` returns with its tensors becomes it."""
        if key not in self:
            own, work = make()
            try:
                self[key] = own, record(work)
            except RuntimeError as error:  # the work waits for the device, or leaves too little memory
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                self.warn(f"recording failed ({reason})")
                self[key] = own, None
        self.move_to_end(key)
        most = self._on_cpu if record is Replay else self._most
        while most is not None and len(self) > most:
            self.popitem(last=False)
        return self[key]


class Forward:
    """A forward pass on one tensor, such as images, through recordings, one for each shape.

    run: the function of pixels [B, C, H, W] that is recorded. state: as in Decoding, called with the pixels. recorder:
    None for the device's default. Without any, or where `state` raises ValueError, `run` is called directly; on GPUs
    one warning then gives the error's reason, behind `what`. tokens: returns the number of tokens of pixels; without
    it no CPU records. model: what runs; while it is watched, nothing is replayed.
    """

    def __init__(
        self,
        run: Callable[[Tensor], Any],
        state: Callable[[Tensor], Hashable] = lambda pixels: None,
        recorder: Recorder | None = None,
        what: str = "images without recorded passes",
        tokens: Callable[[Tensor], float] = lambda pixels: math.inf,
        model: nn.Module | None = None,
    ) -> None:
        self.recorder = recorder
        self.kept = Recordings[tuple[Tensor, Callable[[], bool]]](what, on_cpu=KEPT_ON_CPU)
        self._what = what
        self._run = run
        self._state = state
        self._tokens = tokens
        self._model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        run, state = copy.deepcopy(self._run, memo), copy.deepcopy(self._state, memo)
        tokens, model = copy.deepcopy(self._tokens, memo), copy.deepcopy(self._model, memo)
        return Forward(run, state, self.recorder, self._what, tokens, model)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Any:
        """Return the result of `run`; the next call overwrites it."""
        record, key = self.recorder or recorder_for(pixels.device, self._tokens(pixels)), None
        try:
            if record is not None:
                check_types(pixels.device)
                key = pixels.shape, pixels.dtype, pixels.device, self._state(pixels)
        except ValueError as reason:
            if record is not Replay:
                self.kept.warn(str(reason))
        if record is None or key is None:
            return self._run(pixels)

        def make() -> tuple[tuple[Tensor, Callable[[], bool]], Callable[[], Any]]:
            with torch.inference_mode(False):
                own = pixels.clone()
            return (own, Watch(self._model) if self._model else lambda: False), lambda: self._run(own)

        (own, is_watched), replay = self.kept.take(key, record, make)
        if replay is None or is_watched():
            return self._run(pixels)
        own.copy_(pixels)
        return replay()


class Fetched:
    """A tensor whose copy to the host starts now; what is launched between now and `wait` runs meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._done = tensor, None
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> Tensor:
        """Return the tensor on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._tensor
