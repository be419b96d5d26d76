"""The configuration of training and compression: dataclasses, read from YAML and written beside the results."""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, Union

from tdc_tvm.errors import TdcError
from tdc_tvm.files import write_atomic
from tdc_tvm.training.admm import AdmmConfig

# The phases of each method of compression, in order.
PHASES = {"admm": ("admm", "finetune"), "direct": ("finetune",), "scratch": ("scratch",), "dense": ("dense",)}
PRECISIONS = ("fp32", "bf16", "fp16")
AUGMENTS = ("pad-crop", "resized-crop", "none")


@dataclass(frozen=True)
class DataConfig:
    """A data set and how batches are made of it.

    Parameters
    ----------
    name : str
        ``imagefolder`` (train/CLASS/*, val/CLASS/*), ``tiny-imagenet`` (its public layout), ``cifar10``,
        ``cifar100``, ``fashion-mnist``, or ``arrays`` (train.npz and val.npz, as `tdc_tvm.training.data`
        writes them).
    root : str
        The data set's folder.
    image_size : int, optional
        Height and width of the network's input; by default the data set's own (224 for an image folder).
    batch_size, eval_batch_size : int
        Images per step, over all processes together.
    holdout : int
        Training images kept out, to choose by; the same ones for every seed.
    in_memory : bool
        Decode the set once into memory and augment whole batches on the device.  CIFAR, Fashion-MNIST and
        arrays always are.
    cache : str, optional
        Folder for decoded sets; by default ``~/.cache/tdc_tvm``.
    workers : int
        Threads that decode, or processes that load files; at most one for each CPU.
    skip_corrupt : bool
        Leave out images that cannot be read; by default they are an error.
    download : bool
        Let torchvision fetch CIFAR or Fashion-MNIST.
    augment : str
        ``pad-crop`` (pad, crop at random, mirror half of the images), ``resized-crop`` (a random part of the
        image, mirrored in half of the cases), or ``none``.
    padding : int
        Pixels, of ``pad-crop``.
    crop_scale : float
        Smallest share of the image's area that ``resized-crop`` takes.
    erase : float
        Share of the training images in which a random rectangle, 2 to 33 % of the image, is blanked (Zhong et
        al., AAAI 2020).
    mean, std : list of float, optional
        Of the channels, images scaled to 0..1; by default the data set's own.
    """

    name: str = "imagefolder"
    root: str = ""
    image_size: int | None = None
    batch_size: int = 128
    eval_batch_size: int = 512
    holdout: int = 0
    in_memory: bool = False
    cache: str | None = None
    workers: int = 4
    skip_corrupt: bool = False
    download: bool = False
    augment: str = "pad-crop"
    padding: int = 4
    crop_scale: float = 0.35
    erase: float = 0.0
    mean: list[float] | None = None
    std: list[float] | None = None

    def __post_init__(self) -> None:
        _expect(0 <= self.erase <= 1, f"erase is {self.erase:g}; expected 0 to 1")
        _expect(self.image_size is None or self.image_size > 0, f"image_size is {self.image_size}; expected 1 or more")
        _expect(self.batch_size > 0, f"batch_size is {self.batch_size}; expected 1 or more")
        _expect(self.eval_batch_size > 0, f"eval_batch_size is {self.eval_batch_size}; expected 1 or more")
        _expect(self.holdout >= 0, f"holdout is {self.holdout}; expected 0 or more")
        _expect(self.workers >= 0, f"workers is {self.workers}; expected 0 or more")
        _expect(self.padding >= 0, f"padding is {self.padding}; expected 0 or more")
        _expect(0 < self.crop_scale <= 1, f"crop_scale is {self.crop_scale:g}; expected above 0 to 1")
        _expect(self.augment in AUGMENTS, f"augment is {self.augment!r}; expected {', '.join(AUGMENTS)}")
        _expect(all(value > 0 for value in self.std or ()), f"std is {self.std}; expected more than 0")


