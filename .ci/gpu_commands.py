"""Run the commands in .ci/gpu-bench one after the other, and write what each prints to FOLDER/NUMBER-NAME.json, and to
NUMBER-NAME.txt why something is missing.

`python .ci/gpu_commands.py FOLDER SECONDS`: all commands together get SECONDS, and each but the last at most the share
MOST of the time left, so that one that hangs does not cost the others; none is started in the last LEAST seconds.

Each command runs in a process of its own, so that a GPU error cannot affect the next. The processes are forked from
this one, which has imported all libraries but does not touch the GPU, since importing them each time would take as long
as some of the commands. Exits with 1 if a command fails, but not if time runs out.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

LEAST = 15
"""Fewest seconds that must be left to start a command, and that a command gets."""
GRACE = 5
"""Seconds of a command's time that are left when it is told to stop."""
MOST = 0.6
"""Largest share of the time left that a command other than the last may take."""
IMPORTED = (
    "elastic.bench",
    "elastic.shapes",
    "elastic.families.language",
    "elastic.families.image",
    "elastic.families.vision_language",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.clip.modeling_clip",
)


def commands(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the arguments of each command in a file."""
    for line in file.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, *arguments = shlex.split(line)
            yield name, arguments


def run(arguments: list[str], out: Path, seconds: float) -> bool | None:
    """Run `elastic bench` with these arguments; return whether it succeeded, None if it was stopped, so that it ended
    within `seconds` and wrote what it had timed."""
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads, which libraries start
        child = os.fork()
    if child == 0:
        _become(["bench", *arguments, "--json"], out)
    code = _ended(child, seconds - GRACE)
    if code is not None:
        return code == 0
    os.kill(child, signal.SIGINT)
    if _ended(child, GRACE) is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return None


def _ended(child: int, seconds: float) -> int | None:
    """Wait so long for a process to end, and return its exit code; None if it has not ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


def _become(arguments: list[str], out: Path) -> None:
    """Run an elastic command in this forked process with stdout written to `out`, then exit with its exit code."""
    code = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started all in the background
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
        import torch

        if torch.cuda._is_in_bad_fork():  # an import initialised CUDA, which cannot be used after a fork
            os.execv(sys.executable, [sys.executable, "-m", "elastic.cli", *arguments])
        from elastic.cli import main

        code = main(arguments)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> int:
    folder, end, failed = Path(sys.argv[1]), time.monotonic() + float(sys.argv[2]), False
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for name in IMPORTED:
        import_module(name)
    listed = list(commands(Path(__file__).with_name("gpu-bench")))
    for number, (name, arguments) in enumerate(listed, 1):
        said, left = f"elastic bench {shlex.join(arguments)}", end - time.monotonic()
        out, why = folder / f"{number}-{name}.json", "out of time, not run"
        if left >= LEAST:
            print(said, file=sys.stderr)
            began = time.monotonic()
            well = run(arguments, out, left if number == len(listed) else max(LEAST, MOST * left))
            took = f"{time.monotonic() - began:.0f} seconds"
            if well:
                print(took, file=sys.stderr)
                continue
            if out.exists() and not out.stat().st_size:
                out.unlink()
            why = f"{'out of time' if well is None else 'failed'} after {took}"
            failed |= well is not None
        print(f"{why}: {said}", file=sys.stderr)
        out.with_suffix(".txt").write_text(f"{why}: {said}\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
