"""Weights and biases in the order in which kernels read them."""

from __future__ import annotations

import math

import numpy as np

from tdc_tvm.schedules.cuda.plan import Part
from tdc_tvm.schedules.kernel import ConvWeights, Prologue


def pack_weights(part: Part, stage: int, weights: ConvWeights) -> np.ndarray:
    """Order a stage's weights as its warps load them.

    Returns
    -------
    numpy.ndarray
        ``(blocks, chunks, channel tiles, parts of the depth, units of a chunk, rows, lanes, vector)``, zero where
        there is no weight; ``(chunks, blocks, ...)`` where `Part.is_streamed`.
    """
    conv, unit, work = part.stages[stage], part.unit, part.works[stage]
    tiles, share, chunk = part.tiles_of_work(stage)[0], part.share(stage), part.chunk_units(stage)
    chunks, steps = part.chunks(stage), share * work.splits
    channels, taps = part.in_channels(stage), conv.kernel[0] * conv.kernel[1]
    blocks = part.split
    kernel = weights.kernel.reshape(conv.out_channels, conv.in_channels, taps).transpose(0, 2, 1)
    padded = np.zeros((blocks, tiles * unit.row_lanes * work.rows, steps * unit.depth), np.float32)
    for rank in range(blocks):
        # Those of the channels that this block computes, or of the channels that it has.
        own, read = slice(None), slice(None)
        if part.has_own_channels(stage):
            own = slice(rank * part.slice_channels(stage), (rank + 1) * part.slice_channels(stage))
        else:
            read = slice(rank * channels, (rank + 1) * channels)
        part_of = kernel[own, :, read]
        matrix: np.ndarray = np.zeros((part_of.shape[0], taps, channels), np.float32)
        matrix[:, :, : part_of.shape[2]] = part_of
        if part.rows_kept(stage) > 1:
            # The rows of the window come last.
            rows = matrix.reshape(-1, *conv.kernel, channels // unit.depth, unit.depth)
            matrix = rows.transpose(0, 2, 3, 1, 4)
        padded[rank, : part_of.shape[0], : taps * channels] = matrix.reshape(-1, taps * channels)
    # channel = (tile, rows by vectors, lane, rows of a vector), depth = (unit, chunk, vector)
    together = min(work.rows, unit.vector)
    split = padded.reshape(blocks, tiles, -1, unit.row_lanes, together, steps, unit.chunks, unit.vector)
    packed = split.transpose(0, 1, 5, 2, 4, 3, 6, 7).reshape(
        blocks, tiles, steps, work.rows, unit.weight_lanes, unit.vector
    )
    if unit.name == "wgmma":
        # (tile, vector of depth, channel, vector); of every eight columns each of four lanes has the results of two.
        ordered = split.reshape(*split.shape[:4], together // 2, 2, *split.shape[5:])
        packed = ordered.transpose(0, 1, 6, 7, 2, 4, 3, 5, 8)
    if unit.name == "mma":
        # Two rows of vectors become two fragments of A, each what an mma wants in neighbouring registers:
        # words 0 and 1 of both rows for the first step of the depth, words 2 and 3 for the second.
        words = packed.reshape(blocks, tiles, steps, work.rows // 2, 2, unit.weight_lanes, 2, 2, unit.vector // 4)
        packed = words.transpose(0, 1, 2, 3, 6, 5, 7, 4, 8).reshape(packed.shape)
    if unit.halves:
        pairs = packed.reshape(blocks, tiles, steps, work.rows // 2, 2, unit.weight_lanes, unit.vector)
        packed = pairs.transpose(0, 1, 2, 3, 5, 4, 6)
    parts = packed.reshape(blocks, tiles, work.splits, share, -1)
    whole = np.zeros((*parts.shape[:3], chunks * chunk, parts.shape[-1]), np.float32)
    whole[:, :, :, :share] = parts
    order = (3, 0, 1, 2, 4, 5) if part.is_streamed else (0, 3, 1, 2, 4, 5)
    chunked = whole.reshape(*parts.shape[:3], chunks, chunk, -1).transpose(order)
    if unit.halves:
        return (chunked * np.float32(weight_scale(weights))).astype(np.float16)
    return round_to(part.precision, chunked)


def weight_scale(weights: ConvWeights) -> float:
    """What weights are multiplied by where they are stored in FP16: small ones then keep all of its bits."""
    largest = float(np.abs(weights.kernel).max(initial=0.0))
    return 2.0 ** (14 - math.frexp(largest)[1]) if largest else 1.0


def pack_bias(part: Part, stage: int, bias: np.ndarray) -> np.ndarray:
    """Fill up a bias with zeros; FP32."""
    channels = part.slice_channels(stage)
    padded = np.zeros(channels * (part.split if part.has_own_channels(stage) else 1), np.float32)
    padded[: bias.size] = bias
    return padded


def pack_prologue(part: Part, prologue: Prologue) -> np.ndarray:
    """Scales, then shifts, each filled up with zeros to the channels that all blocks read; FP32."""
    blocks = part.split if part.is_cluster and part.core_index == 0 else 1
    padded = np.zeros((2, blocks * part.in_channels(0)), np.float32)
    padded[:, : prologue.scale.size] = prologue.scale, prologue.shift
    return padded


def merge(weights: tuple[ConvWeights, ...]) -> ConvWeights:
    """The dense convolution that the three stages of a mergeable Tucker convolution are."""
    kernels = [one.kernel.astype(np.float64) for one in weights]
    reduce, core, expand = kernels[0][:, :, 0, 0], kernels[1], kernels[2][:, :, 0, 0]
    kernel = np.einsum("no,oiyx,ic->ncyx", expand, core, reduce, optimize=True)
    # What a stage adds passes through those behind it.
    bias = np.zeros(reduce.shape[1])
    for one, matrix in zip(weights, (reduce, core.sum((2, 3)), expand), strict=True):
        bias = matrix @ bias + (0.0 if one.bias is None else one.bias.astype(np.float64))
    has_bias = any(one.bias is not None for one in weights)
    return ConvWeights(kernel.astype(np.float32), bias.astype(np.float32) if has_bias else None)


def round_to(precision: str, array: np.ndarray) -> np.ndarray:
    """An FP32 array as it is stored for a precision, contiguous: FP16, BF16, or FP32 rounded to what TF32 keeps."""
    array = np.ascontiguousarray(array, np.float32)
    if precision == "fp16":
        return array.astype(np.float16)
    if precision == "bf16":
        import ml_dtypes

        return array.astype(ml_dtypes.bfloat16)
    if precision == "tf32":
        # 13 of the 23 bits of the fraction are dropped; ties go away from zero, as PTX's cvt.rna does.
        bits = array.view(np.uint32)
        finite = np.isfinite(array)
        return np.where(finite, (bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000), bits).view(np.float32)
    return array
