"""Gives pooling layers that GPUs have kernels for what is computed before them."""

from __future__ import annotations

import tvm
from tvm import relax

from tdc_tvm.relay_passes.graph import MAX_POOL, Graph, ints, is_static
from tdc_tvm.relay_passes.outline import POOL2D, Chain, outline
from tdc_tvm.schedules.cuda.pool import Pool2dShape

_AVG_POOL, _MEAN = (tvm.ir.Op.get(f"relax.{name}") for name in ("nn.avg_pool2d", "mean"))
_NHWC_IMAGE = ((1, 2), (-3, -2))


@tvm.transform.module_pass(opt_level=0, name="FusePool2d")
def fuse_pool2d(mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Outline each pooling layer, channels last, with the normalisation and activation that only it reads."""
    graph = Graph.of(mod["main"])
    chains = []
    for var, value in graph.values.items():
        if isinstance(value, relax.Call) and pool_shape(value) is not None:
            head = graph.head(var, value.args[0], int(value.args[0].ty.shape[3]), 3)
            chains.append(Chain(POOL2D, var.name, [*(head.variables if head is not None else ()), var]))
    return outline(mod, graph.values, chains)


def pool_shape(call: relax.Call) -> Pool2dShape | None:
    """The pooling layer that a call is; None if it is none, or not one that there is a kernel for."""
    if not any(call.op == op for op in (MAX_POOL, _AVG_POOL, _MEAN)):
        return None
    data = call.args[0]
    if not is_static(data) or not is_static(call) or data.ty.ndim != 4 or str(data.ty.dtype) != "float32":
        return None
    extents, out = ints(data.ty.shape.values), ints(call.ty.shape.values)
    batch, height, width, channels = extents
    attrs = call.attrs
    if call.op == _MEAN:
        if not attrs.keepdims or attrs.axis is None or tuple(sorted(ints(attrs.axis))) not in _NHWC_IMAGE:
            return None
        kernel = (height, width)
        return Pool2dShape(False, batch, height, width, channels, kernel, kernel, (1, 1), (0, 0), 1, 1, True, "float32")
    if (str(attrs.layout), str(attrs.out_layout)) != ("NHWC", "NHWC"):
        return None
    kernel, stride, dilation = (ints(values) for values in (attrs.pool_size, attrs.strides, attrs.dilation))
    padding, is_max = ints(attrs.padding), call.op == MAX_POOL
    if not is_max:
        # What a mean is of where windows reach behind the padding, operators do not agree on.
        ends = [(out[1 + i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] for i in range(2)]
        if any(ends[i] >= extents[1 + i] + padding[i] + padding[2 + i] for i in range(2)):
            return None
    counts = is_max or bool(attrs.count_include_pad)
    return Pool2dShape(
        is_max, batch, height, width, channels, kernel, stride, dilation, padding[:2], out[1], out[2], counts, "float32"
    )
