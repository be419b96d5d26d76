"""Keeping a library's chatter out of the user's terminal."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# Lines of TVM 0.27: one for each constant saved or loaded, one where the layout conversion gives up (the pipeline goes
# on without it), one for each Gather.
_CHATTER = (b"Warning: Scope ", b"Warning: BlockBuilder destroyed with remaining blocks", b"Fast mode segfaults")
# The descriptor belongs to the whole process: two threads must not swap it at once.
_swapping = threading.RLock()


@contextmanager
def without_chatter() -> Iterator[None]:
    """Drop known, harmless lines of TVM from the process's standard error; everything else passes through."""
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
            rest = b"".join(line for line in buffer if not any(chatter in line for chatter in _CHATTER))
            if rest:
                os.write(2, rest)
