"""Keeping a library's chatter out of the user's terminal."""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Lines of TVM 0.27: one for each constant saved or loaded, one where MetaSchedule draws a schedule that does not apply,
# one where the layout conversion gives up (the pipeline goes on without it), one for each Gather.  A line of HiGHS 1.12
# on standard output, where it repairs a solution.
_CHATTER = (
    b"Warning: Scope ",
    b"Warning: Trace replay failed with ScheduleError",
    b"Warning: BlockBuilder destroyed with remaining blocks",
    b"Fast mode segfaults",
    b"HighsMipSolverData::",
)
# The descriptor belongs to the whole process: two threads must not swap it at once.
_swapping = threading.RLock()


@contextmanager
def without_chatter(descriptor: int = 2) -> Iterator[None]:
    """Drop known, harmless lines of libraries from the process's standard error; everything else passes through.

    Parameters
    ----------
    descriptor : int
        1 for standard output instead.
    """
    stream = sys.stderr if descriptor == 2 else sys.stdout
    if stream is not None:
        stream.flush()
    with _swapping, tempfile.TemporaryFile() as buffer:
        try:
            kept = os.dup(descriptor)
        except OSError:  # it is closed: there is no terminal to keep clean
            yield
            return
        _flush()
        os.dup2(buffer.fileno(), descriptor)
        try:
            yield
        finally:
            _flush()
            os.dup2(kept, descriptor)
            os.close(kept)
            buffer.seek(0)
            rest = b"".join(line for line in buffer if not any(chatter in line for chatter in _CHATTER))
            if rest:
                os.write(descriptor, rest)


def _flush() -> None:
    """Write what C's own buffers hold."""
    ctypes.CDLL(None).fflush(None)
