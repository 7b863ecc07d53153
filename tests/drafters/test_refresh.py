"""The trainer's core on a made-up base: it gains, stops, refuses, yields between units, and goes on after a crash bit for bit."""

from __future__ import annotations

import gc
import json
import resource
import signal
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafters.config import MLPSpeculatorConfig
from drafters.mlp import MLPSpeculator
from drafters.refresh import Measurement, Refresher, RefreshSettings
from drafters.replay import BufferSettings, ReplayBuffer
from drafters.traces import Trace
from drafters.walk import HeldOut, walk
from tests.conftest import wait_until
from tests.drafters.traced import VOCAB, WIDTH, make_trace, many

SETTINGS = RefreshSettings(
    objective="forward_kl",
    positions="all",
    rate=0.02,
    warmup=2,
    requests=8,
    window=16,
    steps=40,
    interval=10,
    patience=3,
    least_tokens=100,
    least_held=3,
    least_gain=0.05,
)
ROOT = Path(__file__).resolve().parents[2]


def speculator(seed: int = 0) -> MLPSpeculator:
    torch.manual_seed(seed)
    shape = {"inner_dim": 32, "n_predict": 3, "n_candidates": 3, "top_k_tokens_per_head": (3, 2, 2)}
    return MLPSpeculator(MLPSpeculatorConfig(VOCAB, WIDTH, tie_weights=True, scale_input=True, torch_dtype="bfloat16", **shape))  # type: ignore[arg-type]


def filled(traces: list[Trace] | None = None) -> ReplayBuffer:
    buffer = ReplayBuffer("toy", VOCAB, WIDTH, BufferSettings(held_out=0.3))
    for trace in traces if traces is not None else many(60):
        buffer.add(trace)
    return buffer


def weights(model: MLPSpeculator) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: MLPSpeculator, other: MLPSpeculator) -> bool:
    return all(torch.equal(value, weights(other)[name]) for name, value in weights(one).items())


@pytest.mark.parametrize(
    ("objective", "temperature"), [("forward_kl", 0.0), ("lk_hybrid", 0.0), ("forward_kl", 1.0), ("cross_entropy", 0.7)]
)
def test_a_round_ends_in_a_better_speculator(objective: str, temperature: float) -> None:
    live, buffer = speculator(), filled(many(60, temperature=temperature))
    kept = weights(live)
    refresher = Refresher(live, "v1", buffer, replace(SETTINGS, objective=objective))  # type: ignore[arg-type]
    standing = refresher.advance()
    assert standing.phase == "candidate" and standing.step == 40
    candidate = refresher.take()
    assert candidate is not None and refresher.take() is None
    assert candidate.after.per_step > candidate.before.per_step + SETTINGS.least_gain
    held = buffer.choosing("")
    assert candidate.before == HeldOut.of(walk(live, trace) for trace in held)
    assert candidate.after == HeldOut.of(walk(candidate.speculator, trace) for trace in held)
    assert sum(candidate.losses) < 0.9 * sum(candidate.first_losses)
    training = buffer.training("")
    assert (candidate.data.requests, candidate.data.tokens) == (len(training), 20 * len(training))
    assert (candidate.data.first, candidate.data.last) == (min(t.at for t in training), max(t.at for t in training))
    assert (candidate.parent, candidate.tag, candidate.objective) == ("v1", "", objective)
    assert candidate.metrics["held_out_per_step_after"] == candidate.after.per_step and "loss_head_2" in candidate.metrics
    assert all(torch.equal(value, kept[name]) for name, value in weights(live).items())


def test_a_candidate_that_waits_to_be_taken_does_not_keep_what_trained_it() -> None:
    refresher = Refresher(speculator(), "v1", filled(), SETTINGS)
    refresher.advance(units=1)
    assert refresher.round is not None
    trained, optimizer = weakref.ref(refresher.round.speculator), weakref.ref(refresher.round.optimizer)
    refresher.advance()
    assert refresher.phase == "candidate"
    gc.collect()
    assert trained() is None and optimizer() is None


