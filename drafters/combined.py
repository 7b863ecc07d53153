"""Two drafters for one batch: a repeated or predicted text is followed, and a speculator drafts the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from drafters.ngram import NgramDrafter
from engine.drafter import Draft, Drafter, Kept


class CombinedDrafter:
    """A path of the n-gram drafter where it stands in a prediction or matched `strong` tokens, beside the primary's paths.

    The n-gram path counts as one of the budget's paths; a chain takes either one or the other.
    """

    def __init__(self, primary: Drafter, ngram: NgramDrafter, strong: int = 4) -> None:
        self.primary, self.ngram, self.strong = primary, ngram, strong
        self.name, self.version = f"{primary.name}+{ngram.name}", primary.version
        self.max_depth = max(primary.max_depth, ngram.max_depth)
        self.max_width = primary.max_width + ngram.max_width

    def draft(self, batch: Sequence[Draft]) -> None:
        """Extend each tree within its budget."""
        self.primary.draft([self.followed(draft) for draft in batch])

    def followed(self, draft: Draft) -> Draft:
        """The draft with its n-gram path planted and what is left of its budget."""
        match = self.ngram.match(draft)
        if match is None or not (match.predicted or match.length >= self.strong):
            return draft
        draft.tree.extend(match.path, draft.budget.nodes)
        return replace(draft, budget=replace(draft.budget, width=draft.budget.width - 1))

    def observe(self, batch: Sequence[Kept]) -> None:
        self.primary.observe(batch)
        self.ngram.observe(batch)

    def forget(self, request: str) -> None:
        self.primary.forget(request)
        self.ngram.forget(request)
