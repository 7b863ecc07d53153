"""Training a speculator for a base, offline, in the paper's two stages (arXiv 2404.19124).

Stage 1: ground-truth text. Stage 2: text the base writes itself from short prompts. The base is frozen; the loss is the sum of the heads'
cross entropies. All randomness is a function of the job's seed, the stage and the step, so a run that was cut off and continued ends in
the same weights as one that was not.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafters.config import MLPSpeculatorConfig
from drafters.durable import replace_durably
from drafters.measuring import Measured, measure
from drafters.mlp import MLPSpeculator
from drafters.objectives import head_losses
from drafters.teacher import Teacher
from drafters.tree_draft import MLPDrafter
from engine.loading import load_base

log = logging.getLogger(__name__)


class TrainingError(ValueError):
    """A training job that cannot run, and why."""


@dataclass(frozen=True, slots=True)
class SpeculatorShape:
    """The speculator to train; its emb_dim and vocabulary are the base's."""

    n_predict: int = 3
    n_candidates: int = 5
    top_k_tokens_per_head: tuple[int, ...] = (5, 3, 2)
    inner_dim: int = 256
    tie_weights: bool = True
    scale_input: bool = True
    torch_dtype: str = "bfloat16"

    def config(self, emb_dim: int, vocab_size: int, base: str) -> MLPSpeculatorConfig:
        return MLPSpeculatorConfig(vocab_size=vocab_size, emb_dim=emb_dim, base_model_name_or_path=base, **asdict(self))


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of training. Rates are shares of the peak: parabolic warm-up to `highest`, then a cosine to `lowest`.

    rows: texts in one step. length: positions of one text that are trained on (stage 1), or tokens the base writes (stage 2).
    """

    steps: int
    rows: int
    length: int
    highest: float
    lowest: float

    def rate(self, step: int) -> float:
        """Share of the peak learning rate at a step (0-based); warm-up takes 5 % of the steps, at most 2000."""
        warm = max(1, min(2000, self.steps // 20))
        if step < warm:
            return self.highest * (1 - (1 - (step + 1) / warm) ** 2)
        turn = math.pi * (step - warm) / max(1, self.steps - warm)
        return self.lowest + (self.highest - self.lowest) * (1 + math.cos(turn)) / 2


@dataclass(frozen=True, slots=True, eq=False)
class TrainingJob:
    """Everything a run depends on.

    base: a local Hugging Face folder. output: where the speculator is saved. work: where a run keeps its checkpoint.
    tokens: [N] the ground-truth text as token ids. prompts: held-out prompts to measure on. name: the base as the saved config calls it.
    stage 2 starts from `prompt_length` tokens and draws at temperature 1 from the `top_k` likeliest; the base writes `pool` steps at once.
    """

    base: Path
    output: Path
    work: Path
    tokens: Tensor
    prompts: Sequence[Sequence[int]]
    name: str
    shape: SpeculatorShape = field(default_factory=SpeculatorShape)
    first: Stage = field(default_factory=lambda: Stage(500, 8, 256, 1.0, 0.1))
    second: Stage = field(default_factory=lambda: Stage(200, 8, 256, 0.1, 0.01))
    peak: float = 1e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    prompt_length: int = 64
    top_k: int = 10
    pool: int = 8
    seed: int = 0
    device: str = "cpu"
    bfloat16: bool = True
    new_tokens: int = 128
    log_steps: int = 25
    checkpoint_seconds: float = 60.0

    @property
    def stages(self) -> tuple[Stage, Stage]:
        return self.first, self.second


@dataclass(frozen=True, slots=True)
class Advance:
    """Where a run is. stage: 1 or 2. losses: of every head, in nats, averaged over the last steps. positions: trained per second."""

    stage: int
    step: int
    steps: int
    losses: tuple[float, ...]
    positions: float


@dataclass(frozen=True, slots=True)
class StageReport:
    """What one stage did. losses: of every head at its end. curve: (step, losses) every `log_steps` steps."""

    stage: int
    steps: int
    positions: int
    seconds: float
    losses: tuple[float, ...]
    curve: tuple[tuple[int, tuple[float, ...]], ...]
    greedy: Measured
    sampled: Measured


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """The numbers of a finished run."""

    base: str
    parameters: int
    config: dict[str, Any]
    recipe: dict[str, Any]
    stages: tuple[StageReport, ...]

    def to_json(self) -> dict[str, Any]:
        """As saved in training.json beside the weights."""
        return asdict(self)


@dataclass(slots=True)
class Run:
    """A run in memory: what a checkpoint holds, and the base it learns from."""

    job: TrainingJob
    teacher: Teacher
    speculator: MLPSpeculator
    optimizer: torch.optim.Optimizer
    fingerprint: str
    stage: int = 0  # index into job.stages
    step: int = 0
    seconds: float = 0.0
    losses: tuple[float, ...] = ()
    curve: list[tuple[int, tuple[float, ...]]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    pool: tuple[int, Tensor, Tensor] | None = None  # index, texts [rows, P + G], states [rows, G, emb_dim]


Progress = Callable[[Advance], None]


def train(job: TrainingJob, progress: Progress | None = None) -> TrainingReport:
    """Train, measure after each stage, and save to `job.output`; continues a run that was cut off.

    Raises TrainingError for tokens outside the base's vocabulary, too little text, or a work folder that holds another job's run.
    """
    run = prepare(job)
    for index in range(run.stage, len(job.stages)):
        run_stage(run, progress)
        log.info("%s: measuring after stage %d", job.name, index + 1)
        run.reports.append(asdict(stage_report(run)))
        run.stage, run.step, run.seconds, run.losses, run.curve = index + 1, 0, 0.0, (), []
        checkpoint(run)
    return save(run)


def prepare(job: TrainingJob) -> Run:
    """A fresh run from the job's seed, or the one in its work folder."""
    teacher = Teacher.load(job.base, job.device, torch.bfloat16 if job.bfloat16 else torch.float32)
    check_text(job, teacher)
    torch.manual_seed(job.seed)
    config = job.shape.config(teacher.hidden_size, teacher.vocab_size, job.name)
    speculator = MLPSpeculator(config).to(job.device)
    optimizer = torch.optim.AdamW(speculator.parameters(), lr=job.peak, betas=(0.9, 0.95), weight_decay=job.weight_decay)
    run = Run(job, teacher, speculator, optimizer, fingerprint(job))
    if checkpoint_file(job).is_file():
        restore(run)
    return run


