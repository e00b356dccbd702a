"""The command `elastic`. Heavy libraries are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from elastic import launch
from elastic.cli.parser import parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake that one line can explain, 3 for a finished run that
    missed its budget, 130 for Ctrl-C.

    141 where whoever reads the output closed the pipe.
    """
    logging.getLogger("torch.utils._pytree").addFilter(_is_news)
    options = parser().parse_args(arguments)
    options.line = ["elastic", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        if not options.shared:
            return 0 if _left_to_the_first() else options.command(options) or 0
        launch.join()
        code = options.command(options) or 0
        launch.leave()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, launch.Lost) as error:
        # whatever a user can mend is raised as one of these two, with one line that says how
        if os.environ.get("ELASTIC_TRACEBACK"):
            raise
        line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
        if launch.is_said_here(error):
            print(f"elastic: error: {line}", file=sys.stderr, flush=True)
        launch.wait_until_said(error)
        return 2
    except KeyboardInterrupt as interruption:
        if launch.is_main():
            print(f"elastic: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return 130


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a remark of torch is not what it says wherever torchao, which transformers imports, is installed."""
    return "is an Enum subclass" not in record.getMessage()


def _left_to_the_first() -> bool:
    """Whether this is one of several processes, and not the one that does a command whose work is not shared."""
    if launch.launched() > 1 and launch.is_main():
        launch.forget()
    return not launch.is_main()
