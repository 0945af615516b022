"""A second generator of graphs, NNSmith's (Liu et al., ASPLOS 2023), from the package index: the same check.

NNSmith draws operators and shapes that fit together by constraint solving. Of its graphs, those count here that
compute with floating numbers and have a layer with weights; everything is run in float64.

    pip install nnsmith==0.1.0 && python tests/fuzz_nnsmith.py --seeds 300
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from fuzz import Outcome, checked, guarded
from torch import Tensor, nn
from tqdm import tqdm

import ep_prune as ep

NODES = 12
WEIGHTED, LAYERS = ("NCHWConv2d", "Conv1d", "Linear", "BatchNorm2d", "PReLU"), 12
"""Operators with weights, and how often more than others they are drawn."""

FLOATS = ("float32", "float64")


class Graph(nn.Module):
    """Runs the instructions of one of NNSmith's graphs; constants are buffers."""

    def __init__(self, ir: Any, function_of: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inputs, self.outputs = list(ir.input_var()), list(ir.leaf_var())
        self.shapes = {name: tuple(ir.vars[name].shape) for name in self.inputs}
        self.layers = nn.ModuleList()
        self.steps: list[tuple[Any, list[str], list[str]]] = []
        for inst in ir.insts:
            if type(inst.iexpr.op).__name__ == "Input":
                continue
            function = function_of(inst.iexpr.op)
            if type(inst.iexpr.op).__name__ == "Constant":
                self.register_buffer(f"constant{len(self.steps)}", function.data.detach().double())
                function = f"constant{len(self.steps)}"
            elif isinstance(function, nn.Module):
                self.layers.append(function)
                function = len(self.layers) - 1
            self.steps.append((function, list(inst.iexpr.args), list(inst.retvals())))

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = dict(zip(self.inputs, given, strict=True))
        for function, names, results in self.steps:
            if isinstance(function, str):
                found = getattr(self, function)
            else:
                call = self.layers[function] if isinstance(function, int) else function
                found = call(*(values[name] for name in names))
            found = (found,) if isinstance(found, Tensor) else tuple(found)
            values.update(zip(results, found, strict=True))
        return tuple(values[name] for name in self.outputs)


def generator() -> Callable[[int], Graph | None]:
    """seed -> a graph, or None where NNSmith's has no weights or no floating outputs."""
    warnings.filterwarnings("ignore")
    from nnsmith.abstract.extension import activate_ext
    from nnsmith.graph_gen import model_gen
    from nnsmith.materialize import Model
    from nnsmith.materialize.torch.forward import forward_fn
    from nnsmith.narrow_spec import auto_opset

    kind = Model.init("torch", backend_target="cpu")
    kind.add_seed_setter()
    operators = [op for op in auto_opset(kind, None) if op.__name__ not in ("Cast",)]
    operators += LAYERS * [op for op in operators if op.__name__ in WEIGHTED]
    activate_ext(opset=operators, factory=None)

    def draw(seed: int) -> Graph | None:
        torch.manual_seed(seed)
        made = model_gen(
            opset=operators, method="symbolic-cinit", seed=seed, max_nodes=NODES, timeout_ms=5000,
            max_elem_per_tensor=2**12, dtype_choices=list(FLOATS),
        )  # fmt: skip
        ir = made.make_concrete()
        net = Graph(ir, forward_fn).double().eval()
        for name, tensor in net.named_buffers():
            if name.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
            elif name.endswith("running_mean"):
                tensor.normal_()
        weighted = any(p.ndim > 1 for p in net.parameters())
        with torch.no_grad():
            outputs = net(*inputs(net, 0)) if weighted else ()
        good = all(out.is_floating_point() and bool(out.isfinite().all()) for out in outputs)
        return net if weighted and good and any(bool((out != 0).any()) for out in outputs) else None

    return draw


def inputs(net: Graph, seed: int) -> tuple[Tensor, ...]:
    """Inputs of a graph."""
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in net.shapes.values())


def main() -> int:
    """Run seeds until so many graphs with weights were checked; 1 if any failed."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--seeds", type=int, default=300)
    options.add_argument("--start", type=int, default=0)
    asked = options.parse_args()
    torch.set_num_threads(1)
    draw, found, left = generator(), Counter[str](), 0
    for seed in tqdm(range(asked.start, asked.start + asked.seeds), disable=None):
        try:
            net = draw(seed)
        except Exception as error:  # the generator's own: no shapes that fit, an operator that does not run
            found[f"not generated ({type(error).__name__})"] += 1
            continue
        if net is None:
            found["without weights"] += 1
            continue

        def test(net: Graph = net, seed: int = seed) -> Outcome:
            return checked(net, lambda k: inputs(net, k), seed)

        outcome = guarded(test)
        refused = outcome.problem.startswith("crash") and any(
            name in outcome.problem for name in (ep.InputError.__name__, ep.TraceError.__name__)
        )
        left += bool(outcome.left)
        found["refused" if refused else outcome.problem or "right"] += 1
        if outcome.problem:
            tqdm.write(f"seed {seed}: {outcome.problem}: {outcome.detail[:300]}")
    print(dict(found), f"spaces left wider with a reason in {left}")
    failed = [
        name for name in found if name not in ("right", "refused", "without weights") and "not gen" not in name
    ]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
