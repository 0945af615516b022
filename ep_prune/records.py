"""What the rounds of a reduction found out of each space, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ep_prune.mixing import Near
from ep_prune.report import SpaceRecord
from ep_prune.selection import DISTINCT, Selection
from ep_prune.spaces import spaces
from ep_prune.trial import Axis


@dataclass
class Records:
    """What the report will say of each space, over all rounds."""

    spaces: dict[str, SpaceRecord] = field(default_factory=dict)
    barriers: dict[str, str] = field(default_factory=dict)
    mixed: tuple[Axis, int] | None = None
    """The axis that was folded to its rank last, and how wide it was."""
    size: int = 0
    idle: int = 0
    """How large the model is, and for how many rounds it has been."""
    folded: set[tuple[object, ...]] = field(default_factory=set)
    """Layers whose heads were folded to their ranks, and the shapes of their weights then."""
    left: dict[Axis, Tensor] = field(default_factory=dict)
    """By axis, the channels that the last fold left unread: they are linear, not null."""

    near: Near = field(default_factory=dict)
    """By axis, how many channels a lower rank would do without, and why they stay."""

    def name_near(self) -> None:
        """Say of channels that are linear in others, and stay all the same, why."""
        for (weight, _), (count, why) in self.near.items():
            for space in self.spaces.values():
                own = space.stayed.get(DISTINCT, 0)
                if weight in space.producers and (some := min(count, own - 1)) > 0:
                    space.stayed[DISTINCT] -= some
                    space.stayed[why] = space.stayed.get(why, 0) + some

    def add(self, chosen: Selection, frozen: Mapping[Axis, str]) -> None:
        """Bring the records up to date with one more round."""
        self.barriers.update(chosen.numbering.barriers)
        left, self.left = self.left, {}
        for space in spaces(chosen, left):
            stayed = dict(space.stayed)
            reasons = {frozen[axis] for axis in space.axes if axis in frozen}
            if reasons and "rolled back or protected" in stayed:
                stayed["; ".join(sorted(reasons))] = stayed.pop("rolled back or protected")
            gone, before = dict(space.gone), space.before
            if (record := self.spaces.get(space.name)) is not None:
                gone = {kind: count + record.gone.get(kind, 0) for kind, count in gone.items()}
                before = record.before
            self.spaces[space.name] = SpaceRecord(space.name, space.producers, before, space.after, gone, stayed)
