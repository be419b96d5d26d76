"""Fast Tucker-compressed CNNs on Apache TVM.

>>> import tdc_tvm
>>> compiled = tdc_tvm.build("model.onnx", decompose=0.9)  # doctest: +SKIP
>>> y = compiled.run(x)                                    # doctest: +SKIP
>>> compiled.export_library("model.so")                    # doctest: +SKIP
>>> y = tdc_tvm.load("model.so").run(x)                    # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from tdc_tvm.errors import TdcError

if TYPE_CHECKING:
    from tdc_tvm.compiled_model import CompiledModel, load
    from tdc_tvm.compiler import build
    from tdc_tvm.plan import DecompositionPlan

__version__ = "0.1.0"
__all__ = ["CompiledModel", "DecompositionPlan", "TdcError", "__version__", "build", "load"]

_HOMES = {
    "CompiledModel": "tdc_tvm.compiled_model",
    "DecompositionPlan": "tdc_tvm.plan",
    "build": "tdc_tvm.compiler",
    "load": "tdc_tvm.compiled_model",
}

# An installed package holds its subpackages; in a source checkout, which Python prefers when it is
# started there, they lie beside this folder.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "schedules").is_dir():
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> object:
    # TVM takes seconds to import, so it is not imported before it is needed.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tdc_tvm' has no attribute {name!r}")
