"""The errors of the package: one sentence each, that names the layer and what to do."""

from __future__ import annotations


class EpPruneError(Exception):
    """Base of all errors of this package."""


class InputError(EpPruneError):
    """What was given cannot be used: a model, inputs, weights, a tolerance."""


class TraceError(EpPruneError):
    """The model cannot be exported to a graph."""


class VerificationError(EpPruneError):
    """The narrow model does not compute what the wide one does."""


class PlanError(EpPruneError):
    """A plan does not belong to the model that it was applied to."""