def test_a_candidate_is_worth_the_same_when_it_was_saved(tmp_path: Path) -> None:
    buffer = filled()
    refresher = Refresher(speculator(), "v1", buffer, SETTINGS)
    refresher.advance()
    candidate = refresher.take()
    assert candidate is not None
    candidate.speculator.save_pretrained(tmp_path)
    assert same(MLPSpeculator.from_pretrained(tmp_path), candidate.speculator)


def test_work_comes_in_units_so_that_it_can_yield_between_them() -> None:
    buffer = filled()
    held, ticks = len(buffer.choosing("")), iter(range(10**6))
    refresher = Refresher(speculator(), "v1", buffer, SETTINGS, clock=lambda: float(next(ticks)))
    assert refresher.advance(units=1).phase == "measuring"
    assert refresher.advance(units=held - 1).phase == "training"
    assert refresher.advance(units=9).step == 9
    assert refresher.advance(seconds=0.5).step == 10  # a slice that is too short is one unit
    assert refresher.standing.phase == "measuring"
    assert refresher.advance(seconds=3.5, units=100).phase == "measuring"
    whole = Refresher(speculator(), "v1", filled(), SETTINGS)
    whole.advance()
    while refresher.advance(units=7).phase != "candidate":
        pass
    one, other = refresher.take(), whole.take()
    assert one is not None and other is not None and same(one.speculator, other.speculator)


def test_it_waits_for_traffic_and_for_held_out_requests() -> None:
    buffer = filled([])
    refresher = Refresher(speculator(), "v1", buffer, replace(SETTINGS, least_tokens=400))
    assert refresher.advance().phase == "waiting"
    assert refresher.standing.waiting_for == 400
    for trace in many(10):
        buffer.add(trace)
    assert refresher.advance(units=1).waiting_for == 200
    short = Refresher(speculator(), "v1", filled(many(60, length=1)), replace(SETTINGS, least_tokens=0))
    assert short.advance(units=1).phase == "waiting"  # answers of one token have nothing to learn from
    for trace in many(50, first=10):
        buffer.add(trace)
    assert refresher.advance(units=1).phase == "measuring"


def test_held_out_choices_of_few_requests_are_few_to_choose_by() -> None:
    buffer = filled([])
    refresher = Refresher(speculator(), "v1", buffer, SETTINGS)
    for index in range(60):
        for choice in range(5):
            few = len({trace.asked for trace in buffer.choosing("")}) < SETTINGS.least_held
            assert (refresher.advance(units=0).phase, refresher.able()) == ("waiting", not few and refresher.missing() == 0)
            buffer.add(make_trace(f"r-{index}-{choice}"))
    assert refresher.able() and len(buffer.choosing("")) > 5 * SETTINGS.least_held
    refresher.advance()
    found = refresher.take()
    assert found is not None and found.after.requests == len({trace.asked for trace in buffer.choosing("")})


def test_a_round_chooses_by_the_latest_of_many_held_out_requests() -> None:
    buffer = filled()
    refresher = Refresher(speculator(), "v1", buffer, replace(SETTINGS, most_held=5))
    refresher.advance(units=1)
    assert refresher.round is not None and refresher.round.held == buffer.choosing("")[-5:] and len(buffer.choosing("")) > 5
    refresher.advance()
    assert refresher.take().after.requests == 5
    with pytest.raises(ValueError, match="most_held is 2, expected at least least_held, which is 3"):
        replace(SETTINGS, most_held=2)


def test_nothing_to_gain_ends_a_round_and_doubles_the_wait() -> None:
    buffer = filled()
    first = Refresher(speculator(), "v1", buffer, SETTINGS)
    first.advance()
    good = first.take()
    assert good is not None
    settings = replace(SETTINGS, rate=1e-9, steps=1000, least_tokens=400)
    refresher = Refresher(good.speculator, "v2", buffer, settings)
    standing = refresher.advance()
    assert standing.phase == "waiting" and refresher.take() is None
    assert standing.outcome.startswith("nothing to gain: 0.000 tokens per step on held-out requests, 0.05 are wanted")
    assert standing.waiting_for == 800
    for trace in many(40, first=100):
        buffer.add(trace)
    assert refresher.standing.waiting_for == 0
    standing = refresher.advance()
    assert (standing.round, standing.waiting_for, refresher.fruitless) == (2, 1600, 2)


