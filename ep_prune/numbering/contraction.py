"""Where weights consume channels: the rows of a weight, rewritten in the atoms of its input.

    y_o(p) = sum_i sum_tap W[o, i, tap] x_i(p + tap) + b_o        x_i = m_i a_g(i) + c_i
           = sum_g sum_tap N[o, g, tap] a_g(p + tap) + sum_tap P[o, tap] 1(p + tap is inside) + b_o

N, the *net* weights, add up what the members of a class of equal directions send: copies whose weights cancel
are gone from it. P is what the constants send: through interior taps, which never fall on zero padding, a
constant; through the others a pattern, which belongs to the row. Rows (N, pattern) that are zero are constants,
rows that are collinear are one new atom.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ep_prune.channels import ONE, Channels, Rows, along, mix, number
from ep_prune.find import BLOCK, MARGIN, Classes, Dense, Freedom, Sparse, in_blocks
from ep_prune.graph import Contract, Lookup, Node, Pick
from ep_prune.numbering.align import on_axis
from ep_prune.numbering.elementwise import _position_shape, transfer
from ep_prune.numbering.state import Known, Numbering, Port, Refused, Value
from ep_prune.numbering.uses import ALL, Net, Outputs, Use
from ep_prune.slots import Groups


@transfer.register(Contract)
def _contract(op: Contract, node: Node, n: Numbering) -> Value:
    layout = op.layout
    x = on_axis(n, op.x, layout.axis)
    use = n.use(op.weight, layout)
    groups, outputs, inputs, _ = use.shape
    if groups * inputs != len(x.rows):
        raise Refused("inputs that do not match the weight")
    classes, constant = n.classes_of(x, inputs)
    leaders = (classes.leader == torch.arange(len(x.rows))) & ~constant

    slots_out = _slots(op, n, x, groups, inputs, outputs)
    bias = error = None
    if op.bias is not None:
        bias = n.tensor(op.bias)
        n.slots.unify(n.slots.of(str(op.bias.tensor), 0, len(bias)), slots_out)
        bias, error = bias.reshape(groups, -1), (n.eps(op.bias) * bias).reshape(groups, -1)
    measured = _Measured(use, classes, constant, leaders, x.rows, n.eps(op.weight), bias, error)
    interior = torch.tensor(layout.interior)
    pattern_rows = torch.where(interior, 0.0, measured.pattern)

    signature = f"{layout.signature} at {_position_shape(x)}"
    sends = Net(use, measured.net)
    if groups == 1:
        vectors: Dense | Sparse = _dense(use, sends, leaders, x.rows, pattern_rows[0], measured)
    else:
        vectors = _sparse(sends.values(), measured.noise, leaders, x.rows, pattern_rows, measured.fuzz, groups)
    rows = _new_rows(n, signature, vectors, measured.offset.reshape(-1), measured.error.reshape(-1))
    out = n.record(
        Channels(
            node.shape or (),
            along(layout.axis, len(node.shape or ()), torch.arange(groups * outputs)),
            rows,
            slots_out,
        )
    )
    n.ports.append(Port(node, op, x, out, classes, constant, use, sends, measured.pattern, measured.size))
    return out


class _Measured:
    """What is known of every output of a weight.

    `pattern` (G, O/G, taps), its squared error `fuzz`; `offset` (G, O/G), its `error`, and `size`, the length of
    what it is made of. `noise`: the squared error of what is sent, (n, O/G); without groups added up over inputs.
    """

    def __init__(
        self,
        use: Use,
        classes: Classes,
        constant: Tensor,
        leaders: Tensor,
        rows: Rows,
        eps: float,
        bias: Tensor | None,
        wrong: Tensor | None,
    ) -> None:
        self.use, self.classes, self.constant, self.rows, self.eps = use, classes, constant, rows, eps
        groups = use.shape[0]
        interior = torch.tensor(use.layout.interior)
        keep = leaders.nonzero().squeeze(1)
        square = rows.coef[keep].square().sum(1)[:, None]
        parts = []
        for block in use.blocks() if groups == 1 else [ALL]:
            weight = use.weight(block)
            net, noise = _net(weight, classes.leader, classes.scale, constant, rows, eps)
            pattern, fuzz = _constants(weight, rows, groups, eps)
            offset = pattern[:, :, interior].sum(2)
            error = fuzz.sum(2).sqrt()
            if bias is not None and wrong is not None:
                offset = offset + bias[:, block]
                error = (error.square() + wrong[:, block].square()).sqrt()
            size = _size(net, rows, pattern, offset)
            pattern = torch.where(pattern.abs() <= unseen(eps) * size.unsqueeze(2), 0.0, pattern)
            noise = noise if groups > 1 else (noise[keep] * square).sum(0, keepdim=True)
            parts.append((pattern, fuzz, offset, error, size, noise))
        joined = parts[0] if len(parts) == 1 else [torch.cat(part, 1) for part in zip(*parts, strict=True)]
        self.pattern, self.fuzz, self.offset, self.error, self.size, self.noise = joined

    def net(self, outputs: Outputs) -> Tensor:
        """(n, O/G, taps) what every class sends, at its leader's place, to some outputs."""
        weight = self.use.weight(outputs)
        net, _ = _net(weight, self.classes.leader, self.classes.scale, self.constant, self.rows, self.eps)
        return without_negligible(net, self.rows.linear_norm(), self.size[:, outputs], self.eps)


