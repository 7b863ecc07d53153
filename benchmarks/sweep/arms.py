"""The policies that are compared, and a service in which each has a model of its own and learns from its own traffic only."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from services.cli.bench_service import alone, serving

ROOT = Path(__file__).resolve().parents[2]
LADDER = ((4, 4), (8, 2), (32, 1))  # up to so many requests: depth. The example of TensorRT-LLM's draft_len_schedule; off beyond
CPUS = 0.1  # that Ray reserves for a replica: one at a time works


@dataclass(frozen=True, slots=True)
class Arm:
    """One policy. fixed: whether it is `off` or one depth, and so one of those that the best is chosen from."""

    name: str
    policy: Mapping[str, Any]
    fixed: bool

    def served(self, model: str) -> str:
        """The name under which a model is served with this policy."""
        return f"{model}-{self.name}"


OFF = Arm("off", {"kind": "off"}, True)
BANDIT = Arm("bandit", {"kind": "bandit"}, False)  # no policy of the service, see `benchmarks.sweep.bandit`


def arms(depths: Sequence[int]) -> tuple[Arm, ...]:
    """Off, the depths, a hand-made table, and the default policy as it comes."""
    fixed = [Arm(f"fixed{depth}", {"kind": "fixed", "depth": depth}, True) for depth in depths]
    ladder = [{"up_to_running": running, "depth": depth} for running, depth in LADDER]
    table = Arm("threshold", {"kind": "threshold", "steps": ladder}, False)
    return OFF, *fixed, table, Arm("goodput", {"kind": "goodput"}, False)


def fleet(config: str, model: str, compared: Sequence[Arm], running: int) -> dict[str, Any]:
    """A configuration that serves one model of a fleet once for each arm, with room for so many running requests.

    SystemExit if the fleet has no such model.
    """
    one = alone(yaml.safe_load(Path(config).read_text(encoding="utf-8")), model, {"max_running": running})
    (entry,) = one["models"]
    share = {"num_cpus": CPUS, "replicas": {"min": 1, "max": 1}, "packed_weights": str(ROOT / ".specfleet" / "packed")}
    models = [{**entry, **share, "name": arm.served(model), "policy": dict(arm.policy)} for arm in compared]
    return {**one, "models": json.loads(json.dumps(models))}  # as YAML without anchors


@contextmanager
def serving_arms(config: str, url: str, model: str, compared: Sequence[Arm], running: int) -> Iterator[None]:
    """The service of `fleet`, with stores of its own, ended afterwards. SystemExit if it does not come up."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(fleet(config, model, compared, running)), encoding="utf-8")
        with serving(str(file), url):
            yield
