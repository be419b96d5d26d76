"""Compare ADMM with its rivals: dense networks, dense ones trained on, plain decomposition, Tucker from scratch.

For every seed a dense network is trained, and from it each method has the same number of further epochs:

    dense    the dense network, trained on
    direct   decomposition (HOOI), fine-tuning in Tucker format
    admm     ADMM training, decomposition, fine-tuning in Tucker format
    scratch  the Tucker network from random weights, for the dense network's and the further epochs together

The configuration (scripts/configs/*.yaml) says model, data and phases.  Everything lies in the output folder and
continues where it stopped: the same command again.  With --budget it stops in time.  Each result is a line of
results.jsonl.  ``report`` prints a table of one or several such files.

    python scripts/train_tiny_imagenet.py run CONFIG -o FOLDER --data ROOT --seeds 0 1 2 [--budget SECONDS]
    python scripts/train_tiny_imagenet.py report FOLDER/results.jsonl
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from tdc_tvm.errors import TdcError
from tdc_tvm.plan import DecompositionPlan, parse_ranks
from tdc_tvm.training import apply_plan
from tdc_tvm.training.checkpoint import make_folder
from tdc_tvm.training.config import Config, load_config
from tdc_tvm.training.evaluation import evaluate
from tdc_tvm.training.models import create_model
from tdc_tvm.training.runs import Data, compress_run, open_data, train
from tdc_tvm.training.trainer import make_accelerator

METHODS = ("dense", "direct", "admm", "scratch")


def uniform_plan(model: torch.nn.Module, shape: tuple[int, ...], reduction: float) -> DecompositionPlan:
    """Ranks that are one share of each k x k convolution's channels, multiples of 8, for a MAC reduction.

    Parameters
    ----------
    model : torch.nn.Module
    shape : tuple of int
        Of the input.
    reduction : float
        Share of all convolutions' MACs to save, at least.
    """
    convs = {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.Conv2d and module.kernel_size != (1, 1) and module.groups == 1
    }
    convs.pop(next(iter(convs)))  # the stem

    def plan(share: float) -> DecompositionPlan:
        def rank(channels: int) -> int:
            return min(channels, max(8, int(share * channels / 8) * 8))

        return DecompositionPlan({n: (rank(c.out_channels), rank(c.in_channels)) for n, c in convs.items()})

    def saved(share: float) -> float:
        _, report = apply_plan(model, plan(share), example=shape)
        assert report.macs is not None
        return 1 - report.macs[1] / report.macs[0]

    # Ranks, and so MACs, fall in steps as the share falls: the largest share that saves enough.
    shares = [share / 64 for share in range(64, 0, -1)]
    for share in shares:
        if saved(share) >= reduction:
            return plan(share)
    raise TdcError(f"no share of the channels saves {reduction:.0%} of the MACs; at most {saved(shares[-1]):.1%}")


def choose_plan(text: str, model: torch.nn.Module, data: Data) -> DecompositionPlan:
    """A plan's file, a preset, or the MAC reduction of a uniform plan, such as ``macs=0.6``."""
    if text.startswith("macs="):
        try:
            reduction = float(text[5:])
        except ValueError:
            raise TdcError(f"--plan is {text!r}; expected a number, such as macs=0.6") from None
        return uniform_plan(model, data.shape, reduction)
    plan = parse_ranks(text)
    if not isinstance(plan, DecompositionPlan):
        raise TdcError(f"--plan is {text!r}; expected a plan's file, a preset, or a reduction such as macs=0.6")
    return plan


def for_method(config: Config, method: str, seed: int) -> Config:
    """The configuration of one run."""
    compress = replace(config.compress, method=method)
    if method == "scratch":
        epochs = config.train.epochs + compress.admm_phase.epochs + compress.finetune.epochs
        compress = replace(compress, finetune=replace(config.train, epochs=epochs))
    return replace(config, compress=compress, run=replace(config.run, seed=seed))


def environment() -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a file of results."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TdcError(f"cannot read results from {path}: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise TdcError(f"line {number} of {path} is no result: {error}; remove it") from None
    return found


