import numpy as np
import pytest
import torch
from torch import nn

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan, Ranks
from tdc_tvm.training.admm import Admm, AdmmConfig
from tdc_tvm.training.hooi import compose, decompose_kernels, hooi, relative_errors
from tdc_tvm.tucker import tucker2


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("shape", "ranks"),
    [((2, 16, 12, 3, 3), (6, 5)), ((1, 8, 8, 1, 5), (8, 3)), ((3, 12, 4, 2, 2), (3, 4)), ((1, 9, 2, 1, 1), (2, 2))],
)
def test_the_projection_is_that_of_tensorlys_partial_tucker(shape, ranks):
    kernels = torch.randn(shape, dtype=torch.float64)
    core, factors = hooi(kernels, ranks, sweeps=40)
    ours = compose(core, factors)
    for kernel, approximation in zip(kernels, ours, strict=True):
        theirs = tucker2(kernel.numpy(), ranks, max_iterations=40, tolerance=0.0)
        np.testing.assert_allclose(approximation.numpy(), theirs.kernel, atol=1e-6)
    identity = torch.eye(ranks[0], dtype=torch.float64).expand(shape[0], -1, -1)
    torch.testing.assert_close(factors.out.mT @ factors.out, identity)


def test_no_sweep_is_the_truncated_hosvd():
    kernel = torch.randn(1, 10, 7, 3, 3, dtype=torch.float64)
    core, factors = hooi(kernel, (4, 3), sweeps=0)
    for mode, basis in ((0, factors.out), (1, factors.in_)):
        unfolded = np.moveaxis(kernel[0].numpy(), mode, 0).reshape(kernel.shape[mode + 1], -1)
        left = np.linalg.svd(unfolded, full_matrices=False)[0][:, : basis.shape[2]]
        ours = basis[0].numpy()
        np.testing.assert_allclose(ours @ ours.T, left @ left.T, atol=1e-10)
    exact = torch.einsum("lncrs,lna,lcb->labrs", kernel, factors.out, factors.in_)
    torch.testing.assert_close(core, exact)


def test_a_warm_start_follows_kernels_that_change():
    kernels = torch.randn(2, 24, 16, 3, 3, dtype=torch.float64)
    _, factors = hooi(kernels, (8, 6), sweeps=30)
    for _ in range(20):
        kernels += 0.01 * torch.randn_like(kernels)
        core, factors = hooi(kernels, (8, 6), factors, sweeps=1)
    warm = relative_errors(kernels, compose(core, factors))
    core, cold_factors = hooi(kernels, (8, 6), sweeps=30)
    cold = relative_errors(kernels, compose(core, cold_factors))
    assert (warm <= 1.005 * cold).all()


