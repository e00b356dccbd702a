"""The command `elastic`. Large libraries are imported inside the commands, so that --help answers at once."""

from __future__ import annotations

import os
import sys

try:
    import logging
    import warnings
    from collections.abc import Sequence

    from elastic import launch
    from elastic.cli.parser import parser
except KeyboardInterrupt:  # which `main` cannot catch yet
    print("elastic: interrupted", file=sys.stderr)
    sys.exit(130)

LESS_MEMORY = "less is needed with --set train.checkpointing=true or quantization=int8, or a smaller train.batch"
"""What a user can do where memory is too small for training."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code.

    0: success; 2: an error that is reported in one line; 3: a finished run or sweep that missed a budget; 130: Ctrl-C;
    141: the reader of the output closed the pipe.
    """
    try:
        return _run(arguments)
    except KeyboardInterrupt as interruption:
        if launch.is_main():
            print(f"elastic: {str(interruption) or 'interrupted'}", file=sys.stderr)
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    """Run a command and return the exit code; KeyboardInterrupt after Ctrl-C."""
    logging.getLogger("torch.utils._pytree").addFilter(_is_news)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # warns where HOME cannot be written to, and needs nothing
    if not os.environ.get("ELASTIC_TRACEBACK"):
        warnings.formatwarning = _warning
    if os.environ.get("COLUMNS") == "0":  # an unknown width, for which rich would print no table
        del os.environ["COLUMNS"]
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this process
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
    options = parser().parse_args(arguments)
    options.line = ["elastic", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        if options.shared:
            launch.join()
            code = options.command(options) or 0
            launch.leave()
        else:
            code = 0 if _left_to_the_first() else options.command(options) or 0
        sys.stdout.flush()  # else a closed pipe is noticed only when Python ends
        return code
    except (BrokenPipeError, SystemExit):  # the reader of stdout has exited, for which rich raises SystemExit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python fails again when it flushes
        return 141
    except Exception as error:
        # errors that a user can fix are raised as ValueError or OSError, with one line that says how
        if not (_is_of_memory(error) or isinstance(error, ValueError | OSError | launch.Lost)):
            raise
        if _is_of_memory(error) and "set" in vars(options):
            error.add_note(LESS_MEMORY)
        if os.environ.get("ELASTIC_TRACEBACK"):
            raise
        if launch.is_said_here(error):
            print(f"elastic: error: {_line(error, options.line)}", file=sys.stderr, flush=True)
        launch.wait_until_said(error)
        return 2


def _warning(message: Warning | str, *_: object, **__: object) -> str:
    """Return a warning of a library in one line, without the line of code that it is about."""
    return f"elastic: warning: {' '.join(str(message).split())}\n"


def _is_of_memory(error: Exception) -> bool:
    """Return whether memory, of the host or a GPU, is too small; torch has a class of errors for GPUs alone."""
    said = "out of memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said)


def _line(error: Exception, given: Sequence[str]) -> str:
    """Return an error in one line: of an error of the system what it concerns and what it is, without its number; and
    its notes, which say how to go on. Arguments that were `given` with line breaks have escapes in their place."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror:
        said = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    for text in (part for argument in given for part in (argument, argument.rpartition("=")[2])):
        said = said if text.isprintable() else said.replace(text, repr(text)[1:-1])
    line = next((part.strip() for part in said.splitlines() if part.strip()), type(error).__name__)
    return "; ".join([line, *getattr(error, "__notes__", ())])


def _is_news(record: logging.LogRecord) -> bool:
    """Logging filter that drops a message of torch, caused by torchao, which transformers imports if installed."""
    return "is an Enum subclass" not in record.getMessage()


def _left_to_the_first() -> bool:
    """Return whether this process skips a command whose work is not shared: all but the first of several do."""
    if launch.launched() > 1 and launch.is_main():
        launch.forget()
    return not launch.is_main()
