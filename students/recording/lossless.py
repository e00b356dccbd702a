"""Lossless decoding: the student drafts tokens, and the frozen model, all gates open, verifies them.

In each round the student decodes up to DRAFTED tokens; then one pass of the dense model over the last token and the
drafts says what the dense model puts behind each of them. Drafts are kept by speculative sampling (arXiv 2211.17192):
tokens that are sampled have the dense model's distribution, and greedy text is the dense model's. Student and dense
model share the weights and one cache: the dense pass writes its keys and values over those of the drafts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from students.kernels.capture import Recorder, Recordings, recorder_for
from students.kernels.replay import Replay
from students.recording.decoding import Decoding, drawn, scored
from students.recording.step import DecodeStep

DRAFTED = 4
"""Maximum number of drafts that one dense pass verifies."""
SURE = 0.4
"""A draft to which the student gives a lower probability is the last one of its round."""


@dataclass
class Counts:
    """What one call of `generate` took."""

    tokens: int = 0
    """New tokens, without the first one, which the prompt's pass gives."""
    rounds: int = 0
    """Dense passes, each over DRAFTED + 1 tokens."""
    drafts: int = 0
    """Decode steps of the student."""

    def compute(self, student: float) -> float:
        """Return FLOPs over those of the dense model that decodes the same tokens; student: those of a step of the
        student. More than 1: dense passes over several tokens at once are fast for what they compute."""
        return (self.drafts * student + self.rounds * (DRAFTED + 1)) / max(1, self.tokens)


