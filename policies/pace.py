"""How fast a machine is at the moment, so that steps measured at different times can be compared.

A neighbour or a clock makes all steps dearer at once. Every step whose kind is known votes with what it took over what such steps usually
take, and the pace at a step is the median vote around it. If it was the kind of most steps that changed, and not the machine, the other
kinds are found to have changed the other way as soon as they are measured: it is their relation that decisions rest on.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import takewhile
from statistics import median

REACH = 4  # steps before and after one whose votes tell its pace
FEWEST = 3  # votes that it takes
MUCH = 0.3  # change of the log pace that counts as much
PRESENT = 64  # latest votes whose median is the present pace


class Pace:
    """The votes of the latest steps.

    shaken: the step at which the present pace last turned out to have changed much. Whether the machine changed then or the kind of most
    steps, only other kinds can tell.
    """

    def __init__(self, present: float = 1.0) -> None:
        self.known = self.steady = present  # when votes last told it; as it was when it last changed much
        self.shaken = -1
        self.votes: deque[tuple[int, float]] = deque(maxlen=PRESENT)

    def vote(self, step: int, ratio: float) -> None:
        """What a step took over what its kind usually takes; steps come in order."""
        if ratio > 0 and math.isfinite(ratio):
            self.votes.append((step, ratio))
        if step % REACH == 0 and len(self.votes) >= FEWEST and abs(math.log(self.present / self.steady)) > MUCH:
            self.steady, self.shaken = self.present, step

    def at(self, step: int) -> float:
        """The pace at a step not long ago; as last known where too few voted."""
        near = [ratio for at, ratio in takewhile(lambda vote: vote[0] >= step - REACH, reversed(self.votes)) if at <= step + REACH]
        if len(near) >= FEWEST:
            self.known = median(near)
        return self.known

    @property
    def present(self) -> float:
        return median(ratio for _, ratio in self.votes) if len(self.votes) >= FEWEST else self.known
