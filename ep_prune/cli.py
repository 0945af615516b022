"""The command line: `ep-prune reduce | compress | embed | verify | inspect | demo`.

Exit codes: 0 done, 1 could not be verified, 2 wrong use. An error is one sentence on stderr; --debug adds
the traceback. Files appear whole or not at all, and none is replaced without --force. A long step shows
a bar on a terminal and nothing in a pipe.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ep_prune
from ep_prune import cli_compress, cli_embed
from ep_prune.cli_files import check_plot, check_targets, publish, write_text
from ep_prune.cli_models import domain_of, given, given_inside, moved_inside
from ep_prune.demo_model import digits_data, load_digits_net
from ep_prune.errors import EpPruneError, InputError, VerificationError
from ep_prune.pipeline import Result, reduce
from ep_prune.plan import Plan, fingerprint
from ep_prune.probes import synthetic_probes
from ep_prune.storage import load, save
from ep_prune.trace import prepare
from ep_prune.verification import verify
from ep_prune.why import explain

DONE, NOT_VERIFIED, WRONG_USE = 0, 1, 2

_ABOUT = """\
Find the narrow network inside a trained wide one, or widen one, and check that it computes the same; or compress
one to a budget, and measure how far it is from that.

A model is named
  package.module:factory    called without arguments, or with --model-args '{"num_classes": 10}';
                            imported as Python does, the current folder first
  torchvision:resnet18      torchvision's model of that name (weights=None unless --model-args says otherwise)
  timm:NAME                 timm's, where timm is installed
and its weights are a safetensors file, also one that reduce, compress or embed wrote, or a checkpoint that
torch.load(weights_only=True) takes.
"""

_EXAMPLES = """\
examples:
  ep-prune demo
  ep-prune inspect my_net:MyNet --weights trained.pt --input 1,3,32,32 --why layer1.0.conv1
  ep-prune reduce my_net:MyNet --weights trained.pt --input 1,3,32,32 --out narrow.safetensors
  ep-prune reduce torchvision:resnet18 --weights r18.pth --tol 1e-3 --probes images.npz --report r18.json
  ep-prune reduce my_net:Policy --weights policy.pt --input 1,2 --domain=-1.2,0.6:-0.07,0.07
  ep-prune verify my_net:MyNet narrow.safetensors --weights trained.pt --input 1,3,32,32
  ep-prune compress my_net:MyNet --weights trained.pt --input 1,3,32,32 --calibration images.npz --keep-macs 0.5 \
                    --out half.safetensors
  ep-prune verify my_net:MyNet half.safetensors --weights trained.pt --input 1,3,32,32 --probes others.npz
  ep-prune embed my_net:MyNet --weights trained.pt --input 1,3,32,32 --width layer1=96 --out wide.safetensors
  ep-prune reduce my_net:MyNet --weights wide.safetensors --input 1,3,32,32 --out back.safetensors

