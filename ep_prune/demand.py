"""What every weight needs of the channels that it reads: classes, which of them are read, where constants can go.

A `Demand` gathers all uses of one weight. Channels count as copies only if they are so, with one ratio, at every
use. What is read depends on the outputs that are kept, and so is asked anew as the selection grows (`refresh`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ep_prune.find import MARGIN, Freedom, Sparse, congruence
from ep_prune.graph import Graph, Node, Normalize
from ep_prune.numbering import Numbering, Port
from ep_prune.numbering.contraction import unseen, without_negligible
from ep_prune.numbering.uses import Net, Outputs
from ep_prune.rules import kind_of

AMPLIFIED = 1e4
"""How many rounding units of an output's size a merged channel's own error may make there."""


@dataclass
class Demand:
    """The needs of one weight. n input positions, G groups, O/G outputs a group.

    leader, scale, constant (n,): classes of equal directions over all uses. nets: for each use, what each class,
    at its leader's place, sends (n, O/G, taps). offset (n,). live, net_zero (n,) at leaders: some output that is
    kept reads the class; its weights are zero or cancel exactly. prefer (n,): at leaders, the member that should
    stand for the class; opinions: those among them that are needed, not just as good as others. eps: rounding
    unit of the type in which the weight is stored. foldable: copies may be merged (not where the weight has
    another use). bias, mean, new_bias: where constants can go, if anywhere. rigid: offsets count as part of the
    direction; no constant can be folded or led here.
    """

    ports: list[Port]
    roots: Tensor
    out_roots: Tensor
    leader: Tensor
    scale: Tensor
    constant: Tensor
    nets: list[Net]
    offset: Tensor
    live_out: Tensor
    eps: float
    tolerance: float
    foldable: bool
    bias: str | None = None
    mean: str | None = None
    new_bias: str | None = None
    rigid: bool = False
    live: Tensor = field(default_factory=lambda: torch.empty(0))
    net_zero: Tensor = field(default_factory=lambda: torch.empty(0))
    prefer: Tensor = field(default_factory=lambda: torch.empty(0))
    opinions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    kept_out: Tensor | None = None
    told_apart: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def port(self) -> Port:
        return self.ports[0]

    @property
    def takes_constants(self) -> bool:
        """Whether W t has a bias to go to."""
        return self.bias is not None or self.mean is not None or self.new_bias is not None

    def outputs(self) -> Tensor:
        """(G, O/G): outputs that are kept and matter."""
        return self.live_out if self.kept_out is None else self.live_out & self.kept_out

    def refresh(self, kept: Tensor, force: bool = False) -> None:
        """Ask again which classes are read, given the kept slots (by root)."""
        kept_out = kept[self.out_roots]
        if not force and self.kept_out is not None and torch.equal(kept_out, self.kept_out):
            return
        self.kept_out = kept_out
        n = len(self.roots)
        self.live = torch.zeros(n, dtype=torch.bool)
        self.net_zero = torch.ones(n, dtype=torch.bool)
        mask = spread(self.outputs(), n)
        for port, net in zip(self.ports, self.nets, strict=True):
            nonzero = net.sent & mask
            self.net_zero &= ~nonzero.any(1)
            if self.tolerance > 0:
                nonzero &= ~port.below(net.values(), self.tolerance)
            self.live |= nonzero.any(1)
        self.live |= self.told_apart
        self.net_zero &= ~self.told_apart

    def tell_apart(self, positions: Tensor) -> None:
        """Take positions (n,) bool out of their classes: each is a class of its own from now on."""
        here = torch.arange(len(self.roots))
        self.told_apart = self.told_apart | positions
        self.told_apart[self.leader[positions]] = True
        self.leader = torch.where(positions, here, self.leader)
        self.scale = torch.where(positions, 1.0, self.scale)
        self.prefer = torch.where(positions, here, self.prefer)
        self.live |= self.told_apart
        self.net_zero &= ~self.told_apart

    def make_rigid(self) -> None:
        """Classes anew, with the offset as part of the direction; every constant but 0 becomes a class.

        The second time, and for weights of several uses: no merging at all, whatever is not zero stays.
        """
        port, n = self.port, len(self.roots)
        rows = port.x.rows
        self.leader, self.scale = torch.arange(n), torch.ones(n, dtype=torch.float64)
        if not (self.rigid or len(self.ports) > 1 or not self.foldable):
            some = (rows.norm() != 0).nonzero().squeeze(1)
            group = some * port.groups // n if port.groups > 1 else None
            found = congruence(Sparse(rows[some], True), Freedom.SCALE, self.tolerance, group)
            self.leader[some], self.scale[some] = some[found.leader], found.scale
        self.constant = torch.stack([p.x.rows.norm() for p in self.ports]).amax(0) == 0
        self.offset = torch.zeros(n, dtype=torch.float64)
        self.nets = [_net_of(p, self.leader, self.scale, self.constant, self.eps) for p in self.ports]
        self.prefer = torch.arange(n)
        self.rigid = True

    def amplified(self) -> Tensor:
        """(n,) positions that are close to their leader as rows go, but not once their weights are counted.

        Two nearly equal neurons with large opposite outgoing weights encode a derivative ("flat channels to
        infinity"): the distance to the leader, times the weight, must vanish in what the output is made of.
        """
        allowed = AMPLIFIED * self.eps + 10 * self.tolerance
        result = torch.zeros(len(self.roots), dtype=torch.bool)
        for port in self.ports:
            rows, leader = port.x.rows, port.classes.leader
            away = port.classes.residual + rows.error + port.classes.scale.abs() * rows.error[leader]
            effect = port.weight.square().sum(2).sqrt() * away.unsqueeze(1)
            share = effect.reshape(port.groups, -1, effect.shape[1]) > allowed * port.size.unsqueeze(1)
            result |= (share.reshape(effect.shape) & spread(self.outputs(), len(rows))).any(1)
        return result

    def can_fold(self, t: Tensor) -> bool:
        """Whether what the constants t (n,) send to outputs is a constant, and has a bias to go to."""
        outputs = self.outputs()
        for port, block in [(one, block) for one in self.ports for block in one.use.blocks()]:
            weight = port.use.weight(block)
            terms = (weight * t.reshape(-1, 1, 1)).reshape(port.groups, -1, *weight.shape[1:])
            sent, size = terms.sum(1), terms.square().sum(1).sqrt()
            error = port.x.rows.error.reshape(port.groups, -1, 1, 1)
            noise = (weight.reshape(terms.shape) * error).square().sum(1).sqrt()
            least = MARGIN * (self.eps * size + noise) + unseen(self.eps) * port.size[:, block].unsqueeze(2)
            nonzero = (sent.abs() > least) & outputs[:, block].unsqueeze(2)
            edge = ~torch.tensor(port.op.layout.interior)
            if bool(nonzero[:, :, edge].any()) or (bool(nonzero.any()) and not self.takes_constants):
                return False
        return True


def spread(outputs: Tensor, n: int) -> Tensor:
    """(G, O/G) -> (n, O/G): every input position of a group sees the group's outputs."""
    groups, size = outputs.shape
    return outputs.unsqueeze(1).expand(groups, n // groups, size).reshape(n, size)


def demands(n: Numbering, roots: Tensor) -> dict[str, Demand]:
    """The demand of every weight, last use first."""
    live = n.liveness()
    users = _readers(n.graph)
    by_weight: dict[str, list[Port]] = {}
    for port in reversed(n.ports):
        by_weight.setdefault(port.name, []).insert(0, port)
    found = {}
    for name, ports in by_weight.items():
        port = ports[0]
        layout = port.op.layout
        same = len({(p.op.layout.groups, p.op.layout.inputs_first) for p in ports}) == 1
        alone = set(users[name]) <= {p.node for p in ports}
        out_slots = n.slots.bound[(name, -1 if layout.groups > 1 else int(layout.inputs_first))]
        size = len(port.x.rows)
        demand = Demand(
            ports,
            roots[port.x.slots],
            roots[out_slots].reshape(layout.groups, -1),
            port.classes.leader.clone(),
            port.classes.scale.clone(),
            port.constant,
            [p.sends for p in ports],
            port.x.rows.offset,
            torch.stack([live[id(p.out)] for p in ports]).any(0).reshape(layout.groups, -1),
            n.eps(port.op.weight),
            n.tolerance,
            foldable=same and alone and name not in n.pinned_tensors,
            told_apart=torch.zeros(size, dtype=torch.bool),
        )
        if len(ports) > 1:
            _join_uses(demand)
        if not demand.foldable:
            demand.leader = torch.arange(size)
            demand.scale = torch.ones(size, dtype=torch.float64)
            demand.nets = [_net_of_each(p, demand.constant, demand.eps) for p in ports]
        demand.prefer = demand.leader.clone()
        _find_room_for_constants(n, demand, users)
        _prefer_members(demand)
        found[name] = demand
    _share_opinions(list(found.values()), len(roots))
    return found


def _share_opinions(needs: list[Demand], slots: int) -> None:
    """A weight that does not care which member stands for a class takes the one that another weight needs."""
    wanted = torch.zeros(slots, dtype=torch.bool)
    for demand in needs:
        wanted[demand.roots[demand.opinions]] = True
    for demand in needs:
        n = len(demand.roots)
        member = wanted[demand.roots] & ~demand.constant
        first = torch.full((n,), n).scatter_reduce_(0, demand.leader[member], torch.arange(n)[member], "amin")
        free = (first < n) & (demand.leader == torch.arange(n))
        free[demand.leader[demand.opinions]] = False
        demand.prefer = torch.where(free, first, demand.prefer)


def _readers(graph: Graph) -> dict[Node | str, list[Node]]:
    """The readers of every node; a tensor that has several nodes (tied names) goes by its name."""
    readers: dict[Node | str, list[Node]] = {}
    for node, users in graph.users().items():
        readers.setdefault(node if node.tensor is None else node.tensor, []).extend(users)
    return readers


def _net_of(port: Port, leader: Tensor, scale: Tensor, constant: Tensor, eps: float) -> Net:
    """What the classes of `leader` send through one use; what cancels to rounding is zero.

    A constant may be a class here, and so its offset counts.
    """
    factor = torch.where(constant, 0.0, scale).reshape(-1, 1, 1)

    def make(outputs: Outputs) -> Tensor:
        terms = port.use.weight(outputs) * factor
        net = torch.zeros_like(terms).index_add_(0, leader, terms)
        size = torch.zeros_like(terms).index_add_(0, leader, terms.abs())
        net = torch.where(net.abs() <= MARGIN * eps * size, 0.0, net)
        return without_negligible(net, port.x.rows.norm(), port.size[:, outputs], eps)

    return Net(port.use, make)


def _net_of_each(port: Port, constant: Tensor, eps: float) -> Net:
    """What channels that are not merged send through one use."""
    fixed = constant.reshape(-1, 1, 1)

    def make(outputs: Outputs) -> Tensor:
        net = torch.where(fixed, 0.0, port.use.weight(outputs))
        return without_negligible(net, port.x.rows.norm(), port.size[:, outputs], eps)

    return Net(port.use, make)


def _join_uses(demand: Demand) -> None:
    """A weight with several uses: channels are equal only if they are so, with one ratio, at every use."""
    ports, n = demand.ports, len(demand.roots)
    leaders = torch.stack([torch.where(p.constant, -1, p.classes.leader) for p in ports], 1)
    _, inverse = torch.unique(leaders, dim=0, return_inverse=True)
    leader = torch.full((n,), n).scatter_reduce_(0, inverse, torch.arange(n), "amin")[inverse]
    scales = torch.stack([p.classes.scale for p in ports], 1)
    varies = torch.stack([~p.constant for p in ports], 1)
    ratio = torch.where(varies, scales / scales[leader], torch.nan)
    common = ratio.nanmean(1).nan_to_num(1.0)
    offsets = torch.stack([p.x.rows.offset for p in ports], 1)
    constant = ~varies.any(1)
    rest = torch.where(constant.unsqueeze(1), offsets, offsets - common.unsqueeze(1) * offsets[leader])
    agree = (ratio - common.unsqueeze(1)).abs().nan_to_num(0.0).amax(1) <= 1e-12 * common.abs()
    agree &= (rest - rest[:, :1]).abs().amax(1) <= 1e-12 * (1 + offsets.abs().amax(1))
    demand.leader = torch.where(agree & ~constant, leader, torch.arange(n))
    demand.scale = torch.where(agree & ~constant, common, 1.0)
    demand.constant = constant & agree
    demand.nets = [_net_of(p, demand.leader, demand.scale, demand.constant, demand.eps) for p in ports]


def _find_room_for_constants(n: Numbering, demand: Demand, users: dict[Node | str, list[Node]]) -> None:
    """Where W t can go: the layer's own bias, the mean of the batch norm that follows, or a new bias."""
    nodes = {port.node for port in demand.ports}
    bias = demand.port.op.bias
    if bias is not None:
        alone = set(users[str(bias.tensor)]) <= nodes and str(bias.tensor) not in n.pinned_tensors
        shared = any(port.op.bias is not bias for port in demand.ports)
        demand.bias = bias.tensor if alone and not shared else None
        return
    if not demand.foldable or any(port.op.bias is not None for port in demand.ports):
        return
    readers = users[demand.port.node]
    if len(nodes) == 1 and len(readers) == 1:
        kind = kind_of(readers[0], n.graph)
        if (
            isinstance(kind, Normalize)
            and len(users[str(kind.mean.tensor)]) == 1
            and demand.port.op.layout.axis == 1
        ):
            demand.mean = kind.mean.tensor
            return
    path = demand.port.name.rpartition(".")[0]
    if demand.port.name.endswith(".weight") and path in n.graph.bias_free:
        names = n.graph.aliases.get(demand.port.name, ())
        demand.new_bias = path if len(names) == 1 else None


def _prefer_members(demand: Demand) -> None:
    """Where constants cannot be folded, prefer the members with which the constants of all classes cancel.

    x_i = m_i a + c_i: with leader l the class leaves the constant sum_i W_i c_i - net * r, r = c_l / m_l. The r
    for which nothing is left on any tap that sees the padding is a least-squares problem; each class takes the
    member nearest to it (a sigmoid's unflipped copy, not 1 - s).
    """
    port, n = demand.port, len(demand.roots)
    edge = ~torch.tensor(port.op.layout.interior) | (not demand.takes_constants)
    if len(demand.ports) > 1 or port.groups > 1 or not demand.foldable or not bool(edge.any()):
        return
    ratio = torch.where(demand.constant, 0.0, demand.offset / demand.scale)
    low = torch.full((n,), torch.inf, dtype=torch.float64).scatter_reduce_(0, demand.leader, ratio, "amin")
    high = torch.full((n,), -torch.inf, dtype=torch.float64).scatter_reduce_(0, demand.leader, ratio, "amax")
    noise = MARGIN * port.x.rows.error[demand.leader] + 1e-14 * ratio.abs()
    open_ = ((high - low)[demand.leader] > noise) & ~demand.constant
    free = torch.unique(demand.leader[open_])
    if not len(free):
        return
    net = demand.nets[0].values()[:, :, edge]
    fixed = torch.where(open_, 0.0, ratio) * (demand.leader == torch.arange(n))
    sent = (port.weight[:, :, edge] * demand.offset.reshape(-1, 1, 1)).sum(0)
    wanted = (sent - (net * fixed.reshape(-1, 1, 1)).sum(0)).reshape(-1, 1)
    solved = torch.linalg.lstsq(net[free].reshape(len(free), -1).T, wanted, driver="gelsd").solution.squeeze(1)
    target = torch.zeros(n, dtype=torch.float64).index_put_((free,), solved)
    distance = (ratio - target[demand.leader]).abs()
    nearest = torch.full((n,), torch.inf, dtype=torch.float64).scatter_reduce_(0, demand.leader, distance, "amin")
    best = open_ & (distance <= nearest[demand.leader])
    first = torch.full((n,), n).scatter_reduce_(0, demand.leader[best], torch.arange(n)[best], "amin")
    demand.prefer = torch.where(first < n, first, demand.prefer)
    demand.opinions = demand.prefer[free]
