import dataclasses
import itertools
import json
import os
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import tdc_tvm
from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan, Ranks
from tdc_tvm.quiet import without_chatter
from tdc_tvm.schedules import backend
from tdc_tvm.schedules.device import GPUS
from tdc_tvm.schedules.shape import Conv2dShape, TuckerConvShape
from tdc_tvm.training import RankProblem, apply_plan, choose_ranks, export_onnx, latency_table
from tdc_tvm.training.knapsack import solve_knapsack, undominated
from tdc_tvm.training.latency_table import LatencyTable, candidate_ranks, candidates
from tdc_tvm.training.ranks import _Layer, find_device
from tdc_tvm.training.ranks_report import as_text, comparison, write_front
from tdc_tvm.training.sensitivity import cross_entropy, sensitivities
from tdc_tvm.tucker import truncation_errors, tucker2

H100 = GPUS["H100"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def truncated(kernel, *ranks):
    """The truncated higher-order SVD by projections from NumPy's SVD."""
    result = kernel
    for mode, rank in enumerate(ranks):
        unfolded = np.moveaxis(kernel, mode, 0).reshape(kernel.shape[mode], -1)
        left = np.linalg.svd(unfolded)[0][:, :rank]
        result = np.moveaxis(np.tensordot(left @ left.T, result, axes=(1, mode)), 0, mode)
    return result


@pytest.mark.parametrize("shape", [(6, 5, 3, 2), (4, 7, 1, 1), (9, 2, 2, 1)])
def test_one_hosvd_gives_the_error_of_all_ranks(shape):
    # Slices of falling size, as of trained kernels.
    scales = 0.5 ** np.add.outer(np.arange(shape[0]), np.arange(shape[1]))[:, :, None, None]
    kernel = np.random.default_rng(0).standard_normal(shape) * scales
    errors = truncation_errors(kernel)
    assert errors.shape == shape[:2]
    total = np.square(kernel).sum()
    for rank_out, rank_in in itertools.product(range(1, shape[0] + 1), range(1, shape[1] + 1)):
        expected = np.square(kernel - truncated(kernel, rank_out, rank_in)).sum() / total
        assert errors[rank_out - 1, rank_in - 1] == pytest.approx(expected, rel=1e-9, abs=1e-14)
        # The iteration only improves on it, and by a factor of two at most (De Lathauwer, property 10).
        found = tucker2(kernel, (rank_out, rank_in)).relative_error ** 2
        assert found <= expected * (1 + 1e-9) + 1e-14
        assert expected <= 2 * found * (1 + 1e-9) + 1e-14
    assert errors[-1, -1] == pytest.approx(0, abs=1e-14)


def test_errors_of_kernels_that_are_zero_or_not_finite():
    assert not truncation_errors(np.zeros((3, 2, 3, 3))).any()
    with pytest.raises(TdcError, match="NaN or infinite"):
        truncation_errors(np.full((3, 2, 3, 3), np.inf))


def brute_force(costs, limits):
    """The least cost of all combinations within the limits; None if there is none."""
    best = None
    for choice in itertools.product(*(range(len(options)) for options in costs)):
        if all(sum(row[i] for row, i in zip(rows, choice, strict=True)) <= limit for rows, limit in limits):
            cost = sum(row[i] for row, i in zip(costs, choice, strict=True))
            best = cost if best is None else min(best, cost)
    return best


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("seed", range(12))
def test_the_knapsack_is_solved_as_by_trying_everything(seed, count):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, 5)
    scale = 10.0 ** rng.integers(-9, 9)
    costs = [rng.integers(0, 20, size) * scale for size in sizes]
    limits = []
    for _ in range(count):
        rows = [rng.integers(0, 20, size).astype(float) for size in sizes]
        limits.append((rows, float(rng.integers(20, 60))))
    expected = brute_force(costs, limits)
    if expected is None:
        with pytest.raises(TdcError, match="no choice"):
            solve_knapsack(costs, limits, gap=0.0)
        return
    chosen, gap = solve_knapsack(costs, limits, gap=0.0)
    assert gap == 0
    assert sum(row[i] for row, i in zip(costs, chosen, strict=True)) == pytest.approx(expected, rel=1e-9)
    for rows, limit in limits:
        assert sum(row[i] for row, i in zip(rows, chosen, strict=True)) <= limit


