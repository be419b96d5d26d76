"""Tucker-2 projection of many convolution kernels at once, on the device they lie on.

`tdc_tvm.tucker.tucker2` decomposes one kernel in float64 on the CPU; this does the same for a stack of
kernels in PyTorch, in their own precision, and can start from the factors of the last call.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan, Ranks
from tdc_tvm.tucker import TuckerFactors


class Factors(NamedTuple):
    """Orthonormal factors of a stack of kernels.

    ``out`` has shape (layers, out_channels, rank_out), ``in_`` (layers, in_channels, rank_in).
    """

    out: torch.Tensor
    in_: torch.Tensor


def hooi(
    kernels: torch.Tensor, ranks: tuple[int, int], start: Factors | None = None, sweeps: int = 1
) -> tuple[torch.Tensor, Factors]:
    """Higher-order orthogonal iteration for kernels of one shape and rank.

    Parameters
    ----------
    kernels : torch.Tensor
        Shape (layers, out_channels, in_channels, kernel_h, kernel_w), float32 or float64.
    ranks : tuple[int, int]
        (rank_out, rank_in).
    start : Factors, optional
        Factors of nearly the same kernels.  Each sweep is then one step of orthogonal iteration per
        mode (a QR decomposition of a tall matrix); without it, it starts from the truncated HOSVD and
        solves each mode exactly (an eigendecomposition of its Gram matrix).
    sweeps : int
        Passes over both modes; 0 without ``start`` is the truncated HOSVD.

    Returns
    -------
    core : torch.Tensor
        Shape (layers, rank_out, rank_in, kernel_h, kernel_w).
    factors : Factors

    Notes
    -----
    De Lathauwer, De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000; orthogonal
    iteration: Golub and Van Loan, Matrix Computations, 4th ed., section 8.2.4.
    """
    rank_out, rank_in = ranks
    swapped = kernels.transpose(1, 2).contiguous()
    out, in_ = start or Factors(_leading(kernels, rank_out, None), _leading(swapped, rank_in, None))
    for _ in range(sweeps):
        out = _leading(_multiply(in_.mT, swapped).transpose(1, 2), rank_out, None if start is None else out)
        in_ = _leading(_multiply(out.mT, kernels).transpose(1, 2), rank_in, None if start is None else in_)
    core = _multiply(in_.mT, _multiply(out.mT, kernels).transpose(1, 2)).transpose(1, 2)
    # Contiguous: products with the columns of a QR in LAPACK's order round otherwise than with a reloaded copy.
    return core, Factors(out.contiguous(), in_.contiguous())


def compose(core: torch.Tensor, factors: Factors) -> torch.Tensor:
    """The kernels that cores and factors stand for, shape (layers, out_channels, in_channels, h, w)."""
    return _multiply(factors.in_, _multiply(factors.out, core).transpose(1, 2)).transpose(1, 2)


def decompose_kernels(model: nn.Module, plan: DecompositionPlan, sweeps: int = 10) -> dict[str, TuckerFactors]:
    """Decompose the layers that a plan names, in float64.

    Parameters
    ----------
    model : nn.Module
        Has a convolution of every name in the plan; kernels on a GPU are decomposed there.
    plan : DecompositionPlan
    sweeps : int
        Of orthogonal iteration; 0 gives the truncated HOSVD.

    Raises
    ------
    TdcError
        If a kernel is not finite.
    """
    groups: dict[tuple[torch.Size, Ranks], list[str]] = defaultdict(list)
    weights: dict[str, torch.Tensor] = {
        name: model.get_submodule(name).weight.detach()  # type: ignore[operator]
        for name in plan.layers
    }
    for name, ranks in plan.layers.items():
        groups[weights[name].shape, ranks].append(name)
    factors: dict[str, TuckerFactors] = {}
    for (_, ranks), names in groups.items():
        kernels = torch.stack([weights[name].double() for name in names])
        finite = kernels.isfinite().flatten(1).all(1).tolist()
        if not all(finite):
            raise TdcError(
                f"layer {names[finite.index(False)]!r}: the kernel has NaN or infinite weights and cannot be decomposed"
            )
        core, basis = hooi(kernels, ranks, sweeps=sweeps)
        errors = relative_errors(kernels, compose(core, basis)).tolist()
        dtype = weights[names[0]].dtype
        dtype = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        stages = [t.to("cpu", dtype).contiguous().numpy() for t in (basis.in_.mT, core, basis.out)]
        for index, name in enumerate(names):
            u_in, kernel, u_out = (stage[index] for stage in stages)
            factors[name] = TuckerFactors(u_in[:, :, None, None], kernel, u_out[:, :, None, None], errors[index])
    return factors


def relative_errors(kernels: torch.Tensor, approximations: torch.Tensor) -> torch.Tensor:
    """``||K - K'|| / ||K||`` of each layer of a stack (Frobenius norm; 0 where K is 0), shape (layers,)."""
    norms = kernels.flatten(1).norm(dim=1)
    return (kernels - approximations).flatten(1).norm(dim=1) / norms.clamp_min(torch.finfo(norms.dtype).tiny)


def _multiply(matrices: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Multiply the first channel mode: (layers, a, b) by (layers, b, c, h, w) gives (layers, a, c, h, w)."""
    return (matrices @ kernels.flatten(2)).unflatten(2, kernels.shape[2:])


def _leading(kernels: torch.Tensor, rank: int, start: torch.Tensor | None) -> torch.Tensor:
    """An orthonormal basis (layers, channels, rank) of the dominant subspace of the first channel mode."""
    unfolded = kernels.flatten(2)
    gram = unfolded @ unfolded.mT
    if start is None:
        return torch.linalg.eigh(gram)[1][..., -rank:].flip(-1)
    return torch.linalg.qr(gram @ start)[0]