def test_other_traffic_ends_a_long_wait() -> None:
    """Rounds without gain wait ever longer, unless serving is off its pace: half of all tokens were kept drafts, and now none are."""
    buffer = filled([served(trace, 0.5) for trace in many(60)])
    refresher = Refresher(speculator(), "v1", buffer, replace(SETTINGS, rate=1e-9, patience=1, least_tokens=400))
    assert refresher.advance().waiting_for == 800
    for count, share, waiting_for in ((30, 0.5, 200), (15, 0.5, 1600), (15, 0.0, 1300), (10, 0.0, 3200), (30, 0.0, 2600)):
        for trace in many(count, first=buffer.counts("").seen):
            buffer.add(served(trace, share))
        assert refresher.advance().waiting_for == waiting_for, (count, share)
    assert refresher.fruitless == 3


def served(trace: Trace, share: float) -> Trace:
    """The trace as if that share of its tokens had been drafts that were kept."""
    return replace(trace, accepted=torch.arange(len(trace)) % 20 >= 20 * (1 - share))


def test_the_stop_rule_ends_before_all_steps() -> None:
    buffer = filled()
    refresher = Refresher(speculator(), "v1", buffer, replace(SETTINGS, rate=1e-9, steps=1000, patience=2))
    steps = 0
    while (standing := refresher.advance(units=1)).round and standing.phase != "waiting":
        steps = max(steps, standing.step)
    assert steps == 3 * SETTINGS.interval


@pytest.mark.parametrize(("course", "kept"), [((1.4, 1.38, 1.5, 1.6, 1.55, 1.59), 1.6), ((1.3, 1.4, 1.35, 1.39), None)])
def test_a_copy_that_loses_before_it_gains_is_not_given_up(course: tuple[float, ...], kept: float | None) -> None:
    """At the full rate a copy of a good speculator first gets worse: a round goes on for as long as its own copies get better."""
    refresher = Refresher(speculator(), "v1", filled(), replace(SETTINGS, steps=1000, patience=2))
    r = refresher.round = refresher.begin()
    for worth in (1.5, *course):
        assert refresher.round is r and refresher.candidate is None
        r.step += SETTINGS.interval * (r.before is not None)
        r.measurement = Measurement(refresher.live, r.held)
        refresher.measured(r, HeldOut(10, 100, 50, worth))
    assert refresher.candidate is not None if kept else refresher.round is None
    assert kept is None or refresher.take().after.per_step == kept


def test_a_diverging_round_is_refused() -> None:
    refresher = Refresher(speculator(), "v1", filled(), replace(SETTINGS, rate=30.0, clip=1e9))
    standing = refresher.advance()
    assert standing.phase == "waiting" and standing.refused == 1
    assert standing.outcome.startswith("refused: diverged at step")
    assert refresher.take() is None


def test_losses_that_are_no_numbers_are_refused_before_any_weight_moves() -> None:
    live = speculator()
    refresher = Refresher(live, "v1", filled(), SETTINGS)
    while refresher.advance(units=1).step < 3:
        pass
    assert refresher.round is not None
    refresher.round.speculator.head[0].weight.data[0, 0] = torch.nan
    copy = refresher.round.speculator
    kept = weights(copy)
    standing = refresher.advance(units=1)
    assert standing.outcome.startswith("refused: step 4: losses [nan") and standing.refused == 1
    assert all(torch.equal(value, kept[name]) or bool(value.isnan().any()) for name, value in weights(copy).items())
    assert standing.phase == "waiting" and standing.waiting_for > 0


def test_another_version_that_serves_drops_the_round() -> None:
    refresher = Refresher(speculator(), "v1", filled(), SETTINGS)
    refresher.advance(units=20)
    refresher.serve(speculator(1), "v2")
    assert refresher.standing.round == 1 and refresher.round is None
    for trace in many(20, first=100):
        refresher.buffer.add(trace)
    refresher.advance()
    candidate = refresher.take()
    assert candidate is not None and candidate.parent == "v2"
    refresher.reject("the gate saw no gain")
    assert refresher.standing.waiting_for == 2 * SETTINGS.least_tokens and refresher.standing.outcome == "the gate saw no gain"


