"""The trainer: from traces to a submission, resting while serving needs the device, and the same on a real Ray."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from actors.artefacts import Artefacts
from actors.domain_trainer import PINNED, UNTAKEN, Subject, Submission
from actors.folder_lock import FolderLock, InUse
from actors.log_contents import Selection
from actors.registry import RegistryKeeper, start_registry
from actors.releases import Base, Parent, Placement
from actors.store import open_state
from actors.trainer import Registrar, TrainerKeeper, TrainerSettings, Worker, start_trainer
from actors.work_folder import WorkFolder
from drafters.bundle import Manifest, Origin, adopt_folder, read_bundle
from drafters.mlp import MLPSpeculator
from drafters.replay import BufferSettings
from drafters.traces import Trace
from drafters.walk import HeldOut, walk
from policies import Verdict
from policies.gate import GateRule
from tests.conftest import wait_until
from tests.drafters.test_refresh import SETTINGS, same, speculator
from tests.drafters.traced import VOCAB, WIDTH, make_trace, many

BASE = Base("toy-base", VOCAB, WIDTH, "r1")
RULE = GateRule(least=10)
PASSED = Verdict(True, 150, 2.0, 2.1, 0.1, 0.05, 0.15, "better")
TRAINER = TrainerSettings(SETTINGS, BufferSettings(held_out=0.4), RULE, slice=0.01, quiet=0.05, checkpoint=0.0, poll=0.05)


def keeper(tmp_path: Path, settings: TrainerSettings = TRAINER, live: MLPSpeculator | None = None) -> TrainerKeeper:
    artefacts = Artefacts(str(tmp_path / "artefacts"), tmp_path / "cache")
    now = partial(next, count(7.0))
    subjects = {"": Subject(live or speculator(), "")}
    found = TrainerKeeper("toy", BASE, lambda: subjects, artefacts, tmp_path / "work", settings, now=now)
    found.begin()
    return found


def fed(found: TrainerKeeper, traces: int = 80) -> TrainerKeeper:
    for trace in many(traces):
        found.add(trace.to_bytes())
    return found


def worked(found: TrainerKeeper) -> Submission | None:
    """Run until there is a submission, or nothing more to do."""
    while found.next() is not None:
        if (submission := found.run(0.05)) is not None:
            found.settle(submission.tag)
            return submission
    return None


def test_traces_become_a_submission(tmp_path: Path) -> None:
    found = fed(keeper(tmp_path))
    submission = worked(found)
    assert submission is not None and submission.verdict.passed and submission.against == found.domains[""].refresher.version
    assert submission.verdict.requests == len(found.buffer.judging("")) >= RULE.least
    manifest = submission.manifest
    assert (manifest.model, manifest.base, manifest.base_revision, manifest.parent, manifest.created) == (
        "toy",
        "toy-base",
        "r1",
        None,
        7.0,
    )
    assert manifest.gate is not None and manifest.gate["difference"] == submission.verdict.difference > 0
    assert manifest.data.requests == len(found.buffer.training("")) and manifest.objective == "forward_kl"
    published = Artefacts(str(tmp_path / "artefacts"), tmp_path / "other").fetch(submission.url, manifest.checksum, VOCAB, WIDTH)
    candidate = MLPSpeculator.from_pretrained(published.folder)
    judged = found.buffer.judging("")
    assert submission.verdict.mean_candidate == pytest.approx(HeldOut.of(walk(candidate, t) for t in judged).per_step)
    assert found.status()["phase"] == "waiting" and found.status()["gate"]["passed"]
    assert found.status()["candidates"] == {"passed": 1, "rejected": 0}


def test_choices_of_one_request_count_once(tmp_path: Path) -> None:
    """By the gate and for what it waits for: all of its choices are one request, with the tokens and steps of all."""
    found = keeper(tmp_path)
    for index in range(80):
        for choice in range(1 + 7 * (index % 2)):
            if len({trace.asked for trace in found.buffer.judging("")}) < RULE.least:
                assert found.next() is None
            found.add(make_trace(f"r-{index}-{choice}", at=float(index)).to_bytes())
    judged: dict[str, list[Trace]] = {}
    for trace in found.buffer.judging(""):
        judged.setdefault(trace.asked, []).append(trace)
    submission = worked(found)
    assert submission is not None and submission.verdict.requests == len(judged) >= RULE.least
    live, candidate = found.domains[""].refresher.live, MLPSpeculator.from_pretrained(Path(submission.url.removeprefix("file://")))
    for drafter, told in ((live, submission.verdict.mean_live), (candidate, submission.verdict.mean_candidate)):
        assert told == pytest.approx(HeldOut.of(walk(drafter, trace) for choices in judged.values() for trace in choices).per_step)
    assert submission.manifest.data.requests == len({trace.asked for trace in found.buffer.training("")})


def test_nothing_is_begun_that_could_not_be_judged(tmp_path: Path) -> None:
    found = fed(keeper(tmp_path, replace(TRAINER, rule=GateRule(least=1000))))
    assert found.next() is None and found.run(1.0) is None and found.status()["round"] == 0


def test_a_candidate_that_the_gate_refuses_is_published_and_told_of(tmp_path: Path) -> None:
    found = fed(keeper(tmp_path, replace(TRAINER, rule=replace(RULE, margin=3.0))))
    submission = worked(found)
    assert submission is not None and not submission.verdict.passed and "not surely more than +3" in submission.verdict.reason
    assert submission.manifest.gate is not None and submission.manifest.gate["passed"] is False
    assert read_bundle(tmp_path / "artefacts" / "toy" / submission.manifest.version).manifest == submission.manifest
    status = found.status()
    assert status["gate"]["passed"] is False and "not surely more than +3" in status["outcome"]
    assert status["waiting_for"] == 2 * SETTINGS.least_tokens and status["candidates"] == {"passed": 0, "rejected": 1}
    assert submission.verdict.difference > 0 and found.domains[""].refresher.further is not None, "it was better: it is trained further"


def test_the_history_tells_of_a_candidate_that_the_gate_refused(tmp_path: Path) -> None:
    found = fed(keeper(tmp_path, replace(TRAINER, rule=replace(RULE, margin=3.0))))
    registry = RegistryKeeper(open_state(f"sqlite:///{tmp_path}/state.db"), found.domains[""].place.artefacts)
    registry.register("toy", BASE, *published(tmp_path, 0))
    refused = worked(found)
    assert refused is not None
    registry.submit("toy", refused.url, refused.manifest, refused.verdict, "trainer", against=refused.against)
    last = registry.history("toy")[-1]
    assert (last["action"], last["who"], last["version"]) == ("submit", "trainer", refused.manifest.version)
    assert last["states"] == {refused.manifest.version: "rejected"} and "not surely more than +3" in last["why"]
    assert registry.state("toy")["canary"] is None and last["from"] == last["to"] != refused.manifest.version


def test_what_cannot_be_published_is_tried_again(tmp_path: Path) -> None:
    found = fed(keeper(tmp_path))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bundles").write_text("in the way")
    with pytest.raises(OSError, match="bundles"):
        worked(found)
    (tmp_path / "work" / "bundles").unlink()
    submission = worked(found)
    assert found.status()["candidates"]["passed"] == 1  # though it was judged twice
    assert submission is not None and read_bundle(tmp_path / "artefacts" / "toy" / submission.manifest.version)
    assert not list((tmp_path / "work" / "bundles").iterdir())  # what is published is not kept here too


def test_traces_of_another_base_are_counted_and_left_out(tmp_path: Path) -> None:
    found = keeper(tmp_path)
    found.add(b"nothing")
    found.add(replace(many(1)[0], model="other").to_bytes())
    assert found.status()["invalid"] == 2 and found.status()["traces"]["seen"] == 0


def test_a_restarted_trainer_ends_in_the_same_candidate(tmp_path: Path) -> None:
    whole = worked(fed(keeper(tmp_path / "whole")))
    cut = fed(keeper(tmp_path / "cut"))
    while cut.domains[""].refresher.standing.step < 13:
        cut.run(0.0)
    cut.save()
    again = keeper(tmp_path / "cut")
    assert again.domains[""].refresher.standing.step == 13 and again.status()["traces"] == cut.status()["traces"]
    resumed = worked(again)
    assert whole is not None and resumed is not None
    assert whole.manifest.version == resumed.manifest.version
    (tmp_path / "cut" / "work" / "traces").write_bytes(b"\x10")
    assert keeper(tmp_path / "cut").status()["traces"]["seen"] == 0


def test_a_candidate_that_never_reached_the_registry_is_submitted_again(tmp_path: Path) -> None:
    found = fed(keeper(tmp_path))
    while (submission := found.run(0.05)) is None:
        pass
    again = found.run(0.05)
    found.save()
    after = worked(keeper(tmp_path))
    assert again is not None and after is not None
    assert submission.manifest == again.manifest == after.manifest


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """Workers that are stopped at the end."""
    started: list[Worker] = []

    def make(found: TrainerKeeper, submit: Callable[[Submission], None], **settings: object) -> Worker:
        worker = Worker(found, submit, dict, **settings)  # type: ignore[arg-type]
        started.append(worker)
        worker.start()
        return worker

    yield make
    for worker in started:
        worker.close()


def test_a_worker_makes_way_when_load_comes_and_goes_on_when_it_is_gone(tmp_path: Path, start: Callable[..., Worker]) -> None:
    endless = replace(SETTINGS, rate=1e-9, steps=10**9, patience=10**9)
    worker = start(keeper(tmp_path, replace(TRAINER, refresh=endless)), lambda found: None)
    worker.offer([trace.to_bytes() for trace in many(80)])
    wait_until(lambda: worker.status()["step"] > 3, 30)
    worker.load("replica", 2)
    wait_until(lambda: not worker.status()["working"], 30)
    status = worker.status()
    assert status["yields"] == 1 and 0 < status["slowest_yield"] < 5.0
    for index in range(80, 85):  # what comes in stays where it is, and nothing else is done
        worker.load("replica", 1)
        worker.offer([many(1, first=index)[0].to_bytes()])
    worker.forget(Selection(request="r-80")).result(30)
    wait_until(lambda: (found := worker.status()["traces"])["seen"] == 85 and found["dropped"] == 1, 30)  # all was read for that
    status = worker.status()
    worker.load("replica", 1)
    worker.offer([many(1, first=85)[0].to_bytes()])
    assert worker.status()["inbox"] == 1 and worker.status()["step"] == status["step"]
    worker.load("replica", 0)
    wait_until(lambda: worker.status()["traces"]["seen"] == 86, 30)
    wait_until(lambda: worker.status()["step"] > status["step"], 30)
    worker.pause(True)
    wait_until(lambda: not worker.status()["working"], 30)
    worker.pause(False)
    wait_until(lambda: worker.status()["working"], 30)


def test_training_rests_for_a_while_from_the_end_of_load_on(tmp_path: Path) -> None:
    """An unchanged load is not told again at once: until the report that it is gone it was there."""
    now = [1000.0]
    worker = Worker(keeper(tmp_path, replace(TRAINER, quiet=1.0)), lambda found: None, dict, lambda: now[0])
    worker.load("replica", 0)
    assert not worker.makes_way()
    worker.load("replica", 1)
    now[0] += 1.9
    worker.load("replica", 0)
    now[0] += 0.9
    worker.load("other", 0)
    assert not worker.busy() and worker.makes_way()
    now[0] += 0.2
    assert not worker.makes_way()


def test_a_replica_may_tell_its_load_while_loads_are_added_up(tmp_path: Path) -> None:
    """As from the actor's thread, while the worker's goes through them."""
    others = (f"replica-{index}" for index in range(3))

    class Now(float):
        def __sub__(self, at: float) -> float:
            if (other := next(others, None)) is not None:
                worker.load(other, 1)
            return float(self) - at

    worker = Worker(keeper(tmp_path), lambda found: None, dict, lambda: Now(1000.0))
    worker.load("replica", 1)
    assert worker.busy() and worker.busy() and len(worker.loads) == 4


def test_replicas_that_are_gone_are_not_kept(tmp_path: Path) -> None:
    now = [1000.0]
    worker = Worker(keeper(tmp_path), lambda found: None, dict, lambda: now[0])
    worker.load("one", 1)
    now[0] += TRAINER.believed
    worker.load("other", 0)
    assert not worker.busy() and worker.loads.keys() == {"other"}


@pytest.mark.parametrize("what", ["add", "next", "status"])
def test_what_goes_wrong_between_two_slices_is_told_of_and_tried_again(
    tmp_path: Path, start: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    found = keeper(tmp_path)
    well, broken = getattr(found, what), threading.Event()

    def failing(*arguments: object) -> Any:
        if broken.is_set():
            raise RuntimeError("out of order")
        return well(*arguments)

    monkeypatch.setattr(found, what, failing)
    worker = start(found, lambda submission: None)
    wait_until(lambda: worker.entered, 30)
    broken.set()
    data = [trace.to_bytes() for trace in many(80)]
    worker.offer(data[:1])
    wait_until(lambda: worker.status()["problem"] == "working: RuntimeError: out of order", 30)
    broken.clear()
    worker.offer(data[1:])
    wait_until(lambda: (status := worker.status())["step"] > 0 and not status["problem"], 30)


def test_a_slice_of_reading_ends_when_it_is_over(tmp_path: Path) -> None:
    """By a clock that is a second on at every look. A slice that is too short is one trace."""
    for slice, read in ((0.5, 1), (3.5, 4)):
        ticks = count()
        found = keeper(tmp_path, replace(TRAINER, slice=slice))
        worker = Worker(found, lambda submission: None, dict, lambda ticks=ticks: float(next(ticks)))
        worker.offer([trace.to_bytes() for trace in many(10)])
        worker.read()
        assert (len(remembered(found)), worker.status()["inbox"]) == (read, 10 - read)


def test_what_is_unread_when_it_ends_is_saved(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start(keeper(tmp_path), lambda found: None)
    worker.load("replica", 1)
    worker.offer([trace.to_bytes() for trace in many(5)])
    assert worker.status()["inbox"] == 5
    worker.close()
    assert remembered(keeper(tmp_path)) == {f"r-{i}-0" for i in range(5)}


def remembered(found: TrainerKeeper) -> set[str]:
    return {trace.request for trace in (*found.buffer.training(""), *found.buffer.held_out(""))}


@pytest.mark.parametrize("phase", ["training", "judging"])
def test_what_is_forgotten_is_gone_from_memory_round_and_disk(tmp_path: Path, phase: str) -> None:
    found = fed(keeper(tmp_path))
    while found.status()["phase"] != phase:
        found.run(0.0)
    found.save()
    assert found.forget(Selection(model="other")) == found.forget(Selection(request="nothing")) == 0
    assert found.status()["phase"] == phase  # nothing was forgotten, nothing is dropped
    assert found.forget(Selection(key="somebody", before=40.0)) == 40
    assert found.domains[""].trial is None and found.status()["phase"] == "waiting" and "40 traces" in found.status()["outcome"]
    after = keeper(tmp_path)
    assert remembered(after) == remembered(found) == {f"r-{i}-0" for i in range(40, 80)}
    assert after.status()["phase"] == "waiting"


@pytest.mark.parametrize("phase", ["training", "judging"])
def test_what_the_buffer_let_go_of_is_forgotten_in_the_round_that_goes_on_with_it(tmp_path: Path, phase: str) -> None:
    found = fed(keeper(tmp_path))
    while found.status()["phase"] != phase:
        found.run(0.0)
    pick = found.buffer.choosing if phase == "training" else found.buffer.judging
    gone = pick("")[0].request
    found.buffer.forget(lambda trace: trace.request == gone)  # as for want of room
    assert found.status()["phase"] == phase
    assert found.forget(Selection(request=gone)) == 0 and found.status()["phase"] == "waiting"
    assert "1 traces" in found.status()["outcome"]


def test_what_memory_dropped_already_is_forgotten_on_the_disk_too(tmp_path: Path) -> None:
    found = fed(keeper(tmp_path))
    found.save()
    found.buffer.domains.clear()
    assert found.forget(Selection()) == 0 and remembered(keeper(tmp_path)) == set()


def test_all_choices_of_a_request_are_forgotten(tmp_path: Path) -> None:
    found = keeper(tmp_path)
    for name in ("cmpl-7-0", "cmpl-7-11", "cmpl-70-0", "cmpl-71"):
        found.add(make_trace(name).to_bytes())
    assert found.forget(Selection(request="cmpl-7")) == 2 and remembered(found) == {"cmpl-70-0", "cmpl-71"}
    assert found.forget(Selection(request="cmpl-70-0")) == 1


def test_a_paused_worker_forgets_what_came_before_it_was_asked(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start(keeper(tmp_path, replace(TRAINER, quiet=600.0, poll=600.0)), lambda found: None)  # it sleeps until it is woken
    worker.pause(True)
    worker.offer([trace.to_bytes() for trace in many(30)])
    assert worker.forget(Selection(before=20.0)).result(30) == 20
    assert remembered(worker.keeper) == {f"r-{i}-0" for i in range(20, 30)} == remembered(keeper(tmp_path))


def test_a_worker_that_cannot_clear_its_disk_says_so_and_goes_on(tmp_path: Path, start: Callable[..., Worker]) -> None:
    worker = start(fed(keeper(tmp_path), 5), lambda found: None)
    (tmp_path / "work" / "traces").mkdir(parents=True)
    with pytest.raises(OSError, match="cannot write"):
        worker.forget(Selection()).result(30)
    assert remembered(worker.keeper) == set()
    wait_until(lambda: "cannot write" in worker.status()["problem"], 30)  # it is tried again
    (tmp_path / "work" / "traces").rmdir()
    wait_until(lambda: (tmp_path / "work" / "traces").is_file() and not worker.status()["problem"], 30)
    assert worker.forget(Selection()).result(30) == 0 and remembered(keeper(tmp_path)) == set()


def test_a_restarted_trainer_is_still_paused(tmp_path: Path, start: Callable[..., Worker]) -> None:
    first = start(keeper(tmp_path), lambda found: None)
    first.pause(True)
    first.close()
    again = start(keeper(tmp_path), lambda found: None)
    again.offer([trace.to_bytes() for trace in many(80)])
    wait_until(lambda: again.status()["traces"]["seen"] == 80, 30)
    assert again.status()["paused"] and again.status()["round"] == 0
    again.pause(False)
    wait_until(lambda: again.status()["step"] > 0, 30)
    again.close()
    for written, paused in ((b"false", False), (b"", True)):
        assert (tmp_path / "work" / "paused").read_bytes() == b"false"
        (tmp_path / "work" / "paused").write_bytes(written)
        last = Worker(keeper(tmp_path), lambda found: None, dict)
        last.enter()
        assert last.status()["paused"] == paused
        last.folder.lock.leave()


def test_a_pause_that_cannot_be_written_holds_until_a_restart(tmp_path: Path) -> None:
    (tmp_path / "work").write_text("in the way")
    worker = Worker(keeper(tmp_path / "other"), lambda found: None, dict)
    worker.enter()
    worker.keeper.work = tmp_path / "work"
    with pytest.raises(OSError, match="paused"):
        worker.pause(True)
    assert worker.status()["paused"]


def test_a_checkpoint_that_cannot_be_written_is_told_of_until_one_is(tmp_path: Path, start: Callable[..., Worker]) -> None:
    """Training goes on meanwhile."""
    endless = replace(SETTINGS, rate=1e-9, steps=10**9, patience=10**9)
    (tmp_path / "work" / "traces").mkdir(parents=True)  # in the way
    worker = start(keeper(tmp_path, replace(TRAINER, refresh=endless)), lambda found: None)
    worker.offer([trace.to_bytes() for trace in many(80)])
    wait_until(lambda: "traces" in worker.status()["problem"], 30)
    step = worker.status()["step"]
    wait_until(lambda: (status := worker.status())["step"] > step + 3 and "cannot write" in status["problem"], 30)
    (tmp_path / "work" / "traces").rmdir()
    wait_until(lambda: not worker.status()["problem"], 30)
    assert remembered(keeper(tmp_path)) == remembered(worker.keeper)


def test_a_checkpoint_is_written_in_slices_and_given_up_for_what_is_to_be_forgotten(tmp_path: Path) -> None:
    """By a clock that is a second on at every look, so that a slice is one trace."""
    ticks = count()
    worker = Worker(fed(keeper(tmp_path)), lambda found: None, dict, lambda: float(next(ticks)))
    partial, turns = tmp_path / "work" / "traces.partial", 0
    while worker.saving is None:
        worker.work(worker.keeper.next())
    while not partial.exists() or turns < 5:
        worker.work(worker.keeper.next())
        turns += 1
    done = worker.forget(Selection(before=20.0))
    worker.read()
    assert done.result(0) == 20 and not partial.exists()
    assert remembered(keeper(tmp_path)) == {f"r-{i}-0" for i in range(20, 80)}
    while worker.saving is None:
        worker.work(worker.keeper.next())
    while worker.saving is not None:
        worker.work(worker.keeper.next())
        turns += 1
    assert turns > 60 and remembered(keeper(tmp_path)) == remembered(worker.keeper)


def test_no_checkpoint_is_written_while_it_makes_way(tmp_path: Path) -> None:
    """Nor begun or gone on with in the quiet time after load."""
    now = [1000.0]
    worker = Worker(fed(keeper(tmp_path, replace(TRAINER, quiet=5.0, slice=0.0))), lambda found: None, dict, lambda: now[0])
    worker.unsaved = True
    worker.load("replica", 1)
    worker.load("replica", 0)
    assert not worker.busy() and not worker.writes()
    now[0] += 5.0
    assert worker.writes()
    worker.work(None)
    worker.load("replica", 1)
    worker.load("replica", 0)
    written = worker.saving
    assert written is not None and not worker.writes()
    worker.work(None)
    assert not (tmp_path / "work" / "traces.partial").exists()
    now[0] += 5.0
    worker.work(None)
    assert (tmp_path / "work" / "traces.partial").exists() and worker.saving is written


def test_a_worker_with_a_device_of_its_own_does_not_care(tmp_path: Path, start: Callable[..., Worker]) -> None:
    sent: list[Submission] = []
    worker = start(keeper(tmp_path, replace(TRAINER, running=None)), sent.append)
    worker.load("replica", 50)
    worker.offer([trace.to_bytes() for trace in many(80)])
    wait_until(lambda: sent, 60)
    assert worker.status()["yields"] == 0 and (tmp_path / "work" / "checkpoint.pt").is_file()


def test_what_came_in_is_saved_while_there_is_nothing_to_train_or_nobody_to_submit_to(tmp_path: Path, start: Callable[..., Worker]) -> None:
    def submit(found: Submission) -> None:
        raise ConnectionError("the registry is away")

    worker = start(keeper(tmp_path), submit)
    worker.offer([trace.to_bytes() for trace in many(5)])
    wait_until(lambda: (tmp_path / "work" / "traces").is_file() and remembered(keeper(tmp_path)) == {f"r-{i}-0" for i in range(5)}, 30)
    worker.offer([trace.to_bytes() for trace in many(75, first=5)])
    wait_until(lambda: worker.status()["problem"], 60)
    wait_until(lambda: keeper(tmp_path).status()["phase"] == "candidate", 30)


def test_a_registry_that_is_away_is_asked_again(tmp_path: Path, start: Callable[..., Worker]) -> None:
    sent: list[Submission] = []
    failures = iter(range(3))

    def submit(found: Submission) -> None:
        if next(failures, None) is not None:
            raise ConnectionError("the registry is away")
        sent.append(found)

    worker = start(keeper(tmp_path), submit)
    worker.offer([trace.to_bytes() for trace in many(80)])
    wait_until(lambda: worker.status()["problem"] == "ConnectionError: the registry is away", 60)
    wait_until(lambda: sent, 60)
    wait_until(lambda: worker.status()["problem"] == "", 60)


@pytest.mark.parametrize(("state", "outcome", "waits"), [("candidate", "candidate: ", 1), ("rejected", UNTAKEN, 2)])
def test_a_candidate_that_the_registry_rejects_is_as_one_that_the_gate_did(
    tmp_path: Path, start: Callable[..., Worker], state: str, outcome: str, waits: int
) -> None:
    worker = start(fed(keeper(tmp_path)), lambda found: state)
    status = wait_until(lambda: (found := worker.status())["candidates"]["passed"] and found, 60)
    assert status["outcome"].startswith(outcome) and status["waiting_for"] == waits * SETTINGS.least_tokens


def test_what_the_registry_says_of_a_candidate_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submission = worked(fed(keeper(tmp_path)))
    assert submission is not None
    artefacts = Artefacts(str(tmp_path / "artefacts"), tmp_path / "cache")
    registry = RegistryKeeper(open_state(f"sqlite:///{tmp_path}/state.db"), artefacts)
    registry.register("toy", replace(BASE, revision="r2"), *published(tmp_path, 0))
    monkeypatch.setattr("actors.trainer.ray.get", lambda answer: answer)
    handle = SimpleNamespace(submit=SimpleNamespace(remote=registry.submit))
    assert Registrar(lambda: handle, "toy", (), artefacts, BASE, WorkFolder(tmp_path / "work")).submit(submission) == "rejected"


def test_the_inbox_drops_the_oldest(tmp_path: Path) -> None:
    data = [trace.to_bytes() for trace in many(10)]
    worker = Worker(keeper(tmp_path, replace(TRAINER, inbox=sum(map(len, data[6:])))), lambda found: None, dict)
    worker.offer(data)
    assert list(worker.inbox) == data[6:] and worker.status()["dropped_before_reading"] == 6


def test_while_it_makes_way_traces_stay_where_they_are_unless_they_are_many(tmp_path: Path) -> None:
    data = [trace.to_bytes() for trace in many(10)]
    now = [1000.0]
    room = replace(TRAINER, inbox=3 * sum(map(len, data)), quiet=5.0)
    worker = Worker(keeper(tmp_path, room), lambda found: None, dict, lambda: now[0])
    assert not worker.reads()
    worker.load("replica", 1)
    worker.offer(data)
    assert not worker.reads() and worker.status()["inbox"] == 10
    worker.offer(data)
    assert worker.reads()
    worker.read()
    assert remembered(worker.keeper) == {f"r-{i}-0" for i in range(10)} and not worker.reads()
    worker.offer(data)
    worker.load("replica", 0)
    assert not worker.reads()
    now[0] += 5.0
    assert worker.reads()


AGED = replace(TRAINER, max_age=60.0, quiet=5.0, checkpoint=600.0)


def test_a_trace_is_kept_no_longer_than_what_was_answered(tmp_path: Path, start: Callable[..., Worker]) -> None:
    """Also where there is room for it, and on the disk, though the next checkpoint would be long off."""
    found = fed(keeper(tmp_path, AGED))
    found.save()
    found.now = lambda: 60.0
    assert not found.age() and len(remembered(found)) == 80
    found.now = lambda: 100.0
    start(found, lambda submission: None)
    wait_until(lambda: remembered(keeper(tmp_path)) == {f"r-{i}-0" for i in range(40, 80)}, 30)
    assert remembered(found) == {f"r-{i}-0" for i in range(40, 80)} and not found.age()


def test_what_is_too_old_goes_at_once_and_from_the_disk_when_serving_can_spare_it(tmp_path: Path) -> None:
    """What waits unread while it makes way is dropped where it is, and the rest of it is not read for that."""
    found, now = fed(keeper(tmp_path, AGED), 30), [1000.0]
    found.save()
    worker = Worker(found, lambda submission: None, dict, lambda: now[0])
    data = [b"nothing", *(trace.to_bytes() for trace in many(50, first=30))]
    worker.offer(data)
    worker.load("replica", 1)
    found.now = lambda: 100.0
    worker.go_round()
    assert remembered(found) == set() and list(worker.inbox) == [data[0], *data[11:]] and worker.waiting == sum(map(len, worker.inbox))
    assert worker.status()["dropped_before_reading"] == 10
    assert len(remembered(keeper(tmp_path))) == 30 and not (tmp_path / "work" / "traces.partial").exists()
    found.now = lambda: 110.0
    worker.load("replica", 0)
    now[0] += 5.0
    while worker.inbox or worker.saving or worker.writes():
        worker.go_round()
    assert remembered(keeper(tmp_path)) == {f"r-{i}-0" for i in range(40, 80)} and worker.status()["invalid"] == 1
    now[0] += 595.0
    worker.go_round()  # those that were too old when they were read
    assert remembered(found) == {f"r-{i}-0" for i in range(50, 80)}


def test_a_disk_that_does_not_let_go_of_what_is_too_old_is_told_of_and_tried_again(tmp_path: Path) -> None:
    found, now = fed(keeper(tmp_path, AGED)), [1000.0]
    worker = Worker(found, lambda submission: None, dict, lambda: now[0])
    (tmp_path / "work" / "traces").mkdir(parents=True)  # in the way
    worker.paused, worker.closing = True, True  # nothing else is done, and it does not wait between attempts
    found.now = lambda: 100.0
    for _ in range(2):
        worker.go_round()
    assert "cannot write" in worker.status()["problem"] and worker.unsaved
    (tmp_path / "work" / "traces").rmdir()
    now[0] += AGED.checkpoint
    while worker.status()["problem"] or worker.saving:
        worker.go_round()
    assert remembered(keeper(tmp_path)) == {f"r-{i}-0" for i in range(40, 80)}


@pytest.mark.parametrize(("max_age", "every"), [(60.0, 600.0), (30 * 86400.0, 0.01 * 30 * 86400.0)])
def test_a_long_age_is_not_looked_at_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_age: float, every: float) -> None:
    found, now, looks = keeper(tmp_path, replace(AGED, max_age=max_age)), [1000.0], list[float]()
    monkeypatch.setattr(found, "age", lambda: looks.append(now[0]))
    worker = Worker(found, lambda submission: None, dict, lambda: now[0])
    worker.paused, worker.closing = True, True
    for later in (0.0, 1.0, every - 1.0, 1.0, every - 2.0):
        now[0] += later
        worker.go_round()
    assert looks == [1000.0, 1000.0 + every]


@pytest.mark.parametrize("phase", ["training", "judging"])
def test_only_rounds_that_hold_a_trace_that_is_too_old_are_dropped(tmp_path: Path, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafters.refresh.PART", 8)
    found = keeper(tmp_path, AGED)
    for trace in many(80, first=1):
        found.add(trace.to_bytes())
    domain = found.domains[""]
    held = found.buffer.choosing("") if phase == "training" else found.buffer.judging("")
    while found.status()["phase"] != phase:
        found.run(0.0)
    found.run(0.0)
    assert domain.refresher.round is not None and (phase == "judging" or domain.refresher.round.under_way is not None)
    oldest = min(trace.at for trace in (*domain.refresher.round.held, *held))
    assert 1.0 < oldest < 40.0
    found.now = lambda: 60.0 + oldest
    assert found.age() and found.status()["phase"] == phase and min(trace.at for trace in found.buffer.training("")) > oldest
    assert domain.refresher.round.under_way is None  # it may have been of what is gone
    found.run(0.0)
    found.now = lambda: 60.5 + oldest
    assert found.age() and found.status()["phase"] == "waiting"
    assert found.status()["outcome"] == "dropped: 1 of its traces are older than they may be"


def test_what_replicas_lost_is_counted(tmp_path: Path) -> None:
    worker = Worker(keeper(tmp_path), lambda found: None, dict)
    for lost in (2, 0, 3, -7):
        worker.offer([], lost)
    assert worker.status()["lost_by_replicas"] == 5


def test_the_version_that_serves_is_taken_over(tmp_path: Path) -> None:
    other = speculator(5)
    answers = iter([{"": Subject(other, "0123456789ab")}])
    worker = Worker(fed(keeper(tmp_path)), lambda found: None, lambda: next(answers, {}))
    worker.start()
    wait_until(lambda: worker.status()["version"] == "0123456789ab", 30)
    worker.close()
    assert same(worker.keeper.domains[""].refresher.live, other)


def test_a_buffer_too_small_to_judge_by_is_told_of_with_what_would_do(tmp_path: Path) -> None:
    """And that much does."""
    size = make_trace().nbytes
    small = replace(TRAINER, buffer=replace(TRAINER.buffer, budget=20 * size))
    found = keeper(tmp_path, small)
    assert found.status()["judging"] == {"requests": 0, "wanted": RULE.least} and found.status()["reason"] == ""
    for trace in many(100):
        found.add(trace.to_bytes())
    few, reason = found.status()["judging"]["requests"], found.status()["reason"]
    assert found.next() is None and 0 < few < RULE.least
    wanted = found.buffer.budget_for("", RULE.least)
    assert wanted == pytest.approx(2.4 * RULE.least * size / 0.4, rel=0.01)
    assert f"full with {few} requests to judge by, the gate wants {RULE.least}: buffer_bytes is" in reason
    assert f"about {wanted / 2**20:.3g}MiB would do" in reason
    enough = fed(keeper(tmp_path / "enough", replace(small, buffer=replace(small.buffer, budget=wanted))), 200)
    assert enough.next() is not None and enough.status()["judging"]["requests"] >= RULE.least and enough.status()["reason"] == ""
    found.forget(Selection())
    assert found.status()["reason"] == ""


# -- domains ----------------------------------------------------------------------------------------------------------------

APART = replace(TRAINER, buffer=replace(TRAINER.buffer, tags=("law", "sql")))


def spread(found: TrainerKeeper, traces: int = 80, tags: tuple[str, ...] = ("", "law", "sql"), first: int = 0) -> TrainerKeeper:
    """So many traces of each tag."""
    for place, tag in enumerate(tags):
        for trace in many(traces, tag=tag, first=first + 1000 * place):
            found.add(trace.to_bytes())
    return found


def submitted(found: TrainerKeeper) -> list[Submission]:
    """All that comes until there is nothing more to do."""
    submissions = []
    while found.next() is not None:
        if (submission := found.run(0.05)) is not None:
            found.settle(submission.tag)
            submissions.append(submission)
    return submissions


def test_every_domain_is_trained_on_its_own_traces(tmp_path: Path) -> None:
    found = spread(keeper(tmp_path, APART))
    submissions = submitted(found)
    assert [s.tag for s in submissions] == ["", "law", "sql"] == [s.manifest.tag for s in submissions]
    assert len({s.manifest.version for s in submissions}) == 3
    for place, submission in enumerate(submissions):
        training = found.buffer.training(submission.tag)
        assert submission.manifest.data.requests == len(training) > 0
        assert submission.manifest.data.first == min(t.at for t in training) >= 1000.0 * place
    alone = worked(fed(keeper(tmp_path / "alone")))
    assert alone is not None and alone.manifest.version == submissions[0].manifest.version  # as without domains
    status = found.status()
    assert status["tag"] == "" and set(status["domains"]) == {"law", "sql"}
    assert all(
        s["round"] == 1 and s["candidates"]["passed"] == 1 and s["traces"]["seen"] == 80 for s in (status, *status["domains"].values())
    )
    assert sum(s["traces"]["bytes"] for s in (status, *status["domains"].values())) == found.buffer.nbytes


def test_domains_take_turns_and_none_waits_for_ever(tmp_path: Path) -> None:
    """All have something to do at any time: the one with most fresh traces begins, and after that who has waited longest."""
    short = replace(SETTINGS, steps=1, interval=1, least_tokens=0, least_gain=99.0)
    found = keeper(tmp_path, replace(APART, refresh=short))
    for tag, traces in (("", 60), ("law", 70), ("sql", 80)):
        spread(found, traces, (tag,), first=traces * 100)
    begun: list[str] = []
    while len(begun) < 9:
        domain = found.next()
        assert domain is not None and not any(other.busy for other in found.domains.values() if other is not domain)
        if not domain.busy:
            begun.append(domain.tag)
            spread(found, 5, ("sql",), first=100 * len(begun))
        found.run(0.0)
    assert begun == ["sql", "law", ""] * 3


def test_a_domain_whose_candidate_nobody_takes_holds_up_no_other(tmp_path: Path) -> None:
    found = spread(keeper(tmp_path, APART))
    told: list[str] = []
    while len(told) < 6:
        if (submission := found.run(0.05)) is not None:
            told.append(submission.tag)
            if submission.tag != "":
                found.settle(submission.tag)
    assert told == ["", "law", "sql", "", "", ""]  # tried again when the others had their turns
    assert found.status()["phase"] == "judging" and found.status()["domains"]["law"]["phase"] == "waiting"


def test_every_domain_comes_to_its_candidate_while_none_can_be_published(tmp_path: Path) -> None:
    found = spread(keeper(tmp_path, APART))
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "bundles").write_text("in the way")
    failures = 0
    while failures < 6:
        try:
            assert found.run(0.05) is None
        except OSError:
            failures += 1
    status = found.status()
    assert all(s["phase"] == "judging" and s["round"] == 1 for s in (status, *status["domains"].values()))
    (tmp_path / "work" / "bundles").unlink()
    assert [submission.tag for submission in submitted(found)] == ["", "law", "sql"]


def test_a_round_that_cannot_go_on_ends_and_holds_up_no_other(tmp_path: Path) -> None:
    found = spread(keeper(tmp_path, APART))
    while found.domains[""].refresher.standing.step < 3:
        found.run(0.0)
    held = {trace.request for trace in found.buffer.held_out("")}
    found.buffer.forget(lambda trace: trace.tag == "" and trace.request not in held)  # as for want of room
    with pytest.raises(ValueError, match="nothing to learn from"):
        found.run(0.0)
    assert "nothing to learn from" in found.status()["outcome"]
    assert [submission.tag for submission in submitted(found)] == ["law", "sql"]


def test_a_version_of_one_domain_leaves_the_others_rounds(tmp_path: Path) -> None:
    found = spread(keeper(tmp_path, APART), tags=("law",))
    while found.domains["law"].refresher.standing.step < 3:
        found.run(0.0)
    other = speculator(5)
    found.serve("", Subject(other, "0123456789ab"))
    assert found.status()["version"] == "0123456789ab" and found.domains["law"].refresher.standing.step >= 3
    found.serve("sql", Subject(speculator(5), "0123456789ab"))
    assert found.domains["sql"].refresher.live is found.domains[""].refresher.live is other  # once in memory
    found.serve("law", Subject(speculator(6), "ba9876543210"))
    assert found.status()["domains"]["law"]["phase"] == "waiting" and found.domains["law"].refresher.version == "ba9876543210"


def test_forgetting_drops_only_the_rounds_that_began_with_what_is_forgotten(tmp_path: Path) -> None:
    found = spread(keeper(tmp_path, APART))
    while found.domains["sql"].refresher.standing.step < 3:
        if (submission := found.run(0.0)) is not None:
            found.settle(submission.tag)
    assert found.forget(Selection(tag="law")) == 80 and found.domains["sql"].refresher.standing.step >= 3
    assert not found.buffer.training("law") and found.buffer.training("sql")
    assert found.forget(Selection(tag="sql", before=2040.0)) == 40 and found.domains["sql"].refresher.phase == "waiting"
    assert found.forget(Selection(tag="other")) == 0


def test_a_restarted_trainer_goes_on_in_every_domain_and_forgets_those_that_are_none_any_more(tmp_path: Path) -> None:
    found = spread(keeper(tmp_path, APART))
    while found.domains["sql"].refresher.standing.step < 3:
        if (submission := found.run(0.0)) is not None:
            found.settle(submission.tag)
    found.save()
    again = keeper(tmp_path, APART)
    assert again.domains["sql"].refresher.standing == found.domains["sql"].refresher.standing
    assert (tag := again.next()) is not None and tag.tag == "sql" and again.domains["law"].refresher.rounds == 1
    fewer = keeper(tmp_path, replace(TRAINER, buffer=replace(TRAINER.buffer, tags=("law",))))
    assert sorted(file.name for file in (tmp_path / "work").glob("checkpoint*")) == ["checkpoint-law.pt", "checkpoint.pt"]
    assert fewer.status()["traces"]["seen"] == 160 and fewer.status()["domains"]["law"]["traces"]["seen"] == 80


def test_a_domain_begins_with_what_the_common_line_serves(tmp_path: Path) -> None:
    live, own = speculator(), speculator(5)
    artefacts = Artefacts(str(tmp_path / "artefacts"), tmp_path / "cache")
    subjects = {"": Subject(live, "v0"), "sql": Subject(own, "v5")}
    found = TrainerKeeper("toy", BASE, lambda: subjects, artefacts, tmp_path / "work", APART)
    found.begin()
    assert {tag: domain.refresher.version for tag, domain in found.domains.items()} == {"": "v0", "law": "v0", "sql": "v5"}
    assert found.domains["law"].refresher.live is live and found.domains["sql"].refresher.live is own


# -- what is refreshed ------------------------------------------------------------------------------------------------------


def registrar(tmp_path: Path, registry: RegistryKeeper | None, monkeypatch: pytest.MonkeyPatch, tags: tuple[str, ...] = ()) -> Registrar:
    """As a trainer's that starts now; without a registry it is away."""
    monkeypatch.setattr("actors.trainer.ray.get", lambda answer: answer)

    def find() -> Any:
        if registry is None:
            raise ValueError("the registry is away")
        return SimpleNamespace(submit=SimpleNamespace(remote=registry.submit), parents=SimpleNamespace(remote=registry.parents))

    artefacts = Artefacts(str(tmp_path / "artefacts"), tmp_path / "work" / "cache")
    return Registrar(find, "toy", tags, artefacts, BASE, WorkFolder(tmp_path / "work"))


