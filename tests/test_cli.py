"""The command line in process: what each command writes and prints, its exit code, and its one sentence."""

import importlib
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ep_prune
from ep_prune.cli import main

SHAPE = "--input=2,6"

NET = '''
"""A small network with two copies, a null neuron and a constant one, written as a user would."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, classes)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def plain(classes=3):
    return Net(classes)


def planted():
    net = Net()
    with torch.no_grad():
        net.first.weight[5], net.first.bias[5] = 2 * net.first.weight[0], 2 * net.first.bias[0]
        net.first.weight[6], net.first.bias[6] = 0, 0.5
        net.second.weight[:, 7] = 0
    return net


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.read, self.head = nn.Embedding(50, 4), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, tokens, x):
        return self.head(torch.tanh(self.table(tokens).mean(1) + self.read(x)))


def broken():
    raise ValueError("no such luck")


def number():
    return 3


VALUE = 3
'''


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """A folder with the user's module in it, which is the current one; one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "user_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "user_net", raising=False)
    yield
    sys.modules.pop("user_net", None)
    torch.set_num_threads(threads)


@pytest.fixture
def ended(capsys) -> Callable[..., str]:
    """Run a command that must end with `code`; its stderr, checked to be one sentence without a traceback."""

    def run(code: int, *argv: str) -> str:
        assert main(list(argv)) == code
        text = capsys.readouterr().err.strip()
        assert text.startswith("ep-prune: ")
        assert "\n" not in text and "Traceback" not in text
        return text

    return run


def trained(**options) -> nn.Module:
    """The user's network with the weights that `--seed 0` gives it."""
    user_net = importlib.import_module("user_net")

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return user_net.planted(**options)


# ---- the commands -------------------------------------------------------------------------------------


def test_reduce_writes_what_was_asked_and_verify_agrees(capsys):
    done = main(["reduce", "user_net:planted", SHAPE, "--out=n.safetensors", "--report=r.json", "--plot=w.png"])
    assert done == 0
    printed = capsys.readouterr()
    assert "8 -> 5" in printed.out and "wrote n.safetensors" in printed.out
    assert "\r" not in printed.err  # no bar where stderr is no terminal
    report = json.loads(Path("r.json").read_text())
    assert report["grade"] == "exact"
    assert [(space["before"], space["after"]) for space in report["spaces"]] == [(8, 5), (3, 3)]
    assert report["verification"]["ok"] is True
    assert Path("w.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert load_file("n.safetensors")["model.first.weight"].shape == (5, 6)
    narrow = ep_prune.load(trained, "n.safetensors")
    x = torch.randn(9, 6)
    torch.testing.assert_close(narrow(x), trained()(x))
    assert main(["verify", "user_net:planted", "n.safetensors", SHAPE]) == 0
    assert capsys.readouterr().out.startswith("same on ")
    assert sorted(path.name for path in Path().glob("*.partial*")) == []


def test_without_out_nothing_is_written(capsys):
    before = sorted(os.listdir())
    assert main(["reduce", "user_net:planted", SHAPE]) == 0
    assert "8 -> 5" in capsys.readouterr().out
    assert main(["inspect", "user_net:planted", SHAPE]) == 0
    printed = capsys.readouterr().out
    assert "8 -> 5" in printed and "nothing was written" in printed
    assert sorted(name for name in os.listdir() if name != "__pycache__") == before


def test_protect_keeps_a_layer(capsys):
    assert main(["inspect", "user_net:planted", SHAPE, "--protect=first"]) == 0
    printed = capsys.readouterr().out
    assert "->" not in printed.splitlines()[2] and "protected" in printed


def test_a_model_of_two_inputs_and_a_table(capsys):
    assert main(["inspect", "user_net:Two", "--input=3,5:int64:50", "--input=3,6"]) == 0
    assert "table" in capsys.readouterr().out


def test_torchvision_by_name(capsys):
    argv = ["inspect", "torchvision:squeezenet1_1", "--input=1,3,32,32", '--model-args={"num_classes": 7}']
    assert main(argv) == 0
    assert "features.3.squeeze" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["pt", "safetensors", "wrapped", "listed"])
