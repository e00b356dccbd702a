"""Questions about images and their answers: JSON lines, parquet, LLaVA's conversations, hub data sets, easy-VQA."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from teachers import hub
from teachers.cache import cache_folder, published
from teachers.data.images import HELD_OUT_NAMES, decode_row
from teachers.quiet import first_line, quiet
from teachers.wheel import checked, download

if TYPE_CHECKING:
    from PIL.Image import Image

EASY_VQA = "easy-vqa"
_EASY_VQA_WHEEL = "easy-vqa==1.0"
_EASY_VQA_SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"

MOST_CHOICES = 64
"""Up to so many different answers are a closed set, in which each is scored; beyond, answers are generated."""

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_HUB_DATASET = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")
_ACCEPTED = (
    "--data takes a .jsonl, .json or .parquet file of image, question and answer (or LLaVA's conversations), a folder "
    f"of such files, {EASY_VQA}, or a hub data set (org/name)"
)


@dataclass(frozen=True)
class Sample:
    """One question about one image."""

    image: Any
    """Whatever the set's `decode` takes: a path, encoded bytes."""
    question: str
    answer: str


@dataclass
class QuestionSet:
    """Questions about images, which are read when they are asked for; those that cannot be read are counted."""

    samples: Sequence[Sample]
    decode: Callable[[Any], Image]
    choices: tuple[str, ...] | None = None
    """All answers that there are, where there are few enough to score each; None: answers are free text."""
    broken: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, chosen: Sequence[int]) -> QuestionSet:
        """Only these questions, in this order."""
        return QuestionSet([self.samples[i] for i in chosen], self.decode, self.choices)

    def read(self, chosen: Sequence[int]) -> list[tuple[Image, str, str]]:
        """(image, question, answer) of these; fewer where images are broken. ValueError where all of them are."""
        found = []
        for number in chosen:
            sample = self.samples[number]
            try:
                found.append((self.decode(sample.image).convert("RGB"), sample.question, sample.answer))
            except Exception:  # image libraries raise whatever they like for a damaged file
                self.broken.add(number)
        if not found:
            raise ValueError(
                f"none of {len(chosen)} images can be read, such as {str(self.samples[chosen[0]].image)[:80]}"
            )
        return found


@dataclass(frozen=True)
class QuestionData:
    """Questions to train on, and others, about other images, to measure on."""

    train: QuestionSet
    held_out: QuestionSet
    description: str
    """What they are, for the user to read."""


def load_questions(source: str, *, held_out: int, seed: int, max_images: int | None = None) -> QuestionData:
    """Questions to train on, and `held_out` others: of the source's own validation part where it has one.

    `seed` chooses both; at most `max_images` questions are trained on. No image is asked about in both parts. Raises
    ValueError with one line for a source that cannot be read or has too few questions.
    """
    train, other = _open(source, True, max_images), _open(source, False, held_out)
    if train is None:
        raise ValueError(f"{source} has no questions to train on, only a {' or '.join(HELD_OUT_NAMES)} part")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    if other is None:
        aside = {str(train.samples[number].image) for number in order[:held_out]}
        inside = [str(sample.image) in aside for sample in train.samples]
        set_aside = order[:held_out]
        order = [number for number in order if not inside[number]]
        if not order:
            raise ValueError(f"{source} has {len(train)} questions: too few to hold out {held_out} (data.held_out)")
        other = train.subset(sorted(set_aside))
    elif len(other) > held_out:
        chosen = torch.randperm(len(other), generator=torch.Generator().manual_seed(seed))[:held_out]
        other = other.subset(sorted(chosen.tolist()))
    choices = _choices(train.samples)
    train = train.subset(sorted(order[:max_images]))
    train.choices = other.choices = choices
    return QuestionData(train, other, f"{len(train):,} questions of {source}")


def load_all(source: str) -> QuestionSet:
    """The validation part of a source, or all of it where it has no parts."""
    every = _open(source, False, None)
    train = _open(source, True, None) if every is None or source == EASY_VQA else None
    every = every if every is not None else train
    assert every is not None  # one of the two
    every.choices = _choices((train or every).samples)
    return every


def _choices(samples: Iterable[Sample]) -> tuple[str, ...] | None:
    answers = sorted({sample.answer for sample in samples})
    return tuple(answers) if len(answers) <= MOST_CHOICES else None


