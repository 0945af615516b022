"""Compare two networks by running them.

Imports torch and the error types alone: it shares no code with the prover.
"""

from ep_prune.verification.compare import OutputDifference, Verification, verify

__all__ = ["OutputDifference", "Verification", "verify"]