@pytest.mark.parametrize("better", [True, False])
def test_what_was_better_and_not_surely_so_is_trained_further(tmp_path: Path, better: bool) -> None:
    """By the next round, also after a restart; what serves is still what it is measured against. Another version ends that, and so do
    traces that are to be forgotten."""
    live = speculator()
    refresher = Refresher(live, "v1", filled(), SETTINGS)
    refresher.advance()
    candidate = refresher.take()
    assert candidate is not None
    refresher.reject("not surely more", candidate.speculator if better else None)
    refresher.checkpoint(tmp_path / "checkpoint.pt")
    resumed = Refresher(live, "v1", filled(many(80)), SETTINGS)
    assert resumed.resume(tmp_path / "checkpoint.pt")
    for found in (refresher, resumed):
        for trace in many(40, first=100):
            found.buffer.add(trace)
        found.advance(units=1)
        assert found.round is not None and found.round.measurement is not None and same(found.round.measurement.speculator, live)
        assert same(found.round.speculator, candidate.speculator.float()) is better and same(found.round.speculator, live) is not better
    refresher.serve(live, "v2")
    resumed.drop("its traces were to be forgotten")
    assert refresher.further is resumed.further is None


@pytest.mark.parametrize(("units", "part"), [(3, 128), (20, 128), (26, 128), (50, 128), (20, 50)])
def test_a_run_cut_off_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: int, part: int) -> None:
    """Cut off while the serving speculator is measured, in training, while a copy is measured, later, and in the middle of a step."""
    monkeypatch.setattr("drafters.refresh.PART", part)
    whole = Refresher(speculator(), "v1", filled(), SETTINGS)
    whole.advance()
    expected = whole.take()
    cut = Refresher(speculator(), "v1", filled(), SETTINGS)
    cut.buffer.save(tmp_path / "traces")
    cut.advance(units=units)
    cut.checkpoint(tmp_path / "checkpoint.pt")
    assert part == 128 or (cut.round is not None and cut.round.under_way is not None)
    cut.advance(units=2)  # lost
    torch.manual_seed(99)
    buffer = filled([])
    buffer.load(tmp_path / "traces")
    resumed = Refresher(speculator(), "v1", buffer, SETTINGS)
    assert resumed.resume(tmp_path / "checkpoint.pt")
    resumed.advance()
    found = resumed.take()
    assert expected is not None and found is not None
    assert same(found.speculator, expected.speculator)
    assert (found.before, found.after, found.losses, found.first_losses) == (
        expected.before,
        expected.after,
        expected.losses,
        expected.first_losses,
    )


def test_a_candidate_that_nobody_took_is_in_the_checkpoint(tmp_path: Path) -> None:
    refresher = Refresher(speculator(), "v1", filled(), SETTINGS)
    refresher.advance()
    refresher.checkpoint(tmp_path / "checkpoint.pt")
    resumed = Refresher(speculator(), "v1", filled(), SETTINGS)
    assert resumed.resume(tmp_path / "checkpoint.pt") and resumed.phase == "candidate"
    one, other = refresher.take(), resumed.take()
    assert one is not None and other is not None and same(one.speculator, other.speculator)
    refresher.checkpoint(tmp_path / "checkpoint.pt")
    assert resumed.resume(tmp_path / "checkpoint.pt") and resumed.take() is None