def _open(source: str, train: bool, most: int | None) -> QuestionSet | None:
    """One part of a source; None where it has no such part. most: how many are wanted, of what is only streamed."""
    path = Path(source).expanduser()
    if source == EASY_VQA:
        return _easy_vqa(train)
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(f"unknown kind of file: {path}; {_ACCEPTED}")
        return _files([path], path.parent) if train else None
    if path.is_dir():
        every = sorted(file for file in path.iterdir() if file.suffix in _READERS)
        if not every:
            raise ValueError(f"no .jsonl, .json or .parquet file in {path}; {_ACCEPTED}")
        held_out = [file for file in every if any(name in file.name for name in HELD_OUT_NAMES)]
        files = [file for file in every if file not in held_out] if train else held_out
        return _files(files, path) if files else None
    match = _HUB_DATASET.fullmatch(source)
    if not match or source.startswith((".", "/")):
        raise ValueError(f"no such file or folder: {source}; {_ACCEPTED}")
    return _hub(source, match, train, most)


def _files(files: Sequence[Path], root: Path) -> QuestionSet:
    """Records of files; paths of images are relative to `root`."""
    import datasets

    datasets.disable_progress_bars()
    samples: list[Sample] = []
    for file in files:
        try:
            with quiet():
                cache = str(cache_folder() / "datasets")
                rows = datasets.load_dataset(
                    _READERS[file.suffix], data_files=str(file), split="train", cache_dir=cache
                )
                rows = rows.with_format(None)
                for name, feature in rows.features.items():
                    if isinstance(feature, datasets.Image):
                        rows = rows.cast_column(name, datasets.Image(decode=False))
        except Exception as error:
            raise ValueError(f"{file} cannot be read: {first_line(error)}") from error
        samples += _samples(rows, str(file))
    return QuestionSet(samples, partial(_decode, root))


def _hub(source: str, match: re.Match, train: bool, most: int | None) -> QuestionSet | None:
    """A hub data set, streamed: at most `most` of its questions are fetched."""
    import datasets

    with hub.streamed(source, *match.groups(), ("train",) if train else HELD_OUT_NAMES, _ACCEPTED) as stream:
        if stream is None:
            return None
        for name, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Image):
                stream = stream.cast_column(name, datasets.Image(decode=False))
        return QuestionSet(list(islice(_samples(stream, source), most)), partial(_decode, Path()))


def _samples(rows: Iterable[dict[str, Any]], source: str) -> Iterator[Sample]:
    """Samples of records; of a conversation, each question with its answer."""
    for row in rows:
        image = next((row[name] for name in ("image", "image_path", "img") if row.get(name) is not None), None)
        pairs = _conversation(row["conversations"]) if row.get("conversations") else [_pair(row)]
        if image is None or None in pairs:
            raise ValueError(
                f"{source} has the columns {', '.join(row)}; `image`, `question` and `answer` are needed, or LLaVA's "
                "`image` and `conversations`"
            )
        for question, answer in pairs:
            yield Sample(image, question, answer)


def _pair(row: dict[str, Any]) -> tuple[str, str] | None:
    """Question and answer; of several answers the most frequent."""
    answer = next((row[name] for name in ("answer", "multiple_choice_answer", "answers") if row.get(name)), None)
    if isinstance(answer, list):
        texts = [one["answer"] if isinstance(one, dict) else str(one) for one in answer]
        answer = max(texts, key=texts.count)
    return (row["question"], str(answer)) if row.get("question") and answer is not None else None


def _conversation(turns: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """What people asked and models answered; each answer is for its own question alone."""
    pairs = zip(turns[::2], turns[1::2], strict=False)
    return [(asked["value"].replace("<image>", "").strip(), said["value"].strip()) for asked, said in pairs]


def _decode(root: Path, image: Any) -> Image:
    from PIL import Image

    if isinstance(image, str):
        return Image.open(root / image)
    return decode_row(image)


def _easy_vqa(train: bool) -> QuestionSet:
    """easy-VQA (Zhou, 2019): 5,000 images of one shape, 48,248 questions, 13 answers; from its wheel on PyPI."""
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
    return QuestionSet(samples, partial(_decode, folder))
