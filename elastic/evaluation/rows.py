"""What a row of results says of the run, and of the data that it was measured on."""

from __future__ import annotations

from typing import Any

from elastic.config import RunConfig
from teachers.wording import number_of

HELD_OUT = "held-out data"
"""Name, in a row of results, of the data that was set aside from the training data's source."""


def settings_of(config: RunConfig, budget: float | None) -> dict[str, Any]:
    """Return the settings that rows of a run begin with. budget: where the dial stands (None: at the run's target)."""
    return {
        "model": config.model,
        "family": config.family,
        "preset": config.preset,
        "phase": config.budget.phase,
        "compute_target": config.budget.target if budget is None else budget,
    }


def data_of(row: dict[str, Any]) -> str:
    """Return the data that a row was measured on, with its part where that is not in the name."""
    if row["data"] == HELD_OUT or "part" not in row:  # rows of earlier versions have no part
        return str(row["data"])
    return f"{row['data']}, {'all of it' if row['part'] == 'all' else 'its held-out part'}"


def samples_of(row: dict[str, Any], what: str) -> str:
    """Return `data_of` a row with the number of samples that were measured; what: the key of that number, and what
    samples are called."""
    return f"{data_of(row)}, {number_of(row[what], what)}" + f", {row['broken']} broken" * (row["broken"] > 0)
