"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
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
        If the directory is missing, ``path`` is not a regular file, the file cannot be made there or
        becomes too large, or the disk is full.

    Examples
    --------
    >>> with write_atomic("plan.json") as temporary:  # doctest: +SKIP
    ...     temporary.write_text("{}")
    """
    target = Path(path).resolve()
    if not target.parent.is_dir():
        raise TdcError(f"cannot write {path}: the directory {target.parent} does not exist; create it first")
    if os.path.exists(target) and not target.is_file():  # Path.exists() raises for names that are too long
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
        if error.errno == errno.EFBIG:
            raise TdcError(f"cannot write {path}: it is larger than files may be here; see ulimit -f") from error
        ours = error.filename is not None and Path(os.fsdecode(error.filename)) in (temporary, target)
        if not ours:
            raise
        reason = error.strerror or error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            reason = f"no permission to write in {target.parent}"
        raise TdcError(f"cannot write {path}: {reason}; choose another directory or name") from error
    finally:
        # Not by trying: a read-only file system refuses to remove even what is not there.
        if os.path.lexists(temporary):
            temporary.unlink()


class _UntouchedError(Exception):
    """Ends `write_atomic` with the file as it was."""


def check_output(
    path: str | os.PathLike, what: str, suffixes: tuple[str, ...], sources: Iterable[str | os.PathLike] = ()
) -> None:
    """Refuse a file that cannot or must not be written to, before the work is done.

    Parameters
    ----------
    path : path
        The file that is to be written.
    what : str
        Its kind, for messages.
    suffixes : tuple[str, ...]
        How its name may end.
    sources : iterable of path
        Files that must survive.

    Raises
    ------
    TdcError
        If the name ends otherwise, the file is one of ``sources``, or `write_atomic` would refuse it.
    """
    if Path(path).suffix not in suffixes:
        raise TdcError(f"the name of {what} ends in {' or '.join(suffixes)}; found {str(path)!r}")
    for source in sources:
        if Path(path).resolve() == Path(source).resolve():
            raise TdcError(f"cannot write {what} to {path}: {source} would be lost; choose another name")
    with suppress(_UntouchedError), write_atomic(path):
        raise _UntouchedError


@contextmanager
def lock_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other processes out of a folder while the body runs; a lock ends with its process, however that ends.

    Raises
    ------
    TdcError
        If another process holds the folder, or nothing can be written there.
    """
    path = Path(folder) / ".lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise TdcError(f"cannot write {path}: {error.strerror}; choose another folder") from None
    try:
        # Not flock, whose locks a killed process's children keep for as long as they live.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(descriptor)
            raise TdcError(
                f"another process is at work in {folder}; wait for it or end it, or choose another folder"
            ) from None
        # Other errors: the file system has no locks.
    try:
        yield
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