def run(args: argparse.Namespace) -> None:
    started = time.monotonic()
    deadline = None if args.budget is None else started + args.budget
    config = load_config(args.config)
    if args.data is not None:
        config = replace(config, data=replace(config.data, root=str(args.data)))
    if args.device is not None:
        config = replace(config, run=replace(config.run, device=args.device))
    accelerator = make_accelerator(config.run)
    make_folder(args.output)
    results = args.output / "results.jsonl"
    lines = read_results(results) if results.is_file() else []
    done = {(line["seed"], line["method"]) for line in lines}
    say = accelerator.print
    say(f"{args.config}: seeds {args.seeds}, methods {args.methods}, {len(done)} results so far")
    plan: DecompositionPlan | None = None
    for seed in args.seeds:
        left = [method for method in args.methods if (seed, method) not in done]
        if not left and (seed, "trained") in done:
            continue
        base = for_method(config, "dense", seed)
        data = open_data(base.data, base.run, accelerator)
        if plan is None:
            net = create_model(config.model, len(data.dataset.classes), data.dataset.channels)
            plan = choose_plan(args.plan, net, data)
            if any(line.get("plan", plan.to_dict()) != plan.to_dict() for line in lines):
                raise TdcError(f"{results} has results of other ranks than {args.plan}; choose another folder")
        common = {
            "model": config.model.name,
            "seed": seed,
            "config": asdict(config),
            "holdout_images": config.data.holdout,
            "command": ["scripts/train_tiny_imagenet.py", *(Path(a).name if "/" in a else a for a in sys.argv[1:])],
            "environment": environment(),
        }

        def write(record: dict[str, Any]) -> None:
            if accelerator.is_main_process:
                with open(results, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")

        model, phase = train(base, args.output / f"seed{seed}" / "trained", resume=True, deadline=deadline, data=data)
        if not phase.finished:
            return say(f"time is up in the dense training of seed {seed}; the same command continues")
        if (seed, "trained") not in done:
            scores = {n: evaluate(model, part, accelerator=accelerator).to_dict() for n, part in data.parts.items()}
            write({**common, "method": "trained", "scores": scores, "epochs": phase.history})
        for method in left:
            if deadline is not None and time.monotonic() > deadline:
                return say(f"time is up before {method}, seed {seed}; the same command continues")
            options = for_method(config, method, seed)
            folder = args.output / f"seed{seed}" / method
            _, history, result = compress_run(options, model, plan, folder, resume=True, deadline=deadline, data=data)
            if not history.finished:
                return say(f"time is up in {method}, seed {seed}; the same command continues")
            ranks = {} if method == "dense" else {"plan": plan.to_dict()}
            write({**common, **ranks, **result, "epochs": history.epochs})
            say(f"seed {seed}, {method}: {json.dumps(result['scores'])}")
    say(f"all done in {time.monotonic() - started:.0f} s of this call; results in {results}")


def report(args: argparse.Namespace) -> None:
    lines = [line for path in args.files for line in read_results(path)]
    part = "val" if all("val" in line["scores"] for line in lines) else "holdout"
    for model in sorted({line["model"] for line in lines}):
        ours = [line for line in lines if line["model"] == model]
        reference = {line["seed"]: line["scores"][part]["top1"] for line in ours if line["method"] == "dense"}
        print(f"{model}: top-1 on {part} in %, mean and standard deviation over seeds")
        print(f"{'method':10}{'seeds':>6}{'top-1':>8}{'sd':>6}{'- dense':>9}{'MACs saved':>12}{'s per epoch':>13}")
        for method in ("trained", *METHODS):
            chosen = [line for line in ours if line["method"] == method]
            if not chosen:
                continue
            top1 = [100 * line["scores"][part]["top1"] for line in chosen]
            pairs = [
                100 * (line["scores"][part]["top1"] - reference[line["seed"]])
                for line in chosen
                if line["seed"] in reference
            ]
            macs = chosen[0].get("macs")
            phase = "admm" if method == "admm" else None
            seconds = [e["train_seconds"] for line in chosen for e in line["epochs"] if phase in (None, e["phase"])]
            print(
                f"{method:10}{len(top1):6}{statistics.mean(top1):8.2f}"
                f"{statistics.stdev(top1) if len(top1) > 1 else 0:6.2f}"
                f"{statistics.mean(pairs) if pairs else float('nan'):+9.2f}"
                f"{1 - macs[1] / macs[0] if macs else 0:12.1%}{statistics.median(seconds):13.2f}"
            )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("run", help="train and compress")
    first.add_argument("config", type=Path)
    first.add_argument("-o", "--output", type=Path, required=True, help="folder of results and checkpoints")
    first.add_argument("--data", type=Path, help="the data set's folder, instead of the configuration's")
    first.add_argument("--plan", default="macs=0.6", help="a plan's file, a preset, or a MAC reduction: macs=0.6")
    first.add_argument("--seeds", type=int, nargs="+", default=[0])
    first.add_argument("--methods", nargs="+", choices=METHODS, default=["dense", "direct", "admm"])
    first.add_argument("--budget", type=float, help="seconds after which to stop, with a checkpoint")
    first.add_argument("--device", choices=["auto", "cpu"], help="instead of the configuration's")
    second = commands.add_parser("report", help="print a table")
    second.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args(argv)
    try:
        (run if args.command == "run" else report)(args)
    except TdcError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
