"""Drafting with an MLP speculator: the paper's tree, grown for a whole batch at once, in the noise the base will draw with.

Every head's logits go through `engine.sampling.perturb`, so a branch is scored by how surely the base draws it; at temperature 0 that is
its log-probability, and the tree is the paper's (arXiv 2404.19124). At higher temperatures the noise has already decided most of it, so
only the best branches are followed between heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from drafters.chains import NativeChains
from drafters.heads import Heads
from drafters.mlp import MLPSpeculator, start
from engine.drafter import Draft, Observer
from engine.sampling import COLDEST, Sampler, perturb, prepare_noise
from engine.tree import Tree


@dataclass(frozen=True, slots=True)
class Job:
    """One draft and its budget within what the speculator can do."""

    draft: Draft
    depth: int
    width: int
    beam: int | None  # branches followed between heads; None: all of them

    @classmethod
    def of(cls, draft: Draft, heads: int, candidates: int) -> Job:
        room = draft.budget.nodes - draft.tree.drafted
        width = min(draft.budget.width, candidates) if draft.hidden is not None else 0
        if width == 1:
            return cls(draft, min(draft.budget.depth, heads, room), 1, 1)
        return cls(draft, min(draft.budget.depth, heads, room), width, 2 * width if draft.sampler.params.temperature > 0 else None)


@dataclass(slots=True)
class Forest:
    """Branches of all jobs in flat lists; parent -1 is a job's last forced node. `leaves`: each job's best path ends."""

    leaves: list[list[int]]
    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)  # summed log-probability in shared noise

    def add(self, parents: Sequence[int], tokens: Tensor, scores: Tensor) -> range:
        """A row of tokens below each parent. tokens, scores: [parents, k]. Returns the new branches, row by row."""
        first, k = len(self.tokens), tokens.shape[1]
        self.tokens += tokens.flatten().tolist()
        self.scores += scores.flatten().tolist()
        self.parents += [parent for parent in parents for _ in range(k)]
        return range(first, len(self.tokens))

    def top(self, branches: Sequence[int], count: int) -> list[int]:
        """The `count` best-scored of the branches, best first. Tokens that cannot be drawn (cut off by top_k, ..) are never among them."""
        best = sorted(branches, key=self.scores.__getitem__, reverse=True)[:count]
        while best and self.scores[best[-1]] == -math.inf:
            best.pop()
        return best

    def sure(self, branch: int) -> float:
        """The softmax, in shared noise, at a branch's token after its parent."""
        before = self.scores[self.parents[branch]] if self.parents[branch] >= 0 else 0.0
        return math.exp(self.scores[branch] - before)

    def text(self, branches: Sequence[int], row: int) -> list[int]:
        """The tokens on the way to the branch of a row, its own included."""
        return [self.tokens[b] for b in self.path(branches[row])]

    def path(self, branch: int) -> list[int]:
        """Branches from the first one down to `branch`."""
        path = []
        while branch >= 0:
            path.append(branch)
            branch = self.parents[branch]
        return path[::-1]


@dataclass(frozen=True, slots=True)
class Front:
    """The branches that the next head extends, as rows: which branch, of which job, under which row of the previous front."""

    branches: list[int]
    owners: list[int]
    state: Tensor  # [previous rows, emb_dim or width]
    token: Tensor  # [rows]
    score: Tensor  # [rows, 1]
    parent: Tensor | None  # [rows], None: row for row

    def spans(self) -> Iterator[tuple[int, range]]:
        """Every job's rows, which lie together."""
        start = 0
        for owner, rows in groupby(self.owners):
            stop = start + sum(1 for _ in rows)
            yield owner, range(start, stop)
            start = stop


