"""The former name of `teachers.data.text`, kept for code written for earlier versions."""

from teachers.data.text import TextData, load_text

__all__ = ["TextData", "load_text"]
