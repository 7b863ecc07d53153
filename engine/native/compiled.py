"""The compiled kernels: built once per machine and source with the system's C compiler, then loaded through ctypes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

from filelock import FileLock

log = logging.getLogger(__name__)
SOURCE = Path(__file__).with_name("kernels.c")
COMPILERS = ("cc", "gcc", "clang")
LONGEST_S = 300  # that compiling may take
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-std=gnu11")


class Linear(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("bias", c_void_p), ("inputs", c_int32), ("panels", c_int32), ("kind", c_int32), ("pad", c_int32))


class Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("norm_attention", "norm_mlp", "norm_query", "norm_key")),
        *((name, Linear) for name in ("qkv", "out", "gate_up", "down")),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("window", c_int64),
    )


class Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "dim", "paired")),
        *((name, c_float) for name in ("eps", "scale", "embed_scale", "residual_scale", "logit_scale")),
        ("halved", c_int32),
        *((name, c_void_p) for name in ("embed", "norm", "cosine", "sine")),
        ("head", Linear),
        ("layer", POINTER(Layer)),
    )


class Row(ctypes.Structure):
    _fields_ = (("context", c_void_p), ("parents", c_void_p), *((name, c_int32) for name in ("length", "count", "start", "longest")))


class Batch(ctypes.Structure):
    _fields_ = (
        *((name, c_int32) for name in ("tokens", "rows", "kept", "pad")),
        *((name, c_void_p) for name in ("ids", "positions", "slots", "keep", "row", "logits", "hidden")),
    )


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The kernels, or None where there is no C compiler; why is logged."""
    try:
        loaded = opened()
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the native kernels are not available, models run on plain PyTorch: %s", error)
        return None
    loaded.pool_new.restype = c_void_p
    loaded.pool_new.argtypes = (c_int,)
    loaded.pool_free.argtypes = (c_void_p,)
    loaded.forward.argtypes = (c_void_p, POINTER(Model), POINTER(Batch))
    loaded.gumbel.argtypes = (c_void_p, c_void_p, c_void_p, c_int, c_int64, c_void_p)
    loaded.draw.argtypes = (c_void_p, c_int, c_int64, c_void_p, c_void_p, c_void_p)
    loaded.gumbel.restype = loaded.draw.restype = None
    loaded.likeliest.argtypes = (c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int64, c_int, c_void_p, c_void_p)
    loaded.halved.argtypes = (c_void_p, c_int64, c_void_p, c_void_p, c_int, c_int64, c_void_p)
    loaded.likeliest.restype = loaded.halved.restype = None
    loaded.linear.argtypes = (c_void_p, POINTER(Linear), c_void_p, c_int, c_void_p)
    return loaded


def opened() -> ctypes.CDLL:
    """The compiled file, made again if it is broken. Raises OSError or SubprocessError."""
    file = build()
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        log.warning("the compiled kernels are broken and made again: %s", error)
        file.unlink(missing_ok=True)
        return ctypes.CDLL(str(build()))


def load() -> ctypes.CDLL:
    """The kernels, where there must be some."""
    found = kernels()
    assert found is not None
    return found


@functools.cache
def lanes() -> int:
    """Floats in a vector; a panel of weights has twice as many columns."""
    return int(load().lanes())


@functools.cache
def pairs() -> int:
    """How products of bfloat16 with bfloat16 are computed: 2 by AMX, 1 by AVX-512's dot products, 0 not at all."""
    return int(load().pairs())


@functools.cache
def pool(threads: int) -> int:
    """Threads that kernels run on, one set per process and number: callers take turns. To be asked for at each call: a fork has its own."""
    return int(load().pool_new(threads))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)


def build() -> Path:
    """Compile the kernels for this very processor unless that has been done; who comes meanwhile waits for it. Raises OSError or
    SubprocessError."""
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    name = f"kernels-{fingerprint(compiler or '')}.so"
    ready = next((place / name for place in folders() if (place / name).exists()), None)
    if ready is not None:
        return ready
    if compiler is None:
        raise FileNotFoundError(f"no C compiler was found ({', '.join(COMPILERS)})")
    target = writable(folders()) / name
    with FileLock(target.with_suffix(".lock"), timeout=LONGEST_S):
        if not target.exists():
            compile_into(target, compiler)
    return target


def compile_into(target: Path, compiler: str) -> None:
    """Compile the kernels into that file, which is there when all of it is. Raises OSError or SubprocessError."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *FLAGS, *vector_flags(), "-o", str(made), str(SOURCE), "-lpthread", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST_S)
        if done.returncode:
            raise OSError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        os.replace(made, target)


def vector_flags() -> tuple[str, ...]:
    return ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()


def folders() -> list[Path]:
    """Where compiled kernels are kept: beside the source, or in the user's cache if that cannot be written."""
    places = [SOURCE.parent / "build"]
    with contextlib.suppress(RuntimeError):  # a user without a home
        places.append(Path.home() / ".cache" / "specfleet")
    return places


def writable(places: Sequence[Path]) -> Path:
    """The first folder that takes files. Raises OSError."""
    for place in places:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            if os.access(place, os.W_OK):
                return place
    raise PermissionError(f"compiled kernels cannot be kept in {', '.join(map(str, places))}")


def fingerprint(compiler: str) -> str:
    """What a compiled file depends on: the source, the flags, the compiler and the processor."""
    parts = [SOURCE.read_bytes(), " ".join(FLAGS).encode(), compiler.encode(), processor().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def processor() -> str:
    """The processor's features as the system tells them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"
