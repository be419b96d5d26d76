import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan
from tdc_tvm.training import TuckerConv2d, apply_plan, decompose


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.point = nn.Conv2d(16, 16, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2)

    def forward(self, x):
        return self.grouped(self.depthwise(self.point(self.body(self.stem(x)))))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
        {"kernel_size": (1, 5), "padding": (0, 2), "stride": (1, 3)},
        {"kernel_size": (5, 2), "padding": (3, 1), "dilation": (1, 2), "stride": (2, 1)},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": (2, 4), "padding": "same", "dilation": (1, 3)},
        {"kernel_size": 3, "padding": "valid"},
        {"kernel_size": 7, "padding": 3, "stride": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"},
        {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
    ],
    ids=str,
)
def test_full_rank_reproduces_the_layer(options):
    conv = nn.Conv2d(6, 9, **options).double()
    layer = TuckerConv2d.from_conv(conv, (9, 6))
    x = torch.randn(2, 6, 13, 11, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-10)


def test_truncated_layer_computes_the_truncated_kernel():
    conv = nn.Conv2d(6, 9, 3, padding=1, stride=2).double()
    layer = TuckerConv2d.from_conv(conv, (4, 3))
    assert layer.ranks == (4, 3)
    kernel = torch.einsum(
        "na,abrs,bc->ncrs", layer.expand.weight[..., 0, 0], layer.core.weight, layer.reduce.weight[..., 0, 0]
    )
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, kernel, conv.bias, stride=2, padding=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_keeps_type_mode_and_gradients(dtype):
    conv = nn.Conv2d(4, 4, 3, dtype=dtype).eval()
    conv.weight.requires_grad_(False)
    layer = TuckerConv2d.from_conv(conv, (2, 3))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert not any(module.training for module in layer.modules())
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"expand.bias"}
    assert TuckerConv2d.from_conv(conv.train(), (2, 3)).core.training


def test_a_model_keeps_what_cannot_be_decomposed_with_the_reason():
    model = Net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result, report = decompose(model, (4, 4), example=(2, 3, 16, 16))
    reasons = {layer.name: layer.reason for layer in report.layers if not layer.decomposed}
    assert reasons == {"point": "1x1", "depthwise": "depthwise", "grouped": "grouped"}
    assert isinstance(result.stem, TuckerConv2d)
    assert isinstance(result.body[0], TuckerConv2d)
    assert result.stem.ranks == (4, 3)
    assert not result.training
    assert type(model.stem) is nn.Conv2d
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    weights = sum(p.numel() for m in result.modules() if isinstance(m, nn.Conv2d) for p in [m.weight])
    assert report.params[1] == weights


def test_macs_count_every_pixel_and_the_run_leaves_no_trace():
    model = Net().train()
    statistics = model.body[1].running_mean.clone()
    _, report = decompose(model, {"body.0": (8, 4)}, example=torch.zeros(2, 3, 16, 16), inplace=True)
    layer = next(layer for layer in report.layers if layer.name == "body.0")
    assert layer.macs_before == 2 * 64 * 16 * 8 * 9
    assert layer.macs_after == 2 * (256 * 8 * 4 + 64 * (4 * 8 * 9 + 8 * 16))
    assert model.training
    assert torch.equal(model.body[1].running_mean, statistics)
    assert not model.stem._forward_hooks


def test_inplace_changes_the_model_itself():
    model = Net()
    result, _ = decompose(model, (2, 2), inplace=True)
    assert result is model
    assert isinstance(model.stem, TuckerConv2d)


def test_a_shared_module_stays_shared():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model, report = decompose(nn.Sequential(conv, nn.ReLU(), conv), (2, 2), example=(1, 4, 5, 5))
    assert model[0] is model[2]
    assert isinstance(model[0], TuckerConv2d)
    assert len(report.layers) == 1
    assert report.macs[0] == 2 * 25 * 4 * 4 * 9


def test_a_bare_convolution_becomes_a_new_module():
    result, report = decompose(nn.Conv2d(4, 4, 3), (2, 2))
    assert isinstance(result, TuckerConv2d)
    assert [layer.name for layer in report.layers] == [""]


class OwnConv(nn.Conv2d):
    pass


