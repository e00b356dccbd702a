"""Self-check of a new student: whether it equals its teacher, and cached decoding equals the full forward pass.

Models change from release to release of transformers and timm, and changes inside them rarely raise an error. So a new
student is run on a few tokens or images before it is used: when a process uses an architecture for the first time, and
always if a library has a version that the project's tests have not seen (see `untested`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn
from transformers import PreTrainedModel

from students.kernels import devices
from students.libraries import cache_of, fresh_positions, with_cache
from students.spec import StudentSpec
from students.student import Student

SWITCH = "ELASTIC_SELF_CHECK"
"""Environment variable; "off" switches the check off."""

LIBRARIES = ("torch", "transformers", "timm")
"""Libraries on whose internals a student depends."""

TOKENS = 6
"""Length of the sequence that the check runs; its last token is also decoded from a cache of the others."""

_passed: set[tuple[Any, ...]] = set()


def untested() -> list[str]:
    """Return the libraries whose version is outside the range that pyproject.toml allows, which is the tested range.

    The ranges are read from the installed distribution; in a checkout that is not installed, all count as untested.
    """
    try:
        required = [Requirement(line) for line in metadata.requires("elastic-distill") or ()]
    except metadata.PackageNotFoundError:
        return list(LIBRARIES)
    ranges = {each.name: each.specifier for each in required if each.marker is None}
    return [name for name in LIBRARIES if not ranges[name].contains(metadata.version(name), prereleases=True)]


def unchecked_use(model: nn.Module, spec: StudentSpec) -> tuple[Any, ...] | None:
    """Return what to hand to `remember` when a student of this model has passed; None if it need not be checked."""
    parameter = next(model.parameters())
    if os.environ.get(SWITCH, "").lower() == "off" or parameter.is_meta:
        return None
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    kinds = frozenset((router.kind, router.kv, router.part) for router in spec.routers)
    use = type(model), attention, parameter.dtype, parameter.device.type, kinds
    return use if use not in _passed or untested() else None


def remember(use: tuple[Any, ...]) -> None:
    """Let later students of this process that use a model in the same way go unchecked."""
    _passed.add(use)


class SelfCheck:
    """Outputs of a frozen model for a few inputs, taken before routers are added, to compare a student's outputs with.

    run: calls the model. inputs: token ids [1, TOKENS] or images [2, C, H, W]. language: whether there is a cache.
    ValueError of one line if the frozen model's outputs are unusable or (`compare`) the student's differ.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any], inputs: Tensor, language: bool) -> None:
        self._model, self._reads, self._inputs, self._language = model, run, inputs, language
        asked = "a few tokens" if language else "images of noise"
        try:
            with fresh_positions(model):
                self._whole = self._run(inputs)
                self._cached = self._decode() if language else self._whole
        except (LookupError, TypeError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            what = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(f"{type(model).__name__} itself cannot read {asked}: {what}") from error
        if self._whole.isnan().any():
            raise ValueError(
                f"{type(model).__name__} itself answers NaN to {asked}: its weights are damaged or overflow in this "
                "precision"
            )
        if bool((self._whole == self._whole.flatten()[0]).all()):
            raise ValueError(
                f"{type(model).__name__} itself answers {asked} with one and the same number, so that there is nothing "
                "to learn from it: its weights are damaged, or were never written (all zero)"
            )

    def compare(self, student: Student) -> None:
        """Compare a student's outputs with the frozen model's; ValueError if they differ.

        Bit for bit: the student as its teacher, and with all gates open in mode `mask` (within rounding if closed
        tokens drop their keys, because attention then gets another mask, and on GPUs, where libraries choose kernels by
        how a tensor lies in memory). Within rounding: mode `skip`, and decoding from the student's own cache.
        """
        run, before = student.runtime, student.runtime.execution
        drops = any(router.kv == "drop" for router in student.spec.routers)
        try:
            with fresh_positions(self._model):
                with student.teacher():
                    self._compare("the student as its teacher", self._run(self._inputs), exact=True)
                run.execution = "mask"
                self._compare("the student with all gates open", self._run(self._inputs), exact=not drops)
                if before == "mask":
                    return
                run.execution = "skip"
                self._compare("the student with all gates open, skipping", self._run(self._inputs))
                if self._language:
                    self._compare("decoding from the student's own cache", self._decode())
        except _Differs as difference:
            raise self._failure(str(difference)) from None
        except Exception as error:  # whatever a changed library raises in the middle of a forward pass
            raise self._failure(f"a forward pass ends in {type(error).__name__}: {error}") from error
        finally:
            run.execution = before
            student.forget_layouts()

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self._inputs.device.type, enabled=False):  # under which students refuse to skip
            return self._reads(*args, **kwargs)

    @torch.no_grad()
    def _run(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        """Return the model's first output: logits, or hidden states or features if it has none."""
        if self._language:
            kwargs.setdefault("use_cache", False)
        out = self._call(inputs, **kwargs)
        return out if isinstance(out, Tensor) else next(iter(out.values()))

    @torch.no_grad()
    def _decode(self) -> Tensor:
        """Return the output [1, 1, V] for the last token, decoded from a cache of the tokens before it."""
        before = self._call(self._inputs[:, :-1], use_cache=True)
        return self._run(self._inputs[:, -1:], **with_cache(self._model, {"use_cache": True}, cache_of(before)))

    def _compare(self, what: str, out: Tensor, exact: bool = False) -> None:
        """Raise _Differs if `out` is not the frozen model's output, bit for bit (exact) or within rounding, which is
        judged by the spread of the output and by how much the frozen model's own cached decoding differs."""
        whole = self._whole[:, -1:] if out.shape[1:2] == (1,) and self._language else self._whole
        if out.shape != whole.shape:
            raise _Differs(f"{what} gives {list(out.shape)} instead of {list(whole.shape)}")
        exact = exact and not devices.runs_ahead(out.device)
        if exact and torch.equal(out, whole):
            return
        apart = float((out.float() - whole.float()).abs().max())
        rounding = 1e-3 if whole.dtype == torch.float32 else 0.25  # a wrong cache moves logits by about their spread
        own = float((self._cached.float() - self._whole[:, -1:].float()).abs().max()) if self._language else 0.0
        if exact or not apart <= max(4 * own, rounding * float(whole.float().std())):
            raise _Differs(f"{what} differs from the frozen model by {apart:.3g}")

    def _failure(self, what: str) -> ValueError:
        """Return the error that names what differs and the versions of libraries."""
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
        outside = untested()
        known = f" (not tested with this {', '.join(outside)})" if outside else ""
        return ValueError(
            f"{type(self._model).__name__} cannot be routed with {versions}{known}: {what}. Install "
            f"versions that elastic-distill asks for, or set {SWITCH}=off to go on all the same"
        )


class _Differs(Exception):
    """Raised where an output differs from the frozen model's; the message says by how much."""


def some_tokens(model: PreTrainedModel) -> Tensor:
    """Return random token ids [1, TOKENS] of a language model, none of which is the placeholder of an image."""
    embeddings, draw = model.get_input_embeddings().get_parameter("weight"), torch.Generator().manual_seed(0)
    ids = torch.randint(len(embeddings), (1, TOKENS), generator=draw)
    return ids.masked_fill(ids == getattr(model.config, "image_token_id", -1), 0).to(model.device)
