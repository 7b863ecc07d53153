"""The measured claims that start a service of their own: what they compare and what they call a failure, without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks import long_prompt, prefix_cache
from configs.settings import load_settings
from services.cli.bench_service import alone
from services.cli.load_outcome import Chunk, Outcome

ROOT = Path(__file__).resolve().parents[2]
TURN = prefix_cache.Turn(0, 1, 100, 80, 64, 20.0, 0, 50.0, 30, "a")


def test_a_service_of_one_model_is_configured_by_its_fleet(tmp_path: Path) -> None:
    fleet = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(alone(fleet, "demo-code", {"chunk": 64})))
    settings, usual = load_settings(file, {}), load_settings(ROOT / "configs" / "demo.yaml", {})
    (model,) = settings.models
    assert model.engine == usual.model("demo-code").engine.model_copy(update={"chunk": 64}) and model.base == usual.model("demo-code").base
    assert str(tmp_path) in settings.state.url and str(tmp_path) in settings.request_log.url
    with pytest.raises(SystemExit, match="there is no model 'other'"):
        alone(fleet, "other", {})


def test_one_cached_token_fewer_is_a_complaint_and_more_is_not() -> None:
    def complaints(ours: prefix_cache.Turn) -> list[str]:
        return prefix_cache.complaints({"off": [TURN], "auto": [ours]})

    assert complaints(TURN) == [] == complaints(replace(TURN, cached_tokens=80))
    assert complaints(replace(TURN, cached_tokens=63)) == ["auto, conversation 0, turn 1: 63 cached tokens against 64"]
    assert "another text" in complaints(replace(TURN, text="b"))[0]


def test_hit_rates_and_time_saved() -> None:
    begun = replace(TURN, turn=0, prompt_tokens=60, reusable_tokens=0, cached_tokens=0, first_ms=40.0, uncached_first_ms=40.0)
    found = prefix_cache.summary([begun, TURN])
    assert (found["hit_rate"], found["hit_rate_of_reusable"], found["saved_ms"], found["first_ms"]) == (0.4, 0.8, 30.0, 20.0)
    assert [entry["cached_tokens"] for entry in found["by_turn"]] == [0, 64]


def test_a_gap_is_disturbed_if_any_of_it_is_within_a_prefill() -> None:
    plan = long_prompt.Plan("m", 1, 1, 5.0, 1.0, 0.0, 1)
    times = [0.0, 0.5, 1.0, 1.5, 2.0, 2.9, 3.0, 3.5]
    steady = Outcome(0, 0.0, 0.0, 4.0, chunks=tuple(Chunk(at, 2.0) for at in times), text="x", tokens=16)
    long = Outcome(0, 2.1, 2.1, 2.95, chunks=(Chunk(2.95, 1.0),), text="y", tokens=1, prompt_tokens=1900)
    found = long_prompt.cell(64, "off", plan, [steady], [long])
    assert (found["with"]["gaps"], found["without"]["gaps"]) == (2, 3), "the warm-up is not counted"
    assert found["with"]["chunk_gap_ms"] == {"p50": 100.0, "p90": 900.0, "p99": 900.0, "max": 900.0}
    assert found["with"]["token_gap_ms"]["p99"] == 450.0 and found["first_ms"]["p50"] == 850.0 and found["prompt_tokens"] == 1900


def test_long_prompts_fill_the_room_and_share_no_beginning() -> None:
    bodies = long_prompt.Bodies(long_prompt.Served("m", "completion", 2048))
    subject = long_prompt.Subject(bodies, ["def f(x):\n    return x"], long_prompt.Fit(3.0, 1.0, True), 1900)
    prompts = [subject.long(index, "1 off").content for index in range(3)]
    assert len({prompt[:60] for prompt in prompts}) == 3 and all(len(prompt) > 3 * 1899 for prompt in prompts)


@pytest.mark.parametrize("script", [prefix_cache, long_prompt])
def test_scripts_say_how_they_are_run(script: object) -> None:
    name = Path(str(script.__file__)).name  # type: ignore[attr-defined]
    assert f"python benchmarks/{name} --out benchmarks/results/" in str(script.__doc__)