def registered(tmp_path: Path, *promoted: int, tags: tuple[str, ...] = ()) -> tuple[RegistryKeeper, list[str]]:
    """A registry with the configured speculator, of seed 0, and others that were promoted after it; all their versions."""
    registry = RegistryKeeper(open_state(f"sqlite:///{tmp_path}/state.db"), Artefacts(str(tmp_path / "artefacts"), tmp_path / "registry"))
    configured, bundles = published(tmp_path, 0), [published(tmp_path, seed) for seed in promoted]
    registry.register("toy", BASE, *configured, tags)
    for bundle in bundles:
        registry.submit("toy", *bundle, PASSED, "operator")
        registry.promote("toy", bundle[1].version, "operator")
    return registry, [manifest.version for _, manifest in (configured, *bundles)]


def versions_of(subjects: Mapping[str, Subject]) -> dict[str, str]:
    return {tag: subject.version for tag, subject in subjects.items()}


def begun(tmp_path: Path, found: Registrar, version: str, settings: TrainerSettings = TRAINER) -> TrainerKeeper:
    """A trainer on the folder `work`, configured with the speculator of seed 0 and this version."""
    first = partial(found.first, str(tmp_path / "published-0"), version)
    made = TrainerKeeper("toy", BASE, first, found.artefacts, tmp_path / "work", settings, now=partial(next, count(7.0)))
    made.begin()
    return made


