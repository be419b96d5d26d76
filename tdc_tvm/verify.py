"""Comparing a compiled model with ONNX Runtime."""

from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import Any

import numpy as np
import onnx

from tdc_tvm.artifact import Entry
from tdc_tvm.compiled_model import CompiledModel, random_inputs
from tdc_tvm.errors import TdcError
from tdc_tvm.onnx_model import frozen
from tdc_tvm.report import Verification

# Of a result relative to an output's largest magnitude, by the precision of convolutions: what tens of layers lose.
_RTOL = {"fp32": 1e-4, "tf32": 1e-2, "fp16": 1e-2, "bf16": 5e-2}
_ADVICE = (
    ". Is this the model that was compiled? If it is, and the difference is acceptable, pass larger atol (--atol) or"
    " rtol (--rtol), or build with verify=False (--no-verify); if it is not, report it"
)
# Protocol buffers end at 2 GB; larger models go to ONNX Runtime through a file.
_INLINE_LIMIT = 2**31 - 2**20


def reference_outputs(
    model: onnx.ModelProto, inputs: dict[str, np.ndarray], threads: int | None = None
) -> list[np.ndarray]:
    """What ONNX Runtime computes on the CPU, optimisations on."""
    return reference_session(model, threads).run(None, inputs)


def reference_session(model: onnx.ModelProto, threads: int | None = None, device: str = "cpu"):
    """An ONNX Runtime session of ``model`` on the CPU, or on a GPU (``"cuda"``) with cuDNN's fastest algorithms."""
    import onnxruntime

    providers: list[Any] = ["CPUExecutionProvider"]
    if device == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"cudnn_conv_algo_search": "EXHAUSTIVE"}))

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        if model.ByteSize() < _INLINE_LIMIT:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers)
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            onnx.save(model, path, save_as_external_data=True, location="model.data")
            return onnxruntime.InferenceSession(str(path), options, providers)
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        raise TdcError(
            f"ONNX Runtime cannot load the model to verify against: {str(error).strip()};"
            " verify=False (--no-verify) builds without it"
        ) from None


def check_tolerances(atol: float, rtol: float | None) -> None:
    """Refuse what is no tolerance; None is the precision's own."""
    for name, value in (("atol", atol), ("rtol", rtol)):
        if value is None and name == "rtol":
            continue
        if not isinstance(value, Real) or not 0 <= value < math.inf:
            raise TdcError(f"{name} is {value!r}; expected a number from 0 on, such as 1e-4")


def verify(
    compiled: CompiledModel, model: onnx.ModelProto, *, atol: float = 1e-5, rtol: float | None = None, seed: int = 0
) -> Verification:
    """Compare outputs on seeded random input: ``max|ours - reference| <= atol + rtol * max|reference|`` for each.

    Every batch size that was built is compared, and one between them, which is filled up: if that one alone differs, a
    warning says so, as the model is right at the sizes that were built.

    Parameters
    ----------
    compiled : CompiledModel
        A model that can run here.
    model : onnx.ModelProto
        The reference; where its inputs are dynamic, they take the extents that were built.
    atol : float
        Absolute tolerance.
    rtol : float, optional
        Tolerance relative to an output's largest magnitude; by default 1e-4 for FP32, 1e-2 for TF32 and FP16, 5e-2
        for BF16.
    seed : int
        Of the input.

    Raises
    ------
    TdcError
        If an output differs by more, has another shape or type, or is not finite where the reference is.
    """
    check_tolerances(atol, rtol)
    rtol = _RTOL[compiled.report.precision] if rtol is None else rtol
    worst, details = 0.0, []
    for entry in compiled.entries:
        error, detail = _compare(compiled, entry, model, atol, rtol, seed)
        worst = max(worst, error)
        details.append(f"batch {entry.batch}: {detail}" if len(compiled.entries) > 1 else detail)
    between = compiled.filled_up()
    if between is not None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _, detail = _compare(compiled, between, model, atol, rtol, seed)
            details.append(f"batch {between.batch}, filled up: {detail}")
        except TdcError as error:
            warnings.warn(
                f"a batch of {between.batch}, filled up as it is between the sizes that were built, is not right:"
                f" {str(error).removesuffix(_ADVICE)}; does an image's result depend on other images? Then run it"
                " at the sizes that were built only",
                stacklevel=2,
            )
        finally:
            compiled._filled_up.discard(between.batch or 0)  # a user's own call says so once
    return Verification("passed", f"{'; '.join(details)} (atol {atol:g}, rtol {rtol:g}, seed {seed})", worst)


def _compare(
    compiled: CompiledModel, entry: Entry, model: onnx.ModelProto, atol: float, rtol: float, seed: int
) -> tuple[float, str]:
    """The largest difference of an entry's outputs, and the differences of all as text."""
    reference, _ = frozen(model, {info.name: info.shape for info in entry.inputs})
    values = random_inputs(entry.inputs, seed)
    ours = compiled.run(*values)
    ours = ours if isinstance(ours, tuple) else (ours,)
    expected = reference_outputs(reference, dict(zip((info.name for info in entry.inputs), values, strict=True)))
    if len(ours) != len(expected):
        raise TdcError(f"the compiled model has {len(ours)} outputs, ONNX Runtime gives {len(expected)}")
    worst = 0.0
    details = []
    for info, have, want in zip(entry.outputs, ours, expected, strict=True):
        if have.shape != want.shape:
            raise TdcError(f"output {info.name!r} has shape {have.shape}; ONNX Runtime gives {want.shape}")
        if have.dtype != want.dtype:
            raise TdcError(f"output {info.name!r} is {have.dtype}; ONNX Runtime gives {want.dtype}")
        want64, have64 = want.astype(np.float64), have.astype(np.float64)
        agree = (want64 == have64) | (np.isnan(want64) & np.isnan(have64))
        with np.errstate(invalid="ignore"):  # infinity less infinity, where both agree
            error = float(np.max(np.where(agree, 0.0, np.abs(have64 - want64)), initial=0.0))
        finite = np.abs(want64[np.isfinite(want64)])
        scale = float(finite.max(initial=0.0))
        # A type coarser than float32 cannot agree more closely than its own rounding.
        coarse = want.dtype.kind == "f" and want.dtype.itemsize < 4
        relative = max(rtol, 8 * float(np.finfo(want.dtype).eps)) if coarse else rtol
        if not error <= atol + relative * scale:
            raise TdcError(
                f"verification failed: output {info.name!r} differs from ONNX Runtime by {error:.3g}"
                f" at magnitude {scale:.3g};"
                f" allowed are atol {atol:g} + rtol {relative:g} x magnitude = {atol + relative * scale:.3g}" + _ADVICE
            )
        worst = max(worst, error)
        details.append(f"{info.name} differs by {error:.2g} at magnitude {scale:.2g}")
    return worst, "; ".join(details)
