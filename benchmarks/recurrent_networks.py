"""Recurrent networks widened by hand: units split, flipped or scaled, and null ones added, at random.

    h_wide = T h        T: a row of one entry for a copy, of zeros for a null unit

A copy has its original's rows in every gate, times its factor in the one that its state is odd in. Whatever
reads the states, W_hh first, gets random columns C with C T = W: each of its rows shares a weight out to the
copies in its own way. Null units come in two kinds: nobody reads them, whatever they do and read (T's row is
zero, and so is their column), or they are zero for ever (their odd row is nothing, and anybody may read them).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

UNREAD, ZERO = -1, -2
ODD = {"LSTM": (4, 2), "GRU": (3, 2), "RNN_TANH": (1, 0), "RNN_RELU": (1, 0)}
"""Mode -> number of gates, and the one that its states are odd in."""


@dataclass(frozen=True, eq=False)
class Units:
    """Where wide units come from: `source` (n,) a narrow unit, or `UNREAD`, or `ZERO`; factor (n,); `narrow`."""

    source: Tensor
    factor: Tensor
    narrow: int

    @property
    def T(self) -> Tensor:
        dense = torch.zeros(len(self.source), self.narrow, dtype=torch.float64)
        some = (self.source >= 0).nonzero().squeeze(1)
        dense[some, self.source[some]] = self.factor[some]
        return dense

    @staticmethod
    def same(count: int) -> Units:
        return Units(torch.arange(count), torch.ones(count, dtype=torch.float64), count)

    @staticmethod
    def join(parts: list[Units]) -> Units:
        sources, start = [], 0
        for part in parts:
            sources.append(torch.where(part.source >= 0, part.source + start, part.source))
            start += part.narrow
        return Units(torch.cat(sources), torch.cat([part.factor for part in parts]), start)


class Widener:
    """Draws, and the widened copies that are made with them."""

    def __init__(
        self, seed: int = 0, unread: int = 2, zero: int = 1, copies: int = 3, factors: bool = True
    ) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.unread, self.zero, self.copies, self.factors = unread, zero, copies, factors

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw, dtype=torch.float64)

    def units(self, narrow: int, kind: str) -> Units:
        """Every narrow unit once, `copies` more, null ones, in any order. `kind`: what factors a copy may have."""
        extra = torch.randint(narrow, (self.copies,), generator=self.draw)
        nulls = torch.tensor([UNREAD] * self.unread + [ZERO] * self.zero, dtype=torch.int64)
        source = torch.cat([torch.arange(narrow), extra, nulls])
        source = source[torch.randperm(len(source), generator=self.draw)]
        factor = torch.ones(len(source), dtype=torch.float64)
        if self.factors and kind != "equal":
            factor = torch.where(self.random(len(source)) < 0, -1.0, 1.0).double()
        if self.factors and kind == "positive":
            factor = 0.5 + torch.rand(len(source), generator=self.draw, dtype=torch.float64)
        return Units(source, factor, narrow)

    def columns(self, weight: Tensor, units: Units) -> Tensor:
        """Random C with C T = weight; 0 where nobody may read."""
        T, C = units.T, 0.5 * self.random(len(weight), len(units.source))
        C[:, units.source == UNREAD] = 0.0
        return C + ((weight.double() - C @ T) / T.square().sum(0)) @ T.T

    def rows(self, weight: Tensor, units: Units, gates: int, odd: int) -> Tensor:
        """The rows of all gates: those of the originals, nothing where a zero unit is odd, else at random."""
        own = weight.reshape(gates, units.narrow, -1)
        wide = 0.5 * self.random(gates, len(units.source), own.shape[2])
        some = units.source >= 0
        wide[:, some] = own[:, units.source[some]]
        wide[odd, some] *= units.factor[some].unsqueeze(1)
        wide[odd, units.source == ZERO] = 0.0
        return wide.reshape(-1, own.shape[2])

    def reader(self, weight: Tensor, units: Units, gates: int, odd: int, reads: Units) -> Tensor:
        """A weight widened on both sides. Unread units read anything; zero ones are odd in zero ones alone."""
        wide = self.columns(self.rows(weight, units, gates, odd), reads).reshape(gates, len(units.source), -1)
        free, nothing = units.source == UNREAD, units.source == ZERO
        wide[:, free] = 0.5 * self.random(*wide[:, free].shape)
        wide[odd, nothing] = 0.5 * self.random(*wide[odd, nothing].shape) * (reads.source == ZERO)
        return wide.reshape(-1, len(reads.source))

    @torch.no_grad()
    def recurrent(self, narrow: nn.RNNBase, inputs: Units | None = None) -> tuple[nn.RNNBase, Units, list[Units]]:
        """A wide module, what its outputs are made of, and the units of each layer and direction."""
        gates, odd = ODD[narrow.mode]
        kind = "positive" if narrow.mode == "RNN_RELU" else "sign"
        reads = inputs or Units.same(narrow.input_size)
        own: Mapping[str, Tensor] = {name: weight.double() for name, weight in narrow.named_parameters()}
        new: dict[str, Tensor] = {}
        found: list[Units] = []
        for layer in range(narrow.num_layers):
            written = []
            for suffix in [f"_l{layer}", *([f"_l{layer}_reverse"] if narrow.bidirectional else [])]:
                units = self.units(narrow.hidden_size, kind)
                states = self.units(narrow.proj_size, "sign") if narrow.proj_size else units
                for side, source in (("ih", reads), ("hh", states)):
                    name = f"weight_{side}{suffix}"
                    new[name] = self.reader(own[name], units, gates, odd, source)
                    if narrow.bias:
                        name = f"bias_{side}{suffix}"
                        new[name] = self.rows(own[name], units, gates, odd).squeeze(1)
                if narrow.proj_size:
                    name = f"weight_hr{suffix}"
                    new[name] = self.reader(own[name], states, 1, 0, units)
                written.append(states)
                found.append(units)
            reads = Units.join(written)
        wide_module = type(narrow)(
            len((inputs or Units.same(narrow.input_size)).source),
            len(found[0].source),
            **options_of(narrow) | ({"proj_size": len(written[0].source)} if narrow.proj_size else {}),
        ).to(next(narrow.parameters()))
        wide_module.load_state_dict({name: weight.to(next(narrow.parameters())) for name, weight in new.items()})
        return wide_module.train(narrow.training), reads, found

    @torch.no_grad()
    def linear(self, narrow: nn.Linear, inputs: Units) -> nn.Linear:
        """A linear layer that reads the wide units."""
        wide = nn.Linear(len(inputs.source), narrow.out_features, bias=narrow.bias is not None).to(narrow.weight)
        wide.weight.copy_(self.columns(narrow.weight, inputs))
        if narrow.bias is not None:
            wide.bias.copy_(narrow.bias)
        return wide


def options_of(module: nn.RNNBase) -> dict[str, object]:
    """The options that make a module of this kind again."""
    options: dict[str, object] = {
        key: getattr(module, key) for key in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
    }
    if module.proj_size:
        options["proj_size"] = module.proj_size
    if isinstance(module, nn.RNN):
        options["nonlinearity"] = module.nonlinearity
    return options


class Tagger(nn.Module):
    """A table of tokens, recurrent layers, a linear head on: `all` states, the `last`, or the last `cell`s."""

    def __init__(self, table: nn.Embedding, layers: nn.RNNBase, head: nn.Linear, use: str) -> None:
        super().__init__()
        self.table, self.layers, self.head, self.use = table, layers, head, use
        self.units: list[Units] = []
        """Of a widened network: the units of each layer and direction."""

    def forward(self, x: Tensor) -> Tensor:
        states, last = self.layers(self.table(x))
        if self.use == "all":
            return self.head(states)  # type: ignore[no-any-return]
        if isinstance(last, tuple):
            last = last[1] if self.use == "cell" else last[0]
        ends = [last[-2], last[-1]] if self.layers.bidirectional else [last[-1]]
        return self.head(torch.cat(ends, -1))  # type: ignore[no-any-return]


def tagger(
    kind: type[nn.RNNBase], use: str, seed: int, units: int = 5, size: int = 4, tokens: int = 11, **options: Any
) -> Tagger:
    """A random narrow network, in float64."""
    draw = torch.Generator().manual_seed(seed)
    layers = kind(size, units, **options)
    width = (units if use == "cell" else layers.proj_size or units) * (2 if layers.bidirectional else 1)
    model = Tagger(nn.Embedding(tokens, size), layers, nn.Linear(width, 3), use).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name.startswith("table") else min(0.5, 1.2 / parameter.shape[-1] ** 0.5)
            parameter.copy_(scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return model


def widened(narrow: Tagger, widener: Widener | None = None, seed: int = 0) -> Tagger:
    """The same function, with all recurrent layers widened."""
    widener = widener or Widener(seed)
    layers, outputs, units = widener.recurrent(narrow.layers)
    if narrow.use == "cell":
        outputs = Units.join(units[-2:] if layers.bidirectional else units[-1:])
    wide = Tagger(copy.deepcopy(narrow.table), layers, widener.linear(narrow.head, outputs), narrow.use)
    wide.units = units
    return wide.train(narrow.training)
