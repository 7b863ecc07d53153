"""Random weights of the right shapes on a real base: the text stays the same, the gate refuses them, a canary of them is rolled back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.artefacts import Artefacts
from actors.registry import RegistryKeeper, RegistrySettings
from actors.releases import Base, ReplicaReport
from drafters.bundle import Bundle, Origin, adopt_folder, write_bundle
from drafters.mlp import MLPSpeculator
from drafters.registry import build_drafter
from engine.drafter import Drafter
from engine.engine import Engine
from engine.loading import load_base
from engine.request import Request, Stats
from engine.sampling import SamplingParams
from engine.tree import Budget
from policies import Arm, CanaryRule, GateRule, Verdict
from policies.gate import Replayed, gate
from tests.actors.stand import MemoryState

MODEL = Path(__file__).parents[2] / "models" / "demo-code"
IDS = [f"cmpl-{i}-0" for i in range(48)]
PASSED = Verdict(True, 100, 2.0, 2.1, 0.1, 0.05, 0.15, "let through by hand")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    return load_base(str(MODEL), "cpu", torch.float32)


def answers(base, drafter: Drafter | None) -> dict[str, tuple[tuple[int, ...], Stats]]:
    """Every request's tokens and stats."""
    budget = Budget.of(drafter.max_depth, 1) if drafter else Budget.of(0, 1)
    engine = Engine(base, drafter, lambda load, candidates: [budget] * len(candidates), slots=4096, max_running=16, max_waiting=len(IDS))
    for i, name in enumerate(IDS):
        engine.submit(Request(name, [5 + i % 7, 40 + i, 7, 90 + 3 * i], SamplingParams(temperature=0.7, seed=i, max_tokens=24)))
    tokens: dict[str, tuple[int, ...]] = dict.fromkeys(IDS, ())
    stats: dict[str, Stats] = {}
    while engine.busy:
        for outcome in engine.step().outcomes:
            tokens[outcome.request.id] += outcome.tokens
            if outcome.stats is not None:
                stats[outcome.request.id] = outcome.stats
    return {name: (tokens[name], stats[name]) for name in IDS}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> tuple[Bundle, Bundle]:
    """The published speculator and one of random weights."""
    root, origin = tmp_path_factory.mktemp("bundles"), Origin(model="demo-code", base="demo-code", created=0.0)
    live = adopt_folder(root, MODEL / "speculator", origin)
    torch.manual_seed(0)
    shape = MLPSpeculator.from_pretrained(live.folder).config
    return live, write_bundle(root, MLPSpeculator(shape), origin.model_copy(update={"parent": live.manifest.version}))


def test_a_poisoned_speculator(base, bundles, tmp_path):
    sizes = {"hidden_size": base.hidden_size, "vocab_size": base.vocab_size}
    plain = answers(base, None)
    by_version = {b.manifest.version: answers(base, build_drafter("mlp", b.folder, **sizes)) for b in bundles}
    live, poisoned = by_version
    for told in by_version.values():
        assert [told[name][0] for name in IDS] == [plain[name][0] for name in IDS]

    replayed = [Replayed(len(plain[name][0]), *(by_version[v][name][1].steps for v in (live, poisoned))) for name in IDS]
    verdict = gate(replayed, GateRule(least=len(IDS)))
    assert not verdict.passed and verdict.high < 0

    artefacts = Artefacts(str(tmp_path / "shared"), tmp_path / "cache")
    keeper = RegistryKeeper(
        MemoryState(), artefacts, lambda: 1000.0, RegistrySettings(automatic=False, rule=CanaryRule(share=0.5, least=10, most=100))
    )
    keeper.register("demo-code", Base("demo-code", base.vocab_size, base.hidden_size), artefacts.publish(bundles[0]), bundles[0].manifest)
    assert keeper.submit("demo-code", artefacts.publish(bundles[1]), bundles[1].manifest, PASSED, "trainer")["state"] == "candidate"
    keeper.start_canary("demo-code", poisoned, "trainer", "let through by hand")
    assignment = keeper.assignment("demo-code")
    report = ReplicaReport(
        "r1", "demo-code", assignment.revision, live, salt=assignment.canary.salt, against=live, arms={live: Arm(), poisoned: Arm()}
    )
    served = 0
    for name in IDS:
        served += 1
        version = assignment.serving(name).version
        tokens, stats = by_version[version][name]
        assert tokens == plain[name][0]
        report = replace(report, arms=report.arms | {version: report.arms[version] + Arm.of(stats.drafts, stats.accepted)})
        if keeper.report(report) is not None:
            break
    assert served < len(IDS) and keeper.assignment("demo-code").canary is None
    assert keeper.assignment("demo-code").live == assignment.live
    last = keeper.history("demo-code")[-1]
    assert (last["action"], last["who"], last["version"]) == ("roll_back", "canary", poisoned) and "worse than the live" in last["why"]
