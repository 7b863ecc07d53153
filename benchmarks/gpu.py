"""What Specfleet is worth on a GPU: `python benchmarks/gpu.py` on a machine with torch, transformers and a GPU; no Ray, no network.

    python benchmarks/gpu.py                      every part, one after the other, each in a process of its own
    python benchmarks/gpu.py step --models llama-2-7b,granite-20b-code
    python benchmarks/gpu.py --tiny               the same code at toy sizes, on a CPU, in Triton's interpreter where Triton is installed

Parts: check (all backends against the oracle) · bandwidth · step (against the bandwidth floor) · speed (tokens per second, acceptance
real and imposed) · flips (near ties turned, and what invariance costs) · peers. Each takes about --minutes, shared evenly by the models,
and writes gpu-PART.json to --out (else $OUT, else benchmarks/results); a model or feature that fails is recorded there with its error, and
the rest goes on.

None of this has been measured on a GPU yet.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("check", "bandwidth", "step", "speed", "flips", "peers")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=(*PARTS, "all"), default="all")
    parser.add_argument("--models", default="", help="names, separated by commas; all unless given")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--minutes", type=float, default=8.0, help="for each part")
    parser.add_argument("--tokens-per-step", type=float, default=None, help="the acceptance to impose at depth 3; the published 2.67")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to try the script itself")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    out = options.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    if options.part == "all":
        return max(spawn(part, options, out) for part in PARTS)
    prepare(options.tiny)
    run(options, out)
    return 0


def spawn(part: str, options: argparse.Namespace, out: Path) -> int:
    """One part in a process of its own: an error that leaves the device unusable ends that part only."""
    command = [sys.executable, str(Path(__file__).resolve()), part, "--out", str(out), "--minutes", str(options.minutes)]
    command += ["--models", options.models] if options.models else []
    command += ["--tokens-per-step", str(options.tokens_per_step)] if options.tokens_per_step else []
    command += ["--tiny"] if options.tiny else []
    print(f"--- {part}", flush=True)
    try:
        return subprocess.run(command, timeout=60 * options.minutes + 120, check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"{part} did not end in time; what it found is in its file", flush=True)
        return 1


def prepare(tiny: bool) -> None:
    """Settings that hold from before the first import of torch and Triton."""
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def run(options: argparse.Namespace, out: Path) -> None:
    import torch

    from benchmarks.accelerator.report import Report

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        raise SystemExit("there is no GPU here; --tiny tries the script on a CPU")
    report = Report(out / f"gpu-{options.part}.json", options.part, device, options.tiny, options.minutes)
    with report.attempt(options.part):
        parts(options)[options.part](report)
    report.put(finished=True)
    print(f"{len(report.content['results'])} results and {len(report.content['errors'])} errors in {report.file}")


def parts(options: argparse.Namespace) -> dict[str, Callable[[Any], None]]:
    import torch

    from benchmarks.accelerator import checks, flips, peers, speeds, steps
    from benchmarks.accelerator.imposed import PUBLISHED

    tiny = options.tiny
    dtype = torch.float32 if tiny else torch.bfloat16
    return {
        "check": lambda report: checks.check(report, tiny),
        "bandwidth": lambda report: steps.bandwidth(report, tiny),
        "step": lambda report: steps.step(report, chosen(options), dtype, tiny),
        "speed": lambda report: speeds.speed(report, chosen(options), dtype, tiny, options.tokens_per_step or PUBLISHED),
        "flips": lambda report: flips.flips(report, chosen(options), dtype, tiny),
        "peers": lambda report: peers.peers(report, chosen(options), dtype, tiny),
    }


def chosen(options: argparse.Namespace) -> dict[str, Any]:
    """The models to measure: those named, or all."""
    from benchmarks.accelerator.shapes import SHAPES, TINY

    known = TINY if options.tiny else SHAPES
    names = [name for name in options.models.split(",") if name] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"no model {unknown[0]}; known are {', '.join(known)}")
    return {name: known[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())