@dataclass(frozen=True)
class ModelConfig:
    """A torchvision classification model.

    Parameters
    ----------
    name : str
        As in ``torchvision.models.get_model``, such as ``resnet18``.
    small_images : bool
        The form for images of about 32 to 64 pixels: see `tdc_tvm.training.models.create_model`.
    weights : str, optional
        A checkpoint's path, as of `tdc_tvm.training.load_weights`, or torchvision's name of weights (``DEFAULT``).
    """

    name: str = "resnet18"
    small_images: bool = False
    weights: str | None = None


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of training: a learning rate that warms up and falls to zero along a cosine.

    Parameters
    ----------
    epochs : int
    optimizer : str
        ``sgd`` (Nesterov momentum) or ``adamw``.
    lr : float
        Peak learning rate.
    momentum : float
        Of SGD.
    weight_decay : float
        Of weights; biases and normalisation have none.
    warmup_epochs : float
        The rate rises linearly over them.
    final_lr : float
        The rate at the end, as a share of the peak.
    label_smoothing : float
    clip_norm : float, optional
        Largest norm of the loss's gradient.
    mixup : float
        The Beta distribution's parameter; 0 leaves images unmixed.
    ema_decay : float
        Of an exponential moving average of the weights, which is then what the phase yields; 0 for none.
    distill_weight : float
        Share of distillation from the teacher (Hinton et al., 2015) in the loss, 0 to 1; compression only.
    distill_temperature : float
    """

    epochs: int = 30
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup_epochs: float = 1.0
    final_lr: float = 0.0
    label_smoothing: float = 0.1
    clip_norm: float | None = None
    mixup: float = 0.0
    ema_decay: float = 0.0
    distill_weight: float = 0.0
    distill_temperature: float = 4.0

    def __post_init__(self) -> None:
        _expect(self.optimizer in ("sgd", "adamw"), f"optimizer is {self.optimizer!r}; expected sgd or adamw")
        _expect(self.epochs >= 0, f"epochs is {self.epochs}; expected 0 or more")
        for name in ("lr", "distill_temperature", *(["clip_norm"] if self.clip_norm is not None else [])):
            _expect(getattr(self, name) > 0, f"{name} is {getattr(self, name):g}; expected more than 0")
        for name in ("weight_decay", "warmup_epochs", "mixup"):
            _expect(getattr(self, name) >= 0, f"{name} is {getattr(self, name):g}; expected 0 or more")
        for name in ("momentum", "ema_decay"):
            _expect(0 <= getattr(self, name) < 1, f"{name} is {getattr(self, name):g}; expected 0 to below 1")
        for name in ("final_lr", "label_smoothing", "distill_weight"):
            _expect(0 <= getattr(self, name) <= 1, f"{name} is {getattr(self, name):g}; expected 0 to 1")


@dataclass(frozen=True)
class CompressConfig:
    """How a trained network is compressed.

    Parameters
    ----------
    method : str
        ``admm``: ADMM training, decomposition, fine-tuning.  ``direct``: decomposition and fine-tuning, for
        the epochs of both phases together.  ``scratch``: the Tucker network from random weights, by
        ``finetune`` alone.  ``dense``: no decomposition, trained on for the epochs of both phases together.
    admm : AdmmConfig
    admm_phase : PhaseConfig
        Training during ADMM.  Epochs that it does not need, because it converged, go to fine-tuning.
    finetune : PhaseConfig
        Training in Tucker format.
    recalibration_batches : int
        Batches for new statistics of batch normalisation after the decomposition.
    """

    method: str = "admm"
    admm: AdmmConfig = field(default_factory=AdmmConfig)
    admm_phase: PhaseConfig = field(default_factory=lambda: PhaseConfig(epochs=20, lr=0.02, final_lr=0.1))
    finetune: PhaseConfig = field(default_factory=lambda: PhaseConfig(epochs=20, lr=0.02, distill_weight=0.5))
    recalibration_batches: int = 50

    def __post_init__(self) -> None:
        _expect(self.method in PHASES, f"method is {self.method!r}; expected {', '.join(PHASES)}")
        batches = self.recalibration_batches
        _expect(batches >= 0, f"recalibration_batches is {batches}; expected 0 or more")


@dataclass(frozen=True)
class RunConfig:
    """What does not belong to the method: device, precision, seed, checkpoints.

    Parameters
    ----------
    seed : int
    device : str
        ``auto`` (a GPU if there is one) or ``cpu``.
    precision : str
        Of training: ``fp32``, or autocast to ``bf16`` or ``fp16`` (with loss scaling).
    channels_last : bool
        Memory format of the network and its input.
    compile : bool
        Let ``torch.compile`` fuse the network's operators; needs a C compiler.
    deterministic : bool
        Only deterministic GPU kernels: runs and resumed runs then agree bit for bit.  On a CPU they do anyway.
    checkpoint_steps : int
        Steps between checkpoints within an epoch; 0 writes them at the end of epochs alone.
    log_steps : int
        Steps between checks of the loss, and between points in TensorBoard.
    tensorboard : bool
    """

    seed: int = 0
    device: str = "auto"
    precision: str = "fp32"
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = True
    checkpoint_steps: int = 0
    log_steps: int = 50
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _expect(self.precision in PRECISIONS, f"precision is {self.precision!r}; expected {', '.join(PRECISIONS)}")
        _expect(self.device in ("auto", "cpu"), f"device is {self.device!r}; expected auto or cpu")
        _expect(self.log_steps >= 1, f"log_steps is {self.log_steps}; expected 1 or more")
        _expect(self.checkpoint_steps >= 0, f"checkpoint_steps is {self.checkpoint_steps}; expected 0 or more")
        _expect(self.seed >= 0, f"seed is {self.seed}; expected 0 or more")


@dataclass(frozen=True)
class Config:
    """All of a run: ``tdc train`` uses data, model, train and run; ``tdc compress`` also compress."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: PhaseConfig = field(default_factory=PhaseConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)
    run: RunConfig = field(default_factory=RunConfig)


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested data as ``outer.inner`` keys."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result


