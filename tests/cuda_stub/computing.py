"""Numbers on the stub of CUDA, where torch's kernels do nothing: what an operator computes is computed by the CPU.

While `Computing` is active, every operator on CUDA tensors runs for real first: torch checks devices and dtypes,
allocates, and launches. Then the same operator runs on CPU tensors over the same memory, which fills in the results. In
a capture that second part is put on a list, and a replay of the graph runs the list. Operators with a Triton kernel
compute by it (executing.py).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from students.kernels import reference, trial, triton

REAL_ALONE = {
    *("empty", "empty_strided", "empty_like", "empty_permuted", "new_empty", "new_empty_strided"),
    *("resize_", "set_", "record_stream", "is_pinned", "_pin_memory", "is_same_size", "_local_scalar_dense"),
}
"""Operators that compute nothing, or whose copy to the host the stub makes itself."""
WAITING = {
    *("nonzero", "masked_select", "equal", "bincount", "unique_dim", "_unique2", "unique_consecutive"),
    *("geqrf", "ormqr", "_cholesky_solve_helper"),
    *("erfinv", "erfinv_", "prod"),
}
"""Operators that run on the CPU alone, after a wait for the device: the shape of their result depends on numbers, or
they need a library that would look for a real driver (cuSOLVER, NVRTC)."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Computing(TorchDispatchMode):
    """Makes operators on CUDA tensors compute on the stub.

    problems: what has been computed wrongly or not at all, one line each, which are limits of the stub."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.recording: list[Callable[[], None]] | None = None
        """What a replay will compute, while a graph is captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat = [*_leaves((args, kwargs))]
        name = func._schema.name.partition("::")[2]
        if not any(map(_on_gpu, flat)) or any(map(_fake, flat)):
            return func(*args, **kwargs)
        if func._can_decompose():  # in inference mode, where `to` may be a view or a copy
            with self:
                return func.decompose(*args, **kwargs)
        if _moves_nothing(func, name):
            return func(*args, **kwargs)
        if _waits(name, args, kwargs):
            torch.cuda.current_stream().synchronize()  # which a capture refuses
            found = _run(func, name, *_mapped(_beside, (args, kwargs)))
            return args[0] if func._schema.is_mutable else _mapped(_moved, found)
        if func.namespace == "elastic":
            with self:
                work = trial.on_gpu(name) if name in triton.OPERATORS else getattr(reference, name)
                return work(*args, **kwargs)
        out = func(*args, **kwargs)
        if self.recording is not None:  # a capture has read what is small and on the host
            args, kwargs = _mapped(_kept, (args, kwargs))
        own_args, own_kwargs, own_out = _mapped(_beside, (args, kwargs, out))
        work = partial(self._compute, func, name, own_args, own_kwargs, own_out)
        if self.recording is None:
            work()
        else:
            self.recording.append(work)
        return out

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any, out: Any) -> None:
        try:
            found = _leaves(_run(func, name, args, kwargs))
            for own, other in zip(_leaves(out), found, strict=False):
                if isinstance(own, Tensor) and isinstance(other, Tensor) and own.numel() and own is not other:
                    if own.shape == other.shape:
                        own.copy_(other)
                    elif own.dtype.is_floating_point and own.dim() > 1 and "attention" not in name:
                        raise ValueError(f"shape {tuple(own.shape)} on CUDA, {tuple(other.shape)} on the CPU")
        except Exception as error:
            problem = f"{func}: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
            if problem not in self.problems:
                self.problems.append(problem)
                print(f"[stub] no numbers: {problem}", file=sys.stderr)

    def install(self) -> None:
        """Begin, for the rest of the process; captures of CUDA graphs record, and replays compute."""
        graph: Any = torch.cuda.CUDAGraph
        begin, end, replay = graph.capture_begin, graph.capture_end, graph.replay

        def capture_begin(own: Any, *args: Any, **kwargs: Any) -> None:
            begin(own, *args, **kwargs)
            own.work = self.recording = []

        def capture_end(own: Any) -> None:
            self.recording = None
            end(own)

        def replayed(own: Any) -> None:
            replay(own)
            with _disable_current_modes():
                for work in own.work:
                    work()

        graph.capture_begin, graph.capture_end, graph.replay = capture_begin, capture_end, replayed
        torch.backends.cudnn.enabled = False  # cuDNN is real, and would look for a real driver
        torch.backends.cuda.enable_cudnn_sdp(False)
        self.__enter__()


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        yield tree
        return
    for part in tree:
        yield from _leaves(part)