@pytest.mark.parametrize("phase", ["training", "candidate"])
def test_a_trainer_that_starts_while_the_registry_is_away_goes_on_with_what_it_refreshed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Also while the place of bundles is."""
    registry, (configured, live) = registered(tmp_path, 5)
    found = fed(begun(tmp_path, registrar(tmp_path, registry, monkeypatch), configured))
    assert found.status()["version"] == live
    while found.domains[""].refresher.phase != phase:
        found.run(0.0)
    found.save()
    (tmp_path / "artefacts").rename(tmp_path / "away")
    again = begun(tmp_path, registrar(tmp_path, None, monkeypatch), configured)
    assert again.status()["version"] == live and again.domains[""].refresher.standing == found.domains[""].refresher.standing
    (tmp_path / "away").rename(tmp_path / "artefacts")
    whole, resumed = worked(found), worked(again)
    assert whole is not None and resumed is not None and whole.against == resumed.against == live
    assert whole.manifest.version == resumed.manifest.version


def test_what_is_refreshed_is_kept_for_every_domain_whenever_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, (configured, live) = registered(tmp_path, 5, tags=("law", "sql"))
    running = registrar(tmp_path, registry, monkeypatch, ("law", "sql"))
    running.first(str(tmp_path / "published-0"), configured)
    own = published(tmp_path, 6)
    registry.submit("toy", *own, PASSED, "operator", tag="law")
    assert versions_of(running.parents()) == {"law": own[1].version}
    away = registrar(tmp_path, None, monkeypatch, ("law", "sql"))
    assert versions_of(away.first(str(tmp_path / "published-0"), configured)) == {"": live, "law": own[1].version, "sql": live}


@pytest.mark.parametrize("kept", [None, b"", b"[]", b'{"": {"placement": {"version": "v"}, "pinned": false}}'])
def test_a_trainer_that_knows_nothing_of_what_it_refreshed_begins_with_the_configured_speculator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: bytes | None
) -> None:
    _, (configured, _) = registered(tmp_path, 5)
    if kept is not None:
        (tmp_path / "work").mkdir()
        (tmp_path / "work" / "parents.json").write_bytes(kept)
    found = registrar(tmp_path, None, monkeypatch).first(str(tmp_path / "published-0"), configured)
    assert versions_of(found) == {"": configured}


def test_what_is_refreshed_is_followed_though_it_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry, (configured, live) = registered(tmp_path, 5)
    running = registrar(tmp_path, registry, monkeypatch)
    (tmp_path / "work" / "parents.json").mkdir(parents=True)  # in the way
    assert running.first(str(tmp_path / "published-0"), configured)[""].version == live
    (tmp_path / "work" / "parents.json").rmdir()
    assert running.parents() == {} and running.work.remembered()[""].placement.version == live


@pytest.mark.parametrize("phase", ["training", "judging"])
def test_nothing_is_trained_in_a_pinned_line_until_it_is_unpinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    registry, (configured, live) = registered(tmp_path, 5, tags=("law", "sql"))
    running = registrar(tmp_path, registry, monkeypatch, ("law", "sql"))
    found = spread(begun(tmp_path, running, configured, APART), tags=("", "sql"))
    while found.status()["phase"] != phase:
        found.run(0.0)
    registry.pin("toy", live, "operator", "stay")
    for tag, subject in running.parents().items():
        found.serve(tag, subject)
    status = found.status()
    assert (status["phase"], status["version"], status["reason"]) == ("waiting", live, PINNED) and found.domains[""].bundle is None
    (submission,) = submitted(found)  # a domain without a version of its own goes on from what is pinned
    assert (submission.tag, submission.against) == ("sql", live) and found.status()["domains"]["sql"]["reason"] == ""
    spread(found, tags=("",), first=100)
    assert found.next() is None and found.status()["traces"]["seen"] == 160 and found.status()["round"] == 1
    registry.unpin("toy", "operator", "go on")
    for tag, subject in running.parents().items():
        found.serve(tag, subject)
    assert [(s.tag, s.against) for s in submitted(found)] == [("", live)] and found.status()["reason"] == ""


def test_a_line_that_was_pinned_is_so_at_a_start_without_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a checkpoint from before it was."""
    registry, (configured, live) = registered(tmp_path, 5)
    running = registrar(tmp_path, registry, monkeypatch)
    found = fed(begun(tmp_path, running, configured))
    while found.domains[""].refresher.standing.step < 3:
        found.run(0.0)
    found.save()
    registry.pin("toy", live, "operator", "stay")
    running.parents()
    again = begun(tmp_path, registrar(tmp_path, None, monkeypatch), configured)
    assert again.next() is None and (again.status()["phase"], again.status()["reason"]) == ("waiting", PINNED)
    assert again.status()["traces"]["seen"] == 80


