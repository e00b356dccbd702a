"""`teachers.data.questions` under the name that versions before the packages had for it."""

from teachers.data.questions import QuestionData, QuestionSet, Sample, _decode, load_questions

__all__ = ["QuestionData", "QuestionSet", "Sample", "_decode", "load_questions"]
