"""The multiple-choice knapsack: one option of each group, at the least cost within limits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tdc_tvm.errors import TdcError
from tdc_tvm.quiet import without_chatter

# That end the search: relative optimality gap, and seconds.
GAP, _SECONDS = 1e-4, 10.0
# The same quantity of all options, by group.
Rows = Sequence[np.ndarray]


def solve_knapsack(
    costs: Rows,
    limits: Sequence[tuple[Rows, float]],
    gap: float = GAP,
    known: list[int] | None = None,
) -> tuple[list[int], float]:
    """Choose one option of each group, so that the sum of costs is least and other sums stay within limits.

    By HiGHS (``scipy.optimize.milp``), without the options that another is no worse than in anything.

    Parameters
    ----------
    costs : sequence of arrays
        Cost of each option, by group.
    limits : sequence of (arrays, float)
        What else the options take, by group, and how much of it there is.
    gap : float
        Relative optimality gap that is good enough.
    known : list[int], optional
        A choice within the limits, which is given back where none better is found in time.

    Returns
    -------
    chosen : list[int]
        The option of each group.
    gap : float
        By how much of its cost the optimum can be lower.

    Raises
    ------
    TdcError
        If no choice is within the limits, or none was found in time.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    keep = [undominated(np.stack(rows, axis=1)) for rows in zip(costs, *(rows for rows, _ in limits), strict=True)]
    sizes = [len(options) for options in keep]
    group = np.repeat(np.arange(len(keep)), sizes)
    count = len(group)

    def row(values: Rows) -> tuple[np.ndarray, float]:
        """Costs above each group's least, and the sum of these: small numbers, that tolerances are absolute for."""
        flat = np.concatenate([np.asarray(v, float)[options] for v, options in zip(values, keep, strict=True)])
        least = np.array([flat[group == i].min() for i in range(len(keep))])
        return flat - least[group], float(least.sum())

    one = csr_array((np.ones(count), (group, np.arange(count))), (len(keep), count))
    constraints = [LinearConstraint(one, 1, 1)]
    for values, limit in limits:
        above, least = row(values)
        room = limit * (1 + 1e-9) - least
        if room < 0:
            raise TdcError(f"no choice is within {limit:.4g}: the least is {least:.4g}")
        # An option that alone takes more than there is room for is none.
        scale = max(room, 1e-12 * float(above.max())) or 1.0
        constraints.append(LinearConstraint(np.minimum(above / scale, 2.0)[None] * 1e3, -np.inf, 1e3))
    objective, base = row(costs)
    spread = sum(objective[group == i].max() for i in range(len(keep))) or 1.0
    with without_chatter(1):
        result = milp(objective * (1e4 / spread), integrality=1, bounds=Bounds(0, 1), constraints=constraints,
                      options={"mip_rel_gap": gap, "time_limit": _SECONDS})  # fmt: skip
    if result.x is None and known is None:
        raise TdcError(f"the solver found no choice of ranks: {result.message}")
    found = [known] if known is not None else []
    if result.x is not None:
        found.append([int(options[np.argmax(result.x[group == i])]) for i, options in enumerate(keep)])
    cost, chosen = min((total_of(costs, choice), choice) for choice in found)
    bound = base + (result.mip_dual_bound or 0.0) * spread / 1e4
    reached = max(0.0, cost - bound) / cost if cost > 0 else 0.0
    # What is left of it at the optimum is rounding.
    return chosen, reached if reached > 1e-9 else 0.0


def solve_twice(
    costs: Rows,
    errors: Rows,
    limits: Sequence[tuple[Rows, float]],
    gap: float,
    known: list[int] | None = None,
) -> tuple[list[int], float]:
    """The least cost, and of the choices that have it the one of the least error."""
    chosen, reached = solve_knapsack(costs, limits, gap, known)
    limits = [*limits, (costs, total_of(costs, chosen))]
    return solve_knapsack(errors, limits, gap, chosen)[0], reached


def total_of(values: Rows, chosen: Sequence[int]) -> float:
    """What a choice takes."""
    return float(sum(options[i] for options, i in zip(values, chosen, strict=True)))


def undominated(costs: np.ndarray) -> np.ndarray:
    """Which rows are not as high as another in every column; of equal rows the first."""
    order = np.lexsort((np.arange(len(costs)), *costs.T[::-1]))
    kept: list[int] = []
    for i in order:
        if not any((costs[j] <= costs[i]).all() for j in kept):
            kept.append(int(i))
    return np.array(sorted(kept))
