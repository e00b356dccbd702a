"""The cache folder, and the atomic writing of files and folders."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder() -> Path:
    """Return `$ELASTIC_CACHE`, else `elastic` in `$XDG_CACHE_HOME` or `~/.cache`; the folder need not exist yet."""
    if own := os.environ.get("ELASTIC_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "elastic"


@contextmanager
def published(final: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `final`; the file or folder that the body leaves there as `final.name` becomes
    `final`.

    `final` appears in one rename after the body has succeeded. On any failure (full disk, Ctrl-C) the temporary folder
    is removed with its contents; OSError names `final` if not even that folder can be made. If another process has made
    `final` meanwhile, that one stays and this one is dropped.
    Safetensors files get the permissions of any new file; their library makes them readable by the owner only.
    """
    from safetensors import SafetensorError

    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    except OSError as error:
        other = "; ELASTIC_CACHE=FOLDER keeps it elsewhere" if final.is_relative_to(cache_folder()) else ""
        raise OSError(f"cannot write {final}: {error.strerror}{other}") from None
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
    except SafetensorError as error:  # a full disk, which is an error of the system in all other files
        raise OSError(f"cannot write {final}: {error}") from None
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
