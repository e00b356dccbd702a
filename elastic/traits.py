"""What has to be known of each family of models before its module, and the libraries behind it, are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Traits:
    """What configurations and command lines have to know of a family."""

    module: str
    noun: str
    """What its models are called in a message."""
    settings: tuple[str, ...]
    """Settings that have no effect on every family, and have one on this."""
    decodes: bool = False
    """Whether a budget can speak of decoding; if not, it is always one of prefill."""
    section: str | None = None
    """The section of a configuration file that holds for it, whatever the phase."""
    data: str | None = None
    """What has to be named as data, for the user to read; None: there is data that needs no name."""
    one_word: bool = False
    """Whether a hub data set may be named without its owner."""
    tasks: bool = False
    """Whether it can be asked multiple-choice tasks of text."""


_IMAGES = "images: --data FOLDER (train/ and val/ with class sub-folders), or fashion-mnist"
_QUESTIONS = "questions about images: --data FILE (image, question, answer in JSON lines or parquet), or easy-vqa"

TRAITS: Mapping[str, Traits] = MappingProxyType(
    {
        "llm": Traits(
            "elastic.families.language",
            "a language model",
            ("data.window", "data.max_tokens", "train.window", "loss.cross_entropy_weight"),
            decodes=True,
            tasks=True,
        ),
        "vit": Traits(
            "elastic.families.image",
            "an image model",
            ("data.max_images", "data.classes"),
            section="vit",
            data=_IMAGES,
            one_word=True,
        ),
        "vlm": Traits(
            "elastic.families.vision_language",
            "a vision-language model",
            ("data.max_images",),
            section="vlm",
            data=_QUESTIONS,
        ),
    }
)
"""Of each family, by the name that configurations and tables of models have for it."""
