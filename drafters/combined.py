"""Two drafters for one batch: a repeated or predicted text is followed, and a speculator drafts the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from drafters.ngram import Match, NgramDrafter
from engine.drafter import Draft, Drafter, Observer


class CombinedDrafter:
    """A path of the n-gram drafter where it stands in a prediction or matched `strong` tokens, beside the primary's paths.

    The n-gram path counts as one of the budget's paths; a chain takes either one or the other.
    """

    def __init__(self, primary: Drafter, ngram: NgramDrafter, strong: int = 4) -> None:
        self.primary, self.ngram, self.strong = primary, ngram, strong

    @property
    def name(self) -> str:
        return f"{self.primary.name}+{self.ngram.name}"

    @property
    def version(self) -> str:
        """The primary's."""
        return self.primary.version

    @property
    def max_depth(self) -> int:
        return max(self.primary.max_depth, self.ngram.max_depth)

    @property
    def max_width(self) -> int:
        return self.primary.max_width + self.ngram.max_width

    def draft(self, batch: Sequence[Draft]) -> None:
        """Extend each tree within its budget."""
        self.primary.draft([self.followed(draft, match) for draft, match in self.ngram.matches(batch)])

    def followed(self, draft: Draft, match: Match | None) -> Draft:
        """The draft with its n-gram path planted, where it is one to follow, and what is left of its budget."""
        if match is None or not (match.predicted or match.length >= self.strong):
            return draft
        draft.tree.extend(match.path, draft.budget.nodes)
        return replace(draft, budget=replace(draft.budget, width=draft.budget.width - 1))

    @property
    def observer(self) -> Observer | None:
        return self.primary.observer

    def forget(self, request: str) -> None:
        self.primary.forget(request)
        self.ngram.forget(request)
