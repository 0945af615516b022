"""Run the embedding principle backwards: find what a wide network repeats, merge it, check the output.

result = ep_prune.reduce(model, example_inputs)      # exact, no data
result.model, result.report, result.plan, result.verification
"""

from importlib import metadata

from ep_prune.embedding import ChannelEmbedding
from ep_prune.errors import EpPruneError, InputError, PlanError, TraceError, VerificationError
from ep_prune.pipeline import Result, reduce, reduce_
from ep_prune.plan import Plan
from ep_prune.report import Report
from ep_prune.storage import load, save
from ep_prune.verification import Verification, verify

try:
    __version__ = metadata.version("ep-prune")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ChannelEmbedding",
    "EpPruneError",
    "InputError",
    "Plan",
    "PlanError",
    "Report",
    "Result",
    "TraceError",
    "Verification",
    "VerificationError",
    "load",
    "reduce",
    "reduce_",
    "save",
    "verify",
]
