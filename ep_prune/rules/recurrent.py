"""Recurrent layers: LSTM, GRU and plain recurrent units, all layers and directions of a module in one operator.

Gates come in torch's order, stacked along the rows of every weight and bias:

    LSTM  i f g o    c' = s(f) c + s(i) tanh(g)                            h = s(o) tanh(c'), perhaps projected
    GRU   r z n      h' = (1 - s(z)) tanh(n_x + s(r) n_h) + s(z) h         n_x and n_h with a bias each
    RNN              h' = tanh or relu

So a unit of LSTM or GRU starts from zero and changes sign with its row of g, or of n; the other gates must agree.
A state that is no plain `torch.zeros` may tell units apart, and makes a barrier.
"""

from __future__ import annotations

import torch

from ep_prune.graph import Barrier, Cell, Direction, Node, Operation, Recurrent
from ep_prune.rules.registry import Tensors, arguments, rule

_CELLS = {
    "aten.lstm.input": Cell("lstm", 4, odd=2),
    "aten.gru.input": Cell("gru", 3, odd=2, split=True),
    "aten.rnn_tanh.input": Cell("rnn_tanh", 1, odd=0, function=torch.tanh),
    "aten.rnn_relu.input": Cell("rnn_relu", 1, odd=0, positive=True, function=torch.relu),
}


@rule(*_CELLS)
def recurrent(node: Node, tensors: Tensors) -> Operation:
    call = arguments(node)
    cell, x = _CELLS[node.op], call["input"]
    states = call["hx"] if isinstance(call["hx"], tuple | list) else [call["hx"]]
    if any(state.op != "aten.zeros" for state in states):
        return Barrier("its initial state is not plain zeros")
    if call["train"] and call["dropout"] > 0 and call["num_layers"] > 1:
        return Barrier("dropout between layers in training mode")
    flat: list[Node] = list(call["params"])
    names = [weight.tensor for weight in flat]
    if None in names:
        return Barrier("its weights are computed in the forward pass")
    if len(set(names)) < len(names):
        return Barrier("its layers share weights")
    directions = call["num_layers"] * (2 if call["bidirectional"] else 1)
    each, biases = len(flat) // directions, 2 if call["has_biases"] else 0
    if each * directions != len(flat) or each not in (2 + biases, 3 + biases) or len(x.shape or ()) != 3:
        return Barrier("weights that are not laid out as those of torch.nn")
    found = []
    for start in range(0, len(flat), each):
        ih, hh, *rest = flat[start : start + each]
        project = rest.pop() if each == 3 + biases else None
        bias_ih, bias_hh = rest or (None, None)
        found.append(Direction(ih, hh, bias_ih, bias_hh, project))
    width = len(found) // call["num_layers"]
    layers = tuple(tuple(found[start : start + width]) for start in range(0, len(found), width))
    return Recurrent(x, cell, layers, 0 if call["batch_first"] else 1)
