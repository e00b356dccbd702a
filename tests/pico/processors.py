"""Processors for the tiny vision-language models, to be saved beside their weights."""

from __future__ import annotations

import transformers

from teachers.families.vision_language import IMAGE_TOKEN as MARK
from tests.pico.language import make_tokenizer
from tests.pico.vision_language import GRIDS, HYBRID, IMAGE_TOKEN

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
_SIZE = {"height": 16, "width": 16}
_QWEN = dict(patch_size=4, merge_size=2, temporal_patch_size=2)
_TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE {% else %}{{ p['text'] }}"
    "{% endif %}{% endfor %}{% endfor %} w1 "
)
_THOUGHT = "{% if enable_thinking is false %}w60 w61 {% else %}w60 {% endif %}"
"""End of a prompt in which a thought begins, unless it is ended at once (Qwen3.5)."""


def make_question_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of 90 words, COLORS' names and the special tokens of the shipped vision-language model."""
    tokenizer = make_tokenizer(words=90)
    tokenizer.add_tokens(list(COLORS))
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK, "<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    return tokenizer


def _of_characters() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of the class that transformers takes for Qwen3.5, whose tokens are characters."""
    characters = [*map(chr, range(33, 127)), "\u0120", "\u010a"]  # the last two: a space and a newline
    vocabulary = {token: number for number, token in enumerate(["<unk>", "</s>", "<s>", *characters])}
    special = dict(unk_token="<unk>", eos_token="</s>", bos_token="<s>", pad_token="</s>")
    return transformers.Qwen3_5Tokenizer(vocab=vocabulary, merges=[], **special)


def make_processor(kind: str) -> transformers.ProcessorMixin:
    """Return a model class's processor, whose tokenizer has 64 words and an image token with the id IMAGE_TOKEN."""
    qwen = kind in GRIDS
    own = ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>"]
    others = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer = _of_characters() if kind in HYBRID else make_tokenizer(words=64)
    tokenizer.add_tokens([f"x{number}" for number in range(IMAGE_TOKEN - len(tokenizer))])
    tokenizer.add_special_tokens({"additional_special_tokens": own if qwen else others})
    tokenizer.pad_token = "</s>"
    mark = "<|vision_start|><|image_pad|><|vision_end|>" if qwen else "<image>"
    template = {"chat_template": _TEMPLATE.replace("IMAGE", mark) + _THOUGHT * (kind in HYBRID)}
    if kind == "llava":
        images = transformers.CLIPImageProcessor(size=_SIZE, crop_size=_SIZE)
        more = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
        return transformers.LlavaProcessor(images, tokenizer, image_token="<image>", **more, **template)
    if kind == "llava_next":
        images = transformers.LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size=_SIZE, image_grid_pinpoints=[[16, 16], [16, 32]]
        )
        more = dict(patch_size=4, vision_feature_select_strategy="full")
        return transformers.LlavaNextProcessor(images, tokenizer, image_token="<image>", **more, **template)
    if kind == "gemma3":
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend_tokenizer,
            **dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"),
            extra_special_tokens=dict(image_token="<image>", boi_token=others[1], eoi_token=others[2]),
        )
        images = transformers.Gemma3ImageProcessor(size=_SIZE)
        template = {"chat_template": _TEMPLATE.replace("IMAGE", others[1])}
        return transformers.Gemma3Processor(images, tokenizer, image_seq_length=4, **template)
    if kind.startswith("paligemma"):
        images = transformers.SiglipImageProcessor(size=_SIZE)
        images.image_seq_length = 16
        return transformers.PaliGemmaProcessor(images, tokenizer)
    if kind in ("idefics3", "smolvlm"):
        one = dict(size={"longest_edge": 16}, max_image_size={"longest_edge": 16}, do_image_splitting=False)
        if kind == "idefics3":
            images = transformers.Idefics3ImageProcessor(**one)
            return transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, **template)
        images, videos = transformers.SmolVLMImageProcessor(**one), transformers.SmolVLMVideoProcessor(**one)
        return transformers.SmolVLMProcessor(images, tokenizer, videos, image_seq_len=4, **template)
    images = transformers.Qwen2VLImageProcessor(**_QWEN, min_pixels=64, max_pixels=1024)
    videos = transformers.Qwen2VLVideoProcessor(**_QWEN)
    name = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.get(kind, "Qwen3VL")
    return getattr(transformers, f"{name}Processor")(images, tokenizer, videos, **template)