def test_without_its_traces_a_resumed_round_is_measured_again(tmp_path: Path) -> None:
    cut = Refresher(speculator(), "v1", filled(), SETTINGS)
    while cut.advance(units=1).step < 15:
        pass
    cut.checkpoint(tmp_path / "checkpoint.pt")
    resumed = Refresher(speculator(), "v1", filled(many(50)), SETTINGS)
    assert resumed.resume(tmp_path / "checkpoint.pt")
    assert (resumed.standing.phase, resumed.standing.step, resumed.standing.before) == ("measuring", 15, None)
    resumed.advance()
    candidate = resumed.take()
    assert candidate is not None and candidate.steps == 40
    assert candidate.after.requests == len(resumed.buffer.choosing(""))
    empty = Refresher(speculator(), "v1", filled([]), SETTINGS)
    assert empty.resume(tmp_path / "checkpoint.pt")
    assert empty.advance().phase == "waiting" and empty.standing.waiting_for == SETTINGS.least_tokens


def test_a_checkpoint_of_something_else_is_not_gone_on_from(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    refresher = Refresher(speculator(), "v1", filled(), SETTINGS)
    assert not refresher.resume(file)
    refresher.advance(units=30)
    refresher.checkpoint(file)
    for other in (
        Refresher(speculator(), "v2", filled(), SETTINGS),
        Refresher(speculator(), "v1", filled(), replace(SETTINGS, objective="tv")),
        Refresher(speculator(), "v1", filled(), SETTINGS, tag="law"),
    ):
        assert not other.resume(file) and other.standing.round == 0
    data = file.read_bytes()
    for torn in (b"", data[:100], data[: len(data) // 2]):
        file.write_bytes(torn)
        assert not Refresher(speculator(), "v1", filled(), SETTINGS).resume(file)
    file.write_bytes(data)
    state = torch.load(file)
    changed = [{**state, "round": {**state["round"], "speculator": {}}}, {**state, "round": 7}]
    for broken in ([], {"belongs": state["belongs"]}, *changed):
        torch.save(broken, file)
        other = Refresher(speculator(), "v1", filled(), SETTINGS)
        fresh = other.standing
        assert not other.resume(file) and other.standing == fresh


@contextmanager
def full_after(size: int) -> Iterator[None]:
    """Files of this process may have so many bytes and no more: what a write to a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    refresher = Refresher(speculator(), "v1", filled(), SETTINGS)
    while refresher.advance(units=1).step < 5:
        pass
    refresher.checkpoint(file)
    before = file.read_bytes()
    refresher.advance(units=3)
    for room in (0, 1000, len(before) // 2):
        with full_after(room), pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt: .*; what it held before is unchanged"):
            refresher.checkpoint(file)
        assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    refresher.checkpoint(file)  # there is room again
    resumed = Refresher(speculator(), "v1", filled(), SETTINGS)
    assert resumed.resume(file) and resumed.standing.step == 8


WRITER = """
    import sys
    from pathlib import Path
    from drafters.refresh import Refresher
    from tests.drafters.test_refresh import SETTINGS, filled, speculator
    refresher = Refresher(speculator(), "v1", filled(), SETTINGS)
    while refresher.advance(units=1).step < 5:
        pass
    while True:
        refresher.checkpoint(Path(sys.argv[1]))
"""


def test_a_trainer_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    writer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(WRITER), str(file)], cwd=ROOT)
    try:
        partial = tmp_path / "checkpoint.pt.partial"
        wait_until(lambda: file.exists() and partial.exists(), 60)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    resumed = Refresher(speculator(), "v1", filled(), SETTINGS)
    assert resumed.resume(file) and resumed.standing.step == 5
    resumed.checkpoint(file)
    assert list(tmp_path.iterdir()) == [file]
    resumed.advance()
    assert resumed.take() is not None


def test_the_default_is_what_the_benchmark_found_best() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "objectives.json").read_text())["best"]
    assert found == {"objective": RefreshSettings().objective, "positions": RefreshSettings().positions}


def test_settings_that_cannot_be_are_refused() -> None:
    for changes, message in (
        ({"objective": "hinge"}, "objective is 'hinge', expected one of cross_entropy, forward_kl"),
        ({"positions": "some"}, "positions is 'some', expected one of all, rejected"),
        ({"rate": float("nan")}, "rate is nan, expected more than 0"),
        ({"margin": -1.0}, "margin is -1.0, expected at least 0"),
        ({"recent": 2.0}, "recent is 2.0, expected 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(SETTINGS, **changes)  # type: ignore[arg-type]
