"""`specfleet demo build`: the demo fleet from its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from configs.settings import ROOT
from services.cli.device import check_device
from services.cli.problem import TROUBLE, Problem, sentence
from services.cli.screen import remark
from services.demo.recipe import FleetRecipe, RecipeError, demo_fleet

app = typer.Typer(no_args_is_help=True, help="The demo fleet: three small models trained on what this machine has installed.")

Stage = Literal["corpus", "base", "speculator"]
Work = Callable[[str, FleetRecipe, str, int], Any]


@app.callback()
def group() -> None:
    """Keeps `build` a command of its own."""


@app.command()
def build(
    only: Annotated[list[str] | None, typer.Option("--only", help="Models to build; default: all.", show_default=False)] = None,
    stage: Annotated[Stage | None, typer.Option("--stage", help="One stage alone; default: all that are missing.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")] = "cpu",
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    again: Annotated[bool, typer.Option("--again", help="Make also what is there already.")] = False,
) -> None:
    """Gather the text, train the bases, train their speculators. Goes on where it was cut off; what is there already is kept."""
    fleet = recipe()
    names = chosen(fleet, only)
    check_device(device)
    made: set[Path] = set()
    for name in names:
        for step, work in stages().items():
            target = product(name, step, fleet)
            if stage in (None, step) and target not in made:
                make(name, step, fleet, again, partial(work, name, fleet, device, threads))
                made.add(target)


def recipe() -> FleetRecipe:
    """The fleet's recipe, its folders in this checkout wherever the command is given."""
    fleet = demo_fleet()
    return replace(fleet, build_folder=ROOT / fleet.build_folder, models_folder=ROOT / fleet.models_folder)


def chosen(fleet: FleetRecipe, only: list[str] | None) -> list[str]:
    """The models to build. Raises Problem for one that the recipe lacks."""
    known = [model.name for model in fleet.models]
    if strangers := [name for name in only or () if name not in known]:
        raise Problem(f"The demo fleet has no model {strangers[0]!r}; it has {', '.join(known)}.")
    return only or known


def make(name: str, stage: Stage, fleet: FleetRecipe, again: bool, work: Callable[[], Any]) -> None:
    """Make one stage unless it is there; `again` begins it anew. Raises Problem."""
    made = product(name, stage, fleet)
    if again:
        progress(name, stage, fleet).unlink(missing_ok=True)
    elif made.exists() and not unfinished(made, progress(name, stage, fleet)):
        remark(f"{name}: {stage} is there ({made.relative_to(ROOT)})")
        return
    remark(f"{name}: {stage}")
    try:
        work()
    except TROUBLE as error:
        raise Problem(f"{name}: {stage}: {sentence(error)}{way_out(error, name)}") from None


def way_out(error: Exception, name: str) -> str:
    """What helps against earlier work that does not fit the recipe any more."""
    from drafters.training import TrainingError

    return f"; begin anew with: specfleet demo build --only {name} --again" if isinstance(error, RecipeError | TrainingError) else ""


def unfinished(made: Path, work: Path) -> bool:
    """Whether work went on after the product was written: an `--again` that was cut off."""
    return work.is_file() and work.stat().st_mtime > made.stat().st_mtime


def progress(name: str, stage: Stage, fleet: FleetRecipe) -> Path:
    """The file that a stage goes on from when it was cut off."""
    files: Mapping[Stage, Path] = {
        "corpus": product(name, "corpus", fleet),
        "base": fleet.checkpoint(name),
        "speculator": fleet.build_folder / name / "speculator" / "checkpoint.pt",
    }
    return files[stage]


def product(name: str, stage: Stage, fleet: FleetRecipe) -> Path:
    """The file that is written when a stage is done."""
    folder = fleet.models_folder / name
    files: Mapping[Stage, Path] = {
        "corpus": fleet.build_folder / "corpora" / fleet.model(name).corpus / "corpus.json",
        "base": folder / "training.json",
        "speculator": folder / "speculator" / "training.json",
    }
    return files[stage]


def stages() -> Mapping[Stage, Work]:
    """How each stage is done, in order. Imported here, since torch takes a while."""
    from services.demo.pretrain import pretrain
    from services.demo.speculators import train_speculator
    from services.demo.tokens import build_corpus

    def corpus(name: str, fleet: FleetRecipe, device: str, threads: int) -> Path:
        return build_corpus(fleet.model(name).corpus, fleet)

    return {"corpus": corpus, "base": pretrain, "speculator": train_speculator}
