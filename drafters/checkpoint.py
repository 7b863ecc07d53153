"""Speculator checkpoints as published on the model hub: read in every form they come in, written in the form every reader takes.

Knows files, names and shapes; not what the tensors compute.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from drafters.config import MLPSpeculatorConfig

PREFIX = "speculator."
NAME = re.compile(r"(emb|proj|head|ln)\.(0|[1-9][0-9]*)\.(weight|bias)")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: which file, which key, what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor as a file has it."""

    file: str
    key: str  # as the file spells it
    value: Tensor

    def __str__(self) -> str:
        return f"{self.file}: {self.key}"


def read_config(folder: Path) -> MLPSpeculatorConfig:
    """The folder's config.json. Raises CheckpointError."""
    file = folder / "config.json"
    found = read_json(file)
    try:
        return MLPSpeculatorConfig.from_json(found)
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def check_fits(config: MLPSpeculatorConfig, hidden_size: int, vocab_size: int) -> None:
    """Refuse a base of another width or vocabulary with CheckpointError."""
    if config.emb_dim != hidden_size:
        raise CheckpointError(f"the speculator has emb_dim {config.emb_dim}, but the base's hidden size is {hidden_size}")
    if config.vocab_size != vocab_size:
        raise CheckpointError(f"the speculator has vocab_size {config.vocab_size}, but the base's vocabulary is {vocab_size}")


def read_weights(folder: Path, config: MLPSpeculatorConfig) -> dict[str, Tensor]:
    """Every tensor of the speculator under its first name (`shapes`), checked. Raises CheckpointError."""
    expected = shapes(config)
    found: dict[str, Stored] = {}
    for stored in read_tensors(folder):
        name = canonical(stored, config)
        check_tensor(stored, expected[name])
        check_alias(stored, found.setdefault(name, stored))
    missing = sorted(expected.keys() - found.keys())
    if missing:
        shape = list(expected[missing[0]])
        raise CheckpointError(f"{folder}: {PREFIX}{missing[0]} is missing, expected shape {shape} (missing in all: {', '.join(missing)})")
    return {name: found[name].value for name in expected}


def shapes(config: MLPSpeculatorConfig) -> dict[str, tuple[int, ...]]:
    """First names and shapes of all tensors; a tied speculator's aliases are left out."""
    vocab, width = config.vocab_size, config.width
    out: dict[str, tuple[int, ...]] = {}
    for i in range(config.n_predict):
        names: dict[str, tuple[int, ...]] = {f"emb.{i}.weight": (vocab, width), f"head.{i}.weight": (vocab, width)}
        names |= {f"proj.{i}.weight": (width, width if i else config.emb_dim), f"ln.{i}.weight": (width,), f"ln.{i}.bias": (width,)}
        out |= {name: shape for name, shape in names.items() if first_name(name, config) == name}
    return out


def first_name(name: str, config: MLPSpeculatorConfig) -> str:
    """The name that stands for all aliases of `name`: heads of a tied speculator share all but the first projection."""
    if not config.tie_weights:
        return name
    part, head, kind = name.split(".")
    return f"{part}.{min(int(head), 1 if part == 'proj' else 0)}.{kind}"


def aliases(name: str, config: MLPSpeculatorConfig) -> list[str]:
    """Every name under which a reader may look for the tensor with this first name."""
    part, _, kind = name.split(".")
    names = (f"{part}.{i}.{kind}" for i in range(config.n_predict))
    return [alias for alias in names if first_name(alias, config) == name]


def canonical(stored: Stored, config: MLPSpeculatorConfig) -> str:
    name = stored.key.removeprefix(PREFIX)
    match = NAME.fullmatch(name)
    if match is None or (match[3] == "bias" and match[1] != "ln"):
        raise CheckpointError(f"{stored}: unknown key; expected {PREFIX}{{emb,proj,head,ln}}.{{head}}.weight or {PREFIX}ln.{{head}}.bias")
    if int(match[2]) >= config.n_predict:
        raise CheckpointError(f"{stored}: unknown key; config.json has n_predict {config.n_predict}, so heads 0 to {config.n_predict - 1}")
    return first_name(name, config)