def check_text(job: TrainingJob, teacher: Teacher) -> None:
    need = max(job.first.length + job.shape.n_predict + 1, job.prompt_length)
    if job.tokens.dim() != 1 or len(job.tokens) <= need:
        raise TrainingError(f"the training text must be one row of more than {need} tokens, got shape {list(job.tokens.shape)}")
    low, high = int(job.tokens.min()), int(job.tokens.max())
    if low < 0 or high >= teacher.vocab_size:
        raise TrainingError(f"the training text has tokens {low} to {high}, but {job.base} knows tokens 0 to {teacher.vocab_size - 1}")


def fingerprint(job: TrainingJob) -> str:
    """What a checkpoint belongs to: the job's numbers, its text, and the base's weights."""
    digest = hashlib.sha256(json.dumps(recipe_of(job), sort_keys=True).encode())
    digest.update(job.tokens.to(torch.int32).cpu().contiguous().numpy().tobytes())
    for file in sorted([*job.base.glob("*.safetensors"), *job.base.glob("*.bin")]):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def recipe_of(job: TrainingJob) -> dict[str, Any]:
    """The job's numbers, without its paths and tensors."""
    names = ("peak", "weight_decay", "clip", "prompt_length", "top_k", "pool", "seed", "bfloat16")
    nested = {"shape": asdict(job.shape), "first": asdict(job.first), "second": asdict(job.second)}
    return {**nested, **{name: getattr(job, name) for name in names}, "tokens": len(job.tokens)}


def run_stage(run: Run, progress: Progress | None) -> None:
    """Run the steps that are left of the current stage, with a checkpoint every minute or so."""
    job, stage = run.job, run.job.stages[run.stage]
    began, before, saved = time.monotonic(), run.seconds, time.monotonic()
    while run.step < stage.steps:
        note(run, train_step(run, stage), before + time.monotonic() - began)
        advance = Advance(run.stage + 1, run.step, stage.steps, run.losses, run.step * positions(run) / max(run.seconds, 1e-9))
        if progress is not None:
            progress(advance)
        if run.step % job.log_steps == 0 or run.step == stage.steps:
            run.curve.append((run.step, run.losses))
            log.info("%s: %s", job.name, describe(advance))
        if time.monotonic() - saved > job.checkpoint_seconds:
            checkpoint(run)
            saved = time.monotonic()


def describe(advance: Advance) -> str:
    losses = " ".join(f"{loss:.3f}" for loss in advance.losses)
    return f"stage {advance.stage} step {advance.step}/{advance.steps} losses {losses} positions/s {advance.positions:.0f}"


def positions(run: Run) -> int:
    """Positions trained on in one step of the current stage."""
    stage = run.job.stages[run.stage]
    return stage.rows * (stage.length if run.stage == 0 else stage.length - run.job.shape.n_predict)


def train_step(run: Run, stage: Stage) -> Tensor:
    """One step of the optimizer; returns every head's loss. [n_predict]"""
    job = run.job
    hidden, text = given_text(run, stage) if run.stage == 0 else own_text(run, stage)
    with torch.autocast(run.teacher.device.type, torch.bfloat16, enabled=job.bfloat16):
        losses = head_losses(run.speculator, hidden, text)
    for group in run.optimizer.param_groups:
        group["lr"] = job.peak * stage.rate(run.step)
    run.optimizer.zero_grad(set_to_none=True)
    losses.sum().backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(run.speculator.parameters(), job.clip)
    run.optimizer.step()
    return losses.detach()


