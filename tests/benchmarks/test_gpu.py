"""The script for GPUs runs through at toy sizes, and its parts mean what they say."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.accelerator.flips import common
from benchmarks.accelerator.imposed import Imposed, survival
from benchmarks.accelerator.report import Report
from benchmarks.accelerator.shapes import SHAPES, kv_bytes, weight_bytes
from benchmarks.accelerator.steps import plans, rows_of
from benchmarks.gpu import chosen
from engine.engine import Engine
from engine.request import Request
from engine.sampling import SamplingParams
from tests.engine.toys import VOCAB, everywhere, toy_base, toy_config, toy_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["check", "bandwidth", "step", "speed", "flips", "peers"])
def test_a_part_runs_through(part, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), part, "--tiny", "--models", "tiny-llama", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / f"gpu-{part}.json").read_text())
    assert found["finished"] and found["errors"] == [] and found["results"]
    assert all(result.get("passed", True) for result in found["results"])
    if part == "step":
        assert [r.get("drafting", False) for r in found["results"]] == [False, *[True] * 5, False, False], "drafting, then the grid"


def test_errors_are_recorded_and_do_not_end_the_rest(tmp_path):
    report = Report(tmp_path / "r.json", "step", torch.device("cpu"), True, 1.0)
    with report.attempt("one"):
        raise MemoryError("no room")
    report.add(two=2)
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["errors"][0]["what"] == "one" and "no room" in found["errors"][0]["error"]
    assert found["results"] == [{"two": 2}] and not report.late


def test_models_share_the_time_that_is_left(tmp_path):
    report = Report(tmp_path / "r.json", "step", torch.device("cpu"), True, 1.0)
    end, shares = report.deadline, []
    for name in report.shares(["a", "b", "c"]):
        shares.append((name, report.deadline - time.monotonic()))
    assert shares == [("a", pytest.approx(20, abs=1)), ("b", pytest.approx(30, abs=1)), ("c", pytest.approx(60, abs=1))]
    assert report.deadline == end and not report.late
    assert list(Report(tmp_path / "r.json", "step", torch.device("cpu"), True, -1.0).shares(["a", "b"])) == []


def test_all_models_are_measured_unless_some_are_named():
    named = {"llama-2-7b", "llama-2-13b", "granite-20b-code", "codellama-13b", "llama-3-8b"}
    assert set(chosen(Namespace(models="", tiny=False))) == named
    assert list(chosen(Namespace(models="llama-3-8b", tiny=False))) == ["llama-3-8b"]
    with pytest.raises(SystemExit, match="no model gpt-2; known are llama-2-7b"):
        chosen(Namespace(models="gpt-2", tiny=False))


@pytest.mark.parametrize(("wanted", "depth"), [(2.67, 3), (1.0, 3), (4.0, 3)])
def test_imposed_survival_gives_the_wanted_tokens_per_step(wanted, depth):
    chance = survival(wanted, depth)
    assert sum(chance**i for i in range(depth + 1)) == pytest.approx(wanted, abs=1e-6)


class Wrong:
    """Drafts tokens that the base would not draw by itself."""

    name, version, max_depth, max_width = "wrong", "0", 3, 2

    def draft(self, batch):
        for draft in batch:
            for path in range(draft.budget.width):
                draft.tree.extend([50 + path, 60, 70][: draft.budget.depth], draft.budget.nodes)

    observer = None

    def forget(self, request):
        pass


def test_imposed_acceptance_is_what_was_asked_for():
    base = toy_base()
    base.executor = Imposed(base.executor, survival(2.67, 3))
    engine = Engine(base, Wrong(), everywhere(3, 2), slots=1024)
    for i in range(4):
        engine.submit(Request(f"r{i}", [3, 4, 5 + i], SamplingParams(temperature=0.0, max_tokens=120)))
    tokens = steps = 0
    while engine.busy:
        report = engine.step()
        if report.prefill == 0:
            tokens, steps = tokens + report.emitted, steps + report.requests
    engine.check()
    assert tokens / steps == pytest.approx(2.67, abs=0.35)


def test_bytes_are_those_of_the_shapes():
    for tied in (False, True):
        model = toy_model(toy_config(tie_word_embeddings=tied), "ragged")
        total = sum(p.numel() for p in model.parameters()) * 4
        assert weight_bytes(model) == (total if tied else total - VOCAB * 64 * 4)
        assert kv_bytes(model) == 2 * 3 * 2 * 16 * 4
    assert all(shape.speculator.emb_dim == shape.config.get_text_config().hidden_size for shape in SHAPES.values())


def test_the_plan_measures_each_point_once_and_the_bars_first():
    grid = plans(tiny=False)
    assert len(grid) == len(set(grid)) and grid[0] == (1, 64, 0, 1)
    (row,) = rows_of(1, 10, 3, 2)
    assert list(row.parents) == [-1, 0, 1, 2, 0, 4, 5] and list(row.depths) == [0, 1, 2, 3, 1, 2, 3] and len(row.new) == 7
    assert common([1, 2, 3], [1, 2, 4]) == 2


BARE = """
import sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pydantic", "ray", "fastapi"):
            raise ImportError(name)

sys.meta_path.insert(0, Wall())
from benchmarks.accelerator.flight import Flight, requests_of
from tests.benchmarks.test_gpu import Wrong
from tests.engine.toys import toy_base

for policy in ("off", "fixed", "goodput"):
    flight = Flight(toy_base(), Wrong(), policy, 2, 1, slots=256)
    flown = flight.run(requests_of([[3, 4], [5, 6]], 12))
    flight.learn()
    assert (flown.drafted > 0) == (policy != "off"), (policy, flown)
    assert sum(map(len, flown.texts.values())) == 24
"""


def test_policies_fly_without_pydantic_and_ray():
    code = BARE.replace("from tests.benchmarks.test_gpu import Wrong", inspect.getsource(Wrong))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pydantic is not installed" in done.stdout
