"""Where weights consume channels: the rows of a weight, rewritten in the atoms of its input.

    y_o(p) = sum_i sum_tap W[o, i, tap] x_i(p + tap) + b_o        x_i = m_i a_g(i) + c_i
           = sum_g sum_tap N[o, g, tap] a_g(p + tap) + sum_tap P[o, tap] 1(p + tap is inside) + b_o

N, the *net* weights, add up what the members of a class of equal directions send: copies whose weights cancel
are gone from it. P is what the constants send: through interior taps, which never fall on zero padding, a
constant; through the others a pattern, which belongs to the row. Rows (N, pattern) that are zero are constants,
rows that are collinear are one new atom.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ep_prune.channels import ONE, Channels, Rows, along, mix, number
from ep_prune.find import MARGIN, Dense, Freedom, Sparse
from ep_prune.graph import Contract, Lookup, Node, Pick
from ep_prune.numbering.align import on_axis
from ep_prune.numbering.elementwise import _position_shape, transfer
from ep_prune.numbering.state import Known, Numbering, Port, Refused, Value
from ep_prune.slots import Groups


@transfer.register(Contract)
def _contract(op: Contract, node: Node, n: Numbering) -> Value:
    layout = op.layout
    x = on_axis(n, op.x, layout.axis)
    canonical = layout.canonical(n.tensor(op.weight))
    groups, outputs, inputs, taps = canonical.shape
    if groups * inputs != len(x.rows):
        raise Refused("inputs that do not match the weight")
    weight = canonical.transpose(1, 2).reshape(groups * inputs, outputs, taps)
    classes, constant = n.classes_of(x, inputs)
    eps = n.eps(op.weight)
    net, noise = _net(weight, classes.leader, classes.scale, constant, x.rows, eps)
    pattern, fuzz = _constants(weight, x.rows, groups, eps)

    slots_out = _slots(op, n, x, groups, inputs, outputs)
    interior = torch.tensor(layout.interior)
    offset = pattern[:, :, interior].sum(2).reshape(-1)
    error = fuzz.sum(2).sqrt().reshape(-1)
    if op.bias is not None:
        bias = n.tensor(op.bias)
        n.slots.unify(n.slots.of(str(op.bias.tensor), 0, len(bias)), slots_out)
        offset = offset + bias
        error = (error.square() + (n.eps(op.bias) * bias).square()).sqrt()
    size = _size(net, x.rows, pattern, offset)
    net = without_negligible(net, x.rows.linear_norm(), size, eps)
    pattern = torch.where(pattern.abs() <= unseen(eps) * size.unsqueeze(2), 0.0, pattern)
    pattern_rows = torch.where(interior, 0.0, pattern)

    signature = f"{layout.signature} at {_position_shape(x)}"
    leaders = (classes.leader == torch.arange(len(x.rows))) & ~constant
    if groups == 1:
        vectors: Dense | Sparse = _dense(net, noise, leaders, x.rows, pattern_rows[0], fuzz[0])
    else:
        vectors = _sparse(net, noise, leaders, x.rows, pattern_rows, fuzz, groups)
    rows = _new_rows(n, signature, vectors, offset, error)
    out = n.record(
        Channels(
            node.shape or (),
            along(layout.axis, len(node.shape or ()), torch.arange(groups * outputs)),
            rows,
            slots_out,
        )
    )
    n.ports.append(Port(node, op, x, out, classes, constant, net, weight, pattern, size))
    return out


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
    constants = pattern.square().sum(2) + offset.square().reshape(groups, outputs)
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


def _dense(net: Tensor, noise: Tensor, leaders: Tensor, rows: Rows, pattern: Tensor, fuzz: Tensor) -> Dense:
    """(O, atoms * taps) matrix of an ungrouped weight over the atoms of its input."""
    keep = leaders.nonzero().squeeze(1)
    net, noise, rows = net[keep], noise[keep], rows[keep]
    outputs, taps = net.shape[1:]
    atoms, column = torch.unique(rows.atoms[rows.coef != 0], return_inverse=True)
    place = torch.zeros_like(rows.atoms)
    place[rows.coef != 0] = column
    if rows.atoms.shape[1] == 1 and len(atoms) == len(keep):
        values = torch.empty(len(atoms), outputs, taps, dtype=torch.float64)
        values[place[:, 0]] = net * rows.coef[:, :1, None]
    else:
        values = torch.zeros(len(atoms), outputs, taps, dtype=torch.float64)
        for entry in range(rows.atoms.shape[1]):  # over branches of a stream, not over channels
            values.index_add_(0, place[:, entry], net * rows.coef[:, entry, None, None])
    square = (noise * rows.coef.square().sum(1)[:, None]).sum(0)
    keys = mix(atoms.unsqueeze(1), torch.arange(taps)).reshape(-1)
    matrix = values.transpose(0, 1).reshape(outputs, -1)
    if bool((pattern != 0).any()):
        matrix = torch.cat([matrix, pattern], 1)
        keys = torch.cat([keys, mix(ONE, torch.arange(taps))])
        square = square + fuzz.sum(1)
    return Dense(matrix, keys, square.sqrt())


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
        if isinstance(vectors, Dense):
            chosen: Dense | Sparse = Dense(vectors.values[some], vectors.keys, vectors.error[some])
        else:
            chosen = Sparse(vectors.rows[some], False)
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
    table = n.tensor(source).T
    mean = table.mean(1)
    varying = table - mean.unsqueeze(1)
    flat = (table == table[:, :1]).all(1)
    varying = torch.where(flat.unsqueeze(1), 0.0, varying)
    mean = torch.where(flat, table[:, 0], mean)
    error = n.eps(source) * table.norm(dim=1)
    keys = mix(number("vocabulary"), torch.arange(table.shape[1]))
    rows = _new_rows(n, f"lookup {index.name}", Dense(varying, keys, error), mean, error)
    slots = n.slots.of(str(source.tensor), 1, len(table))
    labels = along(len(node.shape or ()) - 1, len(node.shape or ()), torch.arange(len(table)))
    return n.record(Channels(node.shape or (), labels, rows, slots))


@transfer.register(Pick)
def _pick(op: Pick, node: Node, n: Numbering) -> Value:
    """Of a known tensor: at places that are known, too, it is moved as data is."""
    x = n.values[op.x]
    places = [None if place is None else (place, n.values[place]) for place in op.places]
    known = [
        None if place is None else place[1].value.to(place[0].dtype)
        for place in places
        if place is None or isinstance(place[1], Known)
    ]
    if not isinstance(x, Known) or len(known) < len(places):
        raise Refused("indexed by a computed tensor")
    for place in places:
        if place is not None:
            n.sink(place[1], f"places that are picked in {node.where}")
    rows = op.places[0] if len(op.places) == 1 and (node.op == "aten.index.Tensor" or node.args[1] == 0) else None
    if rows is not None and op.x.tensor is not None and x.value.ndim == 2 and rows.dtype in _INDICES:
        return _looked_up(n, op.x, rows, node)
    index = torch.arange(x.value.numel()).reshape(x.value.shape) if x.index is None else x.index
    return Known(op.act(x.value, known), x.name, op.act(index.reshape(x.value.shape), known))


_INDICES = (torch.int64, torch.int32)