def note(run: Run, losses: Tensor, seconds: float) -> None:
    """Count a step; losses are averaged over about 25 steps."""
    run.step, run.seconds = run.step + 1, seconds
    share = max(0.04, 1 / run.step)
    run.losses = tuple(share * new + (1 - share) * old for new, old in zip(losses.tolist(), run.losses or losses.tolist(), strict=True))


def windows(job: TrainingJob, stage: int, index: int, rows: int, length: int) -> Tensor:
    """`rows` stretches of the text, chosen by seed, stage and index alone. [rows, length] int64"""
    generator = torch.Generator().manual_seed((job.seed * 2 + stage) * 1_000_003 + index)
    starts = torch.randint(0, len(job.tokens) - length + 1, (rows, 1), generator=generator)
    return job.tokens[starts + torch.arange(length)].long().to(job.device)


def given_text(run: Run, stage: Stage) -> tuple[Tensor, Tensor]:
    """Stage 1: ground-truth text and the base's states over it. [B, L, emb_dim], [B, L + n + 1]"""
    text = windows(run.job, 0, run.step, stage.rows, stage.length + run.job.shape.n_predict + 1)
    return run.teacher.read(text[:, : stage.length])[0].float(), text


def own_text(run: Run, stage: Stage) -> tuple[Tensor, Tensor]:
    """Stage 2: text the base wrote and the states that drew it. [B, G - n, emb_dim], [B, G + 1]"""
    job, index = run.job, run.step // run.job.pool
    if run.pool is None or run.pool[0] != index:
        prompts = windows(job, 1, index, stage.rows * job.pool, job.prompt_length)
        generator = torch.Generator(job.device).manual_seed(job.seed * 1_000_003 + index)
        run.pool = (index, *run.teacher.write(prompts, stage.length, job.top_k, generator))
    _, text, hidden = run.pool
    rows = slice(run.step % job.pool * stage.rows, (run.step % job.pool + 1) * stage.rows)
    return hidden[rows, : -job.shape.n_predict].float(), text[rows, job.prompt_length - 1 :]


def stage_report(run: Run) -> StageReport:
    """The finished stage in numbers, measured by the real engine in float32 on the weights as they are saved."""
    job, stage = run.job, run.job.stages[run.stage]
    run.speculator.save_pretrained(job.work / "measured")
    drafter = MLPDrafter(MLPSpeculator.from_pretrained(job.work / "measured").to(job.device))
    base = load_base(job.base, job.device, torch.float32)
    greedy, sampled = (measure(base, drafter, job.prompts, temperature, job.new_tokens) for temperature in (0.0, 1.0))
    log.info("%s: tokens per step: greedy %.2f, at temperature 1 %.2f", job.name, greedy.per_step, sampled.per_step)
    done = (run.stage + 1, stage.steps, stage.steps * positions(run), round(run.seconds, 1))
    return StageReport(*done, run.losses, tuple(run.curve), greedy, sampled)


def checkpoint_file(job: TrainingJob) -> Path:
    return job.work / "checkpoint.pt"


STATE = ("fingerprint", "stage", "step", "seconds", "losses", "curve", "reports")


def checkpoint(run: Run) -> None:
    """Write all that continuing needs, in place of the last checkpoint."""
    state = {name: getattr(run, name) for name in STATE}
    state |= {"speculator": run.speculator.state_dict(), "optimizer": run.optimizer.state_dict()}
    replace_durably(checkpoint_file(run.job), lambda opened: torch.save(state, opened))


def restore(run: Run) -> None:
    """Continue from the work folder's checkpoint. Raises TrainingError when it belongs to another job."""
    file = checkpoint_file(run.job)
    state = torch.load(file, map_location=run.job.device, weights_only=True)
    if state["fingerprint"] != run.fingerprint:
        raise TrainingError(f"{file} is of a run with another base, text or recipe; remove it or choose another work folder")
    for name in STATE:
        setattr(run, name, state[name])
    run.speculator.load_state_dict(state["speculator"])
    run.optimizer.load_state_dict(state["optimizer"])


def save(run: Run) -> TrainingReport:
    """Write the speculator and its training.json."""
    job = run.job
    stages = tuple(report_from(stage) for stage in run.reports)
    parameters = sum(p.numel() for p in run.speculator.parameters())
    report = TrainingReport(job.name, parameters, run.speculator.config.to_json(), recipe_of(job), stages)
    run.speculator.save_pretrained(job.output)
    (job.output / "training.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report


def report_from(state: dict[str, Any]) -> StageReport:
    return StageReport(**{**state, "greedy": Measured(**state["greedy"]), "sampled": Measured(**state["sampled"])})
