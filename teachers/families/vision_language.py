"""Load vision-language models, and turn images and questions into what they read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers import hub
from teachers.families.image import unpack
from teachers.quiet import first_line

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

LANGUAGE = "language_model"
"""In config.json of a model that comes with Elastic: the name of the model that its language part is."""
IMAGE_TOKEN = "<file_sep>"
"""What stands for an image token in those models: a token that SmolLM2 has and prose has not."""
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    + IMAGE_TOKEN
    + "{% else %}\n{{ 'Q: ' if message['role'] == 'user' else 'A: ' }}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}\nA:{% endif %}"
)
"""Shorter than SmolLM2's own: an answer is learned sooner where it is nearer to the question."""


def load(
    name: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The vision-language model in `folder` and its processor; ValueError of one line where something is wrong."""
    import transformers

    if not hub.weight_files(folder):
        raise ValueError(f"{name} has no safetensors weights (model.safetensors); pickled weights are not loaded")
    model = hub.read_model(name, folder, transformers.AutoModelForImageTextToText, dtype, trust_remote_code)
    try:
        processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ValueError(f"{name}: processor cannot be loaded: {first_line(error)}") from error
    return model, processor


def language_of(folder: Path) -> str | None:
    """The name of the language model that a vision tower and projector in `folder` were made for, or None."""
    return json.loads((folder / "config.json").read_text("utf-8")).get(LANGUAGE)


def compose(
    folder: Path, language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A LLaVA (arXiv 2304.08485) of a language model, taken over as it is, and the tower and projector in `folder`."""
    from safetensors.torch import load_file

    dtype = next(language.parameters()).dtype
    model = assemble(json.loads((folder / "config.json").read_text("utf-8")), language, tokenizer)
    model.load_state_dict(unpack(load_file(folder / "model.safetensors")), strict=False)
    return model.to(dtype), processor_for(model, tokenizer)


def assemble(
    settings: dict[str, Any], language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """As `compose`, with a tower and projector that are yet to be trained; settings: those of LlavaConfig, without a
    text part."""
    import torch
    from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    settings = {key: value for key, value in settings.items() if key not in (LANGUAGE, "model_type")}
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(text_config=language.config.to_dict(), image_token_index=image, **settings)
    config.tie_word_embeddings = language.config.tie_word_embeddings
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    tower = AutoModel.from_config(config.vision_config, attn_implementation="sdpa")
    model.model.vision_tower, model.model.multi_modal_projector = tower, LlavaMultiModalProjector(config)
    model.model.language_model, model.lm_head = language.base_model, language.lm_head
    model.generation_config = language.generation_config
    return model.eval()


def processor_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The processor of a model that `assemble` made: images to 64 x 64 or whatever its size is, values in -1 ... 1."""
    from transformers import LlavaProcessor, SiglipImageProcessor

    vision = model.config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    images = SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


@dataclass(frozen=True)
class Prompts:
    """Questions about images, each with its answer, as a model reads them."""

    inputs: dict[str, torch.Tensor]
    """What the model is called with: input_ids [B, T] and all the rest."""
    answers: torch.Tensor
    """[B, T] bool: tokens after which the model has to say the next token of the answer, or its end."""
    prompt: torch.Tensor
    """[B, T] bool: tokens of image and question."""
    image: torch.Tensor
    """[B, T] bool: image tokens."""

    def __len__(self) -> int:
        return len(self.image)

    def to(self, device: torch.device) -> Prompts:
        """The same on another device."""
        inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}
        return Prompts(
            inputs, *(mask.to(device, non_blocking=True) for mask in (self.answers, self.prompt, self.image))
        )


def encode(processor: Any, samples: Sequence[tuple[Image, str, str]], image_token: int) -> Prompts:
    """Prompts of (image, question, answer), padded at the right. image_token: the number of the model's image token.

    Raises what the processor raises, and ValueError for an answer without a token.
    """
    tokenizer = processor.tokenizer
    prompts = [prompt_text(processor, question) for _, question, _ in samples]
    texts = [
        prompt + answer_text(prompt, answer) + (tokenizer.eos_token or "")
        for prompt, (_, _, answer) in zip(prompts, samples, strict=True)
    ]
    inputs = call(processor, texts, [image for image, _, _ in samples], "right")
    # how many tokens the answer is, whatever number of tokens the processor makes of an image
    counts = [len(token_ids(tokenizer, text)) for text in texts]
    before = [len(token_ids(tokenizer, prompt)) for prompt in prompts]
    answers = [one - other for one, other in zip(counts, before, strict=True)]
    if min(answers) < 1:
        raise ValueError("an answer has no token, and the model has none for the end")
    return masked(inputs, answers, image_token)


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text, with the tokenizer's own around it, but for those that the text brings itself."""
    return tokenizer(text, add_special_tokens=_needs_special_tokens(tokenizer, text)).input_ids


def _needs_special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether a text does not begin with BOS, as some chat templates make it."""
    return tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)


def masked(inputs: dict[str, torch.Tensor], answers: Sequence[int], image_token: int) -> Prompts:
    """Prompts of inputs padded at the right, whose last `answers` tokens [B] are the answer's."""
    import torch

    valid = inputs["attention_mask"].bool()
    length = valid.sum(1, keepdim=True)
    first = length - torch.tensor(answers).unsqueeze(1)
    place = torch.arange(valid.shape[1]).expand(valid.shape)
    if "token_type_ids" in inputs:  # PaliGemma: text of type 0 is seen from everywhere in front of the answer
        inputs = {**inputs, "token_type_ids": ((place >= first) & valid).to(inputs["token_type_ids"].dtype)}
    saying = (place >= first - 1) & (place < length - 1)
    return Prompts(inputs, saying, (place < first) & valid, inputs["input_ids"] == image_token)


def call(processor: Any, texts: Sequence[str], images: Sequence[Image], side: str) -> dict[str, torch.Tensor]:
    """The processor's tensors for texts with one image each, padded at this side."""
    tokenizer, pictures = processor.tokenizer, [[image] for image in images]
    whole = not all(_needs_special_tokens(tokenizer, text) for text in texts)
    options = {"add_special_tokens": False} if whole else {}
    before, tokenizer.padding_side = tokenizer.padding_side, side
    try:
        made = processor(text=list(texts), images=pictures, padding=True, return_tensors="pt", **options)
    finally:
        tokenizer.padding_side = before
    return dict(made)


def prompt_text(processor: Any, question: str) -> str:
    """What comes in front of the answer, with a place for the image: the model's chat format, where it has one."""
    if processor.chat_template:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return f"{getattr(processor, 'image_token', '<image>')}{question}\n"


def answer_text(prompt: str, answer: str) -> str:
    """The answer as it follows the prompt."""
    return answer if prompt[-1:].isspace() else f" {answer}"
