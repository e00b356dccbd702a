"""Tests of elastic. Tiny image models can spend few amounts of compute, so that few measurements set their dial."""

from elastic.distillation import dial

dial.STEPS = 32