def _mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _mapped(function, part) for key, part in tree.items()}
    if isinstance(tree, (tuple, list)):
        return [*tree] if isinstance(tree, torch.Size) else type(tree)(_mapped(function, part) for part in tree)
    return function(tree)


def _on_gpu(x: Any) -> bool:
    return x.is_cuda if isinstance(x, Tensor) else isinstance(x, torch.device) and x.type == "cuda"


def _fake(x: Any) -> bool:
    return isinstance(x, Tensor) and type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _moves_nothing(func: Any, name: str) -> bool:
    return func.is_view or torch.Tag.inplace_view in func.tags or name in REAL_ALONE


def _waits(name: str, args: Any, kwargs: Any) -> bool:
    if name in INDEXING:
        return any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name.removeprefix("_").startswith("linalg_") and name != "linalg_vector_norm":
        return True
    return name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None)


def _beside(x: Any) -> Any:
    """Return the CPU tensor over the memory of a CUDA tensor; for a CUDA device, the CPU."""
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == "cuda" else x
    if not isinstance(x, Tensor) or not x.is_cuda:
        return x
    storage = x.untyped_storage()
    if not storage.nbytes():
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    base = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=x.dtype).set_(base, x.storage_offset(), x.shape, x.stride())


def _kept(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) and x.dim() == 0 and not x.is_cuda else x


def _moved(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    made = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")
    _beside(made).copy_(x)
    return made


def _run(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Run an operator on CPU tensors, also one that only GPUs have."""
    kwargs = {key: x for key, x in kwargs.items() if key not in ("pin_memory", "non_blocking")}
    given = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
    if name in ("_softmax", "_log_softmax") and given["half_to_float"]:
        return func(args[0].float(), args[1], False)
    if name == "histc":  # of integers on GPUs alone; with limits given, nothing waits there
        return func(args[0].float(), *args[1:], **kwargs)
    if name == "native_layer_norm_backward":  # for which the CPU wants statistics in the input's dtype
        return func(*args[:3], args[3].to(args[1].dtype), args[4].to(args[1].dtype), *args[5:])
    if name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"):
        return _attention(given)[:1]
    if name.startswith("_scaled_dot_product_") and name.endswith("_attention_backward"):
        return _attention_backward(given)
    return func(*args, **kwargs)


def _attention(given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return attention's result in float32, and query, key, value, probabilities and scale, keys for each head."""
    query, key, value = (given[name].float() for name in ("query", "key", "value"))
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if given.get("scale") is None else given["scale"]
    scores = query @ key.mT * scale
    if given.get("is_causal"):
        scores.masked_fill_(scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    if given.get("attn_bias") is not None:
        scores += given["attn_bias"].float()
    p = torch.softmax(scores, -1).nan_to_num(0)
    return p @ value, query, key, value, p, scale


def _attention_backward(given: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return the gradients of query, key, value and bias."""
    _, query, key, value, p, scale = _attention(given)
    out = next(x for name, x in given.items() if name.startswith("grad_out")).float()
    toward = out @ value.mT
    bias = p * (toward - (toward * p).sum(-1, keepdim=True))
    scores, groups = bias * scale, given["key"].shape[1]
    shared = (x.unflatten(1, (groups, -1)).sum(2) for x in (scores.mT @ query, p.mT @ out))
    return (scores @ key, *shared, bias)
