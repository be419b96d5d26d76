"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tdc_tvm.errors import TdcError


@contextmanager
def write_atomic(path: str | os.PathLike) -> Iterator[Path]:
    """Give the body a temporary file to write, and move it to ``path`` when the body succeeds.

    The temporary file lies in the same directory and has the same suffix.  It is flushed to disk
    before the move.  If the body raises, it is removed and ``path`` stays as it was.

    Parameters
    ----------
    path : path
        The file to write; an existing file is replaced, a symbolic link is followed.

    Yields
    ------
    pathlib.Path
        The temporary file: it exists, is empty, and may be overwritten or created anew.

    Raises
    ------
    TdcError
        If the directory is missing, ``path`` is not a regular file, the permission is missing, or
        the disk is full.

    Examples
    --------
    >>> with write_atomic("plan.json") as temporary:  # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise TdcError(f"cannot write {path}: the directory {target.parent} does not exist; create it first")
    if target.exists() and not target.is_file():
        raise TdcError(f"cannot write {path}: it exists and is not a regular file; choose another name")
    temporary = target.with_name(f".{target.stem[:100]}.{secrets.token_hex(6)}{target.suffix}")
    try:
        # Unlike tempfile's, this file gets the permissions that the user's umask asks for.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TdcError(f"cannot write {path}: no space left in {target.parent}; free some and try again") from error
        ours = error.filename is not None and Path(os.fsdecode(error.filename)) in (temporary, target)
        if ours and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise TdcError(
                f"cannot write {path}: no permission to write in {target.parent}; choose another directory"
            ) from error
        raise
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