def claimed(tmp_path: Path, base: Base) -> TrainerKeeper:
    """A trainer of this base on the folder `work`, which is made its own."""
    WorkFolder(tmp_path / "work").claim(base)
    return keeper(tmp_path)


@pytest.mark.parametrize("other", [replace(BASE, revision="r2"), replace(BASE, name="other-base")])
def test_what_another_base_left_is_gone_from_before_anything_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture, other: Base) -> None:
    """Though it has the same shape."""
    found = fed(claimed(tmp_path, BASE))
    while found.domains[""].refresher.standing.step < 3:
        found.run(0.0)
    found.save()
    WorkFolder(tmp_path / "work").remember({"": Parent(Placement("v", "url", "sum"))})
    assert claimed(tmp_path, BASE).domains[""].refresher.standing == found.domains[""].refresher.standing and not caplog.records
    begun = claimed(tmp_path, other)
    assert remembered(begun) == set() and begun.status()["round"] == begun.status()["traces"]["seen"] == 0
    assert WorkFolder(tmp_path / "work").remembered() == {}
    assert all(f"'{base.name}', 'revision': '{base.revision}'" in caplog.text for base in (BASE, other))
    fed(begun).save()
    assert len(remembered(claimed(tmp_path, other))) == 80


def test_a_folder_is_of_the_old_base_until_all_that_is_left_of_it_is_gone(tmp_path: Path) -> None:
    fed(claimed(tmp_path, BASE)).save()
    work, other = tmp_path / "work", replace(BASE, revision="r2")
    (work / "checkpoint-law.pt").mkdir()  # it cannot be deleted as a file is
    with pytest.raises(OSError):
        claimed(tmp_path, other)
    assert WorkFolder(work).owner() == {"name": BASE.name, "revision": BASE.revision}
    (work / "checkpoint-law.pt").rmdir()
    assert remembered(claimed(tmp_path, other)) == set()


