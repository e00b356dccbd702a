"""The command `elastic`. Heavy libraries are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from elastic.cli.parser import parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 2 for a mistake that one line can explain, 3 for a finished run that
    missed its budget, 130 for Ctrl-C.

    141 where whoever reads the output closed the pipe.
    """
    if not _works():
        return 0
    options = parser().parse_args(arguments)
    options.line = ["elastic", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        return options.command(options) or 0
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        # whatever a user can mend is raised as one of these two, with one line that says how
        if os.environ.get("ELASTIC_TRACEBACK"):
            raise
        line = next((part.strip() for part in str(error).splitlines() if part.strip()), type(error).__name__)
        print(f"elastic: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interruption:
        print(f"elastic: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return 130


def _works() -> bool:
    """Whether this process does the command: of several that a launcher starts, the first does all of it, alone."""
    count, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    if count == "1":
        return True
    if rank != "0":
        print(f"elastic: one process does a command; number {rank} of {count} leaves it to number 0", file=sys.stderr)
        return False
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    return True