def _net(
    weight: Tensor, leader: Tensor, scale: Tensor, constant: Tensor, rows: Rows, eps: float
) -> tuple[Tensor, Tensor]:
    """(n, O/G, taps): weights summed over classes at their leaders, and (n, O/G) each sum's squared error.

    What a class of several members sends is zero where it is not above the rounding of its terms.
    """
    if bool((leader == torch.arange(len(leader))).all()) and not bool(constant.any()):
        return weight, (eps * weight).square().sum(2)
    net = weight.clone()
    followers = ((leader != torch.arange(len(leader))) & ~constant).nonzero().squeeze(1)
    net[constant] = 0.0
    net[followers] = 0.0
    several, place = torch.unique(leader[followers], return_inverse=True)
    if len(several):
        terms = weight[followers] * scale[followers].reshape(-1, 1, 1)
        wrong = rows.error[followers] + scale[followers].abs() * rows.error[leader[followers]]
        wrong = wrong / rows.linear_norm()[leader[followers]].clamp_min(1e-300)
        each = (eps * terms).square() + (weight[followers] * wrong.reshape(-1, 1, 1)).square()
        noise = (eps * weight[several]).square().index_add_(0, place, each)
        total = net[several].index_add_(0, place, terms)
        net[several] = torch.where(total.abs() <= MARGIN * noise.sqrt(), 0.0, total)
    square = (eps * net).square().sum(2)
    if len(several):
        square[several] = noise.sum(2)
    return net, square


def unseen(eps: float) -> float:
    """The share of an output that it cannot show: the rounding of its rounding, in half precision less.

    Inputs may then differ in size by a factor of 1 / eps, and what they send is rounded away still.
    """
    return min(eps, 1e-6) ** 2


def _size(net: Tensor, rows: Rows, pattern: Tensor, offset: Tensor) -> Tensor:
    """(G, O/G): the length of what each output is made of, over all inputs of its group, taps and constants."""
    groups, outputs, _ = pattern.shape
    square = net.square().sum(2) * rows.linear_norm().square().unsqueeze(1)
    constants = pattern.square().sum(2) + offset.square()
    return (square.reshape(groups, -1, outputs).sum(1) + constants).sqrt()


