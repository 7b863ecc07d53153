"""Who takes part: every setting of every peer that makes sense on a CPU, and ours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.arena.contest import System
from benchmarks.arena.formats import FORMATS
from benchmarks.arena.install import ENVIRONMENTS, LLAMA_SERVER

OFF, POLICY = "ours off", "ours goodput"
REFERENCE = "transformers generate"
PLAIN = {"vllm": "vllm", "openvino": "openvino"}
"""Peers that ours must not be behind of without speculation, and their plain system's name."""
TCMALLOC = "/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4"
LEARN = 2  # warm-up rounds of ours for every cell, in which the policy learns what steps cost and which drafts are kept
SETTINGS: dict[str, dict[str, str]] = {
    "ours": {OFF: "off", POLICY: "goodput", "ours fixed 3": "fixed"},
    "vllm": {"vllm": "plain", "vllm ngram": "ngram", "vllm draft": "draft"},
    "openvino": {"openvino": "plain", "openvino lookup": "lookup", "openvino draft": "draft"},
    "onnx": {"onnxruntime": "plain", "onnxruntime ngram": "ngram"},
    "llamacpp": {"llama.cpp": "plain", "llama.cpp ngram": "ngram", "llama.cpp draft": "draft"},
    "transformers": {REFERENCE: "static", "transformers lookup": "lookup", "transformers batching": "batching"},
}
RUNNERS = {
    "vllm": "vllm_cpu.py",
    "ours": "ours.py",
    "openvino": "openvino_batching.py",
    "onnx": "onnx_generator.py",
    "llamacpp": "llama_server.py",
    "transformers": "hugging_face.py",
}
ALONE = {"transformers lookup", "onnxruntime ngram"}
"""Settings that their makers refuse for more than one request."""


def systems(peers: Sequence[str], model: Path, draft: Path | None, threads: int, chunk: int) -> list[System]:
    """The systems of these peers, those first that are costly to load again, so that they stay. Makes what formats are missing."""
    return [system(peer, name, model, draft, threads, chunk) for peer in peers for name in SETTINGS[peer] if draft or "draft" not in name]


def system(peer: str, name: str, model: Path, draft: Path | None, threads: int, chunk: int) -> System:
    setting = SETTINGS[peer][name]
    return System(
        name=name,
        peer=peer,
        setting=setting,
        python=Path(sys.executable) if peer == "ours" else ENVIRONMENTS[peer if peer != "llamacpp" else "gguf"].python,
        runner=RUNNERS[peer],
        model=FORMATS[peer](model),
        draft=FORMATS[peer](draft) if draft and setting == "draft" else None,
        most=1 if name in ALONE else 1 << 30,
        learns=LEARN if name == POLICY else 0,
        environment=vllm_environment(threads) if peer == "vllm" else {},
        extra={"binary": str(LLAMA_SERVER)} if peer == "llamacpp" else {"chunk": chunk},
    )


def vllm_environment(threads: int) -> dict[str, str]:
    """Without these it computes on one core fewer than there are, and allocates slowly."""
    preload = [*map(str, (ENVIRONMENTS["vllm"].folder / "lib").glob("libiomp5.so")), TCMALLOC]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(file for file in preload if Path(file).is_file()),
    }
