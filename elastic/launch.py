"""The data-parallel processes that a launcher (accelerate launch, torchrun) starts for one command.

All processes run the same code on the same data in the same order. Each works on its own rows of a batch (`own_rows`),
sums are reduced over all processes (`all_reduce`), and work that must happen once is left to the first process
(`on_main`), which alone writes files and messages. Tensors are reduced on their devices; host data goes through a gloo
group of its own, which waits for no device. Without a launcher there is one process, and these functions do nothing
but the work itself.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

PATIENCE = timedelta(days=7)
"""How long a process waits for others when host data is exchanged: one may calibrate or measure for hours."""
_alone = False


class Lost(RuntimeError):
    """Raised where this process cannot go on because another one has ended."""


def launched() -> int:
    """Return how many processes the launcher started, read from its environment variables."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1


def spreads() -> bool:
    """Return whether the frozen weights are to be spread over the processes (see elastic/sharding.py)."""
    return launched() > 1 and asks("ACCELERATE_USE_FSDP")


def asks(variable: str, otherwise: str = "false") -> bool:
    """Return whether accelerate's configuration turns a setting on, by the environment variable it is passed in."""
    return os.environ.get(variable, otherwise).lower() in ("1", "true", "yes")


def forget() -> None:
    """Make this process act as the only one, for a command whose work is not shared between processes."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)


@dataclass(frozen=True)
class _Joined:
    """What a process knows after all processes have joined."""

    rank: int
    local_rank: int
    size: int
    device: Any
    group: Any
    """The gloo group for host data."""
    underway: set[Any] = field(default_factory=set)
    """Asynchronous collectives that have been started but not waited for."""


@functools.cache
def _join() -> _Joined:
    """Join the other processes at the first call, and return what `_Joined` holds."""
    import torch
    from accelerate import PartialState

    if asks("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "accelerate's configuration asks for Megatron-LM, which brings models of its own: Elastic takes MULTI_GPU, "
            "or to spread the weights FSDP with fsdp_version: 2, or DEEPSPEED with zero_stage: 3"
        )
    if asks("ACCELERATE_USE_DEEPSPEED"):
        _take_as_fsdp()
    without = not torch.accelerator.is_available()
    cpu = without or asks("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu)
    if state.num_processes != launched():
        raise ValueError(
            f"a launcher started {launched()} processes, but on this device ({state.device.type}) they cannot talk to "
            "each other: start one"
        )
    group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return _Joined(state.process_index, state.local_process_index, state.num_processes, state.device, group)


def _take_as_fsdp() -> None:
    """Translate accelerate's DeepSpeed variables to those for FSDP: from either Elastic takes only that the frozen
    weights are to be spread. Raise ValueError for settings that ask for anything else."""
    stage, device, optimizer = (
        os.environ.get(f"ACCELERATE_DEEPSPEED_{name}", otherwise)
        for name, otherwise in (
            ("ZERO_STAGE", "unknown"),
            ("OFFLOAD_PARAM_DEVICE", "none"),
            ("OFFLOAD_OPTIMIZER_DEVICE", "none"),
        )
    )
    if stage != "3":
        raise ValueError(
            f"accelerate's configuration asks for DeepSpeed, zero_stage {stage}: say zero_stage: 3, which spreads the "
            "frozen weights, or MULTI_GPU (nothing else is large enough to be spread)"
        )
    if optimizer != "none":
        raise ValueError(f"offload_optimizer_device: {optimizer} has no effect, routers are small: leave it away")
    if device not in ("none", "cpu"):
        raise ValueError(f"offload_param_device is {device}: say cpu, or leave it away")
    del os.environ["ACCELERATE_USE_DEEPSPEED"]  # accelerate would start DeepSpeed itself
    offload = str(device == "cpu").lower()
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_OFFLOAD_PARAMS=offload)


def join() -> None:
    """Wait for the other processes, if there are any, and set up communication; shared commands begin with this."""
    if launched() > 1:
        _join()


def leave() -> None:
    """Wait for pending collectives and all processes and end communication; shared commands that succeed end so."""
    if launched() > 1:
        import torch

        with _others():
            for work in _join().underway:
                work.wait()
            torch.distributed.barrier(group=_join().group)
        torch.distributed.destroy_process_group()


def size() -> int:
    """Return how many processes share the work; 1 within `together` and `on_main`."""
    return 1 if _alone or launched() == 1 else _join().size


def rank() -> int:
    """Return this process's number among those that share the work, 0 for the first."""
    return 0 if size() == 1 else _join().rank