def check_tensor(stored: Stored, shape: tuple[int, ...]) -> None:
    value = stored.value
    if tuple(value.shape) != shape:
        raise CheckpointError(f"{stored}: shape {list(value.shape)}, expected {list(shape)}")
    if not value.is_floating_point():
        raise CheckpointError(f"{stored}: dtype {value.dtype}, expected a floating-point dtype")
    if not bool(torch.isfinite(value.float()).all()):
        raise CheckpointError(f"{stored}: has NaN or infinite values, expected finite ones of shape {list(shape)}")


def check_alias(stored: Stored, first: Stored) -> None:
    if stored is not first and not torch.equal(stored.value, first.value):
        raise CheckpointError(f"{stored}: differs from {first}, which it is tied to; expected equal values")


def read_tensors(folder: Path) -> Iterator[Stored]:
    """The tensors of a folder: one safetensors file or several with an index, or the same as PyTorch pickles of tensors only."""
    for index, single in zip(INDEXES, SINGLES, strict=True):
        if (folder / index).is_file():
            yield from read_shards(folder / index)
            return
        if (folder / single).is_file():
            yield from read_file(folder / single)
            return
    raise CheckpointError(f"{folder}: no weights; expected one of {', '.join(SINGLES + INDEXES)}")


def read_shards(index: Path) -> Iterator[Stored]:
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: weight_map must map keys to file names")
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{index}: weight_map names {name!r}, expected a file in the same folder")
        stored = {item.key: item for item in read_file(index.parent / name)}
        absent = [key for key, shard in shards.items() if shard == name and key not in stored]
        if absent:
            raise CheckpointError(f"{index.parent / name}: {absent[0]} is missing, expected by {index.name}")
        yield from stored.values()


def read_file(file: Path) -> Iterator[Stored]:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file")
    tensors = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    for key, value in tensors.items():
        yield Stored(str(file), key, value)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: not a readable safetensors file ({error})") from None


def read_pickle(file: Path) -> dict[str, Tensor]:
    """A `.bin` file, unpickled with tensors and plain containers only: no code of the file runs."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable PyTorch file of tensors ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: holds a {type(found).__name__}, expected names with tensors")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{file}: {key!r} is a {type(value).__name__}, expected a tensor")
    return found


def read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not a readable JSON file ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return found


def write(folder: Path, config: MLPSpeculatorConfig, weights: Mapping[str, Tensor], pickled: bool = False) -> None:
    """Write config.json and the weights (by first name) in the config's torch_dtype, each file replaced at once.

    `model.safetensors` holds a tied tensor once, under its first name (emb.0, proj.0, proj.1, head.0, ln.0): safetensors has no shared
    storage, and readers of tied checkpoints take these names and ignore the others or fill them from the tie. `pickled` writes
    `pytorch_model.bin` instead, as tied checkpoints were published: every alias is present and all share one storage in the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = torch_dtype(config.torch_dtype)
    cast = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in shapes(config)}
    if pickled:
        everything = {PREFIX + alias: value for name, value in cast.items() for alias in aliases(name, config)}
        torch.save(everything, partial(folder / SINGLES[1]))
    else:
        save_file({PREFIX + name: value.clone() for name, value in cast.items()}, partial(folder / SINGLES[0]), metadata={"format": "pt"})
    partial(folder / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n", encoding="utf-8")
    written = folder / SINGLES[pickled]
    for file in (written, folder / "config.json"):
        os.replace(partial(file), file)


def partial(file: Path) -> Path:
    """Where a file is written before it takes its name."""
    return file.with_name(file.name + ".partial")


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"torch_dtype is {name!r}, expected float32, float16 or bfloat16")
    return dtype
