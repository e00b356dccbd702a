"""Silence libraries' progress bars and logs, and reduce their errors to one line."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr

_LOUD = ("transformers", "datasets", "torchao", "bitsandbytes", "torch.utils._pytree", "lm_eval")


@contextmanager
def quiet(*, stderr: bool = False) -> Iterator[None]:
    """Silence libraries' logs and progress bars within the block; stderr: also discard everything written to stderr,
    such as progress bars that cannot be switched off."""
    from transformers.utils import logging as transformers_logging

    loggers = {logging.getLogger(name): logging.getLogger(name).level for name in _LOUD}
    bars = transformers_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()) if stderr else nullcontext():
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def unlogged() -> Iterator[None]:
    """Drop log messages up to warnings within the block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def one_line(what: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Turn any error within the block into a one-line error of class `kind`: `what`, then the first line of the
    original message."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, with the next one if it ends with a colon; the
    class's name if there is none. Of an error of `datasets` that only says that there was one, its cause's."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, KeyError) and len(str(error).split()) == 1:
        return f"{error} is missing"
    if isinstance(error, RecursionError):
        return "brackets are nested too deeply"
    return " ".join(lines[: 1 + lines[0].endswith(":")]) if lines else type(error).__name__
