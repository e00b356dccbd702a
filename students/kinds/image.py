"""Image routers: they choose the image tokens that enter a language model."""

from __future__ import annotations

from students.kinds.registry import Kind
from students.places import InputPlace
from students.routers import ImageRouter
from students.spec import RouterSpec


class ImageKind(Kind):
    """A gate for each image token in front of a language model. students/families/vision_language.py prunes closed
    tokens from the sequence; calibration/vision_language.py computes the start."""

    name = "image"
    fields = ("hidden", "network", "selection", "query")
    place = "input"
    may_keep_quota = True

    def check(self, spec: RouterSpec) -> None:
        if spec.network == "static":
            raise ValueError("an image router looks at the image: use `network: linear` or `network: mlp`")

    def attach(self, spec: RouterSpec, place: InputPlace) -> None:
        place.add_router(ImageRouter(spec, place.width, place.gains))


KIND = ImageKind()
