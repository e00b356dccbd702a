"""Facts about each family of models that are needed before its module, and torch or transformers, are imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from teachers.data.kinds import IMAGES, QUESTIONS, TEXT, Kinds


@dataclass(frozen=True)
class Traits:
    """Facts about one family that configurations and the command line need."""

    module: str
    """The family's module in elastic/families."""
    noun: str
    """What messages call a model of this family, with its article."""
    settings: tuple[str, ...]
    """Settings, as "section.key", that have an effect in this family but not in every family."""
    kinds: Kinds
    """The files and folders that are data for this family."""
    decodes: bool = False
    """Whether a budget can limit the compute of decoding; if not, it always limits that of prefill."""
    section: str | None = None
    """The section of a preset or configuration file for this family, used in either phase."""
    data: str | None = None
    """The kinds of data that the user must choose from, for an error message; None: there is a default."""
    starts_at: str | None = None
    """The place of the only routers that calibration starts (Kind.place); None: it starts those of every place."""
    one_word: bool = False
    """Whether a hub data set may be named without its owner, such as imagenet-1k."""
    tasks: bool = False
    """Whether models can be measured on multiple-choice tasks (`elastic eval --tasks`)."""


_IMAGES = "images: --data FOLDER (train/ and val/ with class sub-folders), or fashion-mnist"
_QUESTIONS = "questions about images: --data FILE (image, question, answer in JSON lines or parquet), or easy-vqa"

TRAITS: Mapping[str, Traits] = MappingProxyType(
    {
        "llm": Traits(
            "elastic.families.language",
            "a model of text alone",
            ("data.window", "data.max_tokens", "train.window", "loss.cross_entropy_weight", "loss.hidden_layers"),
            TEXT,
            decodes=True,
            tasks=True,
        ),
        "vit": Traits(
            "elastic.families.image",
            "an image model",
            ("data.max_images", "data.classes", "loss.hidden_layers"),
            IMAGES,
            section="vit",
            data=_IMAGES,
            one_word=True,
        ),
        "vlm": Traits(
            "elastic.families.vision_language",
            "a vision-language model",
            ("data.max_images",),
            QUESTIONS,
            section="vlm",
            starts_at="input",
            data=_QUESTIONS,
        ),
    }
)
"""The traits of each family, by its name in configurations and in configs/models.yaml."""

SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        name: " or ".join(other.noun for other in TRAITS.values() if name in other.settings)
        for traits in TRAITS.values()
        for name in traits.settings
    }
)
"""The settings that have an effect in some families only, and the kinds of models that each needs."""