def tied_pair():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(OwnConv(4, 4, 3)), "OwnConv is a subclass of Conv2d"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), "lazy"),
        (nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), "ConvTranspose2d is not a Conv2d"),
        (nn.Sequential(nn.Conv1d(4, 4, 3)), "Conv1d is not a Conv2d"),
        (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3))), "its weight is computed"),
        (tied_pair(), "shares its weight"),
        (nn.Sequential(TuckerConv2d(4, 4, 3, (2, 2))), "part of a Tucker layer"),
    ],
)
def test_layers_left_alone(model, reason):
    result, report = decompose(model, (2, 2))
    assert all(layer.reason.startswith(reason) for layer in report.layers)
    assert [type(m) for m in result.modules()] == [type(m) for m in model.modules()]


def test_pruned_weights_are_left_alone():
    conv = nn.Conv2d(4, 4, 3)
    prune.l1_unstructured(conv, "weight", 0.5)
    _, report = decompose(nn.Sequential(conv), (2, 2), inplace=True)
    assert "is computed" in report.layers[0].reason
    conv(torch.zeros(1, 4, 5, 5))
    with pytest.raises(TdcError, match="cannot be copied"):
        decompose(nn.Sequential(conv), (2, 2))


def test_a_checkpoint_loads_into_the_plans_structure(tmp_path):
    trained, report = decompose(Net(), 0.7)
    report.plan.save(tmp_path / "plan.json")
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    restored, again = apply_plan(Net(), tmp_path / "plan.json")
    restored.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert again.plan == report.plan
    x = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(restored.eval()(x), trained.eval()(x), rtol=0, atol=0)


def test_apply_plan_computes_no_factors_unless_asked():
    plan = DecompositionPlan({"stem": (8, 3)})
    with torch.device("meta"):
        structure, report = apply_plan(Net(), plan)
    assert structure.stem.core.weight.is_meta
    assert report.layers[0].relative_error is None
    model = Net().double()
    full, report = apply_plan(model, plan, init=True)
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(full.stem(x), model.stem(x), rtol=0, atol=1e-10)
    assert report.layers[0].relative_error < 1e-10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decompose(Net(), {"stm": (2, 2)}), "did you mean 'stem'"),
        (lambda: decompose(Net(), {"stem": (2, 4)}), "rank_in of layer 'stem' is 4"),
        (lambda: decompose(Net(), {"grouped": (2, 2)}), r"cannot be decomposed \(grouped\)"),
        (lambda: decompose(Net(), (2, 2), example=(1, 4, 16, 16)), r"does not run on inputs of shape \(1, 4, 16, 16\)"),
        (lambda: decompose(Net(), (2, 2), example="1x3x16x16"), "an example input is a tensor"),
        (lambda: apply_plan(Net(), "0.9"), "apply_plan needs a plan"),
        (lambda: decompose(Net().to("meta"), (2, 2)), "meta device"),
        (lambda: decompose(3, (2, 2)), "a model is a torch.nn.Module; found int"),
        (lambda: apply_plan(None, {}), "a model is a torch.nn.Module; found NoneType"),
        (lambda: TuckerConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=2), (2, 2)), "2 groups"),
        (lambda: TuckerConv2d(4, 4, 3, (5, 2)), "rank_out of a TuckerConv2d is 5"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(TdcError, match=message):
        call()


# Multiply-adds of all convolutions in 10^9, as published for the released ranks (rounded).
@pytest.mark.parametrize(
    ("name", "layers", "giga_macs"),
    [
        ("resnet18", 16, 0.786),
        ("resnet50", 16, 2.581),
        ("vgg16", 12, 3.322),
        ("vgg16_bn", 12, 3.322),
        ("densenet121", 58, 2.074),
        ("densenet201", 98, 3.928),
    ],
)
def test_presets_fit_torchvisions_models(name, layers, giga_macs):
    torchvision = pytest.importorskip("torchvision", reason="the presets are for its models")
    with torch.device("meta"):
        model, report = apply_plan(getattr(torchvision.models, name)(), name)
    macs = 0

    def count(module, _args, output):
        nonlocal macs
        macs += output.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert len(report.decomposed) == layers
    assert round(macs / 1e9, 3) == giga_macs
