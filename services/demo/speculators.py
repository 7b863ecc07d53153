"""Trains the demo fleet's speculators."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from drafters.measuring import Measured, measure
from drafters.mlp import MLPSpeculator
from drafters.progress import TrainingBar
from drafters.training import SpeculatorShape, Stage, TrainingJob, TrainingReport, train
from drafters.tree_draft import MLPDrafter
from engine.loading import load_base
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


def measure_speculator(name: str, count: int = 64, fleet: FleetRecipe | None = None, threads: int = 1) -> dict[float, Measured]:
    """What the saved speculator is worth on held-out prompts, by temperature, drafting its full tree in the real engine."""
    torch.set_num_threads(threads)
    fleet = fleet or demo_fleet()
    folder = fleet.models_folder / name
    base, drafter = load_base(folder), MLPDrafter(MLPSpeculator.from_pretrained(folder / "speculator"))
    prompts = heldout_prompts(name, count, 64, fleet)
    return {temperature: measure(base, drafter, prompts, temperature) for temperature in (0.0, 1.0)}
