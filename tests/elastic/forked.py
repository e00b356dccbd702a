"""A launcher for tests that forks its worker processes from a server that has imported torch, so that they start fast.

Run with `python -m`, this module is the server: for each line of JSON on stdin it starts workers as torchrun does, ends
all of them where one fails, and prints an exit code.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

PATIENCE = 180
"""Seconds after which worker processes that still run are ended."""


@functools.cache
def _server(root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-m", "tests.elastic.forked"], cwd=root, env=environment, **pipes)
    atexit.register(server.communicate)  # closes the server's stdin, at whose end the server exits
    return server


def forked(
    count: int, arguments: Sequence[str], environment: Mapping[str, str], root: Path
) -> subprocess.CompletedProcess[str]:
    """Run `count` copies of tests/elastic/several.py with these arguments, and return what they print.

    The exit code is that of the first copy found to have failed, 0 where none did."""
    server = _server(root)
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("out", "err")]
        server.stdin.write(json.dumps([count, list(arguments), dict(environment), files]) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        return subprocess.CompletedProcess(list(arguments), code, *(Path(file).read_text() for file in files))


def _run(count: int, arguments: list[str], environment: dict[str, str], files: list[str]) -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    running: set[int] = set()
    for rank in range(count):
        if (process := os.fork()) == 0:
            _become({**environment, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, arguments, files)
        running.add(process)
    code, end, ending = 0, time.monotonic() + PATIENCE, signal.SIGTERM
    while running:
        for process in list(running):
            found, status = os.waitpid(process, os.WNOHANG)
            if found:
                running.remove(process)
                code = code or os.waitstatus_to_exitcode(status)
        if running and ((code and ending == signal.SIGTERM) or time.monotonic() > end):
            for process in running:
                os.kill(process, ending)
            ending, end = signal.SIGKILL, time.monotonic() + 30
        time.sleep(0.01)
    return code


def _become(environment: dict[str, str], arguments: list[str], files: list[str]) -> NoReturn:
    """Turn this forked process into a worker: set environment, arguments and standard streams, work, and exit."""
    from tests.elastic import several

    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["several", *arguments]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    code = 1
    try:
        code = several.work() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    from elastic import families
    from tests.elastic import several  # noqa: F401

    for family in families.TRAITS:
        families.of(family)
    for line in sys.stdin:
        print(json.dumps(_run(*json.loads(line))), flush=True)
