"""Training, Tucker compression and ONNX export of PyTorch models; needs the extra ``train``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tdc_tvm.errors import TdcError

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise TdcError("tdc_tvm.training needs PyTorch; install it with: pip install 'tdc-tvm[train]'") from error

from tdc_tvm.training.checkpoint import load_weights
from tdc_tvm.training.compression import History, compress
from tdc_tvm.training.decompose import TuckerConv2d, apply_plan, decompose
from tdc_tvm.training.export import export_onnx
from tdc_tvm.training.models import load_model

if TYPE_CHECKING:
    from tdc_tvm.training.ranks import RankProblem, choose_ranks

__all__ = [
    "History",
    "RankProblem",
    "TuckerConv2d",
    "apply_plan",
    "choose_ranks",
    "compress",
    "decompose",
    "export_onnx",
    "load_model",
    "load_weights",
]


def __getattr__(name: str) -> object:
    # Predicting latencies needs TVM; training does not, and runs where there is none.
    if name in ("RankProblem", "choose_ranks"):
        from tdc_tvm.training import ranks

        return getattr(ranks, name)
    raise AttributeError(f"module 'tdc_tvm.training' has no attribute {name!r}")
