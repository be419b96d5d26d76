"""Two processes on the CPU (gloo), as torchrun starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = """
import hashlib, json, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, {tests!r})
from test_trainer import Net, PLAN, method
from tdc_tvm.errors import TdcError
from tdc_tvm.training import compress
from tdc_tvm.training.batches import LoaderBatches, make_batches
from tdc_tvm.training.compression import share_loader
from tdc_tvm.training.config import DataConfig, PhaseConfig, RunConfig
from tdc_tvm.training.data import read_dataset
from tdc_tvm.training.trainer import make_accelerator

root = Path({root!r})
run = RunConfig(tensorboard=False, checkpoint_steps=2)
accelerator = make_accelerator(run)
rank, world = accelerator.process_index, accelerator.num_processes
data = DataConfig("arrays", str(root), batch_size=12, eval_batch_size=16, mean=[0.5], std=[0.25], padding=1)
dataset = read_dataset(data)
train = make_batches(dataset.train, dataset, data, train=True, rank=rank, world=world)
val = make_batches(dataset.val, dataset, data, train=False, rank=rank, world=world)
config = replace(
    method("admm"), admm_phase=PhaseConfig(2, lr=0.05), finetune=PhaseConfig(1, lr=0.02, distill_weight=0.5)
)

def once(folder, resume=False, kind=Net):
    torch.manual_seed(0)
    return compress(
        kind(), train, PLAN, eval_loader=val, config=config, run=run, folder=root / folder, resume=resume, show=False
    )

def digest(model):
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()

model, history = once("whole")

class Failing(Net):
    # Both processes fail in the middle of the second epoch, as if they had been killed.
    calls = 0
    def forward(self, x):
        self.calls += self.training
        if self.calls > 8:
            raise KeyboardInterrupt
        return super().forward(x)

try:
    once("parts", kind=Failing)
except KeyboardInterrupt:
    stopped = True
else:
    stopped = False
accelerator.wait_for_everyone()
resumed, again = once("parts", resume=True)
shard = [label for _, labels in train.epoch(5) for label in labels.tolist()]
pairs = torch.utils.data.TensorDataset(torch.rand(41, 1, 12, 12), torch.arange(41))
counts = []
for size in (16, 41):
    shared = share_loader(torch.utils.data.DataLoader(pairs, size), accelerator, 0, train=False)
    counts.append([number for _, labels in shared.epoch(0) for number in labels.tolist()])
out = {{
    "user": counts,
    "world": world, "stopped": stopped, "model": digest(model), "resumed": digest(resumed), "shard": shard,
    "epochs": len(history.epochs), "seen": sum(len(y) for _, y in val.epoch(0)),
    "losses": [[epoch["train_loss"] for epoch in h.epochs] for h in (history, again)],
    "val": [epoch["val_top1"] for epoch in history.epochs],
}}
(root / f"rank{{rank}}.json").write_text(json.dumps(out))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes found."""
    from tdc_tvm.training.data import Arrays, save_arrays

    root = tmp_path_factory.mktemp("ddp")
    rng = np.random.default_rng(0)
    for part, count in (("train", 75), ("val", 41)):
        images = rng.integers(0, 256, (count, 12, 12, 1), np.uint8)
        # In the training set a label is an image's number, so that shards can be told apart.
        save_arrays(root / f"{part}.npz", Arrays(images, np.arange(count) % 10), [str(n) for n in range(10)])
    script = root / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), root=str(root)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    # The device is chosen, as a user's is who has no GPU.
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return root, [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_processes_end_with_the_same_weights_and_figures(ranks):
    _, (first, second) = ranks
    assert (first["world"], second["world"]) == (2, 2)
    assert first["model"] == second["model"]
    assert first["val"] == second["val"]
    assert first["epochs"] == 3


def test_they_share_each_batch_and_the_evaluation(ranks):
    _, (first, second) = ranks
    assert len(first["shard"]) == len(second["shard"]) == 36
    assert first["seen"] + second["seen"] == 41


def test_a_users_loader_is_evaluated_once(ranks):
    _, (first, second) = ranks
    for ours, theirs in zip(first["user"], second["user"], strict=True):
        assert sorted(ours + theirs) == list(range(41))


def test_a_run_that_was_stopped_within_an_epoch_continues_bit_for_bit(ranks):
    _, (first, second) = ranks
    assert first["stopped"]
    assert first["resumed"] == second["resumed"] == first["model"]
    assert first["losses"][0] == first["losses"][1] == second["losses"][0]


def test_only_the_first_process_writes(ranks):
    root, _ = ranks
    lines = (root / "whole" / "admm" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
