"""Trains the demo fleet's speculators: `python -m services.demo.speculators demo-chat` for one model, no name for all of them."""

from __future__ import annotations

import argparse
import logging

import torch

from drafters.progress import TrainingBar
from drafters.training import SpeculatorShape, Stage, TrainingJob, TrainingReport, train
from services.demo.recipe import FleetRecipe, demo_fleet
from services.demo.tokens import heldout_prompts, training_tokens


def speculator_shape(corpus: str) -> SpeculatorShape:
    """The published shapes: three heads for language, four for code."""
    if corpus == "chat":
        return SpeculatorShape(3, 5, (5, 3, 2))
    return SpeculatorShape(4, 5, (4, 3, 2, 2))


def speculator_job(name: str, fleet: FleetRecipe | None = None, device: str = "cpu") -> TrainingJob:
    """The job that trains the speculator of the base `name`, whose folder must be there."""
    fleet = fleet or demo_fleet()
    recipe = fleet.model(name)
    return TrainingJob(
        base=fleet.models_folder / name,
        output=fleet.models_folder / name / "speculator",
        work=fleet.build_folder / name / "speculator",
        tokens=training_tokens(name, fleet)[0],
        prompts=heldout_prompts(name, 32, 64, fleet),
        name=name,
        shape=speculator_shape(recipe.corpus),
        first=Stage(600, 8, 256, 1.0, 0.1),
        second=Stage(120, 8, 256, 0.3, 0.01),
        peak=1e-2,
        seed=recipe.seed,
        device=device,
    )


def train_speculator(name: str, fleet: FleetRecipe | None = None, device: str = "cpu", threads: int = 1) -> TrainingReport:
    """Trains, measures and saves the speculator of one base, or continues to; a bar shows how far it is."""
    torch.set_num_threads(threads)
    job = speculator_job(name, fleet, device)
    with TrainingBar(name) as bar:
        return train(job, bar)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[model.name for model in demo_fleet().models])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in options.names:
        report = train_speculator(name, device=options.device, threads=options.threads)
        last = report.stages[-1]
        print(f"{name}: tokens per step {last.greedy.per_step:.2f} greedy, {last.sampled.per_step:.2f} at temperature 1")


if __name__ == "__main__":
    main()
