"""ADMM training: weights are drawn to low Tucker rank while they are trained.

Solves ``min loss(W)`` subject to "W has Tucker-2 rank (D1, D2)" by the alternating direction method of
multipliers (Boyd, Parikh, Chu, Peleato and Eckstein, Foundations and Trends in Machine Learning 3(1), 2011, in
its scaled form; for Tensor-Train ranks Yin et al., CVPR 2021)::

    W  <-  some steps of  loss(W) + rho / 2 * ||W - Z + U||^2 : the optimizer's on the loss, proximal ones on the rest
    Z  <-  projection of W + U onto Tucker rank (D1, D2), by HOOI
    U  <-  U + W - Z
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import Ranks
from tdc_tvm.training.hooi import Factors, compose, hooi


@dataclass(frozen=True)
class AdmmConfig:
    """Options of ADMM.

    Parameters
    ----------
    rho : float
        Penalty at the start.  With learning rate lr and momentum m, a step draws W to Z - U by a share of about
        ``lr * rho / (1 - m)`` of the distance.
    rho_schedule : str
        ``geometric``: rho grows from ``rho`` to ``rho_max`` over the phase, by the same factor at every
        update.  ``balanced``: rho doubles where the relative primal residual is over ten times the dual one
        and halves in the opposite case (Boyd et al., section 3.4.1, with relative residuals), up to ``rho_max``.
        ``constant``: it stays.
    rho_max : float
        Largest penalty.
    projection_interval : int
        Steps of SGD between two updates of Z and U.
    sweeps : int
        Of orthogonal iteration per projection, from the last factors.
    absolute_tolerance, relative_tolerance : float
        Of the stopping rule (Boyd et al., section 3.3.1).
    """

    rho: float = 1e-3
    rho_schedule: str = "geometric"
    rho_max: float = 1.0
    projection_interval: int = 50
    sweeps: int = 1
    absolute_tolerance: float = 1e-6
    relative_tolerance: float = 1e-2

    def __post_init__(self) -> None:
        if self.rho_schedule not in ("geometric", "balanced", "constant"):
            raise TdcError(f"rho_schedule is {self.rho_schedule!r}; expected geometric, balanced or constant")
        if not 0 < self.rho <= self.rho_max:
            raise TdcError(f"rho is {self.rho:g} and rho_max {self.rho_max:g}; expected 0 < rho <= rho_max")
        if self.projection_interval < 1 or self.sweeps < 1:
            raise TdcError("projection_interval and sweeps must be at least 1")


@dataclass(frozen=True)
class Residuals:
    """Of one update, over all layers.

    ``primal`` is ``||W - Z||`` and ``dual`` ``rho * ||Z - Z_before||``; the relative ones are these over
    ``max(||W||, ||Z||)`` and ``rho * ||U||`` (``rho * ||Z||`` where U is smaller than W - Z).  ``seconds`` is
    what the update took.
    """

    rho: float
    primal: float
    dual: float
    primal_relative: float
    dual_relative: float
    converged: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The residuals as plain data for JSON."""
        return asdict(self)


