"""A frozen language model that answers questions about image tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from teachers.data.prompts import answer_text, prompt_text
from teachers.families.vision_language import IMAGE_TOKEN, processor_for
from teachers.recipes.easy_vqa import Pair

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reader:
    """A frozen language model that reads several questions about one image in one sequence, masked so that every
    question sees the image and no question sees another."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor_for(model, tokenizer)
        self.before: list[int] = self._ids("")[0]

    def _ids(self, question: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a prompt before its image, and those after its image."""
        front, _, behind = prompt_text(self.processor, question).partition(IMAGE_TOKEN)
        return self.tokenizer(front).input_ids, self.tokenizer(behind).input_ids

    def __call__(
        self, image: Tensor, questions: Sequence[Sequence[Pair]], kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [N, V] at the N positions that predict an answer's token, over all answers, and the ids [N]
        of these tokens.

        Args:
            image: image tokens [B, tokens, D].
            questions: for each of the B images, its questions with their answers.
            kept: bool [B, tokens], False for image tokens that are masked from all positions; None keeps all.
        """
        model, dtype = self.model, self.model.lm_head.weight.dtype
        start = len(self.before) + image.shape[1]
        ids, places, numbers, targets = (
            nn.utils.rnn.pad_sequence(list(part), batch_first=True, padding_value=filling)
            for part, filling in zip(
                zip(*(self._row(pairs, start) for pairs in questions), strict=True), (0, 0, -1, -100), strict=True
            )
        )
        embed, count = model.get_input_embeddings(), len(image)
        x = torch.cat([embed(torch.tensor(self.before)).expand(count, -1, -1), image.to(dtype), embed(ids)], 1)
        numbers = torch.cat([torch.zeros(count, start, dtype=torch.long), numbers], 1)
        visible = (numbers[:, :, None] == numbers[:, None, :]) | (numbers[:, None, :] == 0)
        if kept is not None:
            visible[:, :, len(self.before) : start] &= kept.unsqueeze(1)
        mask = (visible & torch.ones_like(visible[0]).tril()).unsqueeze(1)
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        positions = torch.cat([torch.arange(start).expand(count, -1), places], 1)
        out = model.model.language_model(
            inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        answers = targets >= 0
        return model.lm_head(out[:, start:][answers]).float(), targets[answers]

    def _row(self, pairs: Sequence[Pair], start: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return four tensors [T] for the questions about one image: token ids, positions (each question starts at
        `start`), the question's number (from 1), and the target id, -100 where no answer's token is predicted."""
        parts: tuple[list[int], list[int], list[int], list[int]] = [], [], [], []
        ids, places, numbers, targets = parts
        for number, (question, answer) in enumerate(pairs):
            _, prompt = self._ids(question)
            text = answer_text(prompt_text(self.processor, question), answer) + self.tokenizer.eos_token
            answer_ids = self.tokenizer(text).input_ids
            ids += prompt + answer_ids[:-1]
            places += range(start, start + len(prompt) + len(answer_ids) - 1)
            numbers += [number + 1] * (len(prompt) + len(answer_ids) - 1)
            targets += [-100] * (len(prompt) - 1) + answer_ids
        return torch.tensor(ids), torch.tensor(places), torch.tensor(numbers), torch.tensor(targets)