def without_negligible(net: Tensor, norm: Tensor, size: Tensor, eps: float) -> Tensor:
    """`net` (n, O/G, taps), on inputs of size `norm` (n,), without the weights that no output of this `size`
    (G, O/G) can show.

    Weight decay shrinks what no gradient holds to 1e-20 and less, and sums that cancel leave such numbers.
    """
    groups, outputs = size.shape
    limit = unseen(eps) * size.unsqueeze(1).expand(groups, len(net) // groups, outputs).reshape(net.shape[:2])
    negligible = net.abs() * norm.reshape(-1, 1, 1) <= limit.unsqueeze(2)
    return torch.where(negligible, 0.0, net)


def _constants(weight: Tensor, rows: Rows, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(G, O/G, taps): what the constants of all inputs send through each tap, and its squared error."""
    _, outputs, taps = weight.shape
    terms = (weight * rows.offset.reshape(-1, 1, 1)).reshape(groups, -1, outputs, taps)
    fuzz = (eps * terms).square().sum(1)
    some = rows.offset != 0
    wrong = torch.where(some, rows.error, 0.0).reshape(-1, 1, 1)
    fuzz = fuzz + (weight * wrong).square().reshape(groups, -1, outputs, taps).sum(1)
    total = terms.sum(1)
    return torch.where(total.abs() <= MARGIN * fuzz.sqrt(), 0.0, total), fuzz


def _slots(op: Contract, n: Numbering, x: Channels, groups: int, inputs: int, outputs: int) -> Tensor:
    """The slots of the outputs; those of the inputs are tied to the weight's axis, or by groups."""
    name = str(op.weight.tensor)
    shape = op.weight.shape or ()
    out_axis = 1 if op.layout.inputs_first else 0
    if groups == 1:
        n.slots.unify(n.slots.of(name, 1 - out_axis, inputs), x.slots)
        return n.slots.of(name, out_axis, shape[out_axis])
    slots_out = n.slots.of(name, -1, groups * outputs)
    n.slots.constraints.append(Groups(x.slots.reshape(groups, inputs), slots_out.reshape(groups, outputs)))
    return slots_out


def _dense(use: Use, sends: Net, leaders: Tensor, rows: Rows, pattern: Tensor, measured: _Measured) -> Dense:
    """(O, atoms * taps) matrix of an ungrouped weight over the atoms of its input."""
    noise, fuzz = measured.noise[0], measured.fuzz[0]
    return over_atoms(sends.values, use.keep, noise, leaders, rows, pattern, fuzz)


def over_atoms(
    net: Callable[[Outputs], Tensor],
    keep: bool,
    noise: Tensor,
    leaders: Tensor,
    rows: Rows,
    pattern: Tensor,
    fuzz: Tensor,
) -> Dense:
    """What classes send (n, O, taps), as rows over the atoms of their leaders; kept, or made when asked for.

    noise (O,): its squared error. pattern (O, taps): what the constants send, and its squared error `fuzz`.
    """
    lead = leaders.nonzero().squeeze(1)
    rows, taps = rows[lead], pattern.shape[1]
    atoms, column = torch.unique(rows.atoms[rows.coef != 0], return_inverse=True)
    place = torch.zeros_like(rows.atoms)
    place[rows.coef != 0] = column
    keys = mix(atoms.unsqueeze(1), torch.arange(taps)).reshape(-1)
    patterned = bool((pattern != 0).any())
    if patterned:
        keys = torch.cat([keys, mix(ONE, torch.arange(taps))])
        noise = noise + fuzz.sum(1)

    def matrix(outputs: Outputs) -> Tensor:
        sent = net(outputs)[lead]
        count = sent.shape[1]
        if rows.atoms.shape[1] == 1 and len(atoms) == len(lead):
            values = torch.empty(len(atoms), count, taps, dtype=torch.float64)
            values[place[:, 0]] = sent * rows.coef[:, :1, None]
        else:
            values = torch.zeros(len(atoms), count, taps, dtype=torch.float64)
            for entry in range(rows.atoms.shape[1]):  # over branches of a stream, not over channels
                values.index_add_(0, place[:, entry], sent * rows.coef[:, entry, None, None])
        made = values.transpose(0, 1).flatten(1)
        return torch.cat([made, pattern[outputs]], 1) if patterned else made

    return Dense(matrix(ALL) if keep else matrix, keys, noise.sqrt())


def _sparse(
    net: Tensor, noise: Tensor, leaders: Tensor, rows: Rows, pattern: Tensor, fuzz: Tensor, groups: int
) -> Sparse:
    """Rows of a grouped weight: each over the atoms of its own group."""
    n, outputs, taps = net.shape
    width = max(rows.atoms.shape[1], 1)
    rows = rows.widened(width)
    entry = net.unsqueeze(3) * (rows.coef * leaders.unsqueeze(1))[:, None, None, :]  # (n, O/G, taps, r)
    code = mix(rows.atoms[:, None, :], torch.arange(taps)[None, :, None])  # (n, taps, r)
    code = code.unsqueeze(1).expand(n, outputs, taps, width)

    def by_output(tensor: Tensor) -> Tensor:
        return tensor.reshape(groups, n // groups, outputs, -1).transpose(1, 2).reshape(groups * outputs, -1)

    atoms, coef = by_output(code), by_output(entry)
    if bool((pattern != 0).any()):
        ones = mix(ONE, torch.arange(taps)).expand(groups * outputs, taps)
        atoms = torch.cat([atoms, ones], 1)
        coef = torch.cat([coef, pattern.reshape(groups * outputs, taps)], 1)
    square = by_output(noise * rows.coef.square().sum(1)[:, None]).sum(1)
    square = square + fuzz.sum(2).reshape(-1)
    zero = torch.zeros(len(atoms), dtype=torch.float64)
    made = Rows(torch.where(coef == 0, 0, atoms), coef, zero, square.sqrt())
    return Sparse(made.sorted().merged(), False)


def _new_rows(n: Numbering, signature: str, vectors: Dense | Sparse, offset: Tensor, error: Tensor) -> Rows:
    """One atom for every class of collinear rows; rows of length zero are constants."""
    size = len(offset)
    some = (vectors.norm() > MARGIN * vectors.error * 1e-3).nonzero().squeeze(1)
    atoms = torch.zeros(size, 1, dtype=torch.int64)
    coef = torch.zeros(size, 1, dtype=torch.float64)
    if len(some):
        chosen = vectors.taken(some) if isinstance(vectors, Dense) else Sparse(vectors.rows[some], False)
        atoms[some, 0], coef[some, 0], spread = n.intern(signature, chosen, Freedom.SCALE)
        error = error.clone()
        error[some] = (error[some].square() + spread.square()).sqrt()
    return Rows(atoms, coef, offset, error)


@transfer.register(Lookup)
def _lookup(op: Lookup, node: Node, n: Numbering) -> Value:
    """Column d of the table is a function of the index: its mean, plus what varies (one atom if collinear).

    So too where the places are known: what holds for every place holds for sequences of other lengths.
    """
    n.sink(n.values[op.index], f"the places that are looked up in {node.where}")
    return _looked_up(n, op.table, op.index, node)


def _looked_up(n: Numbering, source: Node, index: Node, node: Node) -> Channels:
    table = n.graph.tensors[str(source.tensor)].detach().T
    size, words = table.shape
    fits = n.has_room(table.numel())
    blocks = in_blocks(torch.arange(size), size if fits else max(1, BLOCK // words))

    def column(place: Tensor) -> Tensor:
        return table[place].to("cpu", torch.float64)

    parts = [(c.mean(1), (c == c[:, :1]).all(1), c.norm(dim=1), c[:, 0]) for c in map(column, blocks)]
    mean, flat, norm, first = (torch.cat(part) for part in zip(*parts, strict=True))

    def varying(place: Tensor) -> Tensor:
        return torch.where(flat[place].unsqueeze(1), 0.0, column(place) - mean[place].unsqueeze(1))

    keys = mix(number("vocabulary"), torch.arange(words))
    matrix = Dense(varying(torch.arange(size)) if fits else varying, keys, n.eps(source) * norm)
    rows = _new_rows(n, f"lookup {index.name}", matrix, torch.where(flat, first, mean), matrix.error)
    slots = n.slots.of(str(source.tensor), 1, size)
    labels = along(len(node.shape or ()) - 1, len(node.shape or ()), torch.arange(size))
    return n.record(Channels(node.shape or (), labels, rows, slots))


@transfer.register(Pick)
def _pick(op: Pick, node: Node, n: Numbering) -> Value:
    """Of a known tensor: at places that are known, too, it is moved as data is."""
    x = n.values[op.x]
    known: list[Tensor | None] = []
    for place in op.places:
        value = None if place is None else n.values[place]
        if not isinstance(x, Known) or not (value is None or isinstance(value, Known)):
            raise Refused("indexed by a computed tensor")
        if value is not None:
            n.sink(value, f"places that are picked in {node.where}")
        known.append(None if value is None or place is None else value.value.to(place.dtype))
    assert isinstance(x, Known)
    rows = op.places[0] if len(op.places) == 1 and (node.op == "aten.index.Tensor" or node.args[1] == 0) else None
    if rows is not None and op.x.tensor is not None and x.value.ndim == 2 and rows.dtype in _INDICES:
        return _looked_up(n, op.x, rows, node)
    index = torch.arange(x.value.numel()).reshape(x.value.shape) if x.index is None else x.index
    return Known(op.act(x.value, known), x.name, op.act(index.reshape(x.value.shape), known))


_INDICES = (torch.int64, torch.int32)
