"""Files and folders that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "check_new_folder",
    "new_file",
    "new_folder",
    "unwritten",
    "usual_mode",
    "write_bytes",
    "write_text",
]


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` in UTF-8 to ``path``: the old file or the whole new one, never a part.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """As :func:`write_text`, of bytes."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}")
    with unwritten(target), new_file(target) as new:
        new.write_bytes(data)


@contextmanager
def unwritten(target: Path) -> Iterator[None]:
    """Has an OSError say which file or folder is as it was, and not the name of a temporary one."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        said = f"{target} is not written, what was there is as it was: {why}"
        raise (OSError(error.errno, said) if error.errno else OSError(said)) from error


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty file that becomes ``path`` when the block ends without an error.

    Raises:
        OSError: the folder does not exist or cannot be written to.
    """
    target = Path(path).absolute()
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".new")
    os.close(handle)
    new = Path(name)
    try:
        yield new
        with new.open("rb+") as file:
            os.fsync(file.fileno())
        usual_mode(new)
        new.replace(target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder that becomes ``path`` when the block ends without an error.

    Args:
        path: the folder to be; its parents are made.
        force: replace what is there, once the new one is complete.

    Raises:
        FileExistsError: ``path`` exists and ``force`` is False.
        ValueError: ``force`` would replace a file, a link, or the current folder or one above it.
    """
    target = Path(path)
    check_new_folder(target, force=force)
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".new"))
    old = new.with_suffix(".old")
    try:
        yield new
        new.chmod(0o777 & ~_umask())
        for file in new.rglob("*"):
            if file.is_file():
                usual_mode(file)
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def check_new_folder(path: Path, *, force: bool) -> None:
    """Raise what :func:`new_folder` would, before the work is done."""
    if not (path.exists() or path.is_symlink()):
        return
    if not force:
        raise FileExistsError(f"{path} exists: name another folder, or pass --force to replace it")
    if path.is_symlink() or not path.is_dir():
        raise ValueError(f"{path} is not a folder: --force replaces folders only")
    if Path.cwd().resolve().is_relative_to(path.resolve()):
        raise ValueError(f"{path} is the current folder or holds it: --force does not replace it")


def usual_mode(path: str | os.PathLike[str]) -> None:
    """Give a file the permissions of one that ``open`` makes.

    Temporary files, and those that safetensors writes, are for their owner alone: a colleague could
    not read them.
    """
    os.chmod(path, 0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
