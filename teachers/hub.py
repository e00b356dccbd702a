"""Access to the Hugging Face hub and its cache, which fails within seconds where there is no network."""

import functools
import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from teachers.quantize import plain
from teachers.quiet import first_line, one_line, quiet
from teachers.wording import number_of

_PROBE_SECONDS = 3.0
"""How long the hub may take to answer a HEAD request before it counts as unreachable."""

_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja", "*.py"]
"""Files that a model needs besides its weights: config, tokenizer, chat template, and code for `trust_remote_code`."""


@functools.cache
def unreachable() -> str | None:
    """Return why the hub cannot be used, or None if it can; probed once per process, with one short request.

    The libraries' own retries would take half a minute per file, hence the separate probe.
    """
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    answers: list[str | None] = []

    def probe() -> None:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS).status_code
            answers.append(f"{constants.ENDPOINT} answers {status}" if status >= 500 else None)
        except Exception as error:  # whatever the HTTP library raises, the hub did not answer
            answers.append(f"{constants.ENDPOINT}: {first_line(error)}")

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 1)  # name resolution has no timeout of its own
    return answers[0] if answers else f"{constants.ENDPOINT}: no answer in {_PROBE_SECONDS:.0f} s"


@contextmanager
def offline() -> Iterator[None]:
    """Make `datasets` and `huggingface_hub` use their caches and send no request within the block."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def cached_model(repo: str) -> Path | None:
    """Return the model's folder in the hub's cache (`HF_HOME`) if the cache holds all its weights, else None."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    weights = weight_files(folder)
    return folder if weights and all((folder / name).is_file() for name in weights) else None


def config_file(repo: str) -> Path | None:
    """Return the path of a model's config.json, from the cache or downloaded; None if neither works."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(repo, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    if unreachable():
        return None
    try:
        return Path(hf_hub_download(repo, "config.json"))
    except Exception:  # loading the model will say what is wrong
        return None


def download_model(repo: str) -> Path:
    """Fetch a model's small files and safetensors weights into the hub's cache and return the folder.

    Raises a one-line OSError for a model that does not exist or is gated and for a download that fails; ValueError for
    a model without safetensors weights (pickled weights are never loaded).
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo, allow_patterns=[*_SMALL_FILES, "model.safetensors.index.json"]))
        # the index says which files to take: some repositories hold the weights twice
        sharded = (folder / "model.safetensors.index.json").is_file()
        snapshot_download(repo, allow_patterns=weight_files(folder) if sharded else ["model.safetensors"])
    except GatedRepoError as error:
        raise OSError(
            f"{repo} is gated: accept its license on https://huggingface.co/{repo}, then type `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"no model {repo} on the hub (or a private one: `hf auth login`); `elastic models` lists short names"
        ) from error
    except Exception as error:  # the HTTP library's errors share no base class with OSError
        raise OSError(f"download of {repo} failed: {first_line(error)}") from error
    if not weight_files(folder):
        raise ValueError(f"{repo} has no safetensors weights (model.safetensors); pickled weights are not loaded")
    return folder


def read_model(
    name: str, folder: Path, loader: Any, dtype: Any, trust_remote_code: bool, **options: Any
) -> tuple[Any, list[str]]:
    """Return the transformers model in `folder`, read by `loader.from_pretrained` from safetensors files only, and the
    names of checkpoint weights that the model does not use.

    Raises a one-line ValueError starting with `name` if weights cannot be read, are missing or have another shape.
    """

    def read(attention: str | None) -> Any:
        return loader.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # mismatches are refused below, with the name of a weight
            **options,
        )

    _require_generation_config(name, folder)
    with one_line(f"{name}: weights cannot be loaded"):
        try:
            model, report = read("sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            model, report = read(None)  # the library's choice: Gemma 2 caps its scores, which SDPA cannot do
    if other := sorted(report["mismatched_keys"]):
        key, found, wanted = other[0]
        shapes = f"{list(found)} in the checkpoint and {list(wanted)} by config.json"
        weights = number_of(len(other), "weights") + (" is" if len(other) == 1 else " are")
        raise ValueError(f"{name}: {weights} of another shape, such as {key}: {shapes}")
    if missing := sorted(report["missing_keys"]):
        weights = number_of(len(missing), "weights") + (" is" if len(missing) == 1 else " are")
        raise ValueError(f"{name}: {weights} missing from the checkpoint, such as {missing[0]}{_which_is_read(folder)}")
    return model, sorted(report["unexpected_keys"])


def _require_generation_config(name: str, folder: Path) -> None:
    """Raise ValueError if the folder's generation_config.json cannot be used: transformers would call the weights
    wrong, read config.json in its place, or find out when it generates."""
    if not (folder / "generation_config.json").is_file():
        return
    from transformers import GenerationConfig

    with one_line(f"{name}: generation_config.json cannot be used"):
        config = GenerationConfig.from_pretrained(folder)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, key)
            numbers = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(number) is int for number in numbers):
                raise ValueError(f"{key} is {value!r}; it must be the number of a token, or a list of such")


