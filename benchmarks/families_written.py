"""Networks of `benchmarks.families` that no library has, or each user writes anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Answer:
    """A dataclass as an output."""

    scores: Tensor
    features: Tensor


@dataclass
class Registered(Answer):
    """One that torch.export has been told of."""


torch.export.register_dataclass(Registered)


class Outputs(nn.Module):
    """A small residual network that returns scores and features: as a tuple, a dict, or a dataclass that
    torch.export knows or does not know."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.SiLU(), nn.Conv2d(12, 8, 1))
        self.scores = nn.Linear(8, 5)
        self.features = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        x = torch.relu(x + self.body(x)).mean((2, 3))
        scores, features = self.scores(x), self.features(x)
        if self.kind == "tuple":
            return scores, features
        if self.kind == "dict":
            return {"scores": scores, "features": features}
        return Registered(scores, features) if self.kind == "registered" else Answer(scores, features)


class TwoInputs(nn.Module):
    """An image and a vector in, which gates the image's features; a score and a picture out."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU())
        self.vector = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 10))
        self.down = nn.Sequential(nn.Conv2d(10, 14, 3, 2, 1), nn.LeakyReLU(0.1))
        self.score = nn.Sequential(nn.Linear(24, 12), nn.GELU(), nn.Linear(12, 3))
        self.up = nn.Sequential(nn.ConvTranspose2d(14, 6, 2, 2), nn.ReLU(), nn.Conv2d(6, 3, 1))

    def forward(self, image: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
        code = self.vector(vector)
        x = self.image(image) * torch.sigmoid(code)[:, :, None, None]
        x = self.down(x)
        return self.score(torch.cat([x.mean((2, 3)), code], 1)), self.up(x)


class DnCNN(nn.Module):
    """Zhang et al. 2017: the noise is computed, and taken off the picture."""

    def __init__(self, width: int = 12, depth: int = 5) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU(inplace=True)]
        for _ in range(depth - 2):
            conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.noise = nn.Sequential(*layers, nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x - self.noise(x)
        return y


def _double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, outputs):
        conv = nn.Conv2d(before, outputs, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Ronneberger et al. 2015, of three levels: skips are concatenated, the way up is transposed convolutions."""

    def __init__(self, width: int = 6, classes: int = 3) -> None:
        super().__init__()
        one, two, three = width, 2 * width, 4 * width
        self.down1, self.down2, self.middle = _double(3, one), _double(one, two), _double(two, three)
        self.pool = nn.MaxPool2d(2)
        self.up2, self.up1 = nn.ConvTranspose2d(three, two, 2, 2), nn.ConvTranspose2d(two, one, 2, 2)
        self.join2, self.join1 = _double(2 * two, two), _double(2 * one, one)
        self.head = nn.Conv2d(one, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        x = self.up2(self.middle(self.pool(b)))
        x = self.up1(self.join2(torch.cat([b, x], 1)))
        y: Tensor = self.head(self.join1(torch.cat([a, x], 1)))
        return y


class WaveNet(nn.Module):
    """A classifier of waveforms, as M5 (Dai et al. 2017): a long strided filter, then 1-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, kernel, stride in ((1, 8, 40, 8), (8, 8, 3, 1), (8, 16, 3, 1), (16, 24, 3, 1)):
            conv = nn.Conv1d(before, after, kernel, stride, padding=kernel // 2)
            layers += [conv, nn.BatchNorm1d(after), nn.ReLU(), nn.MaxPool1d(2)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(24, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.features(x).mean(2)).log_softmax(1)
        return y


class LanguageModel(nn.Module):
    """Embedding, two recurrent layers, one hidden layer, a head over all words."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], words: int = 40, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.recurrent = kind(width, 20, num_layers=2, batch_first=True)
        self.hidden = nn.Linear(20, 24)
        self.head = nn.Linear(24, words)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(tokens))
        y: Tensor = self.head(torch.tanh(self.hidden(states)))
        return y


class PlainEncoder(nn.Module):
    """One layer of an encoder with `nn.MultiheadAttention`, norms first, as people write it; and a head."""

    def __init__(self, width: int = 24, heads: int = 4, hidden: int = 40) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        y = self.head(x.mean(1))
        return y
