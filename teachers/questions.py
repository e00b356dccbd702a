"""The former name of `teachers.data.questions`, kept for code written for earlier versions."""

from teachers.data.questions import QuestionData, QuestionSet, Sample, _decode, load_questions

__all__ = ["QuestionData", "QuestionSet", "Sample", "_decode", "load_questions"]
