"""The channels of a traced model as `compress` sees them: the spaces that may be narrowed, their costs, the edits.

`Structure` holds all readers of one graph. Costs and edits are functions of `kept`: a bool for every slot root
(`slots`). Of every layer one channel stays at least, but of the branches that are allowed to go (`allow`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ep_prune.branches import Branch, branches_of, inside
from ep_prune.calibrate import Program, positions
from ep_prune.demand import demands
from ep_prune.embedding import Cut, Refit, Round, Vanished
from ep_prune.heads import heads_of
from ep_prune.numbering import number_channels
from ep_prune.readers import Free, Reader, reader_of
from ep_prune.selection import Selection, close, select
from ep_prune.slots import Blends, EqualCounts, Groups, Slots
from ep_prune.spaces import longest_axis, spaces, units_along


class Structure:
    """What may be narrowed in a graph. `frozen`: parameter axes that stay, as in `trial.State`."""

    def __init__(
        self, program: Program, frozen: Mapping[tuple[str, int], str], parameters: Collection[str]
    ) -> None:
        self.graph = graph = program.graph
        self.numbering = number_channels(graph)
        _join_depthwise(self.numbering.slots)
        self.roots = self.numbering.slots.roots()
        self.count = self.numbering.slots.count
        self.parameters = set(parameters)
        self.pinned = self.numbering.slots.pinned(self.roots)
        for axis in frozen:
            if axis in self.numbering.slots.bound:
                self.pinned[self.roots[self.numbering.slots.bound[axis]]] = True
        order = program.place
        needs = demands(self.numbering, self.roots)
        self.untouched = {}
        for name in needs.keys() & self.numbering.gates.keys():
            recurrent = needs.pop(name)
            self.untouched[recurrent.port.node.layer or name] = "a recurrent layer, which is not fitted"
            self.pinned[recurrent.roots] = True
        self.readers = sorted(
            (reader_of(graph, name, demand, order) for name, demand in needs.items()), key=lambda r: order[r.node]
        )
        for reader in self.readers:
            if reader.kept_whole and not bool(self.pinned[reader.roots].all()):
                self.untouched[reader.node.layer or reader.name] = reader.kept_whole
                self.pinned[reader.roots] = True
        program.rooms |= {
            r.node: (str(r.constant), r.op.layout.axis) for r in self.readers if r.new_bias is not None
        }
        self._selection = select(self.numbering)
        self.spaces, self._single = self._spaces()
        self.branches: dict[str, Branch] = {}
        """By their spaces' names, those that may go as a whole."""

    # ---- branches that may go as a whole -------------------------------------------------------------

    def candidates(self, model: nn.Module) -> dict[str, Branch]:
        """The branches of which the trace shows nothing against their going."""
        spaces_ = [*self.spaces, *self._single]
        return branches_of(model, self.graph, self.readers, spaces_, self.numbering.slots, self.roots)

    def allow(self, branches: Mapping[str, Branch]) -> None:
        """Let branches go: from here on `close` may leave nothing of their spaces."""
        self.branches = dict(branches)
        self.spaces = [space for space in self.spaces if space not in self._single]
        self.spaces += [space for space in self._single if space.name in branches]
        optional = torch.zeros(self.count, dtype=torch.bool)
        for space in self.spaces:
            if space.name in branches:
                optional[space.roots] = True
        self._selection.optional = optional

    def vanished(self, kept: Tensor) -> list[Branch]:
        """The branches of which nothing is left, without those inside of others."""
        gone = [branch for branch in self.branches.values() if not bool(kept[branch.last.roots].any())]
        return [branch for branch in gone if not inside(gone, branch.module)]

    # ---- spaces ----------------------------------------------------------------------------------------

    def _spaces(self) -> tuple[list[Free], list[Free]]:
        """Those that can be narrowed, and those of one channel, which stays unless its branch may go."""
        found: tuple[list[Free], list[Free]] = [], []
        for space in spaces(self._selection):
            axes = [self.roots[self.numbering.slots.bound[axis]] for axis in space.axes]
            own = torch.unique(torch.cat(axes))
            free = own[~self.pinned[own]]
            if len(free):
                longest = units_along(self._selection, longest_axis(self._selection, space.axes))
                made = Free(space.name, free, longest, self._widths(axes, longest), self._sections(free))
                found[int(len(own) == 1)].append(made)
        return found

    def _widths(self, axes: Sequence[Tensor], longest: Tensor) -> tuple[Tensor, ...]:
        own = torch.unique(longest)
        blends = (c for c in self.numbering.slots.constraints if isinstance(c, Blends))
        outputs = [self.roots[blend.out].reshape(-1) for blend in blends]
        return tuple(axis for axis in [*axes, *outputs] if torch.equal(torch.unique(axis), own))

    def _sections(self, free: Tensor) -> Tensor | None:
        for constraint in self.numbering.slots.constraints:
            sides: tuple[Tensor, ...] = ()
            if isinstance(constraint, Groups):
                sides = constraint.inputs, constraint.outputs
            elif isinstance(constraint, EqualCounts):
                sides = (torch.stack(constraint.sections),)
            for rows in (self.roots[side] for side in sides):
                number = torch.full((self.count,), -1)
                number[rows] = torch.arange(len(rows)).unsqueeze(1)
                own = number[free]
                equal = rows.shape[1] > 1 and len(torch.unique(rows)) == rows.numel() and bool((own >= 0).all())
                if equal and len(torch.unique(torch.bincount(own, minlength=len(rows)))) == 1:
                    return own
        return None

    def everything(self) -> Tensor:
        return torch.ones(self.count, dtype=torch.bool)

    def close(self, kept: Tensor) -> Tensor:
        """`kept` with whatever must stay with it: pinned channels, equal groups and parts, one of each layer but
        where a branch may go (`allow`)."""
        chosen = Selection(
            self.numbering, self.roots, self.pinned, (kept | self.pinned)[self.roots], self._selection.demands,
            why=torch.zeros(self.count, dtype=torch.int64), optional=self._selection.optional,
        )  # fmt: skip
        close(chosen)
        return chosen.kept

    # ---- costs ---------------------------------------------------------------------------------------

    def macs(self, kept: Tensor) -> int:
        """Multiply-accumulates of one sample in all weights' uses."""
        gone = self.vanished(kept)
        there = (r for r in self.readers if not inside(gone, r.name))
        return sum(self._weight_size(r, kept) * positions(r.node, r.op) * r.uses for r in there)

    def size(self, kept: Tensor) -> int:
        """Parameters, with the biases that a fit makes."""
        weights = {reader.name: reader for reader in self.readers}
        gone = self.vanished(kept)
        total, fitted = 0, False
        for reader in self.readers:  # from the first that loses inputs on, all weights are fitted
            fitted = fitted or not bool(kept[reader.roots].all())
            gains_bias = fitted and reader.new_bias is not None and not reader.kept_whole
            if inside(gone, reader.name):  # a constant is left
                total += int(kept[reader.outputs].sum()) * any(reader is branch.last for branch in gone)
                continue
            total += int(kept[reader.outputs].sum()) * gains_bias
            total += self._weight_size(reader, kept) * (reader.name in self.parameters)
        bound: dict[str, dict[int, Tensor]] = {}
        for (name, axis), slots in self.numbering.slots.bound.items():
            bound.setdefault(name, {})[axis] = slots
        for name, tensor in self.graph.tensors.items():
            if name in weights or name not in self.parameters or inside(gone, name):
                continue
            sizes = list(tensor.shape)
            for axis, slots in bound.get(name, {}).items():
                sizes[axis] = int(kept[self.roots[slots]].sum())
            total += math.prod(sizes)
        return total

    @staticmethod
    def _weight_size(reader: Reader, kept: Tensor) -> int:
        groups = reader.op.layout.groups
        inputs = int(kept[reader.roots].sum())
        outputs = int(kept[reader.outputs].sum())
        active = int(kept[reader.roots].reshape(groups, -1).any(1).sum()) if groups > 1 else 1
        return inputs * outputs * math.prod(reader.kernel) // max(active, 1)

    def widths(self, kept: Tensor) -> dict[str, tuple[int, int]]:
        """Space -> channels before and after, along its longest axis."""
        return {s.name: (len(s.longest), int(kept[s.longest].sum())) for s in self.spaces}

    # ---- the edits -----------------------------------------------------------------------------------

    def round(self, kept: Tensor, own: Mapping[str, Tensor]) -> Round:
        """The edits that leave the kept channels, with the tensors of `own` (wide shapes) in place."""
        cuts, refits, done = [], [], set()
        gone = self.vanished(kept)
        for reader in self.readers:
            if inside(gone, reader.name):
                continue
            layout = reader.op.layout
            weight = own.get(reader.name, self.graph.tensors[reader.name])
            inputs = kept[reader.roots].reshape(layout.groups, -1)
            outputs = kept[reader.outputs]
            done |= {reader.name}
            if bool(inputs.all()) and bool(outputs.all()) and reader.name not in own:
                continue
            groups = inputs.any(1).nonzero().squeeze(1)
            wide = layout.canonical(weight)[groups]
            rows = outputs[groups].nonzero()[:, 1].reshape(len(groups), -1)
            columns = inputs[groups].nonzero()[:, 1].reshape(len(groups), -1)
            wide = wide.gather(1, rows[:, :, None, None].to(wide.device).expand(-1, -1, *wide.shape[2:]))
            wide = wide.gather(
                2, columns[:, None, :, None].to(wide.device).expand(-1, wide.shape[1], -1, wide.shape[3])
            )
            narrow = layout.original(wide, reader.kernel).contiguous()
            constant = own.get(reader.constant or "")
            if constant is not None:
                constant = constant[outputs.reshape(-1).to(constant.device)]
                done.add(str(reader.constant))
            places = (reader.bias, reader.mean, reader.new_bias) if constant is not None else (None,) * 3
            refits.append(
                Refit(
                    reader.name, narrow.cpu(), len(groups), None if constant is None else constant.cpu(), *places
                )
            )
        for (name, axis), slots in self.numbering.slots.bound.items():
            keep = kept[self.roots[slots]]
            if name not in done and not bool(keep.all()) and not inside(gone, name):
                cuts.append(Cut(name, axis, keep.nonzero().squeeze(1), len(keep)))
        heads = heads_of(self.numbering, self.roots, kept)
        vanished = tuple(self._shift(branch, kept, own) for branch in gone)
        return Round(cuts=tuple(cuts), refits=tuple(refits), heads=heads, vanished=vanished)

    def _shift(self, branch: Branch, kept: Tensor, own: Mapping[str, Tensor]) -> Vanished:
        last = branch.last
        constant = branch.constant({**self.graph.tensors, **own})
        after = len(last.node.shape or ()) - 1 - last.op.layout.axis
        constant = constant[kept[last.outputs.reshape(-1)]]
        return Vanished(branch.module, constant, after, branch.summed, branch.rectified)


def _join_depthwise(slots: Slots) -> None:
    """A group of one input goes as a whole: its input and its outputs are one channel. So is a head."""
    slots.join_heads()
    for constraint in slots.constraints:
        if isinstance(constraint, Groups) and constraint.inputs.shape[1] == 1:
            slots.unify(constraint.inputs, constraint.outputs)
