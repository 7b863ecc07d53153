import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.demo.pretrain import Run, batch, phase_at, pretrain, rate, start_run, train
from services.demo.recipe import FleetRecipe, ModelRecipe, Optimization, Phase, RecipeError, demo_fleet
from services.demo.tokens import load_corpus


def fresh(fleet: FleetRecipe, folder: Path) -> Run:
    return start_run(fleet.models[0], fleet.tokenizer, load_corpus("code", fleet).train, folder / "checkpoint.pt", "cpu")


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(fleet: FleetRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ids = load_corpus("code", fleet).train
    whole = fresh(fleet, tmp_path / "whole")
    train(whole, ids)

    def interrupted(step: int, recipe: ModelRecipe, ids: torch.Tensor) -> torch.Tensor:
        if step == 5:
            raise KeyboardInterrupt
        return batch(step, recipe, ids)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("services.demo.pretrain.batch", interrupted)
        train(fresh(fleet, tmp_path / "cut"), ids)
    resumed = fresh(fleet, tmp_path / "cut")
    assert resumed.progressed.step == 5
    train(resumed, ids)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert resumed.progressed.loss == whole.progressed.loss


def test_a_checkpoint_of_another_recipe_or_text_is_refused(fleet: FleetRecipe, tmp_path: Path):
    ids = load_corpus("code", fleet).train
    train(fresh(fleet, tmp_path), ids)
    assert fresh(fleet, tmp_path).progressed.step == fleet.models[0].steps
    wider, longer, file = replace(fleet.models[0], hidden=128), replace(fleet.models[0], steps=9), tmp_path / "checkpoint.pt"
    for recipe, text in ((wider, ids), (longer, ids), (fleet.models[0], ids[:-1])):
        with pytest.raises(RecipeError, match="another recipe or text"):
            start_run(recipe, fleet.tokenizer, text, file, "cpu")
    state = torch.load(file, weights_only=True)
    del state["fingerprint"]
    torch.save(state, file)
    with pytest.raises(RecipeError):
        fresh(fleet, tmp_path)


def test_a_trained_model_loads_by_transformers(fleet: FleetRecipe):
    folder = pretrain("toy-chat", fleet)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == len(tokenizer) == 320
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [end, tokenizer.eos_token_id]
    record = json.loads((folder / "training.json").read_text())
    assert record["steps"] == 8
    assert set(record["held_out_bits_per_byte"]) == {"conversations", "prose", "overall"}
    assert all(0 < score < 9 for score in record["held_out_bits_per_byte"].values())


def test_the_rate_is_a_trapezoid():
    rates = [rate(step, 100, Optimization((Phase(1.0, 8, 1),), warmup=0.1, decay=0.4)) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9:60] == [1.0] * 51
    assert rates[80] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.03


def test_a_phase_sees_every_window_before_any_again():
    phase = Phase(1.0, length=8, rows=5)
    recipe = replace(demo_fleet().models[0], steps=50, optimization=Optimization(phases=(phase,)))
    ids = torch.arange(8 * 10 + 1, dtype=torch.int32)
    firsts = torch.cat([batch(step, recipe, ids)[:, 0] for step in range(4)]).tolist()
    assert sorted(firsts[:10]) == sorted(firsts[10:]) == list(range(0, 80, 8))
    assert firsts[:10] != firsts[10:]
    assert torch.equal(batch(0, recipe, ids)[0], torch.arange(9) + firsts[0])


def test_phases_divide_the_steps():
    recipe = replace(demo_fleet().models[0], steps=100, optimization=Optimization(phases=(Phase(0.25, 8, 1), Phase(1.0, 16, 1))))
    assert [phase_at(step, recipe)[0] for step in (0, 24, 25, 99)] == [0, 0, 25, 25]
    with pytest.raises(ValueError, match="past"):
        phase_at(100, recipe)
