"""Tucker-2 decomposition of convolution kernels, on NumPy arrays."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tdc_tvm.errors import TdcError


@dataclass(frozen=True, eq=False)
class TuckerFactors:
    """The three kernels that stand for one, ready to be used as convolution weights (OIHW).

    Parameters
    ----------
    u_in : numpy.ndarray
        Reducing 1x1, shape ``(rank_in, in_channels, 1, 1)``; its rows are orthonormal.
    core : numpy.ndarray
        Shape ``(rank_out, rank_in, kernel_h, kernel_w)``; carries stride, padding and dilation.
    u_out : numpy.ndarray
        Expanding 1x1, shape ``(out_channels, rank_out, 1, 1)``; its columns are orthonormal.
    relative_error : float
        ``||K - K'|| / ||K||`` in the Frobenius norm, K' being the kernel that the three stand for.
    """

    u_in: np.ndarray
    core: np.ndarray
    u_out: np.ndarray
    relative_error: float

    @property
    def kernel(self) -> np.ndarray:
        """The kernel that the three stand for, shape ``(out_channels, in_channels, kernel_h, kernel_w)``."""
        return _compose(self.u_in, self.core, self.u_out)


def tucker2(
    kernel: np.ndarray, ranks: tuple[int, int], *, max_iterations: int = 20, tolerance: float = 1e-4
) -> TuckerFactors:
    """Decompose a kernel along its channel modes: ``K ~ core x_0 U_out x_1 U_in``.

    Parameters
    ----------
    kernel : numpy.ndarray
        Shape ``(out_channels, in_channels, kernel_h, kernel_w)``, a floating-point type.
    ranks : tuple[int, int]
        ``(rank_out, rank_in)``, each between 1 and the channels of its mode.
    max_iterations : int
        Limit of the orthogonal iteration.
    tolerance : float
        The iteration ends when the relative error improves by less.

    Returns
    -------
    TuckerFactors
        Computed in float64, returned in the kernel's type.  The same input gives the same factors.

    Raises
    ------
    TdcError
        If the kernel is not a finite four-dimensional floating-point array, or a rank does not fit.

    Notes
    -----
    Higher-order orthogonal iteration, started from the truncated higher-order SVD (De Lathauwer,
    De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000); Tucker-2 of a convolution after
    Kim et al., ICLR 2016.  A full rank reproduces the kernel.
    """
    kernel = _checked(kernel)
    check_ranks(ranks, kernel.shape[:2])
    exact = kernel.astype(np.float64)
    norm = float(np.linalg.norm(exact))
    if norm == 0.0:
        u_out, u_in = (np.eye(channels, rank) for channels, rank in zip(kernel.shape[:2], ranks, strict=True))
        core = np.zeros((*ranks, *kernel.shape[2:]))
    else:
        from tensorly.decomposition import partial_tucker

        with _numpy_backend(), warnings.catch_warnings():
            # A rank may exceed what the other modes leave of it (64 output channels of 3 x 3 x 3 inputs).
            warnings.filterwarnings("ignore", message="Trying to compute SVD with n_eigenvecs")
            (core, (u_out, u_in)), _ = partial_tucker(
                exact / norm,
                rank=list(ranks),
                modes=[0, 1],
                n_iter_max=max_iterations,
                init="svd",
                tol=tolerance,
                random_state=0,
            )
        core = core * norm
        if core.shape[:2] != tuple(ranks):
            # What is left of a mode can have fewer directions than its rank: any others complete it.
            u_out, u_in = (_completed(factor, rank) for factor, rank in zip((u_out, u_in), ranks, strict=True))
            core = np.einsum("ncrs,na,cb->abrs", exact, u_out, u_in, optimize=True)
    stages = u_in.T[:, :, None, None], core, u_out[:, :, None, None]
    error = float(np.linalg.norm(exact - _compose(*stages))) / norm if norm else 0.0
    u_in, core, u_out = (np.ascontiguousarray(stage, dtype=kernel.dtype) for stage in stages)
    return TuckerFactors(u_in, core, u_out, error)


def _completed(factor: np.ndarray, rank: int) -> np.ndarray:
    """An orthonormal matrix with as many columns as ``rank``, whose first are those of ``factor``."""
    known = factor.shape[1]
    basis, _ = np.linalg.qr(np.concatenate([factor, np.eye(factor.shape[0])], axis=1))
    return np.concatenate([factor, basis[:, known:rank]], axis=1)


def ranks_by_energy(kernel: np.ndarray, energy: float) -> tuple[int, int]:
    """The smallest ranks that keep a share of each channel unfolding's energy.

    Parameters
    ----------
    kernel : numpy.ndarray
        Shape ``(out_channels, in_channels, kernel_h, kernel_w)``.
    energy : float
        Share of the sum of squared singular values to keep, between 0 and 1 (exclusive).

    Returns
    -------
    tuple[int, int]
        ``(rank_out, rank_in)``, each at least 1.

    Raises
    ------
    TdcError
        If the kernel is not a finite four-dimensional floating-point array, or ``energy`` is not in
        the open interval.
    """
    kernel = _checked(kernel).astype(np.float64)
    if not 0.0 < energy < 1.0:
        raise TdcError(f"energy {energy} is not between 0 and 1 (exclusive); 0.9 keeps 90 % of it")
    return _rank_of_mode(kernel, 0, energy), _rank_of_mode(kernel, 1, energy)


def truncation_errors(kernel: np.ndarray) -> np.ndarray:
    """The error of the truncated higher-order SVD, for all ranks at once.

    Parameters
    ----------
    kernel : numpy.ndarray
        Shape ``(out_channels, in_channels, kernel_h, kernel_w)``, a floating-point type.

    Returns
    -------
    numpy.ndarray
        Shape ``(out_channels, in_channels)``, float64: at ``[rank_out - 1, rank_in - 1]`` stands
        ``||K - K'||^2 / ||K||^2``; zeros for a kernel of zeros.  The iteration of `tucker2` begins there
        and ends at an error that is not larger.

    Raises
    ------
    TdcError
        If the kernel is not a finite four-dimensional floating-point array.

    Notes
    -----
    The factors of lower ranks are the first columns of the full ones, whose core has the kernel's norm:
    what is lost is the energy of the core outside of its first ``rank_out x rank_in`` slices (De Lathauwer,
    De Moor and Vandewalle, SIAM J. Matrix Anal. Appl. 21(4), 2000, section 3).
    """
    exact = _checked(kernel).astype(np.float64)
    norm = float(np.linalg.norm(exact))
    if norm == 0.0:
        return np.zeros(exact.shape[:2])
    core = exact / norm
    for mode in (0, 1):
        unfolded = np.moveaxis(exact / norm, mode, 0).reshape(exact.shape[mode], -1)
        _, vectors = np.linalg.eigh(unfolded @ unfolded.T)
        core = np.moveaxis(np.tensordot(vectors[:, ::-1].T, core, axes=(1, mode)), 0, mode)
    energy = np.square(core).sum(axis=(2, 3))
    # What lies below the first rows, and to the right of the first columns within these rows; one minus the energy
    # that is kept would cancel.
    below = energy[::-1].sum(axis=1).cumsum()[::-1] - energy.sum(axis=1)
    right = (energy[:, ::-1].cumsum(axis=1)[:, ::-1] - energy).cumsum(axis=0)
    return (below[:, None] + right).clip(min=0.0)


def check_ranks(ranks: tuple[int, int], channels: tuple[int, ...], layer: str = "the kernel") -> None:
    """Refuse ranks that do not fit ``channels``, given as ``(out_channels, in_channels)``.

    Raises
    ------
    TdcError
        If a rank is below 1 or above the channels of its mode.
    """
    for name, rank, limit in zip(("rank_out", "rank_in"), ranks, channels, strict=True):
        if not 1 <= rank <= limit:
            side = "output" if name == "rank_out" else "input"
            raise TdcError(f"{name} of {layer} is {rank}; it must be from 1 to {limit}, the number of {side} channels")


def _checked(kernel: np.ndarray) -> np.ndarray:
    kernel = np.asarray(kernel)
    if kernel.ndim != 4 or kernel.size == 0 or not np.issubdtype(kernel.dtype, np.floating):
        raise TdcError(
            f"expected a floating-point kernel (out_channels, in_channels, height, width); "
            f"found {kernel.dtype} of shape {kernel.shape}"
        )
    if not np.isfinite(kernel).all():
        raise TdcError("the kernel has NaN or infinite weights and cannot be decomposed; check where it comes from")
    return kernel


def _rank_of_mode(kernel: np.ndarray, mode: int, energy: float) -> int:
    unfolded = np.moveaxis(kernel, mode, 0).reshape(kernel.shape[mode], -1)
    # Eigenvalues of the Gram matrix are the squared singular values, much cheaper than an SVD.
    squared = np.linalg.eigvalsh(unfolded @ unfolded.T)[::-1].clip(min=0.0)
    kept = np.cumsum(squared)
    return min(int(np.searchsorted(kept, energy * kept[-1])) + 1, kernel.shape[mode])


def _compose(u_in: np.ndarray, core: np.ndarray, u_out: np.ndarray) -> np.ndarray:
    expanded = np.tensordot(u_out[:, :, 0, 0], core, axes=1)
    return np.moveaxis(np.tensordot(expanded, u_in[:, :, 0, 0], axes=(1, 0)), 3, 1)


@contextmanager
def _numpy_backend() -> Iterator[None]:
    """Let TensorLy work on NumPy in this thread; the caller's own choice of backend is not touched."""
    import tensorly
    from tensorly.backend.numpy_backend import NumpyBackend

    backend = NumpyBackend()
    backend.svd = _svd_by_gram
    theirs = tensorly.backend.current_backend()
    tensorly.set_backend(backend, local_threadsafe=True)
    try:
        yield
    finally:
        tensorly.set_backend(theirs, local_threadsafe=True)


def _svd_by_gram(matrix: np.ndarray, full_matrices: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A thin SVD from the Gram matrix of the rows, ten times as fast for the wide matrices met here.

    Only the span of the left vectors enters the decomposition.  They are orthonormal to machine
    precision; what the squaring blurs is vectors of less than 1e-16 of the energy.
    """
    values, left = np.linalg.eigh(matrix @ matrix.T)
    count = min(matrix.shape)
    left = left[:, ::-1][:, :count]
    singular = np.sqrt(values[::-1][:count].clip(min=0.0))
    right = left.T @ matrix / np.maximum(singular, np.finfo(np.float64).tiny)[:, None]
    return left, singular, right
