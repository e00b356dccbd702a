"""Run the commands that .ci/gpu-bench lists, one after the other, and keep what each prints: FOLDER/NUMBER-NAME.json.

`python .ci/gpu_commands.py FOLDER SECONDS`: all of them together get so many seconds, and each but the last at most the
share MOST of what is left, so that one that hangs costs no others; one that would begin in the last LEAST is left out.
Each is a process of its own, so that a GPU's errors stay with it, forked from this one, which has imported everything
and leaves the GPU alone: to import it each time would take as long as some of the work. Exits with 1
where a command fails, but not where time runs out.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

LEAST = 15
"""Seconds for a command that is begun."""
MOST = 0.6
"""Of the seconds that are left."""
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
    """The name and the arguments of each."""
    for line in file.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            name, *arguments = shlex.split(line)
            yield name, arguments


def run(arguments: list[str], out: Path, seconds: float) -> bool | None:
    """Whether the command ended well; None where it did not within so many seconds."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become(["bench", *arguments, "--json"], out)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(arguments: list[str], out: Path) -> None:
    """Run the command in this process, and end it."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 1)
        import torch

        if torch.cuda._is_in_bad_fork():  # something has looked at the GPU while it was imported
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
        if left < LEAST:
            print(f"out of time, not run: {said}", file=sys.stderr)
            continue
        print(said, file=sys.stderr)
        out, began = folder / f"{number}-{name}.json", time.monotonic()
        well = run(arguments, out, left if number == len(listed) else max(LEAST, MOST * left))
        took = f"{time.monotonic() - began:.0f} seconds"
        if well:
            print(took, file=sys.stderr)
            continue
        out.unlink(missing_ok=True)
        failed |= well is not None
        print(f"{'out of time' if well is None else 'failed'} after {took}: {said}", file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
