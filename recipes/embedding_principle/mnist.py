"""MNIST, 400 neurons to the paper's 58 and fewer, without retraining (arXiv 2105.14573, Fig. 5).

The setting is the paper's: 1,000 training images, a two-layer ReLU network with the bias as an input, 400 neurons,
weights from N(0, 1/m^6), full-batch Adam at 3e-5, mean square error on one-hot targets; narrowed at epoch 5,000 or
at loss 6.3e-4, whichever comes first. What the paper leaves open is as PyTorch has it: pixels in [0, 1], Adam's
epsilon 1e-8, float32; no bias at the output. Two *heads* read the output:

* linear, the formula of the paper: the loss falls without a halt, and the neurons condense little (about 250
  groups at cosine .9 when it passes 6.3e-4);
* softmax, with the mean square error behind it: the loss comes to stand, at a level that depends on the seed, and
  the neurons condense to a few dozen directions. The paper's formula has no softmax; its figure looks like this.

Side by side, over the width kept:

* paper: cosine groups with a random representative each (`_mnist_merge`), the width varied by the cosine;
* paper, retrained: the same after 200 epochs on the labelled training images;
* closed form: backward elimination and one least-squares fit to the wide network's outputs on the training images,
  no labels, no retraining (`_mnist_narrow`);
* fitted: the same with Gauss-Newton steps on the incoming weights, against the wide network's outputs, no labels;
  at a few widths, and where the closed form has more than half of the paper's excess loss.

Agreement is the share of the 10,000 test images with the wide network's prediction. Nothing is chosen by it.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from tqdm.auto import tqdm

from recipes.embedding_principle import _mnist_tables, common
from recipes.embedding_principle._mnist_merge import groups, live, merge
from recipes.embedding_principle._mnist_narrow import collinear, fit_incoming, narrow
from recipes.embedding_principle._mnist_network import Images, Network, load_images
from recipes.embedding_principle._mnist_training import Run, advance_, start, train

HEADS = ("softmax", "linear")
GOAL = 58
"""The paper's width."""
COSINES = (0.99, 0.98, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
WIDTHS = (300, 250, 200, 150, 100, 80, GOAL, 50, 45, 40, 35, 30, 25, 20, 16, 12, 10)
FITTED = (100, GOAL, 40, 30, 25, 20, 16, 10)
RETRAINING = 200


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=5, help="how many, from --seed on")
    parser.add_argument("--width", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=5000, help="where to narrow: at this epoch")
    parser.add_argument("--loss", type=float, default=6.3e-4, help="or at this loss, whichever comes first")
    parser.add_argument("--lr", type=float, default=3e-5)


def main(argv: list[str] | None = None) -> int:
    args = common.parse("mnist", __doc__, argv, arguments)
    if args.quick:
        args.width, args.epochs, args.lr, args.seeds = 40, 400, 2e-3, 1
    images = load_images(args.quick)
    results: dict[str, list[dict[str, Any]]] = {head: [] for head in HEADS}
    for head in HEADS:
        for seed in range(args.seed, args.seed + args.seeds):
            results[head].append(compared(args, images, train(args, images, seed, head), seed))
            tqdm.write(_mnist_tables.line(results[head][-1]))
            write_table(args, results)
    common.save_figure(_mnist_tables.figure(results, GOAL), args.out / "mnist.png")
    return 0


def write_table(args: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    """The table of what has been done so far."""
    done = {head: seeds for head, seeds in results.items() if seeds}
    summary = {head: _mnist_tables.summary(seeds, GOAL) for head, seeds in done.items()}
    common.write_json(args.out / "mnist.json", args, {"summary": summary, "runs": done})


def compared(args: argparse.Namespace, images: Images, run: Run, seed: int) -> dict[str, Any]:
    """`compare`, kept in a state file of its own."""
    path = args.out / f"mnist.{run.network.head}.{seed}.compared.state"
    state = common.load_state(path, args)
    if state is not None:
        return state[1]
    figures = compare(args, images, run, seed)
    common.save_state(path, args, {"seed": torch.tensor(seed)}, figures)
    return figures


def compare(args: argparse.Namespace, images: Images, run: Run, seed: int) -> dict[str, Any]:
    """All procedures on one wide network: rows of width, loss, agreement and accuracy."""
    wide = run.network.double()
    targets, prediction = images.targets(), wide(images.x_test).argmax(1)

    def judge(network: Network, **more: float) -> dict[str, float]:
        chosen = network(images.x_test).argmax(1)
        return {
            "width": network.width,
            "loss": network.loss(images.x, targets),
            "agreement": float((chosen == prediction).double().mean()),
            "accuracy": float((chosen == images.y_test).double().mean()),
            **more,
        }

    alive = wide.take(live(wide))
    apart = collinear(alive, torch.finfo(torch.float32).eps / 4)
    paper = {cosine: merge(wide, cosine, torch.Generator().manual_seed(seed)) for cosine in cosines(alive)}
    closed = narrow(apart, images.x, [*WIDTHS, *(network.width for network in paper.values())])
    answers = wide(images.x)
    figures: dict[str, Any] = {
        "wide": judge(wide, epoch=run.epoch, seconds=run.seconds),
        "paper": [judge(network, cosine=cosine) for cosine, network in paper.items()],
        "closed form": [judge(network) for network in closed.values()],
    }
    widths = sorted({*FITTED, *_mnist_tables.not_halved(figures)} & set(closed))
    return {
        "head": wide.head,
        "seed": seed,
        **figures,
        "live": alive.width,
        "not collinear": apart.width,
        "groups at .9": len(groups(alive, 0.9)),
        "curve (epoch, loss, live, groups)": run.curve,
        "paper, retrained": [judge(retrained(args, images, network), cosine=c) for c, network in paper.items()],
        "fitted": [judge(fit_incoming(closed[width], images.x, answers)) for width in widths],
    }


def cosines(alive: Network) -> list[float]:
    """`COSINES`, and the largest multiple of 1/200 that gives at most the paper's width."""
    for step in range(199, 0, -1):
        if len(groups(alive, step / 200)) <= GOAL:
            return sorted({*COSINES, step / 200}, reverse=True)
    return list(COSINES)


def retrained(args: argparse.Namespace, images: Images, network: Network) -> Network:
    """The paper's retraining: on the labelled training images, with a fresh optimizer."""
    run = start(Network(network.incoming.float(), network.outgoing.float(), network.head))
    advance_(run, images, args.lr, RETRAINING, log=False)
    return run.network.double()


if __name__ == "__main__":
    raise SystemExit(main())