def test_the_solvers_own_lines_do_not_reach_standard_output(capfd):
    with without_chatter(1):
        os.write(1, b"HighsMipSolverData::transformNewIntegerFeasibleSolution tmpSolver.run();\nothers\n")
    assert capfd.readouterr().out == "others\n"


def test_a_limit_without_room_leaves_the_least():
    costs, rows = [np.array([3.0, 1.0]), np.array([5.0, 4.0])], [np.array([0.0, 1e-6]), np.array([0.0, 2.0])]
    assert solve_knapsack(costs, [(rows, 0.0)])[0] == [0, 0]


def test_dominated_options_are_left_out():
    costs = np.array([[1, 5], [2, 5], [2, 4], [3, 4], [1, 5], [0, 9]])
    assert undominated(costs).tolist() == [0, 2, 5]


def problem(seed=0, layers=4, options=6):
    """Layers of random latencies, multiply-adds and errors; the first option is dense, without error."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(layers):
        errors = np.concatenate([[0.0], rng.uniform(0.1, 1, options - 1)])
        made.append(
            _Layer(
                f"conv{i}",
                "8x8x16 -> 16, 3x3",
                None,
                (None, *(Ranks(8 * j, 8) for j in range(1, options))),
                np.concatenate([[10.0], rng.uniform(4, 11, options - 1)]),
                np.concatenate([[1000], rng.integers(100, 1000, options - 1)]),
                errors,
                errors * rng.uniform(0.5, 2),
            )
        )
    return RankProblem("net", "H100", "fp32", "measured", "sum", 3.0, tuple(made))


def combinations(p, theta):
    """All plans as (latency, macs, error), those of layers that are not fast enough left out."""
    allowed = [
        [j for j in range(len(layer.options)) if j == 0 or layer.latency_us[j] <= (1 - theta) * layer.latency_us[0]]
        for layer in p.layers
    ]
    for choice in itertools.product(*allowed):
        picked = list(zip(p.layers, choice, strict=True))
        yield (
            p.other_us + sum(layer.latency_us[j] for layer, j in picked),
            sum(layer.macs[j] for layer, j in picked),
            sum(layer.proxy[j] for layer, j in picked),
        )


@pytest.mark.parametrize("theta", [0.0, 0.15, 0.4])
@pytest.mark.parametrize("seed", range(4))
def test_budgets_are_met_at_the_least_cost(seed, theta):
    p = problem(seed)
    plans = np.array(list(combinations(p, theta)))
    every = np.array(list(combinations(p, -np.inf)))
    dense_us, dense_macs = p.other_us + 40.0, 4000

    for choice in (p.solve(latency_us=35.0, theta=theta, gap=0), p.solve(speedup=dense_us / 35.0, theta=theta, gap=0)):
        assert choice.latency_us <= 35.0 * (1 + 1e-9)
        assert choice.error == pytest.approx(plans[plans[:, 0] <= 35.0][:, 2].min())

    choice = p.solve(max_error=1.0, theta=theta, gap=0)
    assert choice.error <= 1.0
    least = plans[plans[:, 2] <= 1.0][:, 0].min()
    assert choice.latency_us == pytest.approx(least)

    choice = p.solve(mac_reduction=0.3, theta=theta, gap=0)
    fit = plans[plans[:, 1] <= 0.7 * dense_macs]
    fit = fit[fit[:, 2] <= 1.1 * fit[:, 2].min()]
    assert choice.mac_reduction >= 0.3
    assert choice.latency_us == pytest.approx(fit[:, 0].min())

    assert p.by_macs(1.0, gap=0).macs == every[every[:, 2] <= 1.0][:, 1].min()
    by_macs = p.solve(mac_reduction=0.3, objective="macs", theta=theta, gap=0)
    assert by_macs.error == pytest.approx(every[every[:, 1] <= 0.7 * dense_macs][:, 2].min())


def test_of_equally_fast_plans_the_one_of_least_error():
    error = np.array([0.0, 0.2, 0.5])
    layer = _Layer("a", "", None, (None, Ranks(16, 8), Ranks(8, 8)), np.array([10.0, 5.0, 5.0]),
                   np.array([100, 60, 40]), error, error)  # fmt: skip
    p = RankProblem("net", "H100", "fp32", "measured", "sum", 0.0, (layer,))
    assert p.solve(max_error=1.0).layers[0].ranks == (16, 8)
    assert p.by_macs(1.0).layers[0].ranks == (8, 8)


def test_the_front_falls_from_the_original_to_the_fastest():
    p = problem()
    front = sorted(p.front(points=9), key=lambda choice: choice.latency_us)
    times, errors = [c.latency_us for c in front], [c.error for c in front]
    assert times[-1] == 43.0
    assert errors[-1] == 0
    assert times[0] == pytest.approx(min(plan[0] for plan in combinations(p, 0.15)))
    assert all(a > b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "found no budget; give exactly one of mac_reduction, latency_us, speedup, max_error"),
        ({"speedup": 2.0, "max_error": 1.0}, "found speedup and max_error; give exactly one"),
        ({"mac_reduction": 60}, r"found mac_reduction 60; expected a share between 0 and 1 \(exclusive\), such as 0.6"),
        ({"mac_reduction": float("nan")}, "found mac_reduction nan"),
        ({"speedup": 0.5}, "found speedup 0.5; expected a ratio above 1"),
        ({"latency_us": -1}, "expected a positive time in microseconds"),
        ({"max_error": 1.0, "theta": 15}, "found theta 15; expected a share from 0 to below 1"),
        ({"max_error": 1.0, "objective": "flops"}, "found the objective 'flops'; use 'latency' or 'macs'"),
        ({"latency_us": 30, "objective": "macs"}, "know no latency; give mac_reduction or max_error"),
        ({"latency_us": 5.0}, r"5.0 us cannot be reached: the least predicted is \d+.\d us, 43.0 us for the original"),
        ({"latency_us": 5.0, "theta": 0.0}, "ask for more time$"),
        ({"mac_reduction": 0.999, "theta": 0.0}, "ask for fewer$"),
        (
            {"mac_reduction": 0.95, "theta": 0.3},
            r"95.0% fewer MACs cannot be reached: [\d.]+% is the most, as \d of 4 layers with a Tucker form have ranks"
            r" that are 30% faster .* lower theta \(at 0: up to ",
        ),
    ],
)
def test_budgets_that_cannot_be(options, message):
    with pytest.raises(TdcError, match=message):
        problem().solve(**options)


def test_ranks_are_aligned_and_only_where_something_is_saved():
    assert candidate_ranks(60) == [8, 16, 24, 32, 40, 48, 56, 60]
    assert candidate_ranks(128) == [16, 32, 48, 64, 80, 96, 112, 128]
    assert candidate_ranks(256) == [16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256]
    dense = Conv2dShape(1, 14, 14, 64, 64, (3, 3), padding=(1, 1, 1, 1))
    pairs = candidates(dense)
    assert Ranks(64, 48) in pairs
    assert Ranks(64, 64) not in pairs
    assert all(TuckerConvShape(dense, r.rank_in, r.rank_out).macs < dense.macs for r in pairs)
    assert not candidates(Conv2dShape(1, 14, 14, 3, 64, (3, 3)))


class Net(nn.Module):
    """A stem of three channels, a layer worth ranks, one used twice, and what has no Tucker form."""

    def __init__(self, channels=64):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(channels)
        self.body = nn.Conv2d(channels, channels, 3, padding="same", bias=False)
        self.twice = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.point = nn.Conv2d(channels, channels, 1)
        self.grouped = nn.Conv2d(channels, channels, 3, groups=channels)
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        x = torch.relu(self.body(torch.relu(self.norm(self.stem(x)))))
        x = self.grouped(self.point(torch.relu(self.twice(torch.relu(self.twice(x))))))
        return self.head(x.mean((2, 3)))


def coarse(monkeypatch):
    monkeypatch.setattr(latency_table, "candidate_ranks", lambda channels: [channels // 4, channels // 2, channels])


def test_latencies_are_what_the_schedules_model_says(monkeypatch):
    coarse(monkeypatch)
    p = RankProblem.of(Net(), (2, 3, 32, 32), "h100", precision="tf32")
    layers = {layer.name: layer for layer in p.layers}
    choose = backend(H100).choose
    body = Conv2dShape(2, 16, 16, 64, 64, (3, 3), padding=(1, 1, 1, 1), precision="tf32")
    twice = Conv2dShape(2, 16, 16, 64, 64, (3, 1), padding=(1, 0, 1, 0), precision="tf32")
    assert layers["body"].latency_us[0] == choose(body, H100)[1].latency_us
    assert layers["twice"].latency_us[0] == 2 * choose(twice, H100)[1].latency_us
    assert layers["twice"].macs[0] == 2 * twice.macs
    at = layers["body"].options.index((16, 32))
    tucker = TuckerConvShape(body, rank_in=32, rank_out=16)
    assert layers["body"].latency_us[at] == choose(tucker, H100)[1].latency_us
    assert layers["body"].macs[at] == tucker.macs
    depthwise = Conv2dShape(2, 16, 16, 64, 64, (3, 3), groups=64)
    assert layers["grouped"].latency_us[0] == choose(depthwise, H100)[1].latency_us
    assert p.other_us == choose(Conv2dShape(2, 1, 1, 64, 10, precision="tf32"), H100)[1].latency_us
    assert {name for name, layer in layers.items() if len(layer.options) > 1} == {"body", "twice"}


def measured(tmp_path, body_us, **changes):
    """A table for `Net` whose layers take 10 us, and the body at each of its ranks what ``body_us`` says."""

    def shape(height, inputs, outputs, kernel=(3, 3), stride=1, padding=(1, 1, 1, 1), groups=1):
        return {"batch": 1, "height": height, "width": height, "in_channels": inputs, "out_channels": outputs,
                "kernel": kernel, "stride": [stride, stride], "padding": padding, "groups": groups}  # fmt: skip

    shapes = [shape(32, 3, 64, stride=2), shape(16, 64, 64), shape(16, 64, 64, [3, 1], padding=[1, 0, 1, 0]),
              shape(16, 64, 64, [1, 1], padding=[0] * 4), shape(16, 64, 64, padding=[0] * 4, groups=64),
              {"batch": 1, "height": 1, "width": 1, "in_channels": 64, "out_channels": 10}]  # fmt: skip
    layers = [{"shape": s, "dense_us": 10.0, "ranks": body_us if i == 1 else []} for i, s in enumerate(shapes)]
    data = {"format_version": 1, "source": "measured here", "device": "H100", "precision": "fp32", "layers": layers}
    path = tmp_path / "table.json"
    path.write_text(json.dumps(data | changes))
    return path


@pytest.mark.parametrize(
    ("body_us", "ranks", "reason"),
    [
        ([[16, 32, 8.5]], (16, 32), "15.0% faster"),
        ([[16, 32, 8.6]], None, r"at best 14.0% faster, at \(16, 32\); needs 15%"),
        ([[16, 32, 12.0]], None, "no ranks make it faster; needs 15%"),
        ([[16, 32, 4.0], [8, 8, 4.5], [48, 48, 9.0]], (16, 32), "60.0% faster"),
    ],
)
def test_a_layer_that_is_not_faster_by_theta_stays_dense(tmp_path, body_us, ranks, reason):
    table = measured(tmp_path, body_us)
    before = table.read_bytes()
    choice = choose_ranks(Net(), (1, 3, 32, 32), "H100", max_error=10.0, table=table)
    layers = {layer.name: layer for layer in choice.layers}
    assert layers["body"].ranks == ranks
    assert choice.plan.layers == ({"body": ranks} if ranks else {})
    assert {name: layer.reason for name, layer in layers.items() if name != "body"} == {
        "stem": "too few channels to gain anything",
        "twice": "too few channels to gain anything",
        "point": "1x1",
        "grouped": "depthwise",
    }
    assert re.fullmatch(reason, layers["body"].reason)
    assert choice.dense_us == pytest.approx(70.0)
    assert choice.source == "measured here"
    assert table.read_bytes() == before


def test_a_layer_that_the_budget_does_not_need_says_so(tmp_path):
    table = measured(tmp_path, [[8, 8, 2.0]])
    choice = choose_ranks(Net(), (1, 3, 32, 32), "H100", max_error=1e-6, table=table)
    assert next(layer for layer in choice.layers if layer.name == "body").reason == "the budget is met without it"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "A100"}, "holds latencies of the device 'A100', wanted is 'H100'"),
        ({"precision": "fp16"}, "of the precision 'fp16', wanted is 'fp32'"),
        ({"format_version": 9}, "no table of latencies of format_version 1"),
        ({"layers": []}, "lacks 6 of the network's 6 kinds of layer"),
        ({"layers": [{"shape": {}}]}, "layer 0 of .* is no entry"),
        ({"layers": [{"dense_us": 1}]}, "layer 0 of .* lacks 'shape'"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(TdcError, match=message):
        choose_ranks(Net(), (1, 3, 32, 32), "H100", max_error=1.0, table=measured(tmp_path, [], **changes))


@pytest.mark.parametrize("row", [[80, 8, 1.0], [8, 8, -1.0], [8, 8, float("nan")], [8, 8]])
def test_impossible_rows_of_a_table(tmp_path, row):
    with pytest.raises(TdcError, match=r"layer 1 of .* is no entry of a table of latencies"):
        choose_ranks(Net(), (1, 3, 32, 32), "H100", max_error=1.0, table=measured(tmp_path, [row]))


def test_a_table_is_written_once_and_read_until_the_model_changes(tmp_path, monkeypatch):
    coarse(monkeypatch)
    path, model = tmp_path / "table.json", Net()
    calls = []

    def choose():
        calls.clear()
        return choose_ranks(
            model, (1, 3, 32, 32), "H100", max_error=1.0, table=path, progress=lambda *c: calls.append(c)
        )

    first = choose()
    assert calls[-1][0] == calls[-1][1] == len(calls)
    assert choose().layers == first.layers
    assert not calls
    loaded = LatencyTable.load(path, "H100", "fp32")
    assert loaded.is_predicted
    assert len(loaded.layers) == 6
    path.write_text(path.read_text().replace(latency_table.fingerprint(), "another"))
    assert choose().layers == first.layers
    assert calls


def test_nothing_of_the_model_is_changed(monkeypatch):
    coarse(monkeypatch)
    model = Net().train()
    model.body.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    choose_ranks(model, (1, 3, 32, 32), "H100", max_error=1.0, loader=loader)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.body.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sensitivity_is_the_fisher_trace_times_the_weights_norm():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten()).double()
    rng = np.random.default_rng(0)
    batches = [(torch.tensor(rng.standard_normal((b, 2, 2, 2))), torch.tensor(rng.integers(0, 3, b))) for b in (1, 3)]
    weight, bias = (p.detach().numpy().copy() for p in model[0].parameters())

    def loss(w, images, labels):
        """Mean cross-entropy, by hand: the window is the image."""
        scores = np.tanh(np.einsum("bchw,nchw->bn", images, w) + bias)
        log_sums = np.log(np.exp(scores).sum(1))
        return (log_sums - scores[np.arange(len(labels)), labels]).mean()

    trace = 0.0
    for images, labels in batches:
        for index in np.ndindex(weight.shape):
            step = np.zeros_like(weight)
            step[index] = 1e-5
            slope = (loss(weight + step, images.numpy(), labels) - loss(weight - step, images.numpy(), labels)) / 2e-5
            trace += len(labels) * slope**2 / len(batches)
    expected = 0.5 * trace / weight.size * np.square(weight).sum()
    found = sensitivities(model, [*batches, "never used"], batches=2)
    assert found == {"0": pytest.approx(expected, rel=1e-6)}


def test_a_layer_that_the_loss_depends_on_more_keeps_more(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.strong = nn.Conv2d(16, 16, 3)
            self.weak = nn.Conv2d(16, 16, 3)
            self.weak.load_state_dict(self.strong.state_dict())

        def forward(self, x):
            return (self.strong(x) + 0.01 * self.weak(x)).mean((2, 3))

    shape = {"batch": 1, "height": 8, "width": 8, "in_channels": 16, "out_channels": 16, "kernel": [3, 3]}
    layers = [{"shape": shape, "dense_us": 10.0, "ranks": [[8, 8, 5.0], [8, 16, 7.0]]}]
    table = tmp_path / "t.json"
    table.write_text(
        json.dumps({"format_version": 1, "source": "m", "device": "H100", "precision": "fp32", "layers": layers})
    )
    loader = [(torch.randn(8, 16, 8, 8), torch.arange(8))]
    choice = choose_ranks(Two(), (1, 16, 8, 8), "H100", latency_us=15.0, loader=loader, table=table)
    assert choice.plan.layers == {"weak": (8, 8)}
    assert choice.proxy == "expected increase of the loss"


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader gives no batch"),
        ([torch.zeros(1, 3, 32, 32)], "the loader gives Tensor; expected pairs"),
        ([(torch.zeros(1, 3, 32, 32), torch.tensor([10]))], "labels from 10 to 10, the model has 10 classes"),
        ([(torch.full((1, 3, 32, 32), torch.nan), torch.tensor([1]))], "the loss of batch 0 is nan"),
    ],
)
def test_loaders_that_do_not_fit(loader, message):
    with pytest.raises(TdcError, match=message):
        sensitivities(Net(), loader)
    with pytest.raises(TdcError, match="the data have 7 classes, the model has 10 classes"):
        cross_entropy(Net(), (torch.zeros(1, 3, 32, 32), torch.tensor([1])), classes=7)


def not_finite():
    model = Net()
    model.body.weight.data[0, 0, 0, 0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (3, {}, "a model is a torch.nn.Module; found int"),
        (nn.Linear(3, 3), {}, "Linear runs no nn.Conv2d on the example"),
        (Net(), {"example": (1, 4, 32, 32)}, r"does not run on inputs of shape \(1, 4, 32, 32\)"),
        (
            Net(),
            {"device": "H1000"},
            "no device 'H1000': unknown target .* GPUS known by name|GPUs known by name: H100",
        ),
        (Net(), {"device": "RTX 2080 Ti", "precision": "bf16"}, "needs bf16; RTX 2080 Ti .* computes"),
        (Net(), {"precision": "int8"}, "unknown precision 'int8'"),
        (not_finite(), {}, "layer 'body': the kernel has NaN or infinite weights"),
        (Net().to("meta"), {"example": torch.empty(1, 3, 32, 32, device="meta")}, "meta device"),
    ],
)
def test_mistakes(monkeypatch, model, options, message):
    coarse(monkeypatch)
    given = {"example": (1, 3, 32, 32), "device": "H100", "max_error": 1.0} | options
    if isinstance(model, nn.Linear):
        given["example"] = (1, 3)
    with pytest.raises(TdcError, match=message):
        choose_ranks(model, **given)


def test_devices_by_name_or_target():
    assert find_device("rtx 4090") is GPUS["RTX 4090"]
    assert find_device("sm_80").name == "A100"
    assert find_device(H100) is H100


def test_the_plan_is_what_gets_built(tmp_path, monkeypatch):
    """The compiled network takes the time that the plan promised, by the same model; no GPU is needed."""
    coarse(monkeypatch)
    model = nn.Sequential(nn.Conv2d(16, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(),
                          nn.Conv2d(128, 32, 1))  # fmt: skip
    choice = choose_ranks(model, (1, 16, 24, 24), "H100", max_error=1.9)
    assert "2" in choice.plan.layers
    choice.plan.save(tmp_path / "plan.json")
    plan = DecompositionPlan.load(tmp_path / "plan.json")
    assert plan == choice.plan
    tucker, report = apply_plan(model, plan, init=True)
    assert report.plan.layers == plan.layers
    # What is built has lower errors than the truncated HOSVD promises.
    for built, chosen in zip(report.layers, choice.layers, strict=True):
        assert (built.relative_error or 0.0) <= chosen.relative_error + 1e-9
    export_onnx(tucker, (1, 16, 24, 24), tmp_path / "net.onnx")
    compiled = tdc_tvm.build(tmp_path / "net.onnx", "sm_90", verify=False)
    predicted = {layer.name: layer.predicted_latency_us for layer in compiled.report.layers}
    assert len(predicted) == 3
    assert sum(predicted.values()) == pytest.approx(choice.latency_us, rel=1e-9)
    compiled.export_library(tmp_path / "net.so")


def test_tables_fit_the_terminal():
    choice = problem().solve(speedup=1.2)
    for width in (80, 120, 160):
        text = as_text(choice, width)
        assert max(map(len, text.splitlines())) <= width
        assert all(f"conv{i}" in text for i in range(4))
        assert f"{choice.dense_us:.2f} -> {choice.latency_us:.2f}" in text
        assert ("M MACs" in text) == (width >= 136)
        console = Console(width=width)
        with console.capture() as capture:
            console.print(comparison({"this plan": choice}))
        assert f"{choice.mac_reduction:.1%}" in capture.get()
    data = json.loads(json.dumps(choice.to_dict()))
    assert data["totals"]["speedup"] >= 1.2
    assert [layer["name"] for layer in data["layers"]] == [f"conv{i}" for i in range(4)]


def test_fronts_are_drawn_whole_or_not_at_all(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra [plots]")
    p = problem()
    choice, front = p.solve(speedup=1.2), p.front(points=4)
    choice = dataclasses.replace(choice, model="a <b> & c")
    by_macs = [p.by_macs(plan.error) for plan in front if plan.error]
    write_front(tmp_path / "front.png", choice, front, by_macs)
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    write_front(tmp_path / "front.html", choice, front, by_macs)
    page = (tmp_path / "front.html").read_text()
    assert "Ranks of a &lt;b&gt; &amp; c on H100, fp32" in page
    assert "<svg" in page
    assert page.count("<tr") == 2 + len(choice.layers) + len(front)
    assert "<script" not in page
    assert "src=" not in page
    with pytest.raises(TdcError, match=r"drawn as .png or .html; found"):
        write_front(tmp_path / "front.gif", choice, front, by_macs)
    with pytest.raises(TdcError, match="does not exist; create it first"):
        write_front(tmp_path / "none" / "front.png", choice, front, by_macs)
    assert {path.name for path in tmp_path.iterdir()} == {"front.png", "front.html"}