T = TypeVar("T")


def load_config(path: str | os.PathLike, base: Config | None = None) -> Config:
    """Read a configuration; what the file leaves out is as in ``base``, or keeps its default.

    Raises
    ------
    TdcError
        If the file cannot be read, or has a key or value that does not belong there.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise TdcError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise TdcError(f"{path} is not valid YAML: {error}") from None
    data = data or {}
    tree = _merge(asdict(base or Config()), data) if isinstance(data, Mapping) else data
    return from_dict(Config, tree, str(path))


def _merge(base: dict[str, Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Nested data with the values of ``data`` in place of those of ``base``; empty sections leave them."""
    result = dict(base)
    for key, value in data.items():
        section = isinstance(base.get(key), dict) and (value is None or isinstance(value, Mapping))
        result[key] = _merge(base[key], value or {}) if section else value
    return result


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Write a configuration as YAML, with every default spelled out."""
    import yaml

    with write_atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(asdict(config), sort_keys=False), encoding="utf-8")


def from_dict(kind: type[T], data: Any, source: str) -> T:
    """Make a dataclass from plain data; ``source`` names them in errors.

    Raises
    ------
    TdcError
        If a key is unknown or a value is of another type.
    """
    if not isinstance(data, Mapping):
        raise TdcError(f"{source} is a {type(data).__name__}; expected keys and values")
    hints = typing.get_type_hints(kind)
    known = [entry.name for entry in fields(kind)]  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        if key not in known:
            match = get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {match[0]!r}?)" if match else ""
            raise TdcError(f"{source} has the unknown key {key!r}{hint}; expected {', '.join(known)}")
        values[key] = _convert(hints[key], value, f"{key!r} of {source}")
    return kind(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        return from_dict(hint, value, name)  # type: ignore[arg-type]
    choices = typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None and type(None) in choices:
        return None
    kind = next(choice for choice in choices if choice is not type(None))
    if typing.get_origin(kind) is list:
        if isinstance(value, (list, tuple)):
            return [_convert(typing.get_args(kind)[0], item, name) for item in value]
    elif kind is float:
        # YAML 1.1 takes 1e-3, without a point, for text.
        try:
            if not isinstance(value, bool):
                return float(value)
        except (TypeError, ValueError):
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    expected = "a list of numbers" if typing.get_origin(kind) is list else kind.__name__
    raise TdcError(f"{name} is {value!r}; expected {expected}")


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise TdcError(message)