class Lossless(Decoding):
    """Decoding whose tokens the student drafts; `dense` is a context in which the model computes with all gates open,
    other arguments are those of Decoding."""

    def __init__(
        self,
        model: PreTrainedModel,
        trunk: nn.Module,
        state: Callable[[int], Any],
        settle: Callable[[int, torch.device], None],
        dense: Callable[[], AbstractContextManager[Any]],
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(model, trunk, state, settle, recorder)
        self.counts = Counts()
        """Counts of the last call."""
        self._dense = dense
        self._passes = Recordings[DecodeStep]("lossless decoding without recorded passes")

    def __deepcopy__(self, memo: dict[int, Any]) -> Lossless:
        model, trunk = copy.deepcopy(self.model, memo), copy.deepcopy(self.trunk, memo)
        state, settle = copy.deepcopy(self._state, memo), copy.deepcopy(self._settle, memo)
        return Lossless(model, trunk, state, settle, copy.deepcopy(self._dense, memo), self.recorder)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's `generate`. ValueError where nothing can be drafted."""
        try:
            if self._prompts is not None:
                raise ValueError(f"{type(self.model).__name__} reads images")
            if self.hybrid:
                raise ValueError(
                    f"{type(self.model).__name__} has blocks with a state, which cannot be taken back to before a "
                    "draft that is refused"
                )
            if not self._possible(args, kwargs):
                raise ValueError(
                    "it takes greedy search or sampling in transformers' own loop, no hooks, and on CPUs a C compiler"
                )
        except ValueError as reason:
            raise ValueError(f"lossless decoding is not possible: {reason}") from None
        return self._through_steps(args, kwargs)

    def _decode(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        words_to: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """The decoding loop; arguments as in Decoding. ValueError for more than one sequence."""
        if len(input_ids) != 1:
            raise ValueError(f"lossless decoding takes one sequence at a time, not {len(input_ids)}")
        config, prompt, self.counts = generation_config, input_ids.shape[1], Counts()
        kept: dict[str, list[Tensor]] = {"scores": [], "logits": []}
        with self._dense():
            read = self._read(input_ids, config, model_kwargs)
        rows = read.logits.unsqueeze(1)
        drafts: list[Tensor] = []
        guesses: list[Tensor] = []
        step = replay = None
        while True:
            for n, logits in enumerate(rows.unbind(1)[: len(drafts) + 1]):
                scores = scored(input_ids, logits, logits_processor, config, kept)
                if n < len(drafts):
                    agreed, token = verified(drafts[n], guesses[n], scores, config.do_sample)
                else:
                    agreed, token = False, drawn(scores, config.do_sample)
                input_ids = torch.cat([input_ids, token.unsqueeze(1)], 1)
                if words_to is not None:
                    words_to.put(token.cpu())
                ended = bool(stopping_criteria(input_ids, tuple(kept["scores"]) or None))
                if ended or not agreed:
                    break
            self.counts.tokens = input_ids.shape[1] - prompt - 1
            if ended:
                break
            if step is None or replay is None:
                new = 1 if self.replays else config.max_length - prompt
                step, replay = self._begin(read, model_kwargs.get("attention_mask"), new)
            step, replay, dense, verify = self._at(step, replay, read.used + self.counts.tokens)
            most = min(DRAFTED, config.max_length - input_ids.shape[1] - 1)
            drafts, guesses = self._draft(step, replay, input_ids, logits_processor, most, config.do_sample)
            ids = torch.cat([input_ids[0, -1:], *drafts])
            dense.ids.fill_(0)[0, : len(ids)] = ids
            dense.positions.clamp_(max=config.max_length - 1)  # those behind the drafts count for nothing
            rows = verify()
            self.counts.rounds, self.counts.drafts = self.counts.rounds + 1, self.counts.drafts + len(drafts)
        return self._returned(input_ids, prompt, config, kept, read, step, words_to)

    def _draft(
        self, step: DecodeStep, replay: Callable[[], Tensor], ids: Tensor, processor: Any, most: int, sample: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return up to `most` tokens [1] that the student puts behind ids [1, T], and its scores [1, V] of each."""
        drafts: list[Tensor] = []
        guesses: list[Tensor] = []
        while len(drafts) < most and not (guesses and float(guesses[-1].softmax(-1).max()) < SURE):
            step.advance(ids[:, -1])
            guesses.append(processor(ids, replay().to(ids.device, copy=True)))
            drafts.append(drawn(guesses[-1], sample))
            ids = torch.cat([ids, drafts[-1].unsqueeze(1)], 1)
        return drafts, guesses

    def _at(
        self, step: DecodeStep, replay: Callable[[], Tensor], used: int
    ) -> tuple[DecodeStep, Callable[[], Tensor], DecodeStep, Callable[[], Tensor]]:
        """Return the student's step and its replay, and the dense step on the same cache and its replay, all behind the
        first `used` slots, after growing the cache if it is too short for another round."""
        step.go_to(used)
        while used + DRAFTED + 1 > step.length:
            step, replay = self._grow(step)
        like, slots = step.cache, step.length

        def make() -> tuple[DecodeStep, Callable[[], Tensor]]:
            dense = DecodeStep(self.model, self.trunk, like, slots, DRAFTED + 1, beside=step)
            dense.go_to(used)  # recording runs it, and writes keys
            return dense, partial(self._run, dense)

        record = self.recorder or recorder_for(step.ids.device) or Replay
        dense, verify = self._passes.take(step, record, make)
        dense.go_to(used)
        return step, replay, dense, verify or partial(self._run, dense)

    def _run(self, dense: DecodeStep) -> Tensor:
        with self._dense():
            return dense.run()


def verified(draft: Tensor, guess: Tensor, scores: Tensor, sample: bool) -> tuple[bool, Tensor]:
    """Return whether a draft [1] stands, and the token [1] at its place. guess, scores [1, V]: the student's scores,
    from which the draft was drawn, and the dense model's. The token has the distribution of one drawn from the dense
    scores: a draft x stands with probability min(1, p(x) / q(x)), else a token is drawn from max(p - q, 0)."""
    if not sample:
        best = scores.argmax(-1)
        return bool(best == draft), best
    p, q = scores.softmax(-1), guess.softmax(-1)
    if bool(torch.rand((), device=p.device) * q[0, draft] < p[0, draft]):
        return True, draft
    rest = (p - q).clamp(min=0)
    return False, torch.multinomial(rest if bool(rest.any()) else p, 1).squeeze(1)  # none is left but for rounding
