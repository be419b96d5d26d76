"""Keeping a library's chatter out of the user's terminal."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# TVM 0.27 prints this line once per constant when an executable is saved or loaded.
_CHATTER = b"Warning: Scope "
# The descriptor belongs to the whole process: two threads must not swap it at once.
_swapping = threading.RLock()


@contextmanager
def without_scope_warnings() -> Iterator[None]:
    """Drop TVM's line per constant from the process's standard error; everything else passes through."""
    if sys.stderr is not None:
        sys.stderr.flush()
    with _swapping, tempfile.TemporaryFile() as buffer:
        try:
            kept = os.dup(2)
        except OSError:  # standard error is closed: there is no terminal to keep clean
            yield
            return
        os.dup2(buffer.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            buffer.seek(0)
            rest = b"".join(line for line in buffer if _CHATTER not in line)
            if rest:
                os.write(2, rest)
