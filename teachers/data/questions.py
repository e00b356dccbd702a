"""Questions about images and their answers: JSON lines, parquet, LLaVA's conversations, hub data sets, easy-VQA."""

from __future__ import annotations

import base64
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers import hub
from teachers.cache import cache_folder, published
from teachers.data.conversations import FIELDS, questions_and_answers, turns_of
from teachers.data.kinds import QUESTIONS, TEXT
from teachers.data.left_out import LeftOut, Samples
from teachers.data.parts import HELD_OUT_NAMES, TRAIN_NAMES, is_held_out
from teachers.data.pictures import open_image, open_row
from teachers.data.records import Record, as_text, hub_data_set, local_records, rows_of
from teachers.wheel import checked, download
from teachers.wording import number_of

if TYPE_CHECKING:
    from PIL.Image import Image

EASY_VQA = "easy-vqa"
_EASY_VQA_WHEEL = "easy-vqa==1.0"
_EASY_VQA_SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"

IMAGE_FIELDS = ("image", "images", "image_path", "img")
"""Names of the field of a record that holds its image."""
LOOKED_AT = 8
"""Number of records of which one has an image if data asks about images."""
MOST_CHOICES = 64
"""Largest number of different answers that count as a closed set, of which each is scored; with more, answers are
generated."""


@dataclass(frozen=True)
class Sample:
    """One question about one image."""

    image: Any
    """Argument of the set's `decode`: a path, or encoded bytes."""
    question: str
    answer: str
    where: str = ""
    """Place of the question's record, for messages: file and line."""


@dataclass
class QuestionSet(Samples):
    """Questions about images that are read on access; questions that cannot be used are left out (see left_out.py)."""

    samples: Sequence[Sample]
    decode: Callable[[Any], Image]
    choices: tuple[str, ...] | None = None
    """All different answers, if there are few enough to score each; None if answers are free text."""
    whole: bool = False
    """Whether these are all questions of a source without a validation part."""
    left_out: LeftOut = field(default_factory=lambda: LeftOut("the data", "questions"))
    records: LeftOut = field(default_factory=lambda: LeftOut("the data", "records"))
    """Records that hold no question about an image."""
    numbers: Sequence[int] | None = None
    """The samples' numbers in the whole set, if this is a subset; else None."""

    def __len__(self) -> int:
        return len(self.samples)

    def key(self, number: int) -> int:
        return number if self.numbers is None else self.numbers[number]

    def subset(self, chosen: Sequence[int]) -> QuestionSet:
        """Return a set of only these questions, in this order."""
        numbers = [self.key(i) for i in chosen]
        return replace(self, samples=[self.samples[i] for i in chosen], numbers=numbers)

    def read(self, chosen: Sequence[int]) -> list[tuple[Image, str, str]]:
        """Return (image, question, answer) for the chosen questions that can be used."""
        return [sample for _, sample in self.readable(chosen)]

    def readable(self, chosen: Sequence[int]) -> list[tuple[int, tuple[Image, str, str]]]:
        found = []
        for number in chosen:
            if self.key(number) in self.left_out:
                continue
            sample = self.samples[number]
            try:
                found.append((number, (self.decode(sample.image).convert("RGB"), sample.question, sample.answer)))
            except Exception as error:  # image libraries raise whatever they like for a damaged file
                name = sample.image if isinstance(sample.image, str) else sample.where
                self.left_out.add(self.key(number), name, error)
        return found

    def leave_out(self, number: int, reason: Exception) -> None:
        """Leave out a question from now on, for this reason."""
        sample = self.samples[number]
        self.left_out.add(self.key(number), sample.where or f"{sample.image}: {sample.question}", reason)


