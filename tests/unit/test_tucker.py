import numpy as np
import pytest
import tensorly
from tensorly.decomposition import partial_tucker
from tensorly.tenalg import multi_mode_dot

from tdc_tvm.errors import TdcError
from tdc_tvm.tucker import ranks_by_energy, tucker2


def random_kernel(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def low_rank_kernel(shape, ranks, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    core = rng.standard_normal((*ranks, *shape[2:]))
    u_out = np.linalg.qr(rng.standard_normal((shape[0], ranks[0])))[0]
    u_in = np.linalg.qr(rng.standard_normal((shape[1], ranks[1])))[0]
    return np.einsum("na,abrs,cb->ncrs", u_out, core, u_in) + noise * rng.standard_normal(shape)


def composed(factors):
    return np.einsum("na,abrs,bc->ncrs", factors.u_out[..., 0, 0], factors.core, factors.u_in[..., 0, 0])


@pytest.mark.parametrize(
    "shape", [(8, 6, 3, 3), (6, 8, 3, 3), (5, 7, 1, 3), (9, 4, 5, 2), (64, 3, 3, 3), (1, 1, 3, 3), (4, 4, 7, 7)]
)
def test_full_rank_reproduces_the_kernel(shape):
    kernel = random_kernel(*shape)
    factors = tucker2(kernel, shape[:2])
    np.testing.assert_allclose(composed(factors), kernel, atol=1e-12)
    np.testing.assert_allclose(factors.kernel, kernel, atol=1e-12)
    assert factors.relative_error < 1e-12


@pytest.mark.parametrize("ranks", [(1, 1), (3, 5), (8, 2), (2, 6), (10, 1)])
def test_shapes_orthonormality_and_the_reported_error(ranks):
    kernel = random_kernel(12, 6, 3, 3)
    factors = tucker2(kernel, ranks)
    rank_out, rank_in = ranks
    assert factors.u_in.shape == (rank_in, 6, 1, 1)
    assert factors.core.shape == (rank_out, rank_in, 3, 3)
    assert factors.u_out.shape == (12, rank_out, 1, 1)
    u_in, u_out = factors.u_in[..., 0, 0], factors.u_out[..., 0, 0]
    np.testing.assert_allclose(u_in @ u_in.T, np.eye(rank_in), atol=1e-12)
    np.testing.assert_allclose(u_out.T @ u_out, np.eye(rank_out), atol=1e-12)
    error = np.linalg.norm(kernel - composed(factors)) / np.linalg.norm(kernel)
    assert factors.relative_error == pytest.approx(error, rel=1e-9)


def test_ranks_are_completed_where_the_decomposition_has_fewer(monkeypatch):
    """Versions of tensorly differ in this."""
    kernel = random_kernel(12, 6, 3, 3)
    whole = partial_tucker

    def fewer(*arguments, rank, **options):
        return whole(*arguments, rank=[rank[0] - 1, rank[1]], **options)

    monkeypatch.setattr("tensorly.decomposition.partial_tucker", fewer)
    factors = tucker2(kernel, (10, 2))
    assert factors.core.shape == (10, 2, 3, 3)
    u_out = factors.u_out[..., 0, 0]
    np.testing.assert_allclose(u_out.T @ u_out, np.eye(10), atol=1e-12)
    error = np.linalg.norm(kernel - composed(factors)) / np.linalg.norm(kernel)
    assert factors.relative_error == pytest.approx(error, rel=1e-9)


@pytest.mark.parametrize(
    ("shape", "ranks"), [((24, 16, 3, 3), (7, 9)), ((10, 20, 5, 5), (4, 4)), ((16, 16, 3, 1), (9, 3))]
)
def test_agrees_with_tensorly_on_its_own_svd(shape, ranks):
    kernel = random_kernel(*shape)
    (core, factors), _ = partial_tucker(kernel, rank=list(ranks), modes=[0, 1], n_iter_max=20, tol=1e-4, random_state=0)
    np.testing.assert_allclose(tucker2(kernel, ranks).kernel, multi_mode_dot(core, factors, modes=[0, 1]), atol=1e-9)


def test_finds_a_kernel_that_has_the_rank():
    kernel = low_rank_kernel((32, 24, 3, 3), (6, 5))
    assert tucker2(kernel, (6, 5)).relative_error < 1e-12
    noisy = low_rank_kernel((32, 24, 3, 3), (6, 5), noise=1e-3)
    noise = np.linalg.norm(noisy - kernel) / np.linalg.norm(noisy)
    assert tucker2(noisy, (6, 5)).relative_error < noise


def test_more_rank_means_less_error():
    kernel = random_kernel(16, 16, 3, 3)
    errors = [tucker2(kernel, (rank, rank)).relative_error for rank in (2, 4, 8, 12, 16)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_does_not_matter(scale):
    kernel = random_kernel(8, 8, 3, 3)
    assert tucker2(kernel * scale, (3, 4)).relative_error == pytest.approx(tucker2(kernel, (3, 4)).relative_error)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_keeps_the_type_and_repeats_to_the_bit(dtype):
    kernel = random_kernel(8, 6, 3, 3).astype(dtype)
    first, second = tucker2(kernel, (4, 3)), tucker2(kernel, (4, 3))
    for name in ("u_in", "core", "u_out"):
        assert getattr(first, name).dtype == dtype
        assert getattr(first, name).flags.c_contiguous
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_a_kernel_of_zeros_decomposes():
    factors = tucker2(np.zeros((4, 3, 3, 3), np.float32), (2, 3))
    assert factors.relative_error == 0.0
    assert not factors.kernel.any()


@pytest.mark.filterwarnings("error")
def test_a_rank_beyond_what_the_other_modes_leave_is_quiet_and_exact():
    kernel = random_kernel(16, 1, 3, 3)
    assert tucker2(kernel, (12, 1)).relative_error < 1e-12


def test_the_callers_tensorly_backend_is_not_touched():
    pytest.importorskip("torch", reason="TensorLy's other backend")
    tensorly.set_backend("pytorch")
    try:
        assert tucker2(random_kernel(8, 6, 3, 3), (3, 3)).relative_error < 1.0
        assert tensorly.get_backend() == "pytorch"
    finally:
        tensorly.set_backend("numpy")


@pytest.mark.parametrize(
    ("kernel", "ranks", "message"),
    [
        (random_kernel(8, 6, 3, 3), (0, 3), "rank_out of the kernel is 0; it must be from 1 to 8"),
        (random_kernel(8, 6, 3, 3), (8, 7), "rank_in of the kernel is 7; it must be from 1 to 6"),
        (random_kernel(8, 6, 3), (2, 2), r"found float64 of shape \(8, 6, 3\)"),
        (np.ones((8, 6, 3, 3), np.int8), (2, 2), "found int8"),
        (np.full((8, 6, 3, 3), np.nan), (2, 2), "NaN or infinite"),
    ],
)
def test_refuses_what_it_cannot_decompose(kernel, ranks, message):
    with pytest.raises(TdcError, match=message):
        tucker2(kernel, ranks)


@pytest.mark.parametrize(("energy", "expected"), [(0.3, 1), (0.5, 1), (0.63, 2), (0.87, 3), (0.99, 4)])
def test_energy_counts_squared_singular_values(energy, expected):
    # Both unfoldings have the squared singular values 8, 4, 2, 1 (of 15): kept shares 0.53, 0.8, 0.93, 1.
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.standard_normal((6, 4)))[0]
    right = np.linalg.qr(rng.standard_normal((5, 4)))[0]
    kernel = ((left * np.sqrt([8.0, 4.0, 2.0, 1.0])) @ right.T)[:, :, None, None]
    share = {1: 8 / 15, 2: 12 / 15, 3: 14 / 15, 4: 1.0}
    assert ranks_by_energy(kernel, energy) == (expected, expected)
    assert share[expected] >= energy


@pytest.mark.parametrize("energy", [1e-9, 0.5, 0.9, 1 - 1e-9])
def test_energy_ranks_match_a_full_svd(energy):
    kernel = low_rank_kernel((20, 12, 3, 3), (9, 7), noise=0.05)
    expected = []
    for mode in (0, 1):
        singular = np.linalg.svd(np.moveaxis(kernel, mode, 0).reshape(kernel.shape[mode], -1), compute_uv=False)
        kept = np.cumsum(singular**2) / np.sum(singular**2)
        expected.append(int(np.argmax(kept >= energy)) + 1)
    assert ranks_by_energy(kernel, energy) == tuple(expected)


def test_energy_never_gives_rank_zero():
    assert ranks_by_energy(np.zeros((4, 3, 3, 3)), 0.5) == (1, 1)


@pytest.mark.parametrize("energy", [0.0, 1.0, -0.1, 90.0, float("nan")])
def test_refuses_an_energy_outside_the_interval(energy):
    with pytest.raises(TdcError, match="between 0 and 1"):
        ranks_by_energy(random_kernel(4, 4, 3, 3), energy)
