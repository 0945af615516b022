"""What a network's values can be on a box of inputs: sound bounds, in float64, rounding included."""

from ep_prune.bounds.interval import Bounds
from ep_prune.bounds.prove import Budget, Proof, prove

__all__ = ["Bounds", "Budget", "Proof", "prove"]
