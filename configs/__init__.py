"""Data files of Elastic: the table of models and the presets, read through `importlib.resources.files("configs")`."""

from importlib.resources import files


def presets() -> list[str]:
    """Names of the presets that come with Elastic."""
    return sorted(p.name.removesuffix(".yaml") for p in files("configs").joinpath("presets").iterdir())