def test_a_folder_that_says_nothing_of_its_base_is_taken_over_and_one_that_says_nonsense_is_not(tmp_path: Path) -> None:
    fed(keeper(tmp_path)).save()
    assert len(remembered(claimed(tmp_path, BASE))) == 80
    (tmp_path / "work" / "base.json").write_bytes(b"{")
    assert remembered(claimed(tmp_path, BASE)) == set()


# -- one trainer at a time --------------------------------------------------------------------------------------------------


def unbegun(tmp_path: Path, settings: TrainerSettings = TRAINER) -> TrainerKeeper:
    artefacts = Artefacts(str(tmp_path / "artefacts"), tmp_path / "cache")
    return TrainerKeeper("toy", BASE, lambda: {"": Subject(speculator(), "v1")}, artefacts, tmp_path / "work", settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def test_a_second_trainer_leaves_the_folder_alone_until_the_first_ends(tmp_path: Path, start: Callable[..., Worker]) -> None:
    """It then goes on from what the first one saved, and reads what came to it meanwhile."""
    first = start(unbegun(tmp_path), lambda found: None)
    first.offer([trace.to_bytes() for trace in many(30)])
    first.pause(True)
    wait_until(lambda: first.status()["traces"]["seen"] == 30 and (tmp_path / "work" / "traces").is_file() and not first.unsaved, 30)
    wait_until(lambda: not first.status()["working"], 30)
    before, data = contents(tmp_path / "work"), [trace.to_bytes() for trace in many(13, first=30)]
    second = start(unbegun(tmp_path, replace(TRAINER, inbox=sum(map(len, data[3:])))), lambda found: None)
    wait_until(lambda: "another trainer uses" in second.status()["problem"], 30)
    second.offer(data)
    with pytest.raises(InUse, match="another trainer uses"):
        second.forget(Selection()).result(30)
    assert {"phase": "waiting", "inbox": 10, "dropped_before_reading": 3, "paused": False}.items() <= second.status().items()
    assert second.status()["traces"]["seen"] == 0 and contents(tmp_path / "work") == before
    first.close()
    status = wait_until(lambda: (found := second.status())["traces"]["seen"] == 40 and found, 30)
    assert status["paused"] and not status["problem"] and status["version"] == "v1"  # as the first was
    assert second.forget(Selection(before=20.0)).result(30) == 20


@pytest.mark.parametrize("paused", [True, False])
def test_a_pause_before_the_folder_is_free_is_written_when_it_is(tmp_path: Path, start: Callable[..., Worker], paused: bool) -> None:
    first = start(unbegun(tmp_path), lambda found: None)
    wait_until(lambda: first.entered, 30)
    first.pause(not paused)
    second = start(unbegun(tmp_path), lambda found: None)
    wait_until(lambda: second.status()["problem"], 30)
    second.pause(paused)
    assert second.status()["paused"] == paused and (tmp_path / "work" / "paused").read_text() == str(not paused).lower()
    first.close()
    wait_until(lambda: not second.status()["problem"], 30)
    assert second.status()["paused"] == paused and (tmp_path / "work" / "paused").read_text() == str(paused).lower()


def test_a_trainer_that_never_had_the_folder_ends_without_touching_it(tmp_path: Path) -> None:
    holder = FolderLock(tmp_path / "work")
    holder.enter()
    worker = Worker(unbegun(tmp_path), lambda found: None, dict)
    worker.start()
    wait_until(lambda: worker.status()["problem"], 30)
    worker.offer([many(1)[0].to_bytes()])
    worker.close()
    assert set(contents(tmp_path / "work")) == {"lock"}


def test_a_folder_is_free_once_its_trainer_was_killed(tmp_path: Path) -> None:
    """As the kernel sees to."""
    entering = "work = FolderLock(pathlib.Path(sys.argv[1])); work.enter(); print(1, flush=True); input()"
    code = f"import pathlib, sys; from actors.folder_lock import FolderLock; {entering}"
    root = Path(__file__).parents[2]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=root, **pipes) as process:
        assert process.stdout is not None
        held, folder = process.stdout.readline(), FolderLock(tmp_path)
        with pytest.raises(InUse):
            folder.enter()
        process.kill()
        process.wait()
        assert held == b"1\n"
        folder.enter()
        folder.leave()


