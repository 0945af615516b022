"""Run the embedding principle backwards: find what a wide network repeats, merge it, check the output.

result = ep_prune.reduce(model, example_inputs)      # exact, no data
result.model, result.report, result.plan, result.verification

ep_prune.embed(model, example_inputs)                # forwards: wider, the same output, critical where it was
ep_prune.criticality(model, loss, batch), ep_prune.hessian_inertia(model, loss, batch)   # how critical a point is
ep_prune.effective_width(model, example_inputs, tol=0.01)    # how narrow; EffectiveWidthMonitor: while it trains
"""

from importlib import metadata

from ep_prune.compress import Compressed, compress
from ep_prune.criticality import Criticality, Inertia, criticality, hessian_inertia
from ep_prune.effective_width import EffectiveWidths, effective_width
from ep_prune.embedding import ChannelEmbedding
from ep_prune.errors import EpPruneError, InputError, PlanError, TraceError, VerificationError
from ep_prune.monitor import EffectiveWidthMonitor
from ep_prune.pipeline import Result, reduce, reduce_
from ep_prune.plan import Plan
from ep_prune.report import Report
from ep_prune.storage import load, save
from ep_prune.verification import Verification, verify
from ep_prune.why import Why, why
from ep_prune.widen import embed, widenable
from ep_prune.widen_report import EmbedReport

# `criticality` and `effective_width` are functions here, and modules of the same names in the package. The import
# system sets a package's attribute when it first loads a module; both are loaded above, and the functions stay.

try:
    __version__ = metadata.version("ep-prune")
except metadata.PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = [
    "ChannelEmbedding",
    "Compressed",
    "Criticality",
    "EffectiveWidthMonitor",
    "EffectiveWidths",
    "EmbedReport",
    "EpPruneError",
    "Inertia",
    "InputError",
    "Plan",
    "PlanError",
    "Report",
    "Result",
    "TraceError",
    "Verification",
    "VerificationError",
    "Why",
    "compress",
    "criticality",
    "effective_width",
    "embed",
    "hessian_inertia",
    "load",
    "reduce",
    "reduce_",
    "save",
    "verify",
    "why",
    "widenable",
]
