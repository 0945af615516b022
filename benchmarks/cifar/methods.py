"""The registry: every method that is compared, by the name it has in the table.

A method is a function (model, images, keep_macs, seed) -> narrow model. images: calibration inputs (N, C, H,
W), normalised as the network takes them, without labels. keep_macs: the share of the wide network's multiply-
accumulates that may be left. The model is not changed, and what is returned runs on the same inputs. "X + BN"
is X followed by batch-norm re-estimation on the same images (`batch_norm.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from benchmarks.cifar import folding, interpolative, least_squares, merging, ours, torch_pruning
from benchmarks.cifar.batch_norm import reestimated

Run = Callable[[nn.Module, Tensor, float, int], nn.Module]
RE_ESTIMATED = " + BN"
OURS = "ours"
OWN = "our implementation from the paper,"


@dataclass(frozen=True)
class Method:
    """about: whose method and whose code. base: the name of the method that this one re-estimates, if it does."""

    name: str
    run: Run
    about: str
    base: str | None = None

    @property
    def family(self) -> str:
        """The name without what is done afterwards."""
        return self.name.partition(" + ")[0]

    def __call__(self, model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
        return self.run(model, images, keep_macs, seed)


def _with_batch_norm(method: Method) -> Method:
    def run(model: nn.Module, images: Tensor, keep_macs: float, seed: int) -> nn.Module:
        return reestimated(method.run(model, images, keep_macs, seed), images)

    return Method(method.name + RE_ESTIMATED, run, method.about, method.name)


def _registry() -> dict[str, Method]:
    plain = [
        Method(name, run, f"torch-pruning 1.6.1: {about}") for name, (run, about) in torch_pruning.RUNS.items()
    ]
    plain += [
        Method("after Neuron Merging", merging.run, f"{OWN} Kim et al. (NeurIPS 2020); one ratio, inner channels"),
        Method(
            "after GRAIL",
            least_squares.run,
            f"{OWN} Tang et al. (2026): per-channel least squares; L1, one ratio, inner channels",
        ),
        *(
            Method(name, run, f"{OWN} Chee et al. (NeurIPS 2022): {about}")
            for name, (run, about) in interpolative.RUNS.items()
        ),
    ]
    found = [part for method in plain for part in (method, _with_batch_norm(method))]
    found += [
        Method(name, run, f"{OWN} Wang et al. (ICLR 2025): {about}") for name, (run, about) in folding.RUNS.items()
    ]
    found.append(Method(OURS, ours.run, "ep_prune.compress"))
    return {method.name: method for method in found}


METHODS = _registry()
