"""Families of models: one module of the same few functions for each.

load(config, teacher)                      data with .train and .held_out
load_all(source, config, teacher)          data to measure on
random_data(config, model)                 the same as `load` gives, without a source: for models with random weights
summary(data, config)                      what there is, for the user to read
tokens(student, data, config)              what the model reads at once, as `student.uniform` takes it: tokens of
                                           text; of text and of the image; an image's height and width
Batches(data, config, device)              training batches by number: len(), load(chosen, following)
Distillation(student, loss, budget, data)  module: (batch, price, one for all rows or each [B]) -> (loss, Measured),
                                           Measured.rows being "kl" and "compute" of each row
start(student, data, order, config)        calibration, for all budgets that are trained (distillation/budgets.py)
compute_meter(student, data, order, config)  what the dial is set by
evaluate(student, held_out, config)        a row's measurements
lines()                                    how a table shows them
METRICS                                    which of them a report plots: (key, label, "lower" or "higher" is better)
routing(student, data, teacher, config)    where compute went, and examples (see elastic/accounting/routing.py)
UNIT                                       what data consists of
BASELINES                                  names of what the next one makes
baseline(name, student, held_out, config, compute)  a row's measurements of something untrained at this compute
alike(...)                                 images only: see elastic/families/image.py
"""

from importlib import import_module
from types import ModuleType

_MODULES = {
    "llm": "elastic.families.language",
    "vit": "elastic.families.image",
    "vlm": "elastic.families.vision_language",
}


def of(family: str) -> ModuleType:
    """The module of a family: "llm", "vit" or "vlm"."""
    return import_module(_MODULES[family])
