"""`teachers.data.text` under the name that versions before the packages had for it."""

from teachers.data.text import TextData, load_text

__all__ = ["TextData", "load_text"]
