"""Token trees: a prompt chunk, the last token and a draft are one object whose first nodes are forced.

Knows tokens and parents only: no tensors, no model, no slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

UNKNOWN = -1.0


@dataclass(frozen=True, slots=True)
class Budget:
    """How far one request may draft in one step.

    depth: longest drafted path in tokens, 0 means no drafting. width: candidate paths. nodes: drafted nodes in all.
    """

    depth: int = 0
    width: int = 1
    nodes: int = 0

    @classmethod
    def of(cls, depth: int, width: int = 1) -> Budget:
        """The budget of `width` paths of `depth` tokens each."""
        return cls(depth, width, depth * width) if depth > 0 and width > 0 else cls()


@dataclass(slots=True)
class Tree:
    """A tree under one context. `parents[i] < i`; -1 is the context; the first `forced` nodes are a chain already decided.

    confidence: of each drafted node, how sure its drafter is of it after its parent, in [0, 1]; UNKNOWN where it does not say.
    """

    tokens: list[int]
    parents: list[int]
    forced: int
    depths: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list, compare=False)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Tree:
        """A tree of forced nodes only."""
        n = len(tokens)
        return cls(list(tokens), list(range(-1, n - 1)), n, list(range(n)))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def drafted(self) -> int:
        return len(self.tokens) - self.forced

    def child(self, parent: int, token: int, confidence: float = UNKNOWN) -> int:
        """The drafted child of `parent` with `token`, added if there is none; returns its node."""
        found = self.find(parent, token)
        if found is not None:
            return found
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.confidence.append(confidence)
        return len(self.tokens) - 1

    def extend(self, path: Sequence[int], limit: int, confidence: Sequence[float] = ()) -> None:
        """Merge one drafted path (tokens after the last forced node), adding at most `limit` drafted nodes to the tree in all.

        confidence: of each token of the path; empty when unknown.
        """
        node = self.forced - 1
        for i, token in enumerate(path):
            sure = confidence[i] if i < len(confidence) else UNKNOWN
            found = self.child(node, token, sure) if self.drafted < limit else self.find(node, token)
            if found is None:
                return
            node = found

    def cut(self, nodes: Sequence[int]) -> None:
        """Keep these drafted nodes only: ascending, every parent among them. The rest will not be verified."""
        end = self.forced + len(nodes)
        if not nodes or nodes[-1] == end - 1:  # the first ones
            del self.tokens[end:], self.parents[end:], self.depths[end:], self.confidence[len(nodes) :]
            return
        place = {node: self.forced + i for i, node in enumerate(nodes)}
        first = self.forced
        self.tokens[first:] = [self.tokens[n] for n in nodes]
        self.parents[first:] = [place.get(self.parents[n], self.parents[n]) for n in nodes]
        self.depths[first:] = [self.depths[n] for n in nodes]
        self.confidence[:] = [self.confidence[n - first] for n in nodes]

    def find(self, parent: int, token: int) -> int | None:
        """The drafted child of `parent` with `token`, if there is one."""
        for node in range(max(self.forced, parent + 1), len(self.tokens)):
            if self.parents[node] == parent and self.tokens[node] == token:
                return node
        return None

    def ancestry(self, node: int) -> list[int]:
        """Drafted nodes from below the last forced node down to `node` itself (empty for a forced node)."""
        path = []
        while node >= self.forced:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def drafted_depth(self) -> int:
        """Length of the longest drafted path."""
        return max(self.depths[self.forced :], default=self.forced - 1) - (self.forced - 1)


def replay(tree: Tree, picks: Sequence[int]) -> list[int]:
    """Follow the base's own draws down the tree: the nodes it would have visited anyway.

    picks: the base's draw after node i, for i in `forced - 1 ..` (earlier entries are not read).
    Returns the kept nodes, forced ones included. Lossless for any draft: the result depends on picks along the path only.
    """
    path = list(range(tree.forced))
    node: int | None = tree.forced - 1
    while (node := tree.find(path[-1], picks[path[-1]])) is not None:
        path.append(node)
    return path