@dataclass(frozen=True)
class QuestionData:
    """Questions to train on, and held-out questions about other images to measure on."""

    train: QuestionSet
    held_out: QuestionSet
    description: str
    """Number and source of the training questions, for the user to read."""

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Unusable records and questions of the training part and of the held-out part."""
        return tuple(found for part in (self.train, self.held_out) for found in (part.records, part.left_out))


def load_questions(source: str, *, held_out: int, seed: int, max_images: int | None = None) -> QuestionData:
    """Return questions to train on and `held_out` others, from the source's own validation part if it has one.

    `seed` chooses both; at most `max_images` questions are trained on. If the source has no such part, no image occurs
    in both. Raises a one-line ValueError for a source that cannot be read, has too few questions, or has mostly records
    or questions that cannot be used.
    """
    train, other = _open(source, True, max_images), _open(source, False, held_out)
    if train is None:
        raise ValueError(f"{source} has no questions to train on, only a {' or '.join(HELD_OUT_NAMES)} part")
    for part in (train, other):
        if part is not None:
            part.probe()
    order = train.shuffled(seed)
    if other is None:
        aside = {str(train.samples[number].image) for number in order[:held_out]}
        inside = [str(sample.image) in aside for sample in train.samples]
        set_aside = order[:held_out]
        order = [number for number in order if not inside[number]]
        if not order:
            images = len({str(sample.image) for sample in train.samples})
            raise ValueError(
                f"{source} has {len(train)} questions about {images} images: too few to hold out {held_out} "
                "(data.held_out) with images of their own"
            )
        other = train.subset(sorted(set_aside))
    elif len(other) > held_out:
        other = other.subset(sorted(other.shuffled(seed)[:held_out]))
    choices = _choices(train.samples)
    train = train.subset(sorted(order[:max_images]))
    train.choices = other.choices = choices
    return QuestionData(train, other, f"{number_of(train.usable, 'questions')} of {source}")


def load_all(source: str) -> QuestionSet:
    """Return all questions of a source's validation part, or of the whole source if it has no such part."""
    every = _open(source, False, None)
    train = _open(source, True, None) if every is None or source == EASY_VQA else None
    whole = every is None
    every = every if every is not None else train
    assert every is not None  # every source has at least one of the two parts
    every.whole = whole
    every.choices = _choices((train or every).samples)
    return every


def may_ask_about_images(source: str) -> bool:
    """Return whether data may be questions about images: not if it is local, and holds text files or records of which
    none of the first few has an image."""
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(QUESTIONS.found(path)) or sorted(TEXT.found(path))
    else:
        files = [path] if path.is_file() and path.suffix.lower() in TEXT.files else []
    records = (row for file in files for _, row in local_records(file, LeftOut(source, "records")))
    first = list(islice(records, LOOKED_AT))
    return not first or any(map(_has_image, first))


def _has_image(row: dict[str, Any]) -> bool:
    """Return whether a record has an image, in a field or in a turn of its conversation."""
    conversation = next((row[name] for name in FIELDS if row.get(name) is not None), None)
    with suppress(ValueError):
        turns = () if conversation is None else turns_of(conversation)
        return any(row.get(name) is not None for name in IMAGE_FIELDS) or any(turn.images for turn in turns)
    return False


def _choices(samples: Iterable[Sample]) -> tuple[str, ...] | None:
    answers = sorted({sample.answer for sample in samples})
    return tuple(answers) if len(answers) <= MOST_CHOICES else None


def _open(source: str, train: bool, most: int | None) -> QuestionSet | None:
    """Return one part of a source; None if it has no such part. most: limit on questions streamed from the hub."""
    path = Path(source).expanduser()
    if source == EASY_VQA:
        return _easy_vqa(train)
    if path.exists():
        QUESTIONS.require(path)
        if path.is_file():
            return _files([path], path.parent) if train else None
        files = [file for file in sorted(QUESTIONS.found(path)) if is_held_out(Path(file.name)) != train]
        return _files(files, path) if files else None
    return _hub(source, train, most)


def _files(files: Sequence[Path], root: Path) -> QuestionSet:
    """Return the questions in the records of files; paths of images are relative to `root`."""
    root = root.absolute()
    found = LeftOut(str(files[0]) if len(files) == 1 else str(root), "records")
    records = (record for file in files for record in local_records(file, found))
    return _set(records, found, root)


def _hub(source: str, train: bool, most: int | None) -> QuestionSet | None:
    """Return a part of a hub data set, streamed: at most `most` of its questions are fetched."""
    import datasets

    name, config = hub_data_set(source, QUESTIONS.accepted)
    with hub.streamed(source, name, config, TRAIN_NAMES if train else HELD_OUT_NAMES, QUESTIONS.accepted) as stream:
        if stream is None:
            return None
        for name, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Image):
                stream = stream.cast_column(name, datasets.Image(decode=False))
        records = ((f"{source}, row {number}", row) for number, row in enumerate(stream, 1))
        return _set(records, LeftOut(source, "records"), Path(), most)