def read_beside(name: str, folder: Path, what: str, loader: Any, trust_remote_code: bool, *patterns: str) -> Any:
    """Return a model's tokenizer or processor, read by `loader.from_pretrained`; messages call it `what`.

    Raises a one-line ValueError with the library's message, or saying that `folder` has no file matching `patterns`.
    """
    there = any(any(folder.glob(pattern)) for pattern in patterns)
    if not there:  # of some models transformers would make an empty one
        raise ValueError(
            f"{name}: {what} cannot be loaded: there is none beside the weights ({what.split()[-1]}.save_pretrained "
            "puts it there)"
        )
    with one_line(f"{name}: {what} cannot be loaded"):
        return loader.from_pretrained(folder, trust_remote_code=trust_remote_code)


@contextmanager
def streamed(source: str, name: str, config: str | None, parts: Sequence[str], accepted: str) -> Iterator[Any]:
    """Yield a stream of a hub data set's split, the first of `parts` that it has; None if it has none of them.

    Any error in the block becomes a one-line ValueError about `source`. accepted: the kinds of data that the message
    lists if the hub cannot be reached.
    """
    import datasets

    if reason := unreachable():
        raise ValueError(f"no such folder: {source}; and the hub cannot be reached ({reason}); {accepted}")
    try:
        with quiet():
            splits = datasets.get_dataset_split_names(name, config)
            part = next((part for part in parts if part in splits), None)
            yield None if part is None else datasets.load_dataset(name, config, split=part, streaming=True)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{source} cannot be read: {first_line(error)}") from error


def weight_files(folder: Path) -> list[str]:
    """Return the names of a model's safetensors files, as the folder's index lists them; empty if there are none."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with one_line(f"{index} cannot be read"):
            files = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        return files
    return ["model.safetensors"] if (folder / "model.safetensors").is_file() else []


def require_weights(name: str, folder: Path, config: Any = None) -> None:
    """Raise ValueError, naming the model, if `folder` lacks safetensors files of the model, or they cannot be read, or
    none of the weights is an embedding of the size that `config`, of transformers, gives the language model: it has
    defaults of gigabytes for what config.json does not say; or if it says wrongly that torchao has quantized them."""
    files = weight_files(folder)
    if not files:
        raise ValueError(
            f"{name} has no safetensors weights (model.safetensors), and pickled ones are not loaded: save the model "
            "again, with safe_serialization=True where that is not the default, as in timm"
        )
    if (folder / "model.safetensors").is_file():  # which transformers reads, whatever an index lists
        files = ["model.safetensors"]
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{name}: {len(missing)} of {len(files)} weight files are missing, such as {missing[0]}")
    shapes: list[list[int]] = []
    described: dict[str, str] = {}
    for path in (folder / file for file in files):
        if not os.access(path, os.R_OK):  # safetensors calls that file missing
            raise ValueError(f"{name}: {path} cannot be read: permission denied")
        with one_line(f"{name}: weights cannot be loaded: {path} is damaged"), safe_open(path, "pt") as opened:
            shapes += [opened.get_slice(key).get_shape() for key in opened.keys()]  # noqa: SIM118
            described |= opened.metadata() or {}
    if config is None:
        return
    quantized = getattr(config, "quantization_config", None) or {}
    if quantized.get("quant_method") == "torchao" and "tensor_names" not in described:  # of its packed tensors
        raise plain(name, "torchao")
    text = config.get_text_config()
    rows, hidden = (getattr(text, key, None) for key in ("vocab_size", "hidden_size"))
    fits = [rows, getattr(text, "word_embed_proj_dim", hidden)] in shapes  # the former in OPT
    if quantized:  # embeddings may be packed
        fits = any(hidden in shape for shape in shapes)
    if None not in (rows, hidden) and not fits:
        raise ValueError(
            f"{name}: config.json is of another model than the weights: vocab_size is {rows} and hidden_size is "
            f"{hidden} there (transformers' defaults, where it says nothing), and no embedding has that size"
            + _which_is_read(folder)
        )


def _which_is_read(folder: Path) -> str:
    """Return a remark for a message if a model has both one file of weights and an index of several; else ""."""
    both = all((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json"))
    return "; model.safetensors is read, not the files of the index beside it" if both else ""
