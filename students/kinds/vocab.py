"""Vocab routers: they choose the rows of the LM head that are computed exactly for each token."""

from __future__ import annotations

from students.architectures.record import Architecture
from students.compute import Phase
from students.execution.head import RoutedHead
from students.kinds.registry import Kind
from students.places import HeadPlace
from students.routers import VocabRouter
from students.spec import RouterSpec, StudentSpec


class VocabKind(Kind):
    """A preview of all logits and a limit above which rows of the LM head are computed; executed by
    students/execution/head.py, started by calibration/language.py."""

    name = "vocab"
    fields = ("rank",)
    place = "head"
    limits = ("spread", "tail", "log_gain")

    def check_model(self, spec: RouterSpec, record: Architecture, student: StudentSpec) -> None:
        if not record.causal:
            raise ValueError("a vocab router needs a language model's head; image models have none")

    def saves(self, spec: RouterSpec, phase: Phase) -> bool:
        """In prefill all rows are computed exactly, and the preview as well, since it decides which rows are used."""
        return phase == "decode"

    def fixes_shapes(self, spec: RouterSpec) -> bool:
        return True

    def attach(self, spec: RouterSpec, place: HeadPlace) -> None:
        vocabulary, width = place.head.get_parameter("weight").shape
        rank = spec.rank or width // 4
        place.replace(RoutedHead(place.head, place.runtime, VocabRouter(width, rank, place.gains), spec))
        place.macs += rank * (width + vocabulary + 1)


KIND = VocabKind()
