"""`ep-prune compress`: what it writes and prints, how it refuses; and what `verify` says of its files."""

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ep_prune
from ep_prune.cli import main

GIVEN = ["compress_net:Net", "--input=2,6"]
HALF = [*GIVEN, "--calibration=images.npz", "--keep-macs=0.5"]

NET = '''
"""A network with nothing to spare, written as a user would."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, hidden=24):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, hidden), nn.Linear(hidden, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.relu(self.first(x)))))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x, y):
        return self.left(x) + self.right(y)


class Steps(Net):
    def forward(self, x):
        return super().forward(x).abs().sum(1)
'''


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A folder with the user's module and images in it, which is the current one; one thread; a still clock."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "compress_net.py").write_text(NET)
    draw = np.random.default_rng(0)
    images = {"names": np.arange(150), "x": draw.normal(size=(150, 6)).astype(np.float32)}
    np.savez(tmp_path / "images.npz", **images)
    np.savez(tmp_path / "others.npz", x=draw.normal(size=(40, 6)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "compress_net", raising=False)
    monkeypatch.setattr(importlib.import_module("ep_prune.compress"), "latency_of", lambda *_, **__: 1.0)
    yield
    sys.modules.pop("compress_net", None)
    torch.set_num_threads(threads)


def made(name: str = "Net", seed: int = 0) -> nn.Module:
    """The user's model with the weights that `--seed` gives it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return getattr(importlib.import_module("compress_net"), name)()


def macs(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in model.children())


def ended(code: int, capsys, *argv: str) -> str:
    """What a command that ends with `code` says, in one sentence, having written nothing."""
    before = {*os.listdir(), "__pycache__"}
    capsys.readouterr()
    assert main(list(argv)) == code
    printed = capsys.readouterr()
    text = printed.err.strip()
    assert text.startswith("ep-prune: ") and "\n" not in text and "Traceback" not in text
    assert set(os.listdir()) <= before and "wrote" not in printed.out
    return text


def test_half_of_the_multiplications_is_written_and_read_again(capsys):
    names = ["--out=n.safetensors", "--report=r.json", "--plot=w.png"]
    assert main(["compress", *HALF, *names]) == 0
    printed = capsys.readouterr()
    assert "\r" not in printed.err  # no bar where stderr is no terminal
    assert "budget      keep_macs=0.5" in printed.out and "grade       fitted, on " in printed.out
    assert all(f"wrote {name.partition('=')[2]}" in printed.out for name in names)
    report = json.loads(Path("r.json").read_text())
    narrow = ep_prune.load(made, "n.safetensors")
    assert report["grade"] == "fitted" and report["after"]["macs"] == macs(narrow) <= 0.5 * macs(made())
    assert report["samples_given"] == 150
    assert Path("w.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(path.name for path in Path().glob("*.partial*")) == []

    images = torch.from_numpy(np.load("images.npz")["x"])
    expected = ep_prune.compress(made(), torch.randn(2, 6), images.split(64), keep_macs=0.5, progress=False)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensor, narrow.state_dict()[name])


def test_without_out_nothing_is_written(capsys):
    before = {*os.listdir(), "__pycache__"}
    assert main(["compress", *HALF]) == 0
    assert "held out    divergence" in capsys.readouterr().out
    assert set(os.listdir()) <= before


@pytest.mark.parametrize(
    ("options", "holds"),
    [
        (["--keep-params=0.4"], lambda r: r["after"]["parameters"] <= 0.4 * r["before"]["parameters"]),
        (["--keep-macs=200"], lambda r: r["after"]["macs"] <= 200),
        (["--tol=0.2"], lambda r: r["change"] <= 0.2 and r["after"]["macs"] < r["before"]["macs"]),
        (["--latency=2"], lambda r: r["after"] == r["before"]),
        (["--keep-macs=0.6", "--round-to=8"], lambda r: all(w["after"] in (3, 8, 16, 24) for w in r["widths"])),
        (["--keep-macs=0.6", "--protect=first"], lambda r: r["widths"][0]["after"] == 24),
        (["--keep-macs=0.3", "--min-width=7"], lambda r: all(w["after"] >= 7 for w in r["widths"][:2])),
        (["--keep-macs=0.5", "--samples=32"], lambda r: r["samples_used"] == 32),
        (["--keep-macs=0.5", "--double"], lambda r: r["after"]["weight_bytes"] == 8 * r["after"]["parameters"]),
    ],
)
def test_every_option_does_what_it_says(options, holds, capsys):
    assert main(["compress", *GIVEN, "--calibration=images.npz", *options, "--report=r.json"]) == 0
    assert holds(json.loads(Path("r.json").read_text()))


def test_without_calibration_synthetic_inputs_stand_in(capsys):
    assert main(["compress", *GIVEN, "--keep-macs=0.5"]) == 0
    assert "note        no calibration data: synthetic inputs stood in" in capsys.readouterr().out


def test_the_seed_is_that_of_the_weights_and_of_the_fit(capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main(["compress", *HALF, f"--seed={seed}", f"--out={name}.safetensors"]) == 0
    a, b, c = (load_file(f"{name}.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["model.last.bias"], c["model.last.bias"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "no budget: pass keep_macs="),
        (["--keep-macs=0"], "keep_macs=0.0 is no budget"),
        (["--keep-macs=-1"], "keep_macs=-1.0 is no budget"),
        (["--keep-params=nan"], "keep_params=nan is no budget"),
        (["--keep-macs=1.5"], "neither a share up to 1 nor a whole number"),
        (["--keep-macs=0.001"], "the budget cannot be met: the narrowest model that can be reached keeps "),
        (["--keep-macs=0.5", "--tol=1e-6"], "the budgets cannot be met together"),
        (["--latency=0.5"], "latency=0.5 ms cannot be met"),
        (["--keep-macs=0.5", "--round-to=0"], "round_to=0 is not at least 1"),
        (["--keep-macs=0.5", "--samples=2"], "samples=2 is too few"),
        (["--keep-macs=0.5", "--protect=third"], "protect names 'third'"),
        (["--keep-macs=0.5", "--weights=none.pt"], "cannot be read"),
        (["--keep-macs=0.5", "--out=nowhere/n.safetensors"], "does not exist"),
        (["--keep-macs=0.5", "--out=."], "is a folder"),
        (["--keep-macs=0.5", "--out=a", "--plot=a"], "give each its own"),
        (["--keep-macs=0.5", "--plot=w.txt"], "is no picture's name"),
    ],
)
def test_wrong_requests_are_one_sentence_and_write_nothing(options, said, capsys):
    assert said in ended(2, capsys, "compress", *GIVEN, "--calibration=images.npz", *options)


def test_calibration_that_is_none_is_refused(capsys):
    def refusal(*argv: str) -> str:
        return ended(2, capsys, "compress", *argv, "--keep-macs=0.5")

    assert "--calibration none.npz" in refusal(*GIVEN, "--calibration=none.npz")
    assert "compress_net.py is a text file" in refusal(*GIVEN, "--calibration=compress_net.py")
    np.savez("p.npz", x=np.zeros((4, 5), dtype=np.float32))
    said = refusal(*GIVEN, "--calibration=p.npz")
    assert "--calibration p.npz has shape (4, 5): store one of shape (samples, 6)" in said
    np.savez("p.npz", x=np.zeros((4, 6), dtype=np.uint8))
    assert "--calibration p.npz holds no floating array" in refusal(*GIVEN, "--calibration=p.npz")
    np.savez("p.npz", x=np.zeros((9, 6), dtype=np.float32))
    assert "all 9 samples of the calibration data are the same" in refusal(*GIVEN, "--calibration=p.npz")
    bad = np.load("images.npz")["x"]
    bad[100, 3] = np.nan
    np.savez("p.npz", x=bad)
    said = refusal(*GIVEN, "--calibration=p.npz")
    assert "batch 1 of the calibration data holds NaN or infinite values" in said
    two = ["compress_net:Two", "--input=2,6", "--input=2,6", "--calibration=images.npz"]
    assert "--calibration holds one input, and the model takes several: call ep_prune.compress" in refusal(*two)


def test_a_file_is_replaced_with_force_alone(capsys):
    Path("n.safetensors").write_text("mine")
    assert "replace it with --force" in ended(2, capsys, "compress", *HALF, "--out=n.safetensors")
    assert Path("n.safetensors").read_text() == "mine"
    assert main(["compress", *HALF, "--out=n.safetensors", "--force"]) == 0
    assert load_file("n.safetensors")["model.first.weight"].shape[0] < 24


# ---- verify --------------------------------------------------------------------------------------------


def compressed(*options: str) -> str:
    assert main(["compress", *HALF, *options, "--out=n.safetensors"]) == 0
    return "n.safetensors"


def altered(path: str, name: str) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name].view(-1)[0] += 0.01
    save_file(tensors, path, metadata)


def test_verify_measures_and_claims_nothing(capsys):
    path = compressed()
    capsys.readouterr()
    assert main(["verify", *GIVEN[:1], path, *GIVEN[1:], "--probes=others.npz"]) == 0
    printed = capsys.readouterr().out
    assert f"grade       fitted: {path} approximates the model, and no equality is claimed" in printed
    assert "weights     as the plan in the file makes them of this model" in printed
    assert "same" not in printed and "DIFFERENT" not in printed

    x = torch.from_numpy(np.load("others.npz")["x"])
    wide, narrow = made().double(), ep_prune.load(made, path).double()
    with torch.no_grad():
        a, b = wide(x.float().double()), narrow(x.float().double())
    change = float((a - b).abs().max() / a.abs().max())
    assert 0 < change < 1
    assert f"change      {change:.2g} of the largest output, in float64, on 40 samples" in printed
    equal = float((a.argmax(1) == b.argmax(1)).double().mean())
    assert f"decisions   {equal:.1%} equal" in printed


def test_verify_without_probes_says_that_they_are_synthetic_and_knows_no_decisions_without_scores(capsys):
    path = compressed()
    capsys.readouterr()
    assert main(["verify", *GIVEN[:1], path, *GIVEN[1:]]) == 0
    assert "on 32 synthetic samples" in capsys.readouterr().out
    steps = ["compress_net:Steps", "--input=2,6"]
    assert main(["compress", *steps, *HALF[2:], "--out=s.safetensors"]) == 0
    capsys.readouterr()
    assert main(["verify", steps[0], "s.safetensors", steps[1]]) == 0
    assert "decisions" not in capsys.readouterr().out


def test_verify_judges_a_tolerance(capsys):
    path = compressed()
    verify = ["verify", *GIVEN[:1], path, *GIVEN[1:], "--probes=others.npz"]
    capsys.readouterr()
    assert main([*verify, "--tol=0.99"]) == 0
    assert "within      --tol 0.99" in capsys.readouterr().out
    assert "differs from the wide one at 'output'" in ended(1, capsys, *verify, "--tol=1e-5")


def test_an_altered_weight_or_plan_is_not_verified(capsys):
    for name in ("model.first.weight", "model.last.bias"):
        path = compressed("--force")
        altered(path, name)
        said = ended(1, capsys, "verify", *GIVEN[:1], path, *GIVEN[1:])
        assert f"{name.removeprefix('model.')!r} in {path} is not what the plan there makes" in said
    path = compressed("--force")
    altered(path, next(k for k, t in load_file(path).items() if k.startswith("plan.") and t.is_floating_point()))
    assert "the file was altered" in ended(1, capsys, "verify", *GIVEN[:1], path, *GIVEN[1:])


def test_of_other_weights_the_change_is_told_and_the_plan_is_not_checked(capsys):
    path = compressed()
    capsys.readouterr()
    assert main(["verify", *GIVEN[:1], path, *GIVEN[1:], "--seed=1"]) == 0
    printed = capsys.readouterr().out
    assert f"note: {path} was made from other weights" in printed
    assert "weights     not checked: the plan in the file was made for other weights" in printed


def test_a_file_of_nothing_but_exact_edits_is_still_verified_as_equal(capsys):
    path = "n.safetensors"
    assert main(["compress", *GIVEN, "--calibration=images.npz", "--keep-macs=1", f"--out={path}"]) == 0
    capsys.readouterr()
    assert main(["verify", *GIVEN[:1], path, *GIVEN[1:]]) == 0
    assert capsys.readouterr().out.startswith("same on ")


def test_a_compressed_file_is_reduced_inspected_and_compressed_again(capsys):
    path = compressed()
    weights = [f"--weights={path}"]
    for command in ("reduce", "inspect"):
        assert main([command, *GIVEN, *weights]) == 0
    assert main(["compress", *GIVEN, *weights, *HALF[2:], "--out=m.safetensors"]) == 0
    assert (
        load_file("m.safetensors")["model.second.weight"].numel() < load_file(path)["model.second.weight"].numel()
    )
    capsys.readouterr()
    assert main(["verify", *GIVEN[:1], "m.safetensors", *GIVEN[1:], *weights]) == 0
    assert "as the plan in the file makes them of this model" in capsys.readouterr().out
