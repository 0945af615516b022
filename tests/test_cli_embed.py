"""`ep-prune embed`: what it writes is read again, computes the same and reduces again; how it refuses."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ep_prune
from ep_prune.cli import main
from ep_prune.verification import Verification, verify

SHAPE = "--input=2,6"

NET = '''
"""Small networks, written as a user would."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, hidden=4):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, hidden), nn.Linear(hidden, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Tied(Net):
    def __init__(self):
        super().__init__(6)
        self.again = nn.Linear(6, 6)
        self.again.weight = self.first.weight

    def forward(self, x):
        return super().forward(x) + torch.tanh(self.again(x)).sum(1, keepdim=True)


def depthwise():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(),
        nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )


def affine():
    return nn.Linear(6, 2)
'''


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A folder with the user's module in it, which is the current one; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "embed_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "embed_net", raising=False)
    yield
    sys.modules.pop("embed_net", None)
    torch.set_num_threads(threads)


def made(name: str) -> nn.Module:
    """The user's model with the weights that `--seed 0` gives it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(importlib.import_module("embed_net"), name)()


def refused(code: int, capsys, *argv: str) -> str:
    """What a command that ends with `code` says, in one sentence, having written nothing."""
    before = {*os.listdir(), "__pycache__"}
    assert main(["embed", *argv]) == code
    printed = capsys.readouterr()
    text = printed.err.strip()
    assert text.startswith("ep-prune: ") and "\n" not in text and "Traceback" not in text
    assert set(os.listdir()) <= before and "wrote" not in printed.out
    return text


@pytest.mark.parametrize("kind", ["splitting", "threefold", "null", "compatible"])
def test_the_wide_model_is_read_again_computes_the_same_and_reduces_to_the_given_one(kind, capsys):
    model = [f"--kind={kind}", "--double", SHAPE]
    assert main(["embed", "embed_net:Net", *model, "--out=wide.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert f"{kind} embedding, forward and backward condition" in printed
    assert "verified: same output on " in printed and "wrote wide.safetensors" in printed
    hidden = (12, 9) if kind == "threefold" else (6, 4)
    assert f"4 -> {hidden[0]}" in printed and f"3 -> {hidden[1]}" in printed
    wide, narrow = ep_prune.load(lambda: made("Net"), "wide.safetensors"), made("Net").double()
    assert (wide.first.out_features, wide.second.out_features) == hidden
    x = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide(x), narrow(x), rtol=0, atol=1e-12)
    assert main(["verify", "embed_net:Net", "wide.safetensors", "--double", SHAPE]) == 0
    assert "note: wide.safetensors" not in capsys.readouterr().out
    assert main(["reduce", "embed_net:Net", "--weights=wide.safetensors", SHAPE, "--out=back.safetensors"]) == 0
    assert f"{hidden[0]} -> 4" in capsys.readouterr().out
    capsys.readouterr()
    assert main(["verify", "embed_net:Net", "back.safetensors", "--weights=wide.safetensors", SHAPE]) == 0
    assert "note: back.safetensors" not in capsys.readouterr().out
    refused(2, capsys, "embed_net:Net", "--weights=back.safetensors", SHAPE, "--out=none.safetensors")
    back = load_file("back.safetensors")
    assert back["model.first.weight"].shape == (4, 6) and back["model.second.weight"].shape == (3, 4)


def test_widths_and_the_seed_are_what_was_asked_for(capsys):
    argv = ["embed", "embed_net:Net", SHAPE, "--width=first=9", "--no-critical"]
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert main([*argv, f"--seed={seed}", f"--out={name}.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert "4 -> 9" in printed and "second" not in printed and "embedding, forward condition" in printed
    a, b, c = (load_file(f"{name}.safetensors") for name in "abc")
    assert a["model.first.weight"].shape == (9, 6) and a["model.first.weight"].dtype == torch.float32
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert any(not torch.equal(a[key], c[key]) for key in a if key.startswith("model."))


@pytest.mark.parametrize(("name", "shape"), [("depthwise", (2, 2, 6, 6)), ("Tied", (2, 6))])
def test_groups_and_ties_are_read_again(name, shape, capsys):
    given = [f"embed_net:{name}", f"--input={','.join(map(str, shape))}", "--double"]
    assert main(["embed", *given, "--out=wide.safetensors"]) == 0
    wide, narrow = ep_prune.load(lambda: made(name), "wide.safetensors"), made(name).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(wide(x), narrow.eval()(x), rtol=0, atol=1e-12)
    if name == "depthwise":
        assert wide[3].groups == wide[0].out_channels == 6
    else:
        assert wide.again.weight is wide.first.weight
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in narrow.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--width=third=9"], "no space 'third' that can be widened: choose among first, second"),
        (["--width=first=3"], "the space 'first' has 4 channels: pass a width of at least that, not 3"),
        (["--width=first"], "--width 'first' is no width: write SPACE=WIDTH"),
        (["--width=first=much"], "is no width"),
        (["--width=first=-3"], "is no width"),
        (["--width=first=8", "--width=first=9"], "names the space 'first' twice"),
        (["--width=first=9", "--kind=threefold"], "three-fold splitting makes 12 channels"),
        (["--width=first=4"], "nothing was widened"),
        (["--kind=folly"], "no embedding of kind 'folly': choose one of splitting, threefold, null, compatible"),
        (["--factor=1"], "--factor 1.0 does not widen"),
        (["--factor=nan"], "does not widen"),
        (["--factor=inf"], "does not widen"),
        (["--factor=2", "--width=first=9"], "--factor and --width both say how wide"),
        (["--factor=2", "--kind=threefold"], "--factor and --kind threefold both say how wide"),
        (["--weights=none.pt"], "cannot be read"),
        (["--input=2,5"], "at layer first"),
    ],
)
def test_wrong_requests_are_one_sentence_and_write_nothing(options, said, capsys):
    shape = [] if options[0].startswith("--input") else [SHAPE]
    assert said in refused(2, capsys, "embed_net:Net", *shape, *options, "--out=wide.safetensors")


def test_a_model_without_inner_spaces_is_refused(capsys):
    said = refused(2, capsys, "embed_net:affine", SHAPE, "--out=wide.safetensors")
    assert "nothing was widened (no space can be)" in said


def test_a_file_is_replaced_with_force_alone(capsys):
    Path("wide.safetensors").write_text("mine")
    said = refused(2, capsys, "embed_net:Net", SHAPE, "--out=wide.safetensors")
    assert "replace it with --force" in said and Path("wide.safetensors").read_text() == "mine"
    assert "does not exist" in refused(2, capsys, "embed_net:Net", SHAPE, "--out=nowhere/wide.safetensors")
    assert main(["embed", "embed_net:Net", SHAPE, "--out=wide.safetensors", "--force"]) == 0
    assert load_file("wide.safetensors")["model.first.weight"].shape == (6, 6)


def test_what_differs_is_not_written(capsys, monkeypatch):
    def changed(given: nn.Module, wide: nn.Module, inputs: object, **options: object) -> Verification:
        with torch.no_grad():
            wide.first.bias[0] += 1.0
        return verify(given, wide, inputs, **options)

    monkeypatch.setattr("ep_prune.cli_embed.verify", changed)
    said = refused(1, capsys, "embed_net:Net", SHAPE, "--out=wide.safetensors")
    assert "the wide model differs from the one given" in said and "--double" in said


def test_a_wide_file_is_not_widened_again(capsys):
    assert main(["embed", "embed_net:Net", SHAPE, "--out=wide.safetensors"]) == 0
    capsys.readouterr()
    again = ["embed_net:Net", SHAPE, "--weights=wide.safetensors", "--out=wider.safetensors"]
    assert "no file tells of two such steps" in refused(2, capsys, *again)


def test_a_file_of_another_model_is_named(capsys):
    assert main(["embed", "embed_net:Net", SHAPE, "--out=wide.safetensors"]) == 0
    capsys.readouterr()
    other = ["embed_net:Net", SHAPE, '--model-args={"hidden": 5}']
    said = refused(2, capsys, *other, "--weights=wide.safetensors", "--out=wider.safetensors")
    assert re.search(r"'first\.\w+' was widened from \(4, ?6?\), and is \(5, ?6?\)", said)


def test_the_grammar(capsys):
    with pytest.raises(SystemExit) as ending:
        main(["embed", "embed_net:Net", SHAPE])
    assert ending.value.code == 2 and "--out" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ending:
        main(["embed", "--help"])
    printed = capsys.readouterr().out
    assert ending.value.code == 0 and "examples:" in printed and "threefold" in printed


ORDERS = [
    "import ep_prune",
    "import ep_prune.criticality, ep_prune.effective_width",
    "import ep_prune.monitor, ep_prune.cli",
    "from ep_prune.effective_width import effective_width; from ep_prune.criticality import hessian_inertia",
]


def test_functions_keep_the_names_that_modules_share_with_them():
    """In a fresh interpreter for each order of imports, and after every module of the package is loaded."""
    for first in ORDERS:
        code = f"""
{first}
import importlib, pkgutil, sys
import ep_prune
for found in pkgutil.walk_packages(ep_prune.__path__, "ep_prune."):
    if found.name != "ep_prune.__main__":
        importlib.import_module(found.name)
for name in ("criticality", "effective_width"):
    function = getattr(ep_prune, name)
    assert callable(function) and function is getattr(sys.modules["ep_prune." + name], name), name
from ep_prune.criticality import criticality, hessian_inertia
assert ep_prune.criticality is criticality and ep_prune.hessian_inertia is hessian_inertia
assert all(hasattr(ep_prune, name) for name in ep_prune.__all__)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (first, done.stderr)


def test_the_package_measures_by_its_public_names():
    torch.manual_seed(0)
    net, x, y = made("Net").double(), torch.randn(9, 6).double(), torch.randn(9, 2).double()

    def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    point = ep_prune.criticality(net, loss, (x, y))
    assert isinstance(point, ep_prune.Criticality) and point.l2 > 0
    inertia = ep_prune.hessian_inertia(net, loss, (x, y))
    assert isinstance(inertia, ep_prune.Inertia)
    wide, report = ep_prune.embed(net, x, kind="splitting", full_output=True)
    assert isinstance(report, ep_prune.EmbedReport)
    assert set(ep_prune.widenable(net, x)) == {"first", "second"}
    widths = ep_prune.effective_width(wide, x, tol=1e-6)
    assert isinstance(widths, ep_prune.EffectiveWidths)
    assert widths.at(1e-6) == {"first": 4, "second": 3, "last": 2}
    assert ep_prune.EffectiveWidthMonitor(net, x, 0.1).records is not None