def test_kernels_are_decomposed_as_tucker2_does_and_nan_is_refused():
    model = nn.Sequential(nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    plan = DecompositionPlan({"0": (4, 3), "1": (3, 3), "2": (3, 3)})
    factors = decompose_kernels(model, plan, sweeps=30)
    for name, ranks in plan.layers.items():
        kernel = model.get_submodule(name).weight.detach().numpy()
        expected = tucker2(kernel, ranks, max_iterations=30, tolerance=0.0)
        np.testing.assert_allclose(factors[name].kernel, expected.kernel, atol=1e-4)
        assert factors[name].relative_error == pytest.approx(expected.relative_error, rel=1e-4)
    model[1].weight.data[0] = torch.nan
    with pytest.raises(TdcError, match="layer '1'"):
        decompose_kernels(model, plan)


def weights_and_admm(config, updates=40, dtype=torch.float32):
    weights = {name: nn.Parameter(torch.randn(12, 10, 3, 3, dtype=dtype)) for name in ("a", "b")}
    weights["c"] = nn.Parameter(torch.randn(6, 12, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last))
    ranks = {"a": Ranks(4, 3), "b": Ranks(4, 3), "c": Ranks(3, 5)}
    return weights, Admm(weights, ranks, config, updates)


def test_a_pull_is_the_proximal_step_of_the_penalty():
    weights, admm = weights_and_admm(AdmmConfig(rho=0.7, rho_schedule="constant"), dtype=torch.float64)
    for weight in weights.values():
        weight.data += 0.1
    admm.update()
    tensors, _ = admm.state_dict()
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    admm.pull_(0.3)
    # Minimises 0.5 * ||W - W_before||^2 + 0.3 * 0.7 / 2 * ||W - Z + U||^2: the gradient vanishes.
    for name, (group, index) in {"a": (0, 0), "b": (0, 1), "c": (1, 0)}.items():
        z, u = tensors[f"{group}.z"][index], tensors[f"{group}.u"][index]
        w = weights[name].detach()
        torch.testing.assert_close(w - before[name], -0.3 * 0.7 * (w - z + u))
        assert not torch.equal(w, before[name])


def test_admm_reaches_low_rank_near_the_optimum():
    """A least-squares loss, whose best weights of low rank are known: the projection of the target."""
    weights, admm = weights_and_admm(AdmmConfig(rho=0.05, rho_max=5.0, relative_tolerance=0.02), updates=60)
    targets = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.SGD(weights.values(), lr=0.3)
    residuals = []
    for _ in range(60):
        for _ in range(10):
            optimizer.zero_grad()
            (0.5 * sum((weights[name] - targets[name]).square().sum() for name in weights)).backward()
            optimizer.step()
            admm.pull_(0.3)
        residuals.append(admm.update())
    assert residuals[-1].primal_relative < 1e-2 < residuals[0].primal_relative
    assert residuals[-1].rho == pytest.approx(5.0, rel=0.1)
    assert residuals[-1].converged
    for name, ranks in (("a", (4, 3)), ("c", (3, 5))):
        best = tucker2(targets[name].double().numpy(), ranks, max_iterations=50, tolerance=0.0)
        distance = np.linalg.norm(weights[name].detach().numpy() - targets[name].numpy())
        assert distance <= 1.02 * best.relative_error * np.linalg.norm(targets[name].numpy())


def test_balancing_keeps_the_multiplier_and_moves_rho_to_the_larger_residual():
    weights, admm = weights_and_admm(AdmmConfig(rho=0.01, rho_schedule="balanced", rho_max=0.04))
    before = admm.update()  # W is far from Z, and Z stays: primal over dual
    tensors, data = admm.state_dict()
    assert before.primal_relative > 10 * before.dual_relative
    assert data["rho"] == 0.02
    w = torch.stack([weights["a"], weights["b"]]).detach()
    torch.testing.assert_close(tensors["0.u"] * 2, w - tensors["0.z"])  # rho * U is as before
    for _ in range(5):
        admm.update()
    assert admm.rho <= 0.04


def test_the_state_continues_bit_for_bit():
    def steps(weights, admm, count):
        for _ in range(count):
            for weight in weights.values():
                weight.data *= 0.99
            admm.pull_(0.1)
            admm.update()

    torch.manual_seed(1)
    weights, admm = weights_and_admm(AdmmConfig())
    steps(weights, admm, 3)
    tensors, data = admm.state_dict()
    # As a file gives them back: in the default memory format.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    copies = {name: nn.Parameter(weight.detach().clone()) for name, weight in weights.items()}
    steps(weights, admm, 4)
    _, other = weights_and_admm(AdmmConfig())
    other = Admm(copies, {"a": Ranks(4, 3), "b": Ranks(4, 3), "c": Ranks(3, 5)}, AdmmConfig(), 40)
    other.load_state_dict(tensors, data)
    steps(copies, other, 4)
    assert all(torch.equal(weights[name], copies[name]) for name in weights)
    assert other.rho == admm.rho


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AdmmConfig(rho_schedule="steep"), "rho_schedule is 'steep'"),
        (lambda: AdmmConfig(rho=2.0), "expected 0 < rho <= rho_max"),
        (lambda: AdmmConfig(projection_interval=0), "at least 1"),
        (lambda: Admm({}, {}, AdmmConfig(), 1), "names no layers"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(TdcError, match=message):
        call()