def test_where_files_cannot_be_locked_nobody_is_kept_out_and_the_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("actors.folder_lock.fcntl.flock", flock)
    for folder in (FolderLock(tmp_path), FolderLock(tmp_path)):
        folder.enter()
    assert "cannot be locked" in caplog.text


def test_what_keeps_a_trainer_from_beginning_is_told_of_and_tried_again(tmp_path: Path, start: Callable[..., Worker]) -> None:
    (tmp_path / "work").write_text("in the way")
    worker = start(unbegun(tmp_path), lambda found: None)
    worker.offer([trace.to_bytes() for trace in many(5)])
    wait_until(lambda: "FileExistsError" in worker.status()["problem"], 30)
    (tmp_path / "work").unlink()
    wait_until(lambda: (status := worker.status())["traces"]["seen"] == 5 and not status["problem"], 30)


@pytest.mark.cluster
def test_on_a_cluster_a_refreshed_speculator_reaches_the_registry(cluster: None, tmp_path: Path) -> None:
    artefacts, configured = str(tmp_path / "artefacts"), published(tmp_path, 0)
    registry = started_registry(tmp_path)
    ray.get(registry.register.remote("toy", BASE, *configured, ("law", "sql")))
    version, folder = configured[1].version, str(tmp_path / "published-0")
    trainer = start_trainer("toy", BASE, folder, version, artefacts, str(tmp_path / "work"), "registry-t", APART)
    try:
        ray.get(trainer.add.remote([trace.to_bytes() for trace in many(80, tag="law")]))
        (found,) = wait_until(lambda: versions(registry, "law"), 90)
        status = wait_until(lambda: judged(trainer, "law"), 30)
        assert status["gate"]["passed"] and versions(registry, "") == {version}
        assert [c["states"] for c in ray.get(registry.history.remote("toy", None, "law"))][1:] == [{found: "candidate"}]
        wait_until(lambda: ray.get(trainer.status.remote())["domains"]["law"]["version"] == found, 30)  # it goes on from what may be tried
        ray.get(registry.retire.remote("toy", found, "operator", "not yet", tag="law"))
        wait_until(lambda: ray.get(trainer.status.remote())["domains"]["law"]["version"] == version, 30)
        ray.get(registry.promote.remote("toy", found, "operator", "for law", tag="law"))
        wait_until(lambda: ray.get(trainer.status.remote())["domains"]["law"]["version"] == found, 30)
        status = ray.get(trainer.status.remote())
        assert status["version"] == status["domains"]["sql"]["version"] == version
        ray.kill(registry)  # for good: whoever needs one starts another
        registry = started_registry(tmp_path)
        gone, other = published(tmp_path, 6), published(tmp_path, 5)
        for tag, bundle in (("sql", gone), ("", other)):
            ray.get(registry.submit.remote("toy", *bundle, PASSED, "operator", tag=tag))
        shutil.rmtree(gone[0].removeprefix("file://"))
        for tag, bundle in (("sql", gone), ("", other)):
            ray.get(registry.promote.remote("toy", bundle[1].version, "operator", tag=tag))
        status = wait_until(lambda: followed(trainer, other[1].version), 30)
        assert {tag: domain["version"] for tag, domain in status["domains"].items()} == {"law": found, "sql": version}
        assert "no bundle" in wait_until(lambda: ray.get(trainer.status.remote())["problem"], 30)
        ray.get(trainer.close.remote())
    finally:
        ray.kill(trainer)
        ray.kill(registry)


