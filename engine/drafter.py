"""The drafter protocol: extend a batch of trees within each request's budget, and learn from what was kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from engine.sampling import Sampler
from engine.tree import Budget, Tree


@dataclass(slots=True)
class Draft:
    """One request's tree, to be extended below its last forced node.

    tokens: the known text, prompt first; tokens[-1] is the last forced node. A drafted node i levels below it (i = 0, 1, ..) is the token
    at position len(tokens) + i, and is drawn in the noise of that position (`engine.sampling.perturb`).
    hidden: [emb_dim] the base's hidden state (input of its LM head) whose logits drew tokens[-1]; None while the prompt is unread.
    prediction: text the client expects, in tokens; may be empty. tag: the request's domain, "" for none.
    """

    request: str
    tokens: Sequence[int]
    tree: Tree
    budget: Budget
    sampler: Sampler
    hidden: Tensor | None = None
    prediction: Sequence[int] = field(default=())
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Kept:
    """What one step kept of one request.

    tokens: emitted; drafted: nodes drafted; accepted: drafted tokens kept; hidden: states whose logits drew the tokens [k, emb_dim].
    tag: the request's domain, "" for none.
    """

    request: str
    tokens: Sequence[int]
    drafted: int
    accepted: int
    hidden: Tensor
    tag: str = ""


Observer = Callable[[Kept], None]


class Drafter(Protocol):
    """Proposes tokens. A drafter may propose anything: verification by replay makes every draft lossless."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Of what it drafts with; may change between two steps."""
        ...

    @property
    def max_depth(self) -> int: ...

    @property
    def max_width(self) -> int: ...

    def draft(self, batch: Sequence[Draft]) -> None:
        """Extend each tree in place by at most its budget; a tree may be left as it is."""
        ...

    @property
    def observer(self) -> Observer | None:
        """What is to be told of everything that steps keep, one request at a time; None while nobody wants to know, so that it costs
        nothing. May change between two steps."""
        ...

    def forget(self, request: str) -> None:
        """Drop whatever is remembered of a request that ended."""
        ...
