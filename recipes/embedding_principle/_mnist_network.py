"""The network of the MNIST recipe, and its data.

    f(x) = relu(x W') A        W (m, d): incoming weights, the bias being the last of the d inputs; A (m, c)

read by the *head*: "softmax" (the loss is the mean square of softmax(f) - one-hot) or "linear" (of f - one-hot).
Narrowing looks at f alone, so that everything which holds for f holds for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipes.embedding_principle import common


@dataclass(frozen=True, eq=False)
class Images:
    """Inputs with a last component of 1 (n, d), and labels (n,). The test labels only serve to report accuracy."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def targets(self) -> Tensor:
        """One-hot (n, 10)."""
        return torch.nn.functional.one_hot(self.y, 10).double()


@dataclass(frozen=True, eq=False)
class Network:
    """f(x) = relu(x W') A, with W (m, d) and A (m, c), and the head that reads it."""

    incoming: Tensor
    outgoing: Tensor
    head: str

    @property
    def width(self) -> int:
        return len(self.incoming)

    def hidden(self, x: Tensor) -> Tensor:
        """(n, m)"""
        return (x @ self.incoming.T).relu()

    def __call__(self, x: Tensor) -> Tensor:
        """f (n, c), before the head."""
        return self.hidden(x) @ self.outgoing

    def loss(self, x: Tensor, targets: Tensor) -> float:
        """Mean over samples and outputs of the squared difference behind the head."""
        f = self(x)
        return float(((f.softmax(1) if self.head == "softmax" else f) - targets).square().mean())

    def amplitude(self) -> Tensor:
        """(m,) |w_k| |a_k|: how much a neuron can contribute for an input of length 1."""
        amplitude: Tensor = self.incoming.norm(dim=1) * self.outgoing.norm(dim=1)
        return amplitude

    def take(self, keep: Tensor) -> Network:
        return Network(self.incoming[keep], self.outgoing[keep], self.head)

    def double(self) -> Network:
        return Network(self.incoming.double(), self.outgoing.double(), self.head)


def load_images(quick: bool) -> Images:
    """MNIST: the first 1,000 training images and all 10,000 test images, pixels in [0, 1]. `quick`: the 8x8 digits
    of scikit-learn, 300 and 500 of them."""
    if quick:
        from sklearn.datasets import load_digits

        digits = load_digits()
        x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
        parts = x[:300], y[:300], x[300:800], y[300:800]
    else:
        train, test = _archive("train_5000.npz"), _archive("test_10000.npz")
        parts = train[0][:1000], train[1][:1000], *test
    x, y, x_test, y_test = parts
    ones = torch.ones(len(x_test) + len(x), 1, dtype=torch.float64)
    return Images(torch.cat([x, ones[: len(x)]], 1), y, torch.cat([x_test, ones[len(x) :]], 1), y_test)


def _archive(name: str) -> tuple[Tensor, Tensor]:
    path = common.DATA / "mnist" / name
    if not path.exists():
        raise SystemExit(
            f"{path} is missing: set EP_PRUNE_DATA to the folder that holds mnist/{name}, or use --quick"
        )
    with np.load(path) as file:
        return torch.tensor(file["x"]).flatten(1).double() / 255, torch.tensor(file["y"])
