"""Arithmetic on numbers, or on arrays of them: the same formulas serve one kernel and many."""

from __future__ import annotations

from typing import Any

import numpy as np

# An int, or an array of them.
Number = Any


def ceil_div(a: Number, b: Number) -> Number:
    """The quotient, rounded up."""
    # Several times faster for floats, and exact as far as they count whole numbers.
    if isinstance(a, np.ndarray) and a.dtype == np.float32:
        return np.ceil(a / b)
    return -(-a // b)


def round_up(a: Number, b: Number) -> Number:
    """The least multiple of ``b`` that is not below ``a``."""
    return ceil_div(a, b) * b


def larger(a: Number, b: Number) -> Number:
    """The larger of two numbers, or of each two of arrays."""
    return np.maximum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else max(a, b)


def smaller(a: Number, b: Number) -> Number:
    """The smaller of two numbers, or of each two of arrays."""
    return np.minimum(a, b) if isinstance(a, np.ndarray) or isinstance(b, np.ndarray) else min(a, b)
