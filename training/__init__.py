"""Tucker decomposition of PyTorch models and their export to ONNX; needs the extra ``train``."""

from tdc_tvm.errors import TdcError

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    raise TdcError("tdc_tvm.training needs PyTorch; install it with: pip install 'tdc-tvm[train]'") from error

from tdc_tvm.training.decompose import TuckerConv2d, apply_plan, decompose
from tdc_tvm.training.export import export_onnx
from tdc_tvm.training.ranks import RankProblem, choose_ranks

__all__ = ["RankProblem", "TuckerConv2d", "apply_plan", "choose_ranks", "decompose", "export_onnx"]
