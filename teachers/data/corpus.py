"""The `builtin` corpus: English prose found in the installed Python packages, so that distilling needs no download.

Docstrings, block comments, the language reference and package descriptions hold tens of megabytes that people wrote for
people. Whole paragraphs of ordinary sentences are kept; markup, parameter lists, code, licences, repetitions are not.
"""

import hashlib
import importlib.metadata
import inspect
import re
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

from teachers.cache import cache_folder, published

RECIPE = 1
"""Version of the rules below, part of the cached file's name; increased when they give another corpus."""

MIN_CHARS = 120
"""Shorter paragraphs are mostly captions and one-line descriptions."""

MIN_FUNCTION_WORDS = 0.3
"""Running English has 0.4 to 0.55 of its words in `FUNCTION_WORDS`; lists and telegram style have less."""

_FUNCTION_WORDS = """
    a about after all also although an and any are as at be because been before being between both but by can could
    did do does each either even every few for from had has have he her his how however if in into is it its just
    like made many may might more most much must neither no nor not now of often on once one only or other our out
    over own rather same she should since so some still such than that the their them then there therefore these
    they this those though through to too under until up upon very was we were what when where whether which while
    who whose why will with within without would yet you your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())

_TRIPLE_QUOTED = re.compile(r'"""(.*?)"""', re.DOTALL)
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#(?:[ \t].*)?\n){3,}", re.MULTILINE)
_COMMENT_MARK = re.compile(r"^[ \t]*#[ \t]?", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")
_HEADING = re.compile(r"^.*\n[ \t]*([-=~^*#])\1{2,}[ \t]*$", re.MULTILINE)
_INDENTED_LINE = re.compile(r"^[ \t]", re.MULTILINE)
_MARKUP = (
    (re.compile(r":[\w:+-]+:`~?([^`<]+?)(?:\s*<[^`]*>)?`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`]*>`_{1,2}"), r"\1"),
    (re.compile(r"!?\[([^\]]+)\]\([^)]*\)"), r"\1"),
    (re.compile(r"\s*\[[\w#*]+\]_?"), ""),
    (re.compile(r"`+([^`]+)`+_{0,2}"), r"\1"),
    (re.compile(r"\*{1,2}(\S[^*]*?)\*{1,2}"), r"\1"),
)
_NOT_PROSE = re.compile(
    r"https?:|www\.|\\|[{}<>|=@$^~`*]|::|__|\w\(\w+,|\w/\w+/|\.\.\.|"
    r"copyright|licen[cs]e|warrant|redistribut|trademark|\bas is\b|permission is",
    re.IGNORECASE,
)
_STARTS_SENTENCE = re.compile(r"[\"'(“]?[A-Z]")
_ENDS_SENTENCE = re.compile(r"[.!?][\"')”]?$")
_SENTENCE_BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'(])")
_PLAIN_WORD = re.compile(r"[A-Za-z]?[a-z]+(?:['’-][A-Za-z]?[a-z]+)*|[A-Z]{1,5}s?|\d{1,4}")  # noqa: RUF001
_EDGES = "\"'“”‘’()[],.;:!?-–—"  # noqa: RUF001


def corpus_file() -> Path:
    """Return the path of the corpus (parquet, column `text`, most natural documents first), built on first use."""
    path = cache_folder() / "text" / f"builtin-{_fingerprint()}.parquet"
    if not path.is_file():
        import pyarrow
        import pyarrow.parquet

        print("collecting English prose from the installed packages (once) ...", file=sys.stderr)
        with published(path) as folder:  # an unwritable cache is noticed first: collecting takes a minute
            pyarrow.parquet.write_table(pyarrow.table({"text": collect()}), folder / path.name)
    return path


def collect() -> list[str]:
    """Return all documents (the prose of one file each), the most natural first; the same packages give the same
    list."""
    seen: set[int] = set()
    scored = []
    for texts in _files():
        paragraphs = [p for text in texts for p in prose_paragraphs(text) if _is_new(p, seen)]
        if paragraphs:
            document = "\n\n".join(paragraphs)
            scored.append((-naturalness(document), document))
    return [document for _, document in sorted(scored)]


def prose_paragraphs(raw: str) -> list[str]:
    """Return the paragraphs of a docstring, comment or reST/Markdown text that read as ordinary English, each as one
    line."""
    found = []
    for block in _BLANK_LINES.split(_HEADING.sub("\n", inspect.cleandoc(raw))):
        first, _, rest = textwrap.dedent(block).partition("\n")
        body = textwrap.dedent(rest)
        if body == rest:
            body = f"{first}\n{rest}"  # before an indented rest, the first line is only a name, as of a parameter
        if _INDENTED_LINE.search(body):  # a list, a table, code
            continue
        text = " ".join(body.split())
        for pattern, replacement in _MARKUP:
            text = pattern.sub(replacement, text)
        if is_prose(text):
            found.append(text)
    return found


def is_prose(text: str) -> bool:
    """Return whether a paragraph consists of whole sentences of mostly plain words."""
    if len(text) < MIN_CHARS or _NOT_PROSE.search(text):
        return False
    if not (_STARTS_SENTENCE.match(text) and _ENDS_SENTENCE.search(text)):
        return False
    words = [word.strip(_EDGES) for word in text.split()]
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    sentences = len(_SENTENCE_BREAK.split(text))
    return plain >= 0.85 * len(words) and len(words) <= 50 * sentences and _function_share(words) >= MIN_FUNCTION_WORDS


def naturalness(text: str) -> float:
    """Return a document's score for sorting: shares of function words and of plain words, and a bonus for length."""
    words = [word.strip(_EDGES) for word in text.split()]
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words) / len(words)
    return _function_share(words) + 2 * plain + 0.3 * min(len(words), 400) / 400


def _function_share(words: list[str]) -> float:
    return sum(word.lower() in FUNCTION_WORDS for word in words) / len(words)


def _is_new(paragraph: str, seen: set[int]) -> bool:
    """Add a paragraph's sentences to `seen` and return whether most of them are new.

    Sentences are compared by their lower-case words, because templated docstrings differ in names only.
    """
    keys = {
        hash(tuple(word for word in sentence.split() if word.islower()))
        for sentence in _SENTENCE_BREAK.split(paragraph)
    }
    fresh = len(keys - seen)
    seen |= keys
    return 2 * fresh > len(keys)


def _files() -> Iterator[list[str]]:
    """Yield the texts that may hold prose of each file of the standard library and site-packages, in a fixed order."""
    library, packages = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    for root in (library, packages):
        for path in sorted(root.rglob("*")):
            if root == library and "site-packages" in path.parts:
                continue
            if path.suffix == ".py":
                source = path.read_text("utf-8", "ignore")
                yield [
                    *(match[1] for match in _TRIPLE_QUOTED.finditer(source)),
                    *(_COMMENT_MARK.sub("", match[0]) for match in _COMMENT_BLOCK.finditer(source)),
                ]
            elif path.suffix in (".md", ".rst") or path.name == "METADATA":
                yield [path.read_text("utf-8", "ignore")]
    for _, text in sorted(topics.topics.items()):
        yield [text]


def _fingerprint() -> str:
    """Return twelve hex digits, a hash of the recipe, the Python version and all installed distributions."""
    installed = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    return hashlib.sha256("\n".join([str(RECIPE), sys.version, *installed]).encode()).hexdigest()[:12]