class Admm:
    """The state of ADMM for some convolutions of a model.

    Parameters
    ----------
    weights : mapping of str to torch.nn.Parameter
        Kernels by layer name, each (out_channels, in_channels, kernel_h, kernel_w), on one device.
    ranks : mapping of str to Ranks
        Of the same layers.
    config : AdmmConfig
    updates : int
        How many updates the phase will have; the geometric schedule needs it.
    broadcast : callable, optional
        Takes a list of tensors and gives them the first process's values, in place: with several processes all
        must have the same Z.

    Raises
    ------
    TdcError
        If there are no layers.
    """

    def __init__(
        self,
        weights: Mapping[str, torch.nn.Parameter],
        ranks: Mapping[str, Ranks],
        config: AdmmConfig,
        updates: int,
        broadcast: Callable[[list[torch.Tensor]], None] | None = None,
    ) -> None:
        if not ranks:
            raise TdcError("the plan names no layers; ADMM needs at least one")
        self.config = config
        self.rho = config.rho
        self.done = 0
        self.last: Residuals | None = None
        self._updates = max(updates, 1)
        self._broadcast = broadcast or (lambda tensors: None)
        groups: dict[tuple[torch.Size, Ranks], list[str]] = defaultdict(list)
        for name, pair in ranks.items():
            groups[weights[name].shape, pair].append(name)
        self._groups = [_Group(names, [weights[name] for name in names], pair) for (_, pair), names in groups.items()]
        self._weights = [weight for group in self._groups for weight in group.weights]
        self._broadcast([group.z for group in self._groups])
        # Z - U of every layer, in the memory format of its weight: what the gradient needs.
        self._anchors = [torch.empty_like(weight) for weight in self._weights]
        self._set_anchors()

    @torch.no_grad()
    def pull_(self, step_size: float) -> None:
        """Draw the weights to Z - U, in place, after a step of the optimizer.

        This is the penalty's part of a proximal gradient step, ``W <- (W + c * (Z - U)) / (1 + c)`` with
        ``c = step_size * rho``: it has the same fixed points as adding the penalty's gradient to the loss's, but no
        momentum of its own, which would swing with U's updates, and is stable for every rho.

        Parameters
        ----------
        step_size : float
            How far the optimizer moves a weight per unit of gradient: ``lr / (1 - momentum)`` for SGD.
        """
        c = step_size * self.rho
        torch._foreach_lerp_(self._weights, self._anchors, c / (1 + c))  # type: ignore[arg-type]

    @torch.no_grad()
    def update(self) -> Residuals:
        """Project, update U, and set rho for the steps to come.

        Raises
        ------
        TdcError
            If the weights are not finite.
        """
        if self._weights[0].is_cuda:
            torch.cuda.synchronize(self._weights[0].device)  # so that the time is the update's own
        start = time.perf_counter()
        before = [group.z for group in self._groups]
        for group in self._groups:
            group.project(self.config.sweeps)
        self._broadcast([group.z for group in self._groups])
        sums = torch.zeros(5, dtype=torch.float64, device=self._weights[0].device)
        for group, old in zip(self._groups, before, strict=True):
            w = group.stacked()
            difference = w - group.z
            group.u += difference
            norms = [t.norm() for t in (difference, group.z - old, w, group.z, group.u)]
            sums += torch.stack(norms).double().square()
        primal, moved, norm_w, norm_z, norm_u = sums.sqrt().tolist()
        if not math.isfinite(primal):
            raise TdcError("ADMM met NaN or infinite weights; lower the learning rate or rho_max")
        dual = self.rho * moved
        scale_primal = max(norm_w, norm_z) or 1.0
        scale_dual = self.rho * (norm_u if norm_u > primal else norm_z) or 1.0
        absolute = self.config.absolute_tolerance * math.sqrt(sum(weight.numel() for weight in self._weights))
        relative = self.config.relative_tolerance
        self.done += 1
        self.last = Residuals(
            rho=self.rho,
            primal=primal,
            dual=dual,
            primal_relative=primal / scale_primal,
            dual_relative=dual / scale_dual,
            converged=primal <= absolute + relative * scale_primal and dual <= absolute + relative * scale_dual,
            seconds=time.perf_counter() - start,
        )
        self._set_rho(self.last)
        self._set_anchors()
        return self.last

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors by name, and plain data."""
        tensors: dict[str, torch.Tensor] = {}
        for index, group in enumerate(self._groups):
            parts = {"z": group.z, "u": group.u, "out": group.factors.out, "in": group.factors.in_}
            tensors |= {f"{index}.{name}": tensor for name, tensor in parts.items()}
        return tensors, {"rho": self.rho, "done": self.done, "last": self.last and self.last.to_dict()}

    def load_state_dict(self, tensors: Mapping[str, torch.Tensor], data: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, for the same layers and ranks."""
        device = self._weights[0].device
        for index, group in enumerate(self._groups):
            z, u, out, in_ = (tensors[f"{index}.{name}"].to(device) for name in ("z", "u", "out", "in"))
            group.z, group.u, group.factors = z, u, Factors(out, in_)
        self.rho, self.done = data["rho"], data["done"]
        self.last = Residuals(**data["last"]) if data["last"] else None
        self._set_anchors()

    def _set_rho(self, residuals: Residuals) -> None:
        config, rho = self.config, self.rho
        if config.rho_schedule == "geometric":
            rho = config.rho * (config.rho_max / config.rho) ** min(self.done / self._updates, 1.0)
        elif config.rho_schedule == "balanced":
            if residuals.primal_relative > 10 * residuals.dual_relative:
                rho = min(2 * rho, config.rho_max)
            elif residuals.dual_relative > 10 * residuals.primal_relative:
                rho = rho / 2
        for group in self._groups:
            group.u *= self.rho / rho  # the scaled dual variable is the multiplier over rho
        self.rho = rho

    @torch.no_grad()
    def _set_anchors(self) -> None:
        anchors = iter(self._anchors)
        for group in self._groups:
            for value in group.z - group.u:
                next(anchors).copy_(value)


class _Group:
    """The layers of one shape and rank; z and u have shape (layers, out_channels, in_channels, h, w)."""

    @torch.no_grad()
    def __init__(self, names: list[str], weights: list[torch.nn.Parameter], ranks: Ranks) -> None:
        self.names = names
        self.weights = weights
        self.ranks = ranks
        kernels = self.stacked()
        core, self.factors = hooi(kernels, ranks, sweeps=5)
        self.z = compose(core, self.factors).contiguous()
        self.u = torch.zeros_like(self.z)

    def stacked(self) -> torch.Tensor:
        """The weights in float32, or float64 if they are."""
        dtype = torch.float64 if self.weights[0].dtype == torch.float64 else torch.float32
        return torch.stack([weight.detach().to(dtype) for weight in self.weights]).contiguous()

    def project(self, sweeps: int) -> None:
        core, self.factors = hooi(self.stacked() + self.u, self.ranks, self.factors, sweeps)
        self.z = compose(core, self.factors).contiguous()
