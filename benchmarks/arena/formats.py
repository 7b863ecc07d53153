"""One model in every peer's format, float32, made once and kept under `.peers/models/`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.arena.install import ENVIRONMENTS, LLAMA_SOURCE, PEERS, ROOT, command

RUNNERS = Path(__file__).parent / "runners"


def formats(model: Path) -> Path:
    """Where the formats of a model are kept; emptied when the model has changed."""
    folder = PEERS / "models" / f"{model.resolve().name}.formats"
    weights = (model / "model.safetensors").stat()
    stamp = json.dumps([str(model.resolve()), weights.st_size, weights.st_mtime_ns])
    file = folder / "source.json"
    if not file.is_file() or file.read_text(encoding="utf-8") != stamp:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        file.write_text(stamp, encoding="utf-8")
    return folder


def as_float32(model: Path) -> Path:
    """The model as a Hugging Face folder whose stored weights are float32, its speculator below it."""
    return once(formats(model) / "hf", lambda out: inflate_nothing(model, out))


def inflate_nothing(model: Path, out: Path) -> None:
    subprocess.run([sys.executable, "-m", "benchmarks.inflate", str(model.resolve()), str(out)], cwd=ROOT, check=True, capture_output=True)


def as_openvino(model: Path) -> Path:
    tool = str(ENVIRONMENTS["openvino-export"].folder / "bin" / "optimum-cli")
    words = ("--task", "text-generation-with-past", "--weight-format", "fp32")
    return once(
        formats(model) / "openvino", lambda out: command(tool, "export", "openvino", "--model", str(as_float32(model)), *words, str(out))
    )


def as_onnx(model: Path) -> Path:
    cache = str(formats(model) / "onnx-cache")
    words = ("-p", "fp32", "-e", "cpu", "-c", cache)
    build = (str(ENVIRONMENTS["onnx"].python), "-m", "onnxruntime_genai.models.builder", "-m", str(as_float32(model)))
    return once(formats(model) / "onnx", lambda out: command(*build, "-o", str(out), *words))


def as_gguf(model: Path) -> Path:
    convert = (str(ENVIRONMENTS["gguf"].python), str(RUNNERS / "to_gguf.py"), str(LLAMA_SOURCE), str(as_float32(model)), "--outtype", "f32")
    return once(formats(model) / "model.gguf", lambda out: command(*convert, "--outfile", str(out)))


FORMATS: dict[str, Callable[[Path], Path]] = {
    "ours": as_float32,
    "transformers": as_float32,
    "vllm": as_float32,
    "openvino": as_openvino,
    "onnx": as_onnx,
    "llamacpp": as_gguf,
}


def once(out: Path, make: Callable[[Path], None]) -> Path:
    """`out`, made under another name first, so that what is there is whole."""
    if not out.exists():
        partial = out.with_name(f"partial-{out.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)
        make(partial)
        partial.rename(out)
    return out
