"""The harness without a word."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from teachers.quiet import quiet


@contextmanager
def silent() -> Iterator[None]:
    """Within the block the harness says nothing: no messages and no progress bars."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
