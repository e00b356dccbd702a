"""Data files of Elastic: the table of models and the presets, read through `importlib.resources.files("configs")`."""
