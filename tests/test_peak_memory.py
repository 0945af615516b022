"""The peak of memory of a call, against what is known of small ones."""

import torch
from torch import Tensor, nn

from ep_prune.memory import peak_memory_of

KILO = 1000 * 4  # bytes of a thousand float32


class Chain(nn.Module):
    """Never more than two of its tensors stand, beside the input."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = x + 1
        return x


class Keeps(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        made = [x + k for k in range(5)]
        return torch.stack(made).sum(0)


class Views(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(10, 100).t()[:5].unsqueeze(0)


def test_known_peaks() -> None:
    x = torch.randn(1000)
    assert peak_memory_of(Chain(), x) == 3 * KILO
    assert peak_memory_of(Keeps(), x) == (1 + 5 + 5 + 1) * KILO  # the five, their stack and its sum
    assert peak_memory_of(Views(), x) == KILO


def test_weights_count_once() -> None:
    layer = nn.Linear(1000, 1, bias=False)
    tied = nn.ModuleList([layer, layer])
    tied.forward = lambda x: tied[0](x) + tied[1](x)  # type: ignore[method-assign]
    assert 2 * KILO <= peak_memory_of(tied, torch.randn(1, 1000)) < 2.1 * KILO
    with_buffer = nn.BatchNorm1d(1000).eval()
    assert peak_memory_of(with_buffer, torch.randn(2, 1000)) >= (4 + 2 + 2) * KILO


def test_what_is_narrower_takes_less() -> None:
    wide, narrow = (nn.Sequential(nn.Linear(8, n), nn.ReLU(), nn.Linear(n, 8)) for n in (512, 64))
    x = torch.randn(64, 8)
    assert peak_memory_of(narrow, x) < 0.2 * peak_memory_of(wide, x)
