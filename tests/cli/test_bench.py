"""`specfleet bench` against the real gateway: cells, modes, files, plots, failures, and what it refuses."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from services.protocol import Item, Job
from tests.cli.conftest import ADMIN, Service, Shell
from tests.gateway.fake import overloaded, speak, too_long

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"echo": ["Hi", "Ho"], "completion": ["def f", "class A", "import x"]}))
    return str(file)


def measured(shell: Shell, *arguments: str) -> dict[str, Any]:
    done = shell("bench", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_every_cell_is_measured(shell: Shell, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = shell("bench", "echo", "code", "--rounds", "2", "-c", "1", "-c", "2", "--prompts", prompts, "--out", str(out))
    assert done.code == 0 and "same text" in done.out and "chunk gap p50" in done.out
    result = json.loads(out.read_text())
    assert len(result["cells"]) == 2 * 2 * 3 * 2 and len(result["summary"]) == 2 * 2 * 3
    assert all(entry["same_text"] and entry["tokens_per_second"] > 0 and entry["first_ms"]["p50"] > 0 for entry in result["summary"])
    assert {entry["against_off"] for entry in result["summary"] if entry["mode"] == "off"} == {1.0}
    assert result["machine"]["cores"] and result["command"][0] == "specfleet" and not result["peer"] and result["notes"] == []
    assert {len(cell["requests"]) for cell in result["cells"] if cell["model"] == "code"} == {3}


def test_a_cell_holds_what_its_numbers_come_from(shell: Shell, prompts: str) -> None:
    result = measured(shell, "code", "-c", "1", "--rounds", "1", "--modes", "off", "--prompts", prompts)
    (cell,), (entry,) = result["cells"], result["summary"]
    request = cell["requests"][0]
    assert entry["tokens_per_second"] == pytest.approx(sum(r["tokens"] for r in cell["requests"]) / cell["seconds"], rel=1e-2)
    assert entry["tokens_per_step"] == sum(r["step_tokens"] for r in cell["requests"]) / sum(r["steps"] for r in cell["requests"])
    firsts = sorted(r["chunk_at"][0] - r["due"] for r in cell["requests"])
    assert entry["first_ms"]["p50"] == pytest.approx(firsts[1] * 1000, abs=0.02)
    assert (request["tokens"], request["prompt_tokens"], request["cached_tokens"], request["steps"]) == (3, 5, 2, 2)
    assert sum(request["chunk_tokens"] if isinstance(request["chunk_tokens"], list) else [1] * 3) == 3 and cell["client_cpu_seconds"] > 0


def test_rooms_for_results_are_made_first(shell: Shell, service: Service, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder" / "out.json"
    flags = ["bench", "code", "-c", "1", "--rounds", "1", "--prompts", prompts, "--out"]
    assert shell(*flags, str(out)).code == 0 and json.loads(out.read_text())["summary"]
    asked = len(service.fleet.jobs)
    for nowhere in (tmp_path, Path(prompts) / "out.json"):
        refused = shell(*flags, str(nowhere))
        assert refused.code == 1 and "cannot be written" in refused.err and len(service.fleet.jobs) == asked


def test_tables_go_from_off_to_fixed(shell: Shell, prompts: str) -> None:
    done = shell("bench", "code", "--rounds", "1", "--modes", "fixed,off", "--prompts", prompts)
    lines = [line.split()[:3] for line in done.out.splitlines() if line.strip().startswith("code")]
    assert lines == [["code", "×1", "off"], ["code", "×1", "fixed"], ["code", "×8", "off"], ["code", "×8", "fixed"]] * 2


def test_modes_take_turns(shell: Shell, service: Service, prompts: str) -> None:
    measured(shell, "code", "-c", "1", "--rounds", "2", "--requests", "1", "--warm-up", "1", "--prompts", prompts)
    modes = [job.speculation.mode for job in service.fleet.jobs]
    assert modes == ["off", "auto", "fixed", "auto", "fixed", "off", "fixed", "off", "auto"]


def test_requests_are_tagged(shell: Shell, service: Service, prompts: str) -> None:
    flags = ["code", "-c", "1", "--rounds", "1", "--prompts", prompts, "--tag", "law"]
    assert measured(shell, *flags)["settings"]["tag"] == "law" and {job.tag for job in service.fleet.jobs} == {"law"}
    service.fleet.jobs.clear()
    measured(shell, *flags, "--peer")
    assert {job.tag for job in service.fleet.jobs} == {""}


def test_warm_up_is_not_counted_and_may_be_left_out(shell: Shell, service: Service, prompts: str) -> None:
    flags = ["code", "-c", "1", "--rounds", "1", "--modes", "off", "--requests", "2", "--prompts", prompts, "--warm-up"]
    for warm_up in (0, 5):
        service.fleet.jobs.clear()
        assert len(measured(shell, *flags, str(warm_up))["cells"][0]["requests"]) == 2
        assert len(service.fleet.jobs) == warm_up + 2


@pytest.mark.parametrize(
    "extent",
    [
        pytest.param(["-c", "2", "--requests", "12"], id="requests"),
        pytest.param(["-c", "5"], id="users"),
        pytest.param(["--rate", "60", "--duration", "0.4"], id="rate"),
        pytest.param(["-c", "8", "--duration", "0.6"], id="duration"),
    ],
)
@pytest.mark.parametrize("lengths", ["file", "20-60"])
def test_every_prompt_of_a_round_was_sent_in_the_warm_up(
    shell: Shell, service: Service, prompts: str, extent: list[str], lengths: str
) -> None:
    """So that no mode of a round finds fewer of them cached than another."""
    flags = ["--rounds", "2", "--modes", "off,auto", "--max-tokens", "8-90", "--prompt-tokens", lengths]
    cells = measured(shell, "code", *extent, *flags, "--prompts", prompts)["cells"]
    counted = sum(len(cell["requests"]) for cell in cells)
    warm_up, rounds = service.fleet.jobs[:-counted], service.fleet.jobs[-counted:]
    first_mode = [job for job in warm_up if job.speculation.mode == "off"]
    assert {job.prompts for job in rounds} <= {job.prompts for job in first_mode}
    assert len({job.prompts for job in rounds}) > 3 or lengths == "file"
    assert len({job.seed for job in rounds}) == max(len(cell["requests"]) for cell in cells), "texts differ though prompts repeat"


def test_rate_sweep_is_an_open_loop(shell: Shell, service: Service, prompts: str) -> None:
    result = measured(shell, "code", "--rate", "40,80", "--duration", "0.5", "--rounds", "1", "--modes", "off,auto", "--prompts", prompts)
    assert [(entry["rate"], entry["users"], entry["mode"]) for entry in result["summary"]] == [
        *[(40.0, None, "off"), (40.0, None, "auto")],
        *[(80.0, None, "off"), (80.0, None, "auto")],
    ]
    dues = [[request["due"] for request in cell["requests"]] for cell in result["cells"]]
    assert dues[0] == dues[1] and dues[2] == dues[3] and len(dues[2]) > len(dues[0]) > 5 and max(max(due) for due in dues) < 0.5


def test_lengths_are_drawn_alike_in_every_mode(shell: Shell, service: Service, prompts: str) -> None:
    lengths = ["--prompt-tokens", "20-60", "--max-tokens", "lognormal:40,0.5"]
    measured(
        shell,
        "code",
        "-c",
        "1",
        "--requests",
        "12",
        "--rounds",
        "1",
        "--warm-up",
        "0",
        "--modes",
        "off,auto",
        *lengths,
        "--prompts",
        prompts,
    )
    jobs = service.fleet.jobs[-24:]
    assert [job.prompts for job in jobs[:12]] == [job.prompts for job in jobs[12:]] and len({job.prompts for job in jobs}) > 6
    assert len({job.max_tokens for job in jobs}) > 6


def test_refusals_are_counted_and_not_fatal(shell: Shell, service: Service, prompts: str) -> None:
    async def crowded(job: Job) -> AsyncGenerator[Item, None]:
        service.fleet.jobs.remove(job)
        turns.append(job)
        async for item in (overloaded if len(turns) % 2 else speak)(job):
            yield item

    turns: list[Job] = []
    service.fleet.script = crowded
    flags = ["--requests", "4", "--rounds", "1", "--warm-up", "0", "--modes", "off", "--prompts", prompts]
    (entry,) = measured(shell, "code", "-c", "4", *flags)["summary"]
    assert entry["failures"] == {"429": 2} and entry["requests"] == 2 and entry["tokens_per_second"] > 0


def test_a_server_that_answers_nothing_is_a_problem(shell: Shell, service: Service, prompts: str) -> None:
    service.fleet.script = too_long
    done = shell("bench", "code", "-c", "1", "--rounds", "1", "--prompts", prompts)
    assert done.code == 1 and "The prompt is too long." in done.err and "Traceback" not in done.err


def test_plot_is_a_picture(shell: Shell, prompts: str, tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "speculation.png"
    flags = ["--rounds", "1", "-c", "1,4", "--rate", "50", "--prompts", prompts, "--plot", str(plot)]
    assert shell("bench", "echo", "code", *flags).code == 0
    content = plot.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 20_000 and width > 1000 and height > 500


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nothing",), "no model 'nothing'"),
        (("code", "--modes", "fast"), "no mode 'fast'"),
        (("code", "-c", "two"), "--concurrency: 'two' is not accepted; accepted are whole numbers from 1 to 4096"),
        (("code", "-c", "1.5"), "--concurrency: '1.5'"),
        (("code", "--rate", "1,-2"), "--rate: '1,-2' is not accepted; accepted are numbers above 0"),
        (("code", "--prompt-tokens", "long"), "--prompt-tokens: 'long' is no length; accepted are N, LOW-HIGH or lognormal:MEDIAN,SIGMA"),
        (("code", "--max-tokens", "9-3"), "--max-tokens: '9-3' is no length"),
    ],
)
def test_wrong_arguments_are_named(shell: Shell, arguments: tuple[str, ...], said: str) -> None:
    done = shell("bench", *arguments)
    assert done.code == 1 and said in done.err and "Traceback" not in done.err


def test_prompts_must_be_lists_of_texts(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"code": ["x", 3]}))
    done = shell("bench", "code", "--prompts", str(file))
    assert done.code == 1 and "prompts.json must be an object of lists of texts" in done.err


def test_own_prompts_cover_the_demo_fleet() -> None:
    lists = json.loads((ROOT / "benchmarks" / "prompts.json").read_text())
    for name in ("demo-chat", "demo-code", "demo-code-large", "chat", "completion"):
        assert len(lists[name]) >= 8 and len(set(lists[name])) == len(lists[name])


def test_benchmark_script_is_bench(service: Service, prompts: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    flags = ["code", "--rounds", "1", "-c", "1", "--prompts", prompts, "--out", str(out), "--url", service.url, "--key", ADMIN]
    done = subprocess.run([sys.executable, "benchmarks/speculation.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tokens/step" in done.stdout and len(json.loads(out.read_text())["summary"]) == 3
