"""`specfleet demo build` on a toy fleet, with the real training behind it."""

from dataclasses import replace

import pytest
from typer.testing import CliRunner, Result

from drafters.training import checkpoint_file
from services.cli import demo
from services.cli.main import app
from services.demo import pretrain
from services.demo.recipe import FleetRecipe
from services.demo.speculators import speculator_job


@pytest.fixture
def steps(fleet: FleetRecipe, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that training made, while `demo build` builds the toy fleet."""
    made: list[int] = []
    step = pretrain.train_step

    def counted(run: pretrain.Run, windows):
        made.append(run.progressed.step)
        return step(run, windows)

    monkeypatch.setattr(pretrain, "train_step", counted)
    monkeypatch.setattr(demo, "recipe", lambda: fleet)
    monkeypatch.setattr(demo, "ROOT", fleet.models_folder.parent)
    return made


def build(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["demo", "build", "--only", "toy-code", "--stage", "base", *arguments])


def test_again_trains_again(steps: list[int]):
    for arguments, expected in (((), 8), ((), 8), (("--again",), 16)):
        done = build(*arguments)
        assert done.exit_code == 0, done.output
        assert len(steps) == expected
    assert steps == [*range(8)] * 2


def test_work_of_another_recipe_is_refused_until_again(fleet: FleetRecipe, steps: list[int], monkeypatch: pytest.MonkeyPatch):
    assert build().exit_code == 0
    demo.product("toy-code", "base", fleet).unlink()
    changed = replace(fleet, models=tuple(replace(model, steps=9) for model in fleet.models))
    monkeypatch.setattr(demo, "recipe", lambda: changed)
    refused = build()
    assert refused.exit_code == 1 and "another recipe" in refused.stderr and "--again" in refused.stderr and len(steps) == 8
    assert build("--again").exit_code == 0 and len(steps) == 17


def test_speculators_work_is_where_again_looks(fleet: FleetRecipe):
    assert demo.progress("toy-code", "speculator", fleet) == checkpoint_file(speculator_job("toy-code", fleet))
