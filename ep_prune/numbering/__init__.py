"""Global value numbering over channels, and liveness."""

from ep_prune.numbering.state import Known, Numbering, Port, Refused, Unknown
from ep_prune.numbering.walk import number_channels

__all__ = ["Known", "Numbering", "Port", "Refused", "Unknown", "number_channels"]
