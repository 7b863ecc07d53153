"""Training on a toy base: losses fall, a run cut off ends where an uninterrupted one does, and what cannot work is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from drafters.mlp import MLPSpeculator
from drafters.objectives import head_losses
from drafters.teacher import Teacher
from drafters.training import Advance, SpeculatorShape, Stage, TrainingError, TrainingJob, train

VOCAB, WIDTH = 32, 32


class Cut(Exception):
    """Stands for a run that is cut off."""


def toy(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=None,
        bos_token_id=None,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return toy(tmp_path / "base")


@pytest.fixture
def job(base: Path, tmp_path: Path) -> TrainingJob:
    text = (torch.arange(4000) ** 2 // 7) % VOCAB
    return TrainingJob(
        base=base,
        output=tmp_path / "speculator",
        work=tmp_path / "work",
        tokens=text,
        prompts=[text[:12].tolist(), text[50:70].tolist()],
        name="toy",
        shape=SpeculatorShape(n_predict=2, n_candidates=3, top_k_tokens_per_head=(3, 2), inner_dim=24),
        first=Stage(24, 4, 32, 1.0, 0.1),
        second=Stage(8, 4, 24, 0.1, 0.01),
        peak=1e-2,
        prompt_length=16,
        pool=3,
        new_tokens=16,
        log_steps=4,
        checkpoint_seconds=0.0,
    )


def weights(job: TrainingJob) -> dict[str, torch.Tensor]:
    return MLPSpeculator.from_pretrained(job.output).state_dict()


def test_losses_fall_and_the_report_says_so(job: TrainingJob) -> None:
    seen: list[Advance] = []
    report = train(job, seen.append)
    assert [(a.stage, a.step, a.steps) for a in seen] == [(1, i + 1, 24) for i in range(24)] + [(2, i + 1, 8) for i in range(8)]
    assert sum(seen[23].losses) < 0.9 * sum(seen[0].losses)
    assert [stage.stage for stage in report.stages] == [1, 2]
    assert all(len(stage.losses) == 2 and stage.greedy.per_step >= 1 and stage.sampled.tokens > 0 for stage in report.stages)
    assert (report.stages[0].positions, report.stages[1].positions) == (24 * 4 * 32, 8 * 4 * 22)
    assert json.loads((job.output / "training.json").read_text())["stages"][1]["steps"] == 8
    saved = MLPSpeculator.from_pretrained(job.output)
    assert (saved.config.emb_dim, saved.config.vocab_size, saved.config.base_model_name_or_path) == (WIDTH, VOCAB, "toy")


@pytest.mark.parametrize(("stage", "step"), [(1, 5), (1, 8), (2, 4)])
def test_a_run_cut_off_ends_in_the_same_weights(job: TrainingJob, tmp_path: Path, stage: int, step: int) -> None:
    job = replace(job, first=replace(job.first, steps=8))
    whole = train(replace(job, work=tmp_path / "whole", output=tmp_path / "uncut"))

    def cut(advance: Advance) -> None:
        if (advance.stage, advance.step) == (stage, step):
            raise Cut

    with pytest.raises(Cut):
        train(job, cut)
    torch.manual_seed(99)
    continued = train(job)
    for key, value in weights(replace(job, output=tmp_path / "uncut")).items():
        assert torch.equal(value, weights(job)[key]), key
    assert [s.losses for s in continued.stages] == [s.losses for s in whole.stages]
    assert [s.greedy for s in continued.stages] == [s.greedy for s in whole.stages]


def test_another_job_does_not_continue_a_run(job: TrainingJob, tmp_path: Path) -> None:
    small = replace(job, first=replace(job.first, steps=1), second=replace(job.second, steps=1))
    train(small)
    for other in (replace(small, base=toy(tmp_path / "other", 1)), replace(small, tokens=job.tokens + 1 - 1 + (job.tokens < 1))):
        with pytest.raises(TrainingError, match="is of a run with another base, text or recipe"):
            train(other)
    train(small)  # a finished run is saved again and nothing else


def test_text_of_another_vocabulary_is_refused(job: TrainingJob) -> None:
    with pytest.raises(TrainingError, match=r"tokens 0 to 40, but .* knows tokens 0 to 31"):
        train(replace(job, tokens=torch.arange(41)))
    with pytest.raises(TrainingError, match="one row of more than 35 tokens, got shape"):
        train(replace(job, tokens=torch.arange(20)))


def test_stage_rates_follow_the_published_schedule() -> None:
    stage = Stage(1000, 1, 1, 1.0, 0.1)
    rates = [stage.rate(step) for step in range(1000)]
    assert rates[24] == pytest.approx(1 - 0.25)
    assert rates[49] == pytest.approx(1.0)
    assert rates[525] == pytest.approx(0.55, abs=1e-3)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert max(Stage(100, 1, 1, 0.1, 0.01).rate(step) for step in range(100)) == pytest.approx(0.1)


def test_head_losses_score_the_tokens_after_the_next() -> None:
    torch.manual_seed(0)
    speculator = MLPSpeculator(SpeculatorShape(2, 2, (2, 2), 16).config(WIDTH, VOCAB, "toy"))
    hidden, text = torch.randn(3, 5, WIDTH), torch.randint(0, VOCAB, (3, 8))
    logits = speculator(hidden, text[:, 1:])  # [2, 3, 5, V]
    for head, loss in enumerate(head_losses(speculator, hidden, text)):
        expected = torch.nn.functional.cross_entropy(logits[head].flatten(0, 1), text[:, 2 + head : 7 + head].flatten())
        torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="need 8 tokens of text, got 7"):
        head_losses(speculator, hidden, text[:, 1:])


def test_the_teacher_writes_what_its_states_draw(base: Path) -> None:
    teacher = Teacher.load(base, dtype=torch.float32)
    prompts = torch.randint(0, VOCAB, (3, 10))
    text, states = teacher.write(prompts, 12, 1, torch.Generator().manual_seed(0))
    assert (text.shape, states.shape) == ((3, 22), (3, 12, WIDTH))
    hidden, _ = teacher.read(text)
    torch.testing.assert_close(hidden[:, 9:21], states, atol=1e-4, rtol=1e-4)
    head = teacher.model.get_output_embeddings().weight
    assert torch.equal((states @ head.T).argmax(-1), text[:, 10:])
