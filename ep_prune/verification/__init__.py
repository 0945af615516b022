"""Compare two networks by running them.

Imports torch and the error types alone: it shares no code with the prover.
"""

from ep_prune.verification.box import Box, boxes_of, check_inside, clamped, described, draw, plain
from ep_prune.verification.compare import verify
from ep_prune.verification.figures import OutputDifference, Verification
from ep_prune.verification.float64 import InFloat64, hand_back, sharing, widened

__all__ = [
    "Box",
    "InFloat64",
    "OutputDifference",
    "Verification",
    "boxes_of",
    "check_inside",
    "clamped",
    "described",
    "draw",
    "hand_back",
    "plain",
    "sharing",
    "verify",
    "widened",
]
