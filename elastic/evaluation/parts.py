"""Which data, and which part of it, a row of results was measured on."""

from __future__ import annotations

from typing import Any

HELD_OUT = "held-out data"
"""Name, in a row of results, of the data that was set aside from the training data's source."""


def data_of(row: dict[str, Any]) -> str:
    """Return the data that a row was measured on, with its part where that is not in the name."""
    if row["data"] == HELD_OUT or "part" not in row:  # rows of earlier versions have no part
        return str(row["data"])
    return f"{row['data']}, {'all of it' if row['part'] == 'all' else 'its held-out part'}"
