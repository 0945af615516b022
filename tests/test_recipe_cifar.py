"""The CIFAR recipe on a made-up data set in torchvision's format; `compress` is a stand-in."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision import datasets

import ep_prune
from recipes import cifar

FACTORY = """
from torch import nn

def small(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(width * 64, 10))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the data set, a module with a factory, and a checkpoint of what that makes."""
    generator = np.random.default_rng(0)
    home = tmp_path / "cifar-10-batches-py"
    home.mkdir()
    files = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    for name in files:
        data = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        content = {"data": data, "labels": generator.integers(0, 10, 20).tolist()}
        (home / name).write_bytes(pickle.dumps(content))
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(n) for n in range(10)]}))
    # torchvision checks the official checksums
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[name, None] for name in files[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [[files[5], None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": None})
    (tmp_path / "cifar_recipe_model.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    import cifar_recipe_model

    torch.manual_seed(0)
    model = cifar_recipe_model.small()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "model.pt")
    return tmp_path, model, cifar_recipe_model


def arguments(folder, **more) -> list[str]:
    base = {"model": "cifar_recipe_model:small", "weights": folder / "model.pt", "data": folder, "keep-macs": 0.5}
    return [part for key, value in {**base, **more}.items() for part in (f"--{key}", str(value))]


def test_compress_gets_normalised_training_images_and_the_test_set_is_evaluated(folder, monkeypatch, capsys):
    path, model, module = folder
    calls = []

    def compress(network, example, *, calibration, keep_macs):
        calls.append((network, example, calibration, keep_macs))
        return SimpleNamespace(model=module.small(4))

    monkeypatch.setattr(ep_prune, "compress", compress, raising=False)
    assert cifar.main(arguments(path, calibration=30, seed=1)) == 0
    ((network, example, batches, keep_macs),) = calls
    assert keep_macs == 0.5 and not network.training
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key])
    drawn = torch.cat(batches)
    assert drawn.shape == (30, 3, 32, 32) and torch.equal(example, drawn[:2])
    train = datasets.CIFAR10(str(path), train=True).data  # (100, 32, 32, 3)
    mean, std = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.2470, 0.2435, 0.2616))
    pixels = ((torch.from_numpy(train).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    nearest = torch.cdist(drawn.flatten(1), pixels.flatten(1)).min(1)
    assert float(nearest.values.max()) < 0.1 and len(nearest.indices.unique()) == 30
    test = datasets.CIFAR10(str(path), train=False)
    x = ((torch.from_numpy(test.data).float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = 100 * float((model(x).argmax(1) == torch.tensor(test.targets)).float().mean())
    printed = capsys.readouterr().out
    assert f"accuracy    {expected:.2f} % -> " in printed and "on 20 test images" in printed
    assert "(50.0%)" in printed


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"data": "/nowhere"}, "CIFAR-10 is not in /nowhere"),
        ({"calibration": 101}, "--calibration is 101, and there are 100 training images"),
        ({"weights": "/nowhere.pt"}, "nowhere.pt"),
    ],
)
def test_what_is_wrong_is_one_sentence(folder, more, said):
    with pytest.raises(SystemExit, match=said):
        cifar.main(arguments(folder[0], **more))


def test_without_compress_it_says_so(folder, monkeypatch):
    monkeypatch.delattr(ep_prune, "compress", raising=False)
    with pytest.raises(SystemExit, match="has no compress"):
        cifar.main(arguments(folder[0], calibration=10))


def test_nothing_in_a_checkpoint_is_executed(folder):
    path, model, _ = folder
    torch.save(model, path / "whole.pt")
    with pytest.raises(SystemExit, match=r"whole\.pt"):
        cifar.main(arguments(path, weights=path / "whole.pt"))
