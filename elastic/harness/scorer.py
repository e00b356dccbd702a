"""A student as a language model of the harness, which requests the log-probability of a continuation given a
context."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor

from elastic import launch
from elastic.data_parallel import scatter
from elastic.reporting.progress import Watched
from losses import default_chunk_rows
from students.compute import PHASES
from students.families.language import LanguageStudent
from teachers.families.language import require_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_TOKENS = 2048
"""Tokens per batch of texts that are scored together."""
LONGEST = 2048
"""Maximum length of a text in tokens for models whose configuration has no `max_position_embeddings`."""
Request = tuple[tuple[str, str], list[int], list[int]]
"""A request of the harness: ((context, continuation) as text, tokens of the context, tokens of the continuation)."""


class Scorer(TemplateLM):
    """A student as a language model of the harness; all processes receive the same requests and share the work.

    Batches contain texts of equal length, so that no routing decision can depend on padding. Routers that decide per
    sequence decide from the context alone. The LM head runs only at positions whose next token is scored.
    """

    backend = "causal"

    def __init__(self, student: LanguageStudent, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.student = student
        self.tokenizer = tokenizer
        config = student.model.config.get_text_config()
        self.longest = getattr(config, "max_position_embeddings", None) or LONGEST
        self.spent = dict.fromkeys(PHASES, 0.0)
        """The student's multiply-accumulates for all texts that this process has scored so far, by phase."""
        self.dense = dict.fromkeys(PHASES, 0.0)
        """The teacher's multiply-accumulates for the same texts, by phase."""

    @property
    def eot_token_id(self) -> int:
        """Token id of the end of a text, used as the context of a request without one if there is no BOS token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token id that serves as context for a request without one: BOS, or the end of a text if there is no BOS."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Return the token ids of a text, with the tokenizer's special tokens unless `add_special_tokens` is False."""
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def _loglikelihood_tokens(self, requests: list[Request], **options: Any) -> list[tuple[float, bool]]:
        """Return, for each request, (log-probability of the continuation, whether greedy decoding would give it).

        ValueError if a continuation has no tokens, or too many for the model.
        """
        numbers: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (texts, context, continuation) in enumerate(requests):
            if not continuation:
                raise ValueError(
                    f"nothing can be scored of {texts[1][:40]!r}: it has no token of its own in this place"
                )
            read = tuple((context + continuation)[-self.longest - 1 : -1])
            given = len(read) + 1 - len(continuation)
            if given < 1:
                raise ValueError(f"a choice has {len(continuation)} tokens, too many for this model: {texts[1][:40]!r}")
            # choices that differ only in their last token, which the model does not read, share one text
            numbers.setdefault((read, given), []).append(number)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        batches = []
        for length, same in groupby(sorted(numbers, key=lambda text: -len(text[0])), lambda text: len(text[0])):
            group, size = list(same), max(1, BATCH_TOKENS // length)
            batches += [group[first : first + size] for first in range(0, len(group), size)]
        tokens = [token for read, _ in numbers for token in read]
        require_rows(self.student.model, self.tokenizer, torch.tensor(tokens))  # for all batches: all processes raise
        own, shard = scatter(batches)
        found: list[tuple[int, tuple[float, bool]]] = []
        for batch, info in shard.enumerate(Watched("scoring", own)):
            continuations = [[requests[number][2] for number in numbers[text]] for text in batch]
            before = self.spent.copy(), self.dense.copy()
            scored = zip(batch, self._score(batch, continuations), strict=True)
            each = [pair for text, scores in scored for pair in zip(numbers[text], scores, strict=True)]
            if info.counts:
                found += each
            else:
                self.spent, self.dense = before
        for number, score in chain.from_iterable(launch.gather(found)):
            answers[number] = score
        return answers

    @torch.no_grad()
    def _score(
        self, batch: list[tuple[tuple[int, ...], int]], continuations: list[list[list[int]]]
    ) -> Iterator[list[tuple[float, bool]]]:
        """Yield, for each text (tokens, number of context tokens) of a batch of one length, the (log-probability,
        greedy) pairs of its continuations."""
        student = self.student
        device = student.model.device
        ids = torch.tensor([read for read, _ in batch], device=device)
        given = torch.tensor([given for _, given in batch], device=device)[:, None]
        places = torch.arange(ids.shape[1], device=device)
        out, decisions = student.features(ids, prompt=places < given)
        rows = out.last_hidden_state[places >= given - 1]
        # column k holds the k-th continuation of each text, row by row; texts with fewer repeat their first
        most = max(map(len, continuations))
        columns = [[choices[k] if k < len(choices) else choices[0] for choices in continuations] for k in range(most)]
        targets = torch.tensor([[t for choice in column for t in choice] for column in columns], device=device).T
        tensors = student.head_tensors()
        size = default_chunk_rows(student.model.config.get_text_config().vocab_size, rows.dtype, device)
        scores, hits, shares = [], [], []
        for part, target in zip(rows.split(size), targets.split(size), strict=True):
            logits, share = student.logits(part, *tensors)
            logits = logits.float()
            scores.append(logits.gather(1, target) - logits.logsumexp(1, keepdim=True))
            hits.append(logits.argmax(1, keepdim=True) == target)
            if share is not None:
                shares.append(share)
        self._count(ids, decisions, torch.cat(shares).mean() if shares else None)
        lengths = [len(choices[0]) for choices in continuations]
        for choices, score, hit in zip(
            continuations, torch.cat(scores).split(lengths), torch.cat(hits).split(lengths), strict=True
        ):
            found = zip(score.sum(0).tolist(), hit.all(0).tolist(), strict=True)
            yield [answer for answer, _ in zip(found, choices, strict=False)]

    def _count(self, ids: Tensor, decisions: Any, share: Tensor | None) -> None:
        """Add the compute of texts ids [B, T] to `spent` and `dense`; the LM head's compute is that at the scored
        positions, extrapolated to all tokens. share: mean share of exact LM-head rows; None without a vocab router."""
        compute = self.student.compute
        valid = torch.ones_like(ids, dtype=torch.bool)
        for phase in PHASES:
            head = float(compute.routed_head(share, phase)) * ids.numel()
            self.spent[phase] += float(compute.routed_blocks(decisions, valid, phase).sum()) + head
            self.dense[phase] += float(compute.dense(valid, phase).sum())

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Raise NotImplementedError: multiple-choice tasks do not use this method."""
        raise NotImplementedError

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Raise NotImplementedError: multiple-choice tasks do not use this method."""
        raise NotImplementedError
