"""Trains the demo fleet's speculators."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from drafters.progress import TrainingBar
from drafters.training import SpeculatorShape, Stage, TrainingJob, TrainingReport, train
from services.demo.recipe import FleetRecipe, demo_fleet
from services.demo.tokens import heldout_prompts, training_tokens


@dataclass(frozen=True, slots=True)
class SpeculatorRecipe:
    """What the speculators of one corpus' models have in common."""

    shape: SpeculatorShape
    weight_decay: float
    first: Stage = field(default_factory=lambda: Stage(1200, 8, 256, 1.0, 0.1))
    second: Stage = field(default_factory=lambda: Stage(240, 8, 256, 0.3, 0.01))
    peak: float = 1e-2


def speculator_recipe(corpus: str) -> SpeculatorRecipe:
    """The published shapes: three heads for language, four for code."""
    if corpus == "chat":
        return SpeculatorRecipe(SpeculatorShape(3, 5, (5, 3, 2)), weight_decay=0.01)
    return SpeculatorRecipe(SpeculatorShape(4, 5, (4, 3, 2, 2)), weight_decay=0.1)


def speculator_job(name: str, fleet: FleetRecipe | None = None, device: str = "cpu") -> TrainingJob:
    """The job that trains the speculator of the base `name`, whose folder must be there."""
    fleet = fleet or demo_fleet()
    model = fleet.model(name)
    recipe = speculator_recipe(model.corpus)
    return TrainingJob(
        base=fleet.models_folder / name,
        output=fleet.models_folder / name / "speculator",
        work=fleet.build_folder / name / "speculator",
        tokens=training_tokens(name, fleet)[0],
        prompts=heldout_prompts(name, 32, 64, fleet),
        name=name,
        shape=recipe.shape,
        first=recipe.first,
        second=recipe.second,
        peak=recipe.peak,
        weight_decay=recipe.weight_decay,
        seed=model.seed,
        device=device,
    )


def train_speculator(name: str, fleet: FleetRecipe | None = None, device: str = "cpu", threads: int = 1) -> TrainingReport:
    """Trains, measures and saves the speculator of one base, or continues to; a bar shows how far it is."""
    torch.set_num_threads(threads)
    job = speculator_job(name, fleet, device)
    with TrainingBar(name) as bar:
        return train(job, bar)