def test_weights_of_every_form(kind, capsys):
    state = trained().state_dict()
    path = "w.safetensors" if kind == "safetensors" else "w.pt"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "wrapped":
        torch.save({"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    elif kind == "listed":
        torch.save([{"model": state}, 3], path)
    else:
        torch.save(state, path)
    assert main(["inspect", "user_net:plain", "--weights", path, "--seed=5", SHAPE]) == 0
    assert "8 -> 5" in capsys.readouterr().out


def test_double_stores_and_verifies_float64(capsys):
    assert main(["reduce", "user_net:planted", SHAPE, "--double", "--out=n.safetensors"]) == 0
    assert load_file("n.safetensors")["model.first.weight"].dtype == torch.float64
    assert main(["verify", "user_net:planted", "n.safetensors", SHAPE, "--double"]) == 0
    out = capsys.readouterr().out
    assert "limit 1.00e-10" in out and "note: n.safetensors" not in out


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pt"])
def test_bounded_reduction_on_probes(kind, capsys):
    probes = torch.randn(70, 6, generator=torch.Generator().manual_seed(1))
    path = f"p.{kind}"
    if kind == "npz":
        np.savez(path, labels=np.arange(70), images=probes.numpy())
    elif kind == "safetensors":
        save_file({"images": probes}, path)
    else:
        torch.save(probes, path)
    options = [SHAPE, "--tol=1e-3", "--probes", path]
    assert main(["reduce", "user_net:planted", *options, "--out=n.safetensors", "--report=r.json"]) == 0
    report = json.loads(Path("r.json").read_text())
    assert (report["grade"], report["tol"]) == ("bounded", 1e-3)
    assert report["verification"]["synthetic"] is False
    assert main(["verify", "user_net:planted", "n.safetensors", *options]) == 0
    assert "synthetic" not in capsys.readouterr().out


def test_demo_gets_narrower_and_says_so(capsys):
    for _ in range(2):  # a second run replaces its own files
        assert main(["demo", "--out=shown"]) == 0
    printed = capsys.readouterr().out
    assert "predictions   equal on 360 of 360" in printed
    names = {"report.txt", "report.json", "narrow.safetensors", "widths.png"}
    assert set(os.listdir("shown")) == names
    assert Path("shown/report.txt").read_text() in printed
    assert Path("shown/widths.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    report = json.loads(Path("shown/report.json").read_text())
    assert report["parameters_before"] == 95_850
    assert report["parameters_after"] < 10_000
    assert report["grade"] == "exact" and report["verification"]["ok"] is True


# ---- not verified: 1 ----------------------------------------------------------------------------------


def narrow_file() -> str:
    assert main(["reduce", "user_net:planted", SHAPE, "--out=n.safetensors"]) == 0
    return "n.safetensors"


def rewrite(path: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def test_a_tampered_weight_is_not_verified(ended, capsys):
    path = narrow_file()

    def change(tensors):
        tensors["model.first.weight"][0, 0] += 1e-3

    rewrite(path, change)
    assert "differs from the wide one at 'output'" in ended(1, "verify", "user_net:planted", path, SHAPE)
    assert main(["verify", "user_net:planted", path, SHAPE]) == 1
    assert capsys.readouterr().out.startswith("DIFFERENT on ")


def test_a_tampered_plan_is_not_verified(ended):
    path = narrow_file()

    def change(tensors):
        name = next(key for key in tensors if key.startswith("plan."))
        tensors[name] += 1000

    rewrite(path, change)
    ended(1, "verify", "user_net:planted", path, SHAPE)


def test_other_weights_are_not_verified(capsys):
    path = narrow_file()
    capsys.readouterr()
    assert main(["verify", "user_net:planted", path, SHAPE, "--seed=1"]) == 1
    assert f"note: {path} was made from other weights" in capsys.readouterr().out


# ---- wrong use: 2 -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("user_net", "names no model"),
        ("no_such_module:Net", "no module 'no_such_module'"),
        ("user_net:Nat", "has no 'Nat'"),
        ("user_net:VALUE", "no function or class"),
        ("user_net:number", "returned int, not an nn.Module"),
        ("user_net:broken", "ValueError: no such luck"),
        ("torchvision:resnet19", "did you mean resnet18"),
        ("timm:resnet18", "pip install timm"),
    ],
)
def test_an_unknown_model_is_wrong_use(model, said, ended, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert said in ended(2, "inspect", model, SHAPE)


def test_a_module_that_does_not_import(ended):
    Path("bad_net.py").write_text("import no_such_thing_at_all")
    assert "install 'no_such_thing_at_all'" in ended(2, "inspect", "bad_net:Net", SHAPE)
    Path("worse_net.py").write_text("1 / 0")
    assert "ZeroDivisionError" in ended(2, "inspect", "worse_net:Net", SHAPE)


def malicious() -> bytes:
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("executed",)

    return pickle.dumps({"first.weight": Payload()})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("w.pt", b"just some text\n", "is a text file"),
        ("w.pth", b"<!DOCTYPE html><html>404</html>", "is a web page"),
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("w.safetensors", (40).to_bytes(8, "little") + b"{" + b"x" * 80, "damaged safetensors"),
        ("w.pt", b"", "an empty file"),
        ("w.pt", b"PK\x03\x04" + bytes(80), "damaged checkpoint"),
        ("w.pt", malicious(), "pickled code"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(name, content, said, ended):
    Path(name).write_bytes(content)
    assert said in ended(2, "inspect", "user_net:plain", SHAPE, "--weights", name)
    assert not Path("executed").exists()


def test_a_pickled_model_is_refused_by_name(ended):
    torch.save(nn.Linear(2, 2), "w.pt")
    said = ended(2, "inspect", "user_net:plain", SHAPE, "--weights=w.pt")
    assert "pickled code (torch.nn.modules.linear.Linear), which is never run" in said


def test_a_checkpoint_of_another_model(ended):
    torch.save({**nn.Linear(2, 2).state_dict(), "second.bias": torch.zeros(10)}, "w.pt")
    said = ended(2, "inspect", "user_net:plain", SHAPE, "--weights=w.pt")
    assert "3 missing (first.weight, first.bias, second.weight)" in said
    assert "2 unexpected (weight, bias)" in said
    assert "second.bias is (10,) in the file and (3,) in the model" in said
    torch.save({"epoch": 3}, "w.pt")
    assert "no tensors but epoch" in ended(2, "inspect", "user_net:plain", SHAPE, "--weights=w.pt")
    torch.save(3, "w.pt")
    assert "no state dict" in ended(2, "inspect", "user_net:plain", SHAPE, "--weights=w.pt")
    assert "cannot be read" in ended(2, "inspect", "user_net:plain", SHAPE, "--weights=none.pt")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--input=2,5"], "at layer first"),
        (["--input=two"], "is no shape"),
        (["--input=2,0"], "is no shape"),
        (["--input=2,6:int99"], "is no shape"),
        ([], "--input is missing"),
        ([SHAPE, "--tol=1.5"], "not in [0, 1)"),
        ([SHAPE, "--tol=-1"], "not in [0, 1)"),
        ([SHAPE, "--tol=nan"], "not in [0, 1)"),
        ([SHAPE, "--model-args=[1]"], "must be a JSON object"),
        ([SHAPE, "--model-args={"], "is not JSON"),
        ([SHAPE, '--model-args={"klasses": 2}'], "unexpected keyword argument 'klasses'"),
        ([SHAPE, "--protect=third"], "'third'"),
        ([SHAPE, "--probes=none.npz"], "none.npz"),
        ([SHAPE, "--probes=user_net.py"], "is a text file"),
    ],
)
def test_wrong_options(options, said, ended):
    assert said in ended(2, "reduce", "user_net:plain", *options)


def test_probes_of_another_shape(ended):
    np.savez("p.npz", x=np.zeros((4, 5), dtype=np.float32))
    said = ended(2, "reduce", "user_net:plain", SHAPE, "--tol=1e-3", "--probes=p.npz")
    assert "has shape (4, 5): store one of shape (samples, 6)" in said
    np.savez("p.npz", x=np.zeros((4, 6), dtype=np.int64))
    assert "no floating array" in ended(2, "reduce", "user_net:plain", SHAPE, "--probes=p.npz")
    np.savez("p.npz", x=np.array([{}], dtype=object))
    assert "no plain array file" in ended(2, "reduce", "user_net:plain", SHAPE, "--probes=p.npz")


def test_files_are_refused_before_the_work_and_replaced_with_force(ended, capsys):
    Path("n.safetensors").write_text("mine")
    options = ["reduce", "user_net:planted", SHAPE]
    assert "replace it with --force" in ended(2, *options, "--out=n.safetensors")
    assert Path("n.safetensors").read_text() == "mine"
    assert "does not exist" in ended(2, *options, "--out=nowhere/n.safetensors")
    assert "is a folder" in ended(2, *options, "--out=.")
    assert "give each its own" in ended(2, *options, "--report=a", "--out=a")
    assert "is no picture's name" in ended(2, *options, "--plot=w.txt")
    assert main([*options, "--out=n.safetensors", "--force"]) == 0
    assert load_file("n.safetensors")["model.first.weight"].shape == (5, 6)


def test_nothing_is_half_written(ended, monkeypatch):
    def fails(report, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ep_prune.Report, "plot", fails)
    before = {*os.listdir(), "__pycache__"}
    said = ended(2, "reduce", "user_net:planted", SHAPE, "--out=n.safetensors", "--plot=w.png")
    assert "No space left" in said
    assert set(os.listdir()) <= before


def test_verify_of_what_is_no_narrow_file(ended):
    assert "does not exist" in ended(2, "verify", "user_net:planted", "n.safetensors", SHAPE)
    Path("n.safetensors").write_text("text, and not short of eight bytes")
    assert "not a safetensors file" in ended(2, "verify", "user_net:planted", "n.safetensors", SHAPE)
    save_file({"a": torch.zeros(2)}, "n.safetensors")
    assert "holds no plan" in ended(2, "verify", "user_net:planted", "n.safetensors", SHAPE)


def test_demo_without_its_extras_or_into_a_file(ended, monkeypatch):
    Path("taken").write_text("mine")
    assert "is a file" in ended(2, "demo", "--out=taken")
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install ep-prune[demo]" in ended(2, "demo", "--out=shown")
    assert not Path("shown").exists()


def test_debug_shows_the_traceback_and_a_bug_names_itself(ended, capsys, monkeypatch):
    assert main(["inspect", "user_net:broken", SHAPE, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err

    def bug(*args, **options):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("ep_prune.cli.reduce", bug)
    assert "unexpected ZeroDivisionError: oops" in ended(1, "inspect", "user_net:plain", SHAPE)


@pytest.mark.parametrize("argv", [[], ["prune"], ["reduce"], ["reduce", "a:b", "--tol=much"]])
def test_wrong_grammar_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as ending:
        main(argv)
    assert ending.value.code == 2
    assert "usage: ep-prune" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["reduce"], ["inspect"], ["verify"], ["demo"]])
def test_help_is_long_and_has_examples(command, capsys):
    with pytest.raises(SystemExit) as ending:
        main([*command, "--help"])
    assert ending.value.code == 0
    printed = capsys.readouterr().out
    assert command == ["demo"] or "examples:" in printed


def test_the_current_folder_is_searched_first(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(Path.cwd())])
    assert main(["inspect", "user_net:planted", SHAPE]) == 0


def test_the_random_state_is_left_alone(capsys):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert main(["inspect", "user_net:planted", SHAPE]) == 0
    assert torch.equal(before, torch.get_rng_state())
