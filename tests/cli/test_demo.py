"""`specfleet demo build`: which stages run, in what order, and what is left alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from drafters.training import TrainingError
from services.cli import demo
from services.demo.recipe import FleetRecipe, RecipeError, demo_fleet

NAMES = [model.name for model in demo_fleet().models]


@pytest.fixture
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, str, int]]:
    """What was made: stage, model, device, threads. Making a stage writes its product."""
    made: list[tuple[str, str, str, int]] = []

    def work(stage: demo.Stage) -> demo.Work:
        def run(name: str, fleet: FleetRecipe, device: str, threads: int) -> None:
            made.append((stage, name, device, threads))
            file = demo.product(name, stage, fleet)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("made")

        return run

    fleet = replace(demo_fleet(), build_folder=tmp_path / "build", models_folder=tmp_path / "models")
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "check_device", lambda device: None)
    monkeypatch.setattr(demo, "recipe", lambda: fleet)
    monkeypatch.setattr(demo, "stages", lambda: {stage: work(stage) for stage in ("corpus", "base", "speculator")})
    return made


def test_builds_everything_once(run: Callable[..., object], done: list[tuple[str, str, str, int]]) -> None:
    assert run("demo", "build", "--threads", "2").code == 0
    assert [(stage, name) for stage, name, _, _ in done if stage != "corpus"] == [(s, n) for n in NAMES for s in ("base", "speculator")]
    assert sorted(stage for stage, *_ in done).count("corpus") == 2 and {rest for *_, rest in done} == {2}
    done.clear()
    again = run("demo", "build")
    assert not done and "is there" in again.err


def test_one_stage_of_one_model(run: Callable[..., object], done: list[tuple[str, str, str, int]]) -> None:
    arguments = ("demo", "build", "--only", "demo-code", "--stage", "base", "--device", "cuda")
    run(*arguments)
    run(*arguments, "--again")
    assert done == [("base", "demo-code", "cuda", 1)] * 2


def test_again_begins_every_stage_anew_and_once(run: Callable[..., object], done: list[tuple[str, str, str, int]], tmp_path: Path) -> None:
    run("demo", "build")
    done.clear()
    fleet = demo.recipe()
    work = [demo.progress(name, stage, fleet) for name in NAMES for stage in ("base", "speculator")]
    for file in work:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("finished")
    assert run("demo", "build", "--again").code == 0
    assert not any(file.exists() for file in work)
    assert sorted(stage for stage, *_ in done) == ["base"] * 3 + ["corpus"] * 2 + ["speculator"] * 3


def test_goes_on_with_what_was_begun_again(run: Callable[..., object], done: list[tuple[str, str, str, int]]) -> None:
    run("demo", "build")
    done.clear()
    fleet = demo.recipe()
    begun = demo.progress("demo-code", "base", fleet)
    begun.parent.mkdir(parents=True, exist_ok=True)
    begun.write_text("half")
    made = demo.product("demo-code", "base", fleet).stat().st_mtime
    for age, expected in ((-10, []), (10, [("base", "demo-code", "cpu", 1)])):
        os.utime(begun, (made + age, made + age))
        run("demo", "build")
        assert done == expected


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RecipeError("checkpoint.pt is of another recipe or text"), "--only demo-code --again"),
        (TrainingError("it is of a run with another base"), "--only demo-code --again"),
        (RuntimeError("out of memory\nat line 3"), "demo-code: base: out of memory"),
    ],
)
def test_trouble_is_one_sentence(
    run: Callable[..., object], done: list[tuple[str, str, str, int]], monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def work(*_: object) -> None:
        raise error

    monkeypatch.setattr(demo, "stages", lambda: {"base": work})
    failed = run("demo", "build", "--only", "demo-code")
    last = failed.err.splitlines()[-1]
    assert failed.code == 1 and said in last and str(error).splitlines()[0] in last and "line 3" not in failed.err


def test_device_that_is_not_there(run: Callable[..., object]) -> None:
    failed = run("demo", "build", "--device", "cuda:99", "--again")
    assert failed.code == 1 and "no device 'cuda:99'" in failed.err


def test_unknown_model(run: Callable[..., object], done: list[tuple[str, str, str, int]]) -> None:
    failed = run("demo", "build", "--only", "gpt")
    assert failed.code == 1 and "demo-chat" in failed.err and not done


def test_stages_and_folders_are_the_recipes() -> None:
    fleet = demo.recipe()
    assert fleet.models_folder == demo.ROOT / "models" and list(demo.stages()) == ["corpus", "base", "speculator"]
