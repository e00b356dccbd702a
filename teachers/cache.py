"""Where Elastic keeps what it has made once, and how it gets there whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """`$ELASTIC_CACHE`, else `elastic` in `$XDG_CACHE_HOME` or `~/.cache`; it need not exist yet."""
    if own := os.environ.get("ELASTIC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "elastic"


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """Yield a fresh folder beside `final`; what the body leaves there at the name `final.name` becomes `final`.

    The file or folder appears in one rename after the body has succeeded. On any failure (full disk, Ctrl-C) the fresh
    folder is removed with all that is in it. Where another process was quicker, its result stays and ours is dropped.
    Files are as readable as any new one is: safetensors keeps its own to the owner.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        yield workshop
        plain = workshop / ".plain"
        plain.touch()
        for path in workshop.rglob("*.safetensors"):
            path.chmod(plain.stat().st_mode)
        try:
            (workshop / final.name).rename(final)
        except OSError:
            if not final.exists():
                raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