exit codes: 0 done, 1 could not be verified, 2 wrong use
"""


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser("ep-prune", description=_ABOUT, epilog=_EXAMPLES, formatter_class=raw)
    top.add_argument("--version", action="version", version=f"ep-prune {ep_prune.__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--seed", type=int, default=0, help="of inputs, probes and initial weights (default: 0)")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, act: Callable[[argparse.Namespace], int], text: str, more: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, parents=[common], help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=more,
            formatter_class=raw,
        )  # fmt: skip
        added.set_defaults(act=act)
        return added

    reducing = command(
        "reduce", _reduce, "write the narrowest equivalent that the algebra finds, verified", _EXAMPLES
    )
    inspecting = command("inspect", _inspect, "show what reduce would do, and write nothing", _EXAMPLES)
    compressing = command(
        "compress", _compress, "write a narrower model to a budget, fitted to a few unlabelled inputs", _EXAMPLES
    )
    verifying = command(
        "verify", _verify, "compare a model with a file that reduce, compress or embed wrote", _EXAMPLES
    )
    embedding = command("embed", _embed, "write a wider model that computes the same, verified", _EXAMPLES)
    verifying.add_argument("model", metavar="MODEL", help="the model given to reduce, compress or embed")
    verifying.add_argument("narrow", metavar="FILE", type=Path, help="the file that --out wrote")
    for added in (reducing, inspecting, compressing, embedding):
        added.add_argument("model", metavar="MODEL", help="package.module:factory, torchvision:NAME or timm:NAME")
    for added in (reducing, inspecting, compressing):
        added.add_argument(
            "--protect", action="append", default=[], metavar="LAYER",
            help="keep all channels of this layer, a name of named_modules(); may be repeated",
        )  # fmt: skip
        added.add_argument(
            "--replace-modules", action="store_true",
            help="exchange nn.MultiheadAttention, which cannot hold fewer heads, for a module that can",
        )  # fmt: skip
    for added in (reducing, inspecting, verifying, embedding):
        _model_options(added)
        added.add_argument(
            "--probes", type=Path, metavar="FILE",
            help="inputs to measure on: the first floating array of an .npz, .safetensors or .pt file",
        )  # fmt: skip
    _model_options(compressing)
    for added in (reducing, inspecting, verifying):
        added.add_argument(
            "--domain", metavar="LO,HI[:LO,HI...]",
            help="declared box of inputs, on which alone the result is the same: --domain=0,1 for every number of "
            "every input, or a pair for each feature (channel, of images), as --domain=-1.2,0.6:-0.07,0.07; "
            "verify takes the one in the file",
        )  # fmt: skip
        added.add_argument(
            "--tol", type=float, default=0.0,
            help="accepted relative change of any output on the probes, in float64 (default 0: exact)",
        )  # fmt: skip
    inspecting.add_argument(
        "--why", action="append", default=[], metavar="LAYER",
        help="of this layer alone: why each channel stays, and how near it came to going; may be repeated",
    )  # fmt: skip
    inspecting.add_argument("--json", action="store_true", help="print JSON, with one list for each column")
    cli_embed.add_options(embedding)
    cli_compress.add_options(compressing)
    for added in (reducing, compressing):
        added.add_argument("--out", type=Path, metavar="FILE", help="the narrow model and its plan (.safetensors)")
        added.add_argument("--report", type=Path, metavar="FILE", help="the whole report (.json)")
        added.add_argument("--plot", type=Path, metavar="FILE", help="a picture of the widths (.png, .pdf, .svg)")
        added.add_argument("--force", action="store_true", help="replace files that exist")

    demo = command("demo", _demo, "reduce the small trained network in the package and explain what happened", "")
    where = Path("demo-out")
    demo.add_argument(
        "--out", type=Path, default=where, metavar="FOLDER", help=f"where files go (default: {where})"
    )
    return top


def _model_options(added: argparse.ArgumentParser) -> None:
    added.add_argument("--model-args", metavar="JSON", help="keyword arguments of the factory, a JSON object")
    added.add_argument(
        "--weights", type=Path, metavar="FILE",
        help="safetensors (those of reduce, compress and embed too), or a checkpoint of tensors; without it, what "
        "the factory returns",
    )  # fmt: skip
    added.add_argument(
        "--input", action="append", default=[], metavar="SHAPE[:TYPE[:BELOW]]",
        help="an input's shape, as 1,3,32,32 or 1,16:int64:30522 (integers below 30522; default 2); once for "
        "each input, in order; torchvision's and timm's models default to 1,3,224,224",
    )  # fmt: skip
    added.add_argument("--double", action="store_true", help="widen the weights to float64 first")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. Wrong arguments leave through `SystemExit(2)`, as argparse does."""
    options = parser().parse_args(argv)
    try:
        return int(options.act(options))
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except KeyboardInterrupt:
        print("ep-prune: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        text = " ".join(str(error).split())
        if isinstance(error, VerificationError):
            code = NOT_VERIFIED
        elif isinstance(error, EpPruneError):
            code = WRONG_USE
        elif isinstance(error, OSError):
            code, text = WRONG_USE, f"{text}: check the path, its rights and the free space"
        else:
            code = NOT_VERIFIED
            text = f"unexpected {type(error).__name__}: {text}: please report this, with what --debug shows"
        print(f"ep-prune: {text}", file=sys.stderr)
        return code


# ---- commands -----------------------------------------------------------------------------------------


def _reduce(options: argparse.Namespace) -> int:
    targets = [path for path in (options.out, options.report, options.plot) if path is not None]
    check_targets(targets, options.force)
    if options.plot is not None:
        check_plot(options.plot)
    result = _run(options, *given_inside(options))
    writers: dict[Path, Callable[[Path], None]] = {}
    if options.out is not None:
        writers[options.out] = lambda path: save(result, path)
    if options.report is not None:
        writers[options.report] = lambda path: _write_json(result, path)
    if options.plot is not None:
        writers[options.plot] = result.report.plot
    publish(writers)
    print(result.report)
    for path in targets:
        print(f"wrote {path}")
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    model, inputs, probes = given_inside(options)
    result = _run(options, model, inputs, probes, verify_result=False)
    whys = [explain(result, inputs, layer) for layer in options.why]
    if options.json:
        found = {"why": [why.to_dict() for why in whys]} if whys else result.report.to_dict()
        print(json.dumps(found, indent=2))
        return DONE
    for why in whys:
        print(why)
    if not whys:
        print(result.report)
    print("\nnothing was written: this is what reduce would do")
    return DONE


def _run(
    options: argparse.Namespace,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    probes: list[tuple[Tensor, ...]] | None,
    **more: Any,
) -> Result:
    return reduce(
        model,
        inputs,
        tol=options.tol,
        probes=probes,
        protect=options.protect,
        seed=options.seed,
        domain=domain_of(options.domain, inputs),
        replace_modules=options.replace_modules,
        **more,
    )


def _verify(options: argparse.Namespace) -> int:
    if not 0.0 <= options.tol < 1.0:
        raise InputError(f"--tol {options.tol} is not in [0, 1): it is a relative change of the output")
    wide, inputs, probes = given(options)
    narrow, plan = _narrow(wide, options.narrow)
    prepared = prepare(wide, plan.replace_modules)[0]
    if plan.fingerprint != fingerprint(prepared.state_dict()):
        print(f"note: {options.narrow} was made from other weights, or another type, than these")
    domain = plan.domain if options.domain is None else domain_of(options.domain, inputs)
    if domain is not None:
        inputs = moved_inside(inputs, domain, options.seed)
    if plan.fitted:
        cli_compress.verify_fitted(wide, narrow, plan, inputs, probes, options)
        return DONE
    if options.tol == 0:
        checked = verify(wide, narrow, inputs, probes=probes, seed=options.seed, domain=domain)
    else:  # the promise of a bounded reduction is one about its own probes
        promised = probes if probes is not None else synthetic_probes(prepared, inputs, options.seed)
        checked = verify(
            wide,
            narrow,
            inputs,
            probes=promised,
            seed=options.seed,
            limit=options.tol,
            judged=("example", "user"),
            domain=domain,
        )
        checked = replace(checked, synthetic=probes is None)
    print(checked)
    checked.raise_if_different()
    return DONE


def _compress(options: argparse.Namespace) -> int:
    cli_compress.run_compress(options)
    return DONE


def _embed(options: argparse.Namespace) -> int:
    cli_embed.run_embed(options)
    return DONE


def _narrow(wide: nn.Module, path: Path) -> tuple[nn.Module, Plan]:
    """The model in a file that --out wrote. No such file is wrong use; an altered one is not verified."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: give the file that --out of reduce, compress or embed wrote")
    try:
        return load(lambda: wide, path), Plan.load(path)
    except EpPruneError:
        raise
    except Exception as error:  # an altered plan fails in as many ways as there are bytes
        raise VerificationError(
            f"the plan in {path} cannot be applied ({type(error).__name__}: {error}): the file is damaged or "
            "of another model, reduce the model again"
        ) from error


# ---- demo ---------------------------------------------------------------------------------------------


def _demo(options: argparse.Namespace) -> int:
    folder: Path = options.out
    try:
        images, classes = digits_data("test")
    except ImportError as error:
        raise InputError(str(error)) from error
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("the demo draws with matplotlib, which is missing: pip install 'ep-prune[demo]'")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)

    wide = load_digits_net()
    result = reduce(wide, images[:2], seed=options.seed)
    names = ("report.txt", "report.json", "narrow.safetensors", "widths.png")
    text, numbers, weights, picture = (folder / name for name in names)
    publish({weights: lambda path: save(result, path), picture: result.report.plot})
    narrow = load(load_digits_net, weights)  # what is compared is what stands in the file
    story, same = _story(result, wide, narrow, images, classes)
    story += [f"files         {', '.join(str(folder / name) for name in names)}"]
    table = "\n".join(
        [str(result.report), "", "What happened, measured just now", *(f"  {line}" for line in story)]
    )
    publish(
        {
            text: lambda path: write_text(path, table + "\n"),
            numbers: lambda path: _write_json(result, path),
        }
    )
    print(table)
    if not same:
        raise VerificationError("the narrow network's predictions differ from the wide one's: please report this")
    return DONE


def _story(
    result: Result, wide: nn.Module, narrow: nn.Module, images: Tensor, classes: Tensor
) -> tuple[list[str], bool]:
    """What the demo did, a line each, and whether every prediction is the same."""
    report = result.report
    with torch.no_grad():
        stored = wide(images), narrow(images)
        double = wide.double()(images.double()), narrow.double()(images.double())
    change = float((stored[0] - stored[1]).abs().max())
    exact = float((double[0] - double[1]).abs().max())
    largest = float(double[0].abs().max())
    choices = [scores.argmax(1) for scores in stored]
    equal = int((choices[0] == choices[1]).sum())
    right = [int((choice == classes).sum()) for choice in choices]
    inner = [space for space in report.spaces if space.name != "head"]
    before, after = sum(space.before for space in inner), sum(space.after for space in inner)
    gone = {kind: sum(space.gone.get(kind, 0) for space in report.spaces) for kind in report.spaces[0].gone}
    why = ", ".join(f"{count} {kind}" for kind, count in gone.items() if count)
    count = len(images)
    checked = result.verification
    lines = [
        "network       a residual CNN for 8x8 digits, in float32, its weights as training left them",
        "found         by the algebra of the weights: no labels, no training; two images tell the shapes",
        f"channels      {before} -> {after}, gone: {why or 'none'} (a residual stream counts once)",
        f"parameters    {report.before.parameters:,} -> {report.after.parameters:,} "
        f"({report.before.parameters / report.after.parameters:.1f} times fewer)",
        f"MACs          {report.before.macs:,} -> {report.after.macs:,} an image "
        f"({report.before.macs / report.after.macs:.1f} times fewer; time was not measured)",
        f"max |change of logits|  {change:.1e} in float32, {exact:.1e} in float64, on {count} test images "
        f"(largest |logit|: {largest:.1f})",
        f"predictions   equal on {equal} of {count}; right: {right[0]} wide, {right[1]} narrow",
        f"verified      on {checked.samples} inputs, noise and adversarial ones among them: "
        f"{checked.difference:.1e} relative in float64, limit {checked.limit:.1e}",
        "why not 0     the narrow weights are rounded to float32, and sums are taken in another order",
        "not shown     copies: this training asks for null and constant channels, so there are none to merge",
    ]
    return lines, equal == count


# ---- files --------------------------------------------------------------------------------------------


def _write_json(result: Result, path: Path) -> None:
    write_text(path, json.dumps(result.report.to_dict(), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
