"""Keep the libraries' own progress bars and remarks off the user's screen."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr

_LOUD = ("transformers", "datasets", "torchao", "bitsandbytes", "torch.utils._pytree", "lm_eval")


@contextmanager
def quiet(*, stderr: bool = False) -> Iterator[None]:
    """Within the block libraries log nothing and loading shows no progress bar; stderr: nor does anybody write there,
    such as bars that cannot be switched off."""
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
def one_line(what: str, kind: type[Exception] = ValueError) -> Iterator[None]:
    """Within the block any error, of whatever class a library has for it, becomes one of this kind, of one line: what
    cannot be done, and the first line of why."""
    try:
        yield
    except Exception as error:
        raise kind(f"{what}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for errors that the user reads on one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
