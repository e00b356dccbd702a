"""Encode questions about images as a vision-language model's inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from teachers.data.questions import QuestionSet

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

Example = tuple[Any, str, str]
"""Image, question and answer."""


@dataclass(frozen=True)
class Prompts:
    """A batch of encoded questions about images, each followed by its answer."""

    inputs: dict[str, torch.Tensor]
    """Keyword arguments of the model: input_ids [B, T], pixel_values and whatever else its processor makes."""
    answers: torch.Tensor
    """Bool mask [B, T] of the positions from which the model predicts a token of the answer or its end."""
    prompt: torch.Tensor
    """Bool mask [B, T] of the tokens before the answer: image and question."""
    image: torch.Tensor
    """Bool mask [B, T] of the image tokens."""

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device, non_blocking: bool = True) -> Prompts:
        """Return these prompts on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Prompts:
        """Return these prompts in pinned memory, from which a GPU can copy while it computes."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, made: Callable[[torch.Tensor], torch.Tensor]) -> Prompts:
        inputs = {name: made(tensor) for name, tensor in self.inputs.items()}
        return Prompts(inputs, *(made(mask) for mask in (self.answers, self.prompt, self.image)))


def encode(processor: Any, samples: Sequence[Example], image_token: int) -> Prompts:
    """Return (image, question, answer) samples as prompts, padded on the right. image_token: the image token's id.

    Raises whatever the processor raises, and ValueError for an answer without a token, for text that holds an image
    token, which not every processor refuses (Gemma 3's), and for a processor whose image token is another one.
    """
    tokenizer = processor.tokenizer
    mark = tokenizer.convert_ids_to_tokens(image_token)
    if mark is not None and any(mark in question or mark in answer for _, question, answer in samples):
        raise ValueError(f"its question or answer holds {mark}, which stands for an image: take it out of the text")
    asked = [prompt_text(processor, question) for _, question, _ in samples]
    texts = [
        prompt + answer_text(prompt, answer) + (tokenizer.eos_token or "")
        for prompt, (_, _, answer) in zip(asked, samples, strict=True)
    ]
    inputs = call(processor, texts, [image for image, _, _ in samples], "right")
    # an answer's number of tokens as a difference, which does not depend on the processor's number of image tokens
    counts = [len(token_ids(tokenizer, text)) for text in texts]
    before = [len(token_ids(tokenizer, prompt)) for prompt in asked]
    answers = [one - other for one, other in zip(counts, before, strict=True)]
    if min(answers) < 1:
        raise ValueError("an answer has no token, and the model has none for the end")
    prompts = masked(inputs, answers, image_token)
    if not prompts.image.any(1).all():
        named = f"image_token_id in config.json is {image_token} ({mark or 'no token'})"
        raise ValueError(f"{named}, which the processor does not write for an image")
    return prompts


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the token ids of a text, with the tokenizer's special tokens unless the text already begins with BOS."""
    return tokenizer(text, add_special_tokens=_needs_special_tokens(tokenizer, text)).input_ids


def _needs_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Return whether a text lacks the leading BOS token that some chat templates write."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def masked(inputs: dict[str, torch.Tensor], answers: Sequence[int], image_token: int) -> Prompts:
    """Return prompts with their masks, from inputs padded on the right; answers: the length of each row's answer, which
    ends the row."""
    valid = inputs["attention_mask"].bool()
    length = valid.sum(1, keepdim=True)
    first = length - torch.tensor(answers).unsqueeze(1)
    place = torch.arange(valid.shape[1]).expand(valid.shape)
    image, types = inputs["input_ids"] == image_token, inputs.get("token_type_ids")
    if types is not None and not types[image].any():  # else they mark the images, as Gemma 3's do
        # PaliGemma: tokens of type 0 (the prompt) attend to each other in both directions
        inputs = {**inputs, "token_type_ids": ((place >= first) & valid).to(types.dtype)}
    saying = (place >= first - 1) & (place < length - 1)
    return Prompts(inputs, saying, (place < first) & valid, image)


def call(processor: Any, texts: Sequence[str], images: Sequence[Image], side: str) -> dict[str, torch.Tensor]:
    """Return the processor's tensors for texts with one image each, padded on the given side ("left" or "right")."""
    tokenizer, pictures = processor.tokenizer, [[image] for image in images]
    whole = not all(_needs_special_tokens(tokenizer, text) for text in texts)
    options = {"add_special_tokens": False} if whole else {}
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        made = processor(text=list(texts), images=pictures, padding=True, return_tensors="pt", **options)
    finally:
        tokenizer.padding_side = before
    return {name: tensor for name, tensor in made.items() if name != "labels"}  # PaliGemma's, for a loss of its own


def prompt_text(processor: Any, question: str) -> str:
    """Return the text before an answer, with a placeholder for the image, in the model's chat format if it has one."""
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        # questions are answered at once: a template that asks is not to begin a thought (Qwen3.5)
        switch = {"enable_thinking": False} if "enable_thinking" in str(processor.chat_template) else {}
        turns = [{"role": "user", "content": content}]
        return processor.apply_chat_template(turns, add_generation_prompt=True, **switch)
    return f"{getattr(processor, 'image_token', '<image>')}{question}\n"


def answer_text(prompt: str, answer: str) -> str:
    """Return the answer with a space in front, unless the prompt ends with white space."""
    return answer if prompt[-1:].isspace() else f" {answer}"


@dataclass(frozen=True)
class PromptSet:
    """Questions about images, and the processor that encodes them."""

    questions: QuestionSet
    processor: Any
    image_token: int
    rows: int
    """Number of rows of the model's token embedding; larger token ids are refused."""
    most: int | None = None
    """Number of tokens that the model has positions for, of which longer prompts are refused; None: any number."""

    def __len__(self) -> int:
        return len(self.questions)

    def load(self, chosen: Sequence[int]) -> Prompts:
        """Return the prompts of `len(chosen)` questions; other questions replace those that are left out."""
        return self.read(chosen)[0]

    def read(self, chosen: Sequence[int]) -> tuple[Prompts, list[Example]]:
        """Return the prompts that `load` returns, and the samples they were made of."""
        found = self._encoded(chosen, self.questions.filled)
        assert found is not None  # `filled` raises ValueError if no question can be read
        return found

    def read_readable(self, chosen: Sequence[int]) -> tuple[Prompts, list[Example]] | None:
        """Return prompts and samples of only the chosen questions that can be used; None if none can."""
        return self._encoded(chosen, self.questions.readable)

    def _encoded(
        self, chosen: Sequence[int], read: Callable[[Sequence[int]], list[tuple[int, Example]]]
    ) -> tuple[Prompts, list[Example]] | None:
        while found := read(chosen):
            samples = [sample for _, sample in found]
            try:
                return self._encode(samples), samples
            except Exception:  # a processor may refuse a single image or text with any exception
                if not self._leave_out(found):
                    raise
        return None

    def _encode(self, samples: Sequence[Example]) -> Prompts:
        prompts = encode(self.processor, samples, self.image_token)
        if int(prompts.inputs["input_ids"].max()) >= self.rows:
            raise ValueError(f"a token has no row in the model's embedding, which has {self.rows}")
        length = prompts.image.shape[1]
        if self.most is not None and length > self.most:
            raise ValueError(f"with its image it has {length} tokens, and the model reads at most {self.most}")
        return prompts

    def _leave_out(self, found: list[tuple[int, Example]]) -> bool:
        """Leave out the samples that cannot be encoded by themselves; return whether there are any."""
        some = False
        for number, sample in dict(found).items():
            try:
                self._encode([sample])
            except Exception as error:
                self.questions.leave_out(number, error)
                some = True
        return some

    def ask(self, chosen: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the model's inputs for generating the answers to these questions, padded on the left."""
        _, samples = self.read(chosen)
        texts = [prompt_text(self.processor, question) for _, question, _ in samples]
        return call(self.processor, texts, [image for image, _, _ in samples], "left")
