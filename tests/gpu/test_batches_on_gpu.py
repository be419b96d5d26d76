"""A network of several batch sizes on a real GPU, against ONNX Runtime."""

import numpy as np
import pytest
import tvm

import tdc_tvm
from tdc_tvm.verify import reference_outputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not tvm.cuda(0).exist, reason="needs an NVIDIA GPU and its driver"),
]


@pytest.mark.filterwarnings("ignore:a batch of")
def test_every_size_has_a_recorded_call_of_its_own(tucker_model):
    pytest.importorskip("cuda.bindings", reason="recording a call needs cuda-bindings")
    torch = pytest.importorskip("torch")
    model = tucker_model(batch="n")
    compiled = tdc_tvm.build(model, "cuda", batch=[1, 4])
    images = np.random.default_rng(0).standard_normal((4, 8, 6, 6)).astype(np.float32)
    (expected,) = reference_outputs(model, {"x": images})
    for size in (4, 1, 3, 2, 4, 1):
        x = torch.from_numpy(images[:size])
        for value in (images[:size], x, *([x.cuda()] if torch.cuda.is_available() else [])):
            y = compiled.run(value)
            assert y.shape == (size, 8, 6, 6)
            np.testing.assert_allclose(y.cpu() if isinstance(y, torch.Tensor) else y, expected[:size], atol=1e-5)
    points = [compiled._point(entry) for entry in compiled.entries]
    assert all(point.graph is not None for point in points)
    assert points[0].graph is not points[1].graph