def _set(records: Iterable[Record], found: LeftOut, root: Path, most: int | None = None) -> QuestionSet:
    """Return at most `most` questions from records; records without a question about an image go into `found`."""
    samples = list(islice(_samples(records, found, root), most))
    found.finish()
    if not samples:
        raise ValueError(f"{found.source} has no records")
    left_out = LeftOut(found.source, "questions", len(samples))
    return QuestionSet(samples, partial(_decode, root), left_out=left_out, records=found)


def _samples(records: Iterable[Record], found: LeftOut, root: Path) -> Iterator[Sample]:
    """Yield the samples of records, of a conversation one for each question. Paths of images are relative to `root`."""
    for where, row in records:
        try:
            conversation = next((row[name] for name in FIELDS if row.get(name) is not None), None)
            turns = None if conversation is None else turns_of(conversation)
            image = _image(row, [image for turn in turns or () for image in turn.images if image is not None])
            image = _located(image, root) if isinstance(image, str) else image
            pairs = [_pair(row)] if turns is None else questions_and_answers(turns)
        except ValueError as error:
            found.add(where, where, error)
            continue
        found.used += 1
        for question, answer in pairs:
            yield Sample(image, question, answer, where)


def _image(row: dict[str, Any], inside: list[Any]) -> Any:
    """Return the one image in a record's image field or else in its turns (`inside`). Raises ValueError if there is
    none or more than one."""
    image = next((row[name] for name in IMAGE_FIELDS if row.get(name) is not None), inside)
    images = image if isinstance(image, list) else [image]
    if len(images) > 1:
        raise ValueError(f"it has {len(images)} images, where one is read")
    if not images or images[0] in (None, ""):
        fields = ", ".join(name if value is not None else f"{name} (null)" for name, value in row.items())
        raise ValueError(
            f"it has no image, but the fields {fields}; `image`, `question` and `answer` are needed, or LLaVA's "
            "`image` and `conversations`"
        )
    return images[0]


def _located(image: str, root: Path) -> str | bytes:
    """Return the path of an image, or its bytes if the record holds the image as a data URI. Raises ValueError for a
    web address."""
    if image.startswith("data:"):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True)
        except ValueError as error:
            raise ValueError(f"its image is no base64: {error}") from None
    if image.startswith(("http://", "https://")):
        raise ValueError(f"its image is an address, which is not fetched: {image[:100]}")
    return str(root / image.removeprefix("file://"))


def _pair(row: dict[str, Any]) -> tuple[str, str]:
    """Return question and answer, of several answers the most frequent. Raises ValueError if either is missing."""
    answer = next((row[n] for n in ("answer", "multiple_choice_answer", "answers") if row.get(n) is not None), None)
    try:
        question = as_text(row.get("question"))
        several = rows_of(answer)
        if isinstance(several, list) and several:
            texts = [as_text(one.get("answer", one.get("text")) if isinstance(one, dict) else one) for one in several]
            return question, max(texts, key=texts.count)
        return question, as_text(answer)
    except ValueError as error:
        raise ValueError(
            f"its question or answer {error}, of the fields {', '.join(row)}; `image`, `question` and `answer` are "
            "needed, or LLaVA's `image` and `conversations`"
        ) from None


def _decode(root: Path, image: Any) -> Image:
    return open_image(root / image) if isinstance(image, str) else open_row(image)


def _easy_vqa(train: bool) -> QuestionSet:
    """Return a part of easy-VQA (Zhou, 2019) from its wheel on PyPI: in all 5,000 images of one shape each, 48,248
    questions and 13 answers."""
    final = cache_folder() / EASY_VQA
    if not final.is_dir():
        with published(final) as workshop:
            download(_EASY_VQA_WHEEL, workshop)
            archive = checked(next(workshop.glob("*.whl")), _EASY_VQA_SHA256)
            with zipfile.ZipFile(archive) as content:
                for name in content.namelist():
                    _, _, inside = name.partition("easy_vqa/data/")
                    if inside.endswith((".png", ".json")):
                        target = workshop / final.name / inside
                        target.parent.mkdir(parents=True, exist_ok=True)
                        target.write_bytes(content.read(name))
    folder = final / ("train" if train else "test")
    rows = json.loads((folder / "questions.json").read_text("utf-8"))
    samples = [Sample(f"images/{image}.png", question, answer) for question, answer, image in rows]
    return QuestionSet(samples, partial(_decode, folder), left_out=LeftOut(EASY_VQA, "questions", len(samples)))
