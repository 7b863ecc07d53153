"""One base under several names: with a speculator that stays, one that is refreshed, and one that knows the new traffic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

STATIC, REFRESHED, CEILING = "static", "refreshed", "ceiling"
DEPTH = 4  # as deep as any of the speculators goes
POLICY = {"kind": "fixed", "depth": DEPTH, "width": 1}
REFRESH = {
    "enabled": True,
    "capture": {"share": 1.0},
    "buffer_bytes": "10MiB",
    "held_out": 0.3,
    "positions": "all",
    "rate": 1e-2,
    "requests": 8,
    "window": 32,
    "steps": 200,
    "interval": 50,
    "least_tokens": 2000,
    "gate": {"least": 20},
    "trainer": {"running": None, "quiet_s": 0.1, "checkpoint_s": 30.0},
}
# Nothing that was learned is to be forgotten, and there is much to learn.
COLD_REFRESH = REFRESH | {"buffer_bytes": "128MiB", "held_out": 0.2, "steps": 1200, "interval": 100}
CANARY = {"share": 0.5, "least": 12, "most": 40, "tolerance": 0.1, "effect": 0.5}  # so few requests cannot tell less apart


def fleet(base: Path, speculators: dict[str, Path], running: int, refresh: dict[str, Any]) -> dict[str, Any]:
    """The configuration of one model for each named speculator, all stores and versions beside the file it is written to."""
    engine = {"kv_bytes": "64MiB", "max_running": running, "max_waiting": 256, "chunk": 64}
    shared = {"base": str(base.resolve()), "drafter": "mlp", "dtype": "float32", "num_cpus": 0.1, "threads": 1, "packed_weights": None}
    return {
        "models": [
            shared
            | {"name": name, "speculator": str(folder.resolve()), "engine": dict(engine), "policy": dict(POLICY)}
            | ({"refresh": refresh} if name == REFRESHED else {})
            for name, folder in speculators.items()
        ],
        "request_log": {"url": "sqlite:///requests.db"},
        "state": {"url": "sqlite:///state.db"},
        "refresh": {"artefacts": "bundles", "cache": "cache", "work": "work", "canary": CANARY},
        "ray": {"num_cpus": 4, "object_store_mb": 128},
    }
