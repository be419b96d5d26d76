import gzip
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tdc_tvm.errors import TdcError
from tdc_tvm.training.batches import LoaderBatches, make_batches, pad_crop, random_erase, resized_crop
from tdc_tvm.training.config import DataConfig
from tdc_tvm.training.data import Arrays, load_arrays, read_dataset, read_image, save_arrays

CLASSES = ("n02", "n01", "n03")


def write_image(path, value, size=(64, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 255 - value, 10)).save(path, quality=95)


@pytest.fixture
def tiny(tmp_path):
    """Tiny-ImageNet's layout; the classes' order in wnids.txt is not the alphabet's."""
    root = tmp_path / "tiny"
    for label, name in enumerate(CLASSES):
        for number in range(4):
            write_image(root / "train" / name / "images" / f"{name}_{number}.JPEG", 80 * label + number)
    lines = []
    for number in range(3):
        write_image(root / "val" / "images" / f"val_{number}.JPEG", 80 * number + 40)
        lines.append(f"val_{number}.JPEG\t{CLASSES[number]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("\n".join(CLASSES))
    return root


@pytest.fixture
def folder(tmp_path):
    """ImageNet's layout, images of several sizes."""
    root = tmp_path / "folder"
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                write_image(root / part / name / f"{number}.jpg", 100 * label + number, (40 + 10 * number, 36))
    return root


@pytest.fixture
def config(tmp_path):
    def make(name, root, **options):
        options = {"batch_size": 4, "eval_batch_size": 2, "workers": 0, "cache": str(tmp_path / "cache")} | options
        return DataConfig(name, str(root), **options)

    return make


def collect(batches, epoch=0, start=0):
    pairs = list(batches.epoch(epoch, start))
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def test_tiny_imagenets_public_layout(tiny, config):
    options = config("tiny-imagenet", tiny, in_memory=True, mean=[0.0] * 3, std=[1.0] * 3)
    dataset = read_dataset(options)
    assert dataset.classes == list(CLASSES)
    assert (len(dataset.train), len(dataset.val), dataset.image_size) == (12, 3, 64)
    images, labels = collect(make_batches(dataset.val, dataset, options, train=False))
    assert labels.tolist() == [0, 1, 2]
    red = (images[:, 0].mean((1, 2)) * 255).round()
    np.testing.assert_allclose(red, [40, 120, 200], atol=3)


def test_files_and_memory_give_the_same_images(tiny, config):
    parts = []
    for in_memory in (False, True):
        options = config("tiny-imagenet", tiny, in_memory=in_memory, augment="none")
        dataset = read_dataset(options)
        parts.append(collect(make_batches(dataset.train, dataset, options, train=True, seed=3), epoch=2))
    torch.testing.assert_close(parts[0], parts[1])


def test_the_decoded_set_is_cached_until_a_file_changes(tiny, config, tmp_path):
    options = config("tiny-imagenet", tiny, in_memory=True)
    first = read_dataset(options)
    files = sorted((tmp_path / "cache").iterdir())
    stamps = [path.stat().st_mtime_ns for path in files]
    again = read_dataset(options)
    assert np.array_equal(first.train.images, again.train.images)
    assert [path.stat().st_mtime_ns for path in files] == stamps
    write_image(tiny / "train" / "n01" / "images" / "n01_0.JPEG", 255)
    changed = read_dataset(options)
    assert not np.array_equal(first.train.images, changed.train.images)


def test_image_folders_are_scaled_and_cut(folder, config):
    options = config("imagefolder", folder, image_size=32, in_memory=True)
    dataset = read_dataset(options)
    assert dataset.train.images.shape == (8, 32, 32, 3)
    assert dataset.train.labels.tolist() == [0] * 4 + [1] * 4
    assert read_image(folder / "train" / "cat" / "3.jpg", 16).shape == (16, 16, 3)


@pytest.mark.parametrize(("augment", "erase"), [("pad-crop", 0.0), ("resized-crop", 0.5), ("none", 1.0)])
@pytest.mark.parametrize("in_memory", [False, True])
def test_any_number_of_processes_sees_the_same_images_from_any_step_on(tiny, config, augment, erase, in_memory):
    options = config("tiny-imagenet", tiny, in_memory=in_memory, augment=augment, padding=2, erase=erase)
    dataset = read_dataset(options)

    def images(epoch, start=0, rank=0, world=1, seed=0):
        batches = make_batches(dataset.train, dataset, options, train=True, seed=seed, rank=rank, world=world)
        return list(batches.epoch(epoch, start))

    whole = images(1)
    assert len(whole) == 3
    for (x, y), (u, v) in zip(whole[1:], images(1, start=1), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    for step, parts in enumerate(zip(images(1, rank=0, world=2), images(1, rank=1, world=2), strict=True)):
        torch.testing.assert_close(torch.cat([x for x, _ in parts]), whole[step][0])
        assert torch.equal(torch.cat([y for _, y in parts]), whole[step][1])
    for other in (images(2), images(1, seed=1)):
        assert not torch.equal(other[0][0], whole[0][0])


def test_shards_are_disjoint_and_evaluation_sees_each_image_once(config, tmp_path):
    images = np.arange(30, dtype=np.uint8).reshape(30, 1, 1, 1).repeat(4, 1).repeat(4, 2).repeat(3, 3)
    save_arrays(tmp_path / "train.npz", Arrays(images, np.arange(30) % 5), "abcde")
    options = config("arrays", tmp_path, batch_size=6, eval_batch_size=8, holdout=5, augment="none")
    options = replace(options, mean=[0.0] * 3, std=[1.0] * 3)
    dataset = read_dataset(options)
    seen = []
    for rank in range(3):
        batches = make_batches(dataset.train, dataset, options, train=True, rank=rank, world=3)
        seen.append((collect(batches)[0][:, 0, 0, 0] * 255).round().int().tolist())
    assert [len(part) for part in seen] == [8, 8, 8]
    assert len({number for part in seen for number in part}) == 24
    held = dataset.holdout.images[:, 0, 0, 0].tolist()
    assert not set(held) & {number for part in seen for number in part}
    assert read_dataset(options).holdout.images[:, 0, 0, 0].tolist() == held
    evaluated = []
    for rank in range(3):
        batches = make_batches(dataset.train, dataset, options, train=False, rank=rank, world=3)
        evaluated += (collect(batches)[0][:, 0, 0, 0] * 255).round().int().tolist()
    assert sorted(evaluated) == sorted(set(range(30)) - set(held))


def test_padding_cropping_and_mirroring():
    images = torch.arange(1, 17, dtype=torch.uint8).view(1, 4, 4, 1).expand(3, -1, -1, -1)
    draws = torch.tensor([[0.5, 0.0, 0.99], [0.5, 0.0, 0.99], [0.9, 0.9, 0.1], [0, 0, 0]])
    same, shifted, mirrored = pad_crop(images, draws, 1)[..., 0]
    assert torch.equal(same, images[0, ..., 0])
    assert torch.equal(shifted[1:, 1:], images[0, :3, :3, 0])
    assert not shifted[0].any()
    assert torch.equal(mirrored[:3, 1:], images[0, 1:, 1:, 0].flip(1))
    picture = torch.rand(2, 3, 8, 8)
    draws = torch.tensor([[0.3, 0.3], [0.3, 0.3], [0.9, 0.1], [1.0, 1.0]])  # the whole area
    torch.testing.assert_close(resized_crop(picture, draws, 0.2)[0], picture[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(resized_crop(picture, draws, 0.2)[1], picture[1].flip(2), atol=1e-5, rtol=0)
    quarter = resized_crop(picture, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.9, 0.9], [0.0, 0.0]]), 0.25)
    torch.testing.assert_close(quarter.mean((2, 3)), picture[:, :, :4, :4].mean((2, 3)), atol=0.06, rtol=0)


def test_a_rectangle_is_blanked_in_a_share_of_the_images():
    images = torch.ones(2000, 2, 20, 30)
    draws = torch.rand(5, len(images), generator=torch.Generator().manual_seed(0))
    blanked = random_erase(images, draws, 0.25) == 0
    assert torch.equal(blanked[:, 0], blanked[:, 1])
    area = blanked[:, 0].float().mean((1, 2))
    assert (area > 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert area[area > 0].mean().item() == pytest.approx((0.02 + 0.33) / 2, abs=0.02)
    sides = [blanked[:, 0].any(axis).sum(1) for axis in (2, 1)]
    assert torch.equal(sides[0] * sides[1], blanked[:, 0].sum((1, 2)))  # whole rectangles
    assert not random_erase(images[:1], torch.tensor([[0.0], [0.99], [0.99], [0.99], [0.99]]), 1.0)[0, :, -1, -1].any()


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_that_cannot_be_read_are_named_counted_and_skipped_only_when_asked(tiny, config, in_memory):
    (tiny / "train" / "n01" / "images" / "n01_1.JPEG").write_bytes(b"no image")
    whole = tiny / "train" / "n03" / "images" / "n03_2.JPEG"
    whole.write_bytes(whole.read_bytes()[:400])
    (tiny / "val" / "images" / "val_1.JPEG").unlink()

    def labels(options):
        dataset = read_dataset(options)
        train = make_batches(dataset.train, dataset, options, train=True)
        val = make_batches(dataset.val, dataset, options, train=False)
        return collect(train)[1], collect(val)[1], len(dataset.skipped) + len(train.skipped) + len(val.skipped)

    options = config("tiny-imagenet", tiny, in_memory=in_memory, batch_size=2, eval_batch_size=3)
    with pytest.raises(TdcError, match=r"images cannot be read: .*(n01_1|n03_2)\.JPEG.*skip_corrupt"):
        labels(options)
    train, val, skipped = labels(replace(options, skip_corrupt=True))
    assert len(train) == 10
    assert val.tolist() == [0, 2]
    assert skipped == 3


def test_cifar_and_fashion_mnist(tmp_path, config, monkeypatch):
    rng = np.random.default_rng(0)
    raw = tmp_path / "fashion"
    raw.mkdir()
    for part, count in (("train", 6), ("t10k", 4)):
        for what, array in (("images-idx3", rng.integers(0, 256, (count, 28, 28))), ("labels-idx1", np.arange(count))):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (raw / f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
    dataset = read_dataset(config("fashion-mnist", raw))
    assert dataset.train.images.shape == (6, 28, 28, 1)
    assert (dataset.channels, len(dataset.classes), dataset.val.labels.tolist()) == (1, 10, [0, 1, 2, 3])
    (raw / "t10k-labels-idx1-ubyte.gz").write_bytes(b"broken")
    with pytest.raises(TdcError, match=r"cannot read .*t10k-labels"):
        read_dataset(config("fashion-mnist", raw))
    with pytest.raises(TdcError, match=r"cifar10 is not in .* holds cifar-10-batches-py/, or let"):
        read_dataset(config("cifar10", tmp_path))

    class Packed:
        def __init__(self, root, train, download):
            count = 5 if train else 2
            self.data = np.full((count, 32, 32, 3), count, np.uint8)
            self.targets, self.classes = list(range(count)), list("abcdefghij")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Packed)
    dataset = read_dataset(config("cifar10", tmp_path))
    assert (dataset.train.images.shape, dataset.val.labels.tolist()) == ((5, 32, 32, 3), [0, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "wnids.txt").write_text("n01 n02"), "class count mismatch: wnids.txt .* 2 .* 3"),
        (lambda root: (root / "val/val_annotations.txt").write_text("a.JPEG\tn09"), "names the class 'n09'"),
        (lambda root: (root / "val/val_annotations.txt").write_text("a.JPEG n01"), "line 1 of .*expected a file"),
        (lambda root: [p.unlink() for p in (root / "train/n03/images").iterdir()], "class 'n03' has no images"),
        (lambda root: os.rename(root / "train", root / "training"), "there is no folder .*train"),
    ],
)
def test_incomplete_tiny_imagenet(tiny, config, change, message):
    change(tiny)
    with pytest.raises(TdcError, match=message):
        read_dataset(config("tiny-imagenet", tiny))