class MLPDrafter:
    """Drafts with a speculator: up to n_predict tokens deep, up to n_candidates paths, whatever each request's budget allows."""

    def __init__(self, speculator: MLPSpeculator | Heads, version: str = "0", name: str = "mlp") -> None:
        """speculator: its heads are made ready to draft, on its device, if they are not; it is not kept."""
        heads = speculator if isinstance(speculator, Heads) else Heads.of(speculator)
        self.name, self.version, self.config = name, version, heads.config
        self.max_depth, self.max_width = self.config.n_predict, self.config.n_candidates
        self.branches = self.config.top_k_tokens_per_head
        self.heads, self.chains = list(heads.each), heads.chains

    @torch.inference_mode()
    def draft(self, batch: Sequence[Draft]) -> None:
        """Add the best branches within each budget; a request without a hidden state or without budget is left alone."""
        jobs = [Job.of(draft, self.max_depth, self.max_width) for draft in batch]
        jobs = [job for job in jobs if job.depth > 0 and job.width > 0]
        if jobs:
            prepare(jobs, self.heads[0].emb.T)
        if jobs and all(job.width == 1 for job in jobs):
            for job, (path, sure) in zip(jobs, self.follow(jobs), strict=True):
                job.draft.tree.extend(path[: job.depth], job.draft.budget.nodes, sure)
        elif jobs:
            forest = self.grow(jobs)
            for job, leaves in zip(jobs, forest.leaves, strict=True):
                plant(job, forest, leaves)

    @property
    def observer(self) -> Observer | None:
        """There is nothing to learn while serving."""
        return None

    def forget(self, request: str) -> None:
        """Nothing is remembered of a request."""

    def follow(self, jobs: Sequence[Job]) -> list[tuple[list[int], list[float]]]:
        """One path for each job, by the best token of every head, with the heads' confidence in each token: nothing is ranked.

        Those that nothing but temperature and noise shapes are drafted natively where that can be, whatever is done to those beside them.
        """
        if self.chains is None:
            return self.headwise(jobs)
        shaped = [job for job in jobs if job.draft.sampler.shaped]
        plain = [job for job in jobs if not job.draft.sampler.shaped]
        others, natives = iter(self.headwise(shaped) if shaped else ()), iter(chained(self.chains, plain) if plain else ())
        return [next(others if job.draft.sampler.shaped else natives) for job in jobs]

    def headwise(self, jobs: Sequence[Job]) -> list[tuple[list[int], list[float]]]:
        """`follow`, one head after the other."""
        state, token = self.roots(jobs)
        paths: list[tuple[list[int], list[float]]] = [([], []) for _ in jobs]
        for index, head in enumerate(self.heads[: max(job.depth for job in jobs)]):
            state = head.advance(state, token, None)
            scores = perturbed(head.out(state), jobs, range(len(jobs)), index, lambda row: paths[row][0])
            best = surest(scores)
            token = best.indices
            for (path, sure), pick, value in zip(paths, token.tolist(), best.values.exp().tolist(), strict=True):
                path.append(pick)
                sure.append(value)
        return paths

    def grow(self, jobs: Sequence[Job]) -> Forest:
        """Run the heads one after the other over the branches of all jobs."""
        forest, (hidden, token) = Forest([[] for _ in jobs]), self.roots(jobs)
        front = Front([-1] * len(jobs), list(range(len(jobs))), hidden, token, hidden.new_zeros(len(jobs), 1), None)
        for index, head in enumerate(self.heads[: max(job.depth for job in jobs)]):
            state = head.advance(front.state, front.token, front.parent)
            scores = perturbed(head.out(state), jobs, front.owners, index, partial(forest.text, front.branches))
            front = extend(forest, jobs, front, state, *rank(scores, front.score, self.branches[index]), index + 1)
        return forest

    def roots(self, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
        """The state before the first head and the last known token of every job. [jobs, emb_dim], [jobs]"""
        like = self.heads[0].emb
        hidden = torch.stack([job.draft.hidden for job in jobs if job.draft.hidden is not None]).to(like)
        return start(self.config, hidden), torch.tensor([job.draft.tokens[-1] for job in jobs], device=like.device)


def perturbed(logits: Tensor, jobs: Sequence[Job], owners: Sequence[int], head: int, before: Callable[[int], list[int]]) -> Tensor:
    """The head's logits as the base would draw from them, each row in the noise of the position it guesses. [rows, V]

    owners: the job of every row. before: the tokens drafted before a row, asked for where penalties read them.
    """
    samplers = [job.draft.sampler for job in jobs]
    if plain(samplers):
        return logits
    positions = [len(jobs[owner].draft.tokens) + head for owner in owners]
    paths = [before(row) if samplers[owner].params.penalised else [] for row, owner in enumerate(owners)]
    return perturb(logits, samplers, owners, positions, paths)


def surest(scores: Tensor) -> torch.return_types.max:
    """The log-softmax at every row's best token, and that token; any token where scores are not numbers. [rows, V] -> [rows] twice"""
    return scores.float().log_softmax(-1).nan_to_num(-math.inf, neginf=-math.inf).max(-1)


def chained(chains: NativeChains, jobs: Sequence[Job]) -> list[tuple[list[int], list[float]]]:
    """`MLPDrafter.follow` for requests whose draws are shaped by temperature and noise alone; the noise is prepared."""
    drafts, depth = [job.draft for job in jobs], max(job.depth for job in jobs)
    temperatures = [max(t, COLDEST) if (t := draft.sampler.params.temperature) > 0 else 0.0 for draft in drafts]
    noise = [row for draft in drafts for row in noise_ahead(draft, depth)]
    hidden = [draft.hidden for draft in drafts if draft.hidden is not None]
    return chains.draft(hidden, [draft.tokens[-1] for draft in drafts], temperatures, noise, depth)


def noise_ahead(draft: Draft, depth: int) -> list[Tensor | None]:
    """A request's noise at the next positions; below its own budget, where it does not matter, any."""
    noise, first = draft.sampler.noise, len(draft.tokens)
    return [noise.get(first + ahead, noise.get(first)) for ahead in range(depth)]


def prepare(jobs: Sequence[Job], like: Tensor) -> None:
    """Compute at once the noise of every position that drafting and verifying will read. like: [.., V]"""
    drawn = [(i, job) for i, job in enumerate(jobs) if job.draft.sampler.params.temperature > 0]
    places = [(i, len(job.draft.tokens) + ahead) for i, job in drawn for ahead in range(job.depth + 1)]
    prepare_noise([job.draft.sampler for job in jobs], [i for i, _ in places], [p for _, p in places], like)


def plain(samplers: Iterable[Sampler]) -> bool:
    """Whether every request ranks tokens by the bare logits."""
    return all(s.params.temperature <= 0 and s.bias is None and s.counts is None for s in samplers)


def rank(scores: Tensor, score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best tokens of every row: summed log-probability and token. [rows, V], [rows, 1] -> [rows, k] twice"""
    value, token = scores.log_softmax(-1).topk(k)
    return value.add_(score), token


def extend(forest: Forest, jobs: Sequence[Job], front: Front, state: Tensor, score: Tensor, token: Tensor, depth: int) -> Front:
    """Add the ranked tokens [rows, k] to the forest: the leaves of jobs as deep as `depth`, and the front of those that go deeper."""
    k = token.shape[1]
    added = forest.add(front.branches, token, score)
    branches: list[int] = []
    owners: list[int] = []
    for owner, rows in front.spans():
        job, own = jobs[owner], added[rows.start * k : rows.stop * k]
        if job.depth == depth:
            forest.leaves[owner] = forest.top(own, job.width)
        else:
            chosen = own if job.beam is None else forest.top(own, job.beam)
            branches += chosen
            owners += [owner] * len(chosen)
    index = torch.tensor(branches, dtype=torch.long, device=token.device) - added.start
    return Front(branches, owners, state, token.view(-1)[index], score.view(-1)[index][:, None], index // k)


def plant(job: Job, forest: Forest, leaves: Sequence[int]) -> None:
    """Merge the paths to `leaves` into the job's tree. Under a tight cap the best-scored nodes go first: none outscores its parent."""
    branches = dict.fromkeys(branch for leaf in leaves for branch in forest.path(leaf))
    tree, room = job.draft.tree, job.draft.budget.nodes
    order = list(branches) if tree.drafted + len(branches) <= room else sorted(branches, key=lambda b: -forest.scores[b])
    fresh, nodes = tree.drafted == 0, {-1: tree.forced - 1}
    for branch in order:
        parent, token = nodes[forest.parents[branch]], forest.tokens[branch]
        grow = sprout if fresh else Tree.child
        found = grow(tree, parent, token, forest.sure(branch)) if tree.drafted < room else tree.find(parent, token)
        if found is None:
            return
        nodes[branch] = found


def sprout(tree: Tree, parent: int, token: int, confidence: float) -> int:
    """`Tree.child` where no such child can be: branches of one forest differ."""
    tree.confidence.append(confidence)
    tree.tokens.append(token)
    tree.parents.append(parent)
    tree.depths.append(tree.depths[parent] + 1)
    return len(tree.tokens) - 1
