"""How each kind of operation carries x' = d x + e from one program point to the next.

`link` walks the graph and says which scales are one variable and which are fixed; then all variables are drawn,
and `settle` walks again, carries the offsets e, and writes the wide parameters. What cannot be met raises
`Stuck`: `embed` tries the space again without signs and offsets, and leaves it alone if that fails too.
"""

from ep_prune.widen_rules.draws import Draws
from ep_prune.widen_rules.state import Mode, Pull, Stuck, Wide, Widening
from ep_prune.widen_rules.walk import walk

__all__ = ["Draws", "Mode", "Pull", "Stuck", "Wide", "Widening", "walk"]