def test_parts_with_other_classes(folder, config):
    os.rename(folder / "val" / "dog", folder / "val" / "wolf")
    with pytest.raises(TdcError, match=r"class mismatch: .*only in train: dog; only in val: wolf; give both"):
        read_dataset(config("imagefolder", folder))


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 1), (np.uint16, 257)])
def test_gray_images_of_8_and_16_bits_are_the_same(tmp_path, dtype, scale):
    values = np.arange(64, dtype=dtype).reshape(8, 8) * 4
    Image.fromarray(values * dtype(scale)).save(tmp_path / "gray.png")
    np.testing.assert_array_equal(read_image(tmp_path / "gray.png", 8), np.repeat(values[..., None], 3, 2))


def test_one_class_alone_is_a_mistake(folder, config):
    for part in ("train", "val"):
        shutil.rmtree(folder / part / "dog")
    with pytest.raises(TdcError, match="one class, 'cat'; expected two or more"):
        read_dataset(config("imagefolder", folder))


def test_hidden_files_and_folders_are_no_data(folder, config):
    before = read_dataset(config("imagefolder", folder))
    write_image(folder / "train" / ".ipynb_checkpoints" / "0.jpg", 1)
    (folder / "train" / "cat" / "._0.jpg").write_bytes(b"what macOS leaves")
    after = read_dataset(config("imagefolder", folder))
    assert (after.classes, after.train.paths) == (before.classes, before.train.paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnist"}, "no data set named 'mnist'"),
        ({"root": "/nowhere"}, "folder /nowhere does not exist"),
        ({"holdout": 8}, "holdout is 8, of 8 training images"),
        ({"batch_size": 16}, "fewer than a batch of 16"),
        ({"augment": "rotate"}, "augment is 'rotate'"),
        ({"root": ""}, r"folder \(none given\) does not exist"),
        ({"mean": [0.5]}, "mean and std 1 and 3 values"),
    ],
)
def test_mistakes_in_the_configuration(folder, config, options, message):
    def read():
        chosen = config(**({"name": "imagefolder", "root": folder} | options))
        dataset = read_dataset(chosen)
        return make_batches(dataset.train, dataset, chosen, train=True)

    with pytest.raises(TdcError, match=message):
        read()


def test_arrays_that_are_none(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 3)), labels=[0, 1], classes=["x"], fingerprint="")
    with pytest.raises(TdcError, match="expected uint8"):
        load_arrays(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(TdcError, match="cannot read decoded images"):
        load_arrays(tmp_path / "b.npz")


def test_a_users_loader_repeats_its_epochs_from_any_step_on():
    x, y = torch.arange(12.0)[:, None], torch.arange(12)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 3, shuffle=True)
    batches = LoaderBatches(loader, "cpu", seed=5)
    whole = [labels.tolist() for _, labels in batches.epoch(1)]
    assert whole[2:] == [labels.tolist() for _, labels in batches.epoch(1, 2)]
    assert whole != [labels.tolist() for _, labels in batches.epoch(2)]
    with pytest.raises(TdcError, match="needs a length"):
        LoaderBatches((batch for batch in loader), "cpu")
    with pytest.raises(TdcError, match=r"gives Tensor; expected \(images, labels\)"):
        next(LoaderBatches([x], "cpu").epoch(0))
