"""The two walks of one attempt."""

from __future__ import annotations

from ep_prune.widen_rules.link import link
from ep_prune.widen_rules.settle import settle
from ep_prune.widen_rules.state import Widening


def walk(w: Widening) -> None:
    """Write `w.new`, the wide parameters by name, and `w.groups`, of depthwise convolutions. Raises `Stuck`."""
    for node, op in w.kinds.items():
        made = w.rows_of(node)
        if made is not None:
            w.wide[node] = made
        if made is not None or any(operand in w.wide for operand in node.operands()):
            link(op, node, w)
    w.draw()
    for node, op in w.kinds.items():
        if node in w.wide or any(operand in w.wide for operand in node.operands()):
            settle(op, node, w)