def started_registry(tmp_path: Path) -> Any:
    return start_registry(f"sqlite:///{tmp_path}/state.db", str(tmp_path / "artefacts"), str(tmp_path / "registry"), name="registry-t")


def published(tmp_path: Path, seed: int) -> tuple[str, Manifest]:
    """A speculator as a bundle: its URL and manifest."""
    speculator(seed).save_pretrained(folder := tmp_path / f"published-{seed}")
    bundle = adopt_folder(tmp_path / "bundles", folder, Origin(model="toy", base=BASE.name, base_revision=BASE.revision, created=1.0))
    return Artefacts(str(tmp_path / "artefacts"), tmp_path / "cache").publish(bundle), bundle.manifest


def followed(trainer: object, version: str) -> dict[str, Any]:
    """The status of training once the common domain goes on from a version, nothing before."""
    status: dict[str, Any] = ray.get(trainer.status.remote())  # type: ignore[attr-defined]
    return status if status["version"] == version else {}


def judged(trainer: object, tag: str) -> dict[str, Any]:
    """The status of a domain's training once the gate has decided, nothing before."""
    status = ray.get(trainer.status.remote())["domains"][tag]  # type: ignore[attr-defined]
    return status if status["gate"] else {}


def versions(registry: object, tag: str) -> set[str]:
    state = ray.get(registry.state.remote("toy", tag))  # type: ignore[attr-defined]
    return {release["version"] for release in state["versions"]}
