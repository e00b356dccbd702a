"""Whether a new student is its teacher, and decodes as it reads, with the libraries that are installed.

Models change from release to release of transformers and timm, and what changes inside them rarely raises an error. So
a student is tried on a few tokens or images before anybody relies on it: at an architecture's first use in a process,
and always where a library is of a version that the project's tests have not seen (see `untested`).
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

from students.libraries import broken_assumptions, cache_of, fresh_positions, with_cache
from students.spec import StudentSpec
from students.student import Student

SWITCH = "ELASTIC_SELF_CHECK"
"""Environment variable; "off" switches the check off."""

LIBRARIES = ("torch", "transformers", "timm")
"""Whose insides a student depends on."""

TOKENS = 6
"""Length of the sequence that is tried; the last token is decoded from a cache of the others."""

_seen: set[tuple[Any, ...]] = set()


def untested() -> list[str]:
    """Libraries of a version outside the range that pyproject.toml allows, which is the range that is tested.

    A checkout that is not installed says nothing of versions: all of them count as untested there.
    """
    try:
        required = [Requirement(line) for line in metadata.requires("elastic-distill") or ()]
    except metadata.PackageNotFoundError:
        return list(LIBRARIES)
    ranges = {each.name: each.specifier for each in required if each.marker is None}
    return [name for name in LIBRARIES if not ranges[name].contains(metadata.version(name), prereleases=True)]


def must_check(model: nn.Module, spec: StudentSpec) -> bool:
    """Whether a student of this model is to be tried now."""
    parameter = next(model.parameters())
    if os.environ.get(SWITCH, "").lower() == "off" or parameter.is_meta:
        return False
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    kinds = frozenset((router.kind, router.kv, router.part) for router in spec.routers)
    use = type(model), attention, parameter.dtype, parameter.device.type, kinds
    new = use not in _seen
    _seen.add(use)
    return new or bool(untested())


class SelfCheck:
    """What a frozen model answers to a few inputs, before routers are added, to compare a student's answers with.

    run: calls the model. inputs: token ids [1, TOKENS] or images [2, C, H, W]. language: whether there is a cache.
    ValueError, in one line, where the frozen model or the student answers otherwise than it should.
    """

    def __init__(self, model: nn.Module, run: Callable[..., Any], inputs: Tensor, language: bool) -> None:
        self._model, self._call, self._inputs, self._language = model, run, inputs, language
        with fresh_positions(model):
            self._whole = self._run(inputs)
            self._cached = self._decode() if language else self._whole
        asked = "a few tokens" if language else "images of noise"
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
        """Bit for bit: the teacher, and the student with all gates open, as masks (but where keys are dropped, since
        attention gets another mask then). Within rounding: skip execution, and decoding from the student's cache."""
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

    @torch.no_grad()
    def _run(self, inputs: Tensor, **kwargs: Any) -> Tensor:
        if self._language:
            kwargs.setdefault("use_cache", False)
        out = self._call(inputs, **kwargs)
        return out if isinstance(out, Tensor) else next(iter(out.values()))

    @torch.no_grad()
    def _decode(self) -> Tensor:
        """Output [1, 1, V] of the last token, from a cache of those before it."""
        before = self._call(self._inputs[:, :-1], use_cache=True)
        return self._run(self._inputs[:, -1:], **with_cache(self._model, {"use_cache": True}, cache_of(before)))

    def _compare(self, what: str, out: Tensor, exact: bool = False) -> None:
        whole = self._whole[:, -1:] if out.shape[1:2] == (1,) and self._language else self._whole
        if out.shape != whole.shape:
            raise _Differs(f"{what} gives {list(out.shape)} instead of {list(whole.shape)}")
        if exact and torch.equal(out, whole):
            return
        apart = float((out.float() - whole.float()).abs().max())
        rounding = 1e-3 if whole.dtype == torch.float32 else 0.25  # another past moves logits by about their spread
        own = float((self._cached.float() - self._whole[:, -1:].float()).abs().max()) if self._language else 0.0
        if exact or not apart <= max(4 * own, rounding * float(whole.float().std())):
            raise _Differs(f"{what} differs from the frozen model by {apart:.3g}")

    def _failure(self, what: str) -> ValueError:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in LIBRARIES)
        outside = untested()
        known = f" (not tested with this {', '.join(outside)})" if outside else ""
        reasons = "; ".join(broken_assumptions()) or "every assumption listed in students/libraries.py holds"
        return ValueError(
            f"{type(self._model).__name__} cannot be routed with {versions}{known}: {what}. {reasons}. Install "
            f"versions that elastic-distill asks for, or set {SWITCH}=off to go on all the same"
        )


class _Differs(Exception):
    """A comparison that failed."""


def some_tokens(model: PreTrainedModel) -> Tensor:
    """Token ids [1, TOKENS] of a language model, drawn for the purpose; none of them stands for an image."""
    embeddings, draw = model.get_input_embeddings().get_parameter("weight"), torch.Generator().manual_seed(0)
    ids = torch.randint(len(embeddings), (1, TOKENS), generator=draw)
    return ids.masked_fill(ids == getattr(model.config, "image_token_id", -1), 0).to(model.device)