def is_main() -> bool:
    """Return whether this is the first process, which writes files and messages."""
    return launched() == 1 or int(os.environ["RANK"]) == 0


@contextmanager
def _others() -> Iterator[None]:
    """Context of a collective: raise Lost if it fails because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise Lost(f"another of the {_join().size} processes has ended; what it said stands above") from error


@contextmanager
def _as_one() -> Iterator[None]:
    """Context in which this process works as if there were no others."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def own_rows(count: int) -> range:
    """Return which of `count` rows of a batch are this process's: contiguous, by rank."""
    return range(count * rank() // size(), count * (rank() + 1) // size())


def all_reduce(x: Tensor) -> Tensor:
    """Return the sum of x over all processes. Backward reaches this process's x only; see `all_reduce_gradients`."""
    if size() == 1:
        return x
    import torch

    whole = x.detach().clone()
    with _others():
        torch.distributed.all_reduce(whole)
    return whole + (x - x.detach()) if x.requires_grad else whole


def part() -> tuple[int, int, Any]:
    """Return which part of spread weights this process keeps, the number of parts, and the device to compute on."""
    joined = _join()
    return joined.rank, joined.size, joined.device


def fill(buffer: Tensor) -> Callable[[], None]:
    """Start to gather all parts of a buffer into which each process has written its own; return a function that waits
    until the buffer is full (on GPUs it makes later kernels wait, not the host)."""
    import torch

    joined = _join()
    works: set[Any]
    with _others():
        if buffer.device.type == "cpu":  # gloo would gather into a second buffer
            parts = enumerate(buffer.chunk(joined.size))
            works = {torch.distributed.broadcast(own, rank, async_op=True) for rank, own in parts}
        else:
            own = buffer.chunk(joined.size)[joined.rank]
            works = {torch.distributed.all_gather_into_tensor(buffer, own, async_op=True)}
    joined.underway.update(works)

    def wait() -> None:
        with _others():
            for work in works:
                work.wait()
        joined.underway.difference_update(works)

    return wait


def average(x: Tensor) -> Tensor:
    """Return the mean over the elements of x in all processes."""
    return x.mean() if size() == 1 else mean_of(x.mean(), x.numel())


def mean_of(x: Tensor, count: int | Tensor) -> Tensor:
    """Return the mean over all processes of x, which is in each process a mean over `count` rows or tokens."""
    if size() == 1:
        return x
    import torch

    weight = torch.as_tensor(count, device=x.device, dtype=x.dtype)
    sums = all_reduce(torch.cat([(x * weight).flatten(), weight.view(1)]))
    return (sums[:-1] / sums[-1]).view(x.shape)


def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its sum over all processes; it stays None if it is None in all of them."""
    if size() == 1:
        return
    import torch

    parameters = list(parameters)
    found = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
    with _others():
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=_join().group)
    wanted = [p for p, there in zip(parameters, found.tolist(), strict=True) if there]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in wanted])
    flat = all_reduce(flat)
    for parameter, part in zip(wanted, flat.split([p.numel() for p in wanted]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)


def all_gather(x: Tensor) -> Tensor:
    """Return the rows x [n, ...] of all processes, concatenated by rank; n may differ between processes."""
    if size() == 1:
        return x
    import torch

    lengths = [torch.zeros(1, dtype=torch.long) for _ in range(size())]
    with _others():
        torch.distributed.all_gather(lengths, torch.tensor([len(x)]), group=_join().group)
        most = max(map(int, lengths))
        parts = [x.new_empty(most, *x.shape[1:]) for _ in lengths]
        torch.distributed.all_gather(parts, torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]))
    return torch.cat([part[: int(length)] for part, length in zip(parts, lengths, strict=True)])


def any_of(flag: bool) -> bool:
    """Return whether the flag is True in any of the processes."""
    return flag if size() == 1 else any(gather(flag))


def gather(x: T) -> list[T]:
    """Return the values that x has in all processes, by rank; x is plain data or tensors on the host."""
    if size() == 1:
        return [x]
    import torch

    found: list[Any] = [None] * size()
    with _others():
        torch.distributed.all_gather_object(found, x, group=_join().group)
    return found


def on_main(work: Callable[[], T]) -> T:
    """Run `work` in the first process only and return its result, with tensors on the host, in all; a ValueError or
    OSError is raised in all."""
    if size() == 1:
        return work()
    import torch

    word: list[Any] = [_attempt(work) if rank() == 0 else None]
    with _others():
        torch.distributed.broadcast_object_list(word, src=0, group=_join().group)
    if word[0].error is not None:
        raise word[0].error
    return word[0].value


def together(work: Callable[[], T]) -> T:
    """Run `work` in each process on its own; if one raises ValueError or OSError, all processes raise an error."""
    if size() == 1:
        return work()
    done = _attempt(work)
    errors = [error for error in gather(done.error) if error is not None]
    if errors:
        raise done.error or errors[0]
    return done.value


def in_step(work: Callable[[], T]) -> T:
    """Run `work`, in which the processes communicate, so that a ValueError is known to be raised by all of them."""
    try:
        return work()
    except ValueError as error:
        everyones(error)
        raise


def main_process_first(work: Callable[[], T]) -> T:
    """Run `work` as `together` does, on each machine first in its first process: others then find downloads cached.
    What all of them would log the first of all says alone."""
    if size() == 1:
        return work()
    from teachers.quiet import unlogged

    first = _join().local_rank == 0
    made: list[T] = []
    for turn in (True, False):
        with nullcontext() if is_main() else unlogged():
            together((lambda: made.append(work())) if turn == first else (lambda: None))
    return made[0]


@dataclass
class _Done:
    """The result of some work, or the error that it raised."""

    value: Any = None
    error: ValueError | OSError | None = None


def _attempt(work: Callable[[], Any]) -> _Done:
    try:
        with _as_one():
            return _Done(work())
    except (ValueError, OSError) as error:
        return _Done(error=everyones(error))


def everyones(error: E) -> E:
    """Mark an error as raised by all processes at the same place, so that only the first reports it; return it."""
    error.shared = True  # type: ignore[attr-defined]
    return error


def before_the_end(error: Exception, work: Callable[[], object]) -> None:
    """Run `work` in the first process before `error` ends the command, while the others wait for it or are gone."""
    if is_everyones(error):
        on_main(work)
    elif is_main():
        with _as_one():
            work()


def is_everyones(error: Exception) -> bool:
    """Return whether all processes raise this error, so that they can still communicate."""
    return size() == 1 or getattr(error, "shared", False)


def is_said_here(error: Exception) -> bool:
    """Return whether this process reports an error: the first one does, and one whose error no other process has."""
    return is_main() or (_have_met() and not isinstance(error, Lost) and not is_everyones(error))


def wait_until_said(error: Exception) -> None:
    """If all processes raise this error, wait until the first has reported it: a launcher ends all with the first that
    exits."""
    if not _have_met():
        let_the_first_speak()
    elif launched() > 1 and is_everyones(error):
        import torch

        with suppress(RuntimeError):
            torch.distributed.monitored_barrier(_join().group, timedelta(seconds=30))


def let_the_first_speak() -> None:
    """Give the first process 5 s to report an error, where the processes have not joined and cannot wait for it."""
    if not is_main():
        time.sleep(5.0)


def _have_met() -> bool:
    return _join.cache_info().currsize > 0
