"""The recipe of the demo fleet: every name, size, seed and step count, in frozen dataclasses. Knows no torch and no files."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


class RecipeError(ValueError):
    """What was made or begun earlier is of another recipe, and cannot be gone on with."""


@dataclass(frozen=True, slots=True)
class Package:
    """A source of Python files: `stdlib` or the import name of an installed package, with a cap on its share."""

    name: str
    code_bytes: int = 2_000_000  # cap on the code corpus' share
    chat_bytes: int = 2_000_000  # cap on the source bytes whose docstrings feed the chat corpus


@dataclass(frozen=True, slots=True)
class CorpusRecipe:
    """Which files are text, which of them are held out, and how they are sampled."""

    packages: tuple[Package, ...]
    held_out: float = 0.02  # share of whole files, chosen by a stable hash of their names
    smallest_file: int = 200  # bytes
    largest_file: int = 200_000  # bytes
    longest_line: int = 400  # characters
    answer_length: int = 600  # characters
    prose_share: float = 0.3  # of the chat corpus' characters
    prose_length: int = 2_000  # characters
    seed: int = 17


@dataclass(frozen=True, slots=True)
class TokenizerRecipe:
    """A byte-level BPE tokenizer learned from the first `sample_bytes` of a shuffled corpus."""

    vocab_size: int = 2048
    sample_bytes: int = 12_000_000
    document: str = "<|endoftext|>"  # begins every document; bos and eos
    end: str = "<|end|>"  # ends every chat turn
    roles: tuple[str, ...] = ("system", "user", "assistant")

    @property
    def role_markers(self) -> tuple[str, ...]:
        return tuple(f"<|{role}|>" for role in self.roles)

    @property
    def specials(self) -> tuple[str, ...]:
        return (self.document, *self.role_markers, self.end)


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training: until `until` (share of all steps), batches of `rows` windows of `length` tokens."""

    until: float
    length: int
    rows: int


@dataclass(frozen=True, slots=True)
class Optimization:
    """Muon for hidden matrices, AdamW for embeddings and norms, under a trapezoidal schedule."""

    phases: tuple[Phase, ...]
    micro_tokens: int = 4096  # tokens in one forward and backward pass
    warmup: float = 0.02  # share of steps
    decay: float = 0.35  # share of steps
    muon_rate: float = 0.02
    muon_decay: float = 0.05
    momentum: float = 0.95
    embedding_rate: float = 4e-3
    norm_rate: float = 4e-3
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    checkpoint_seconds: float = 120.0
    log_steps: int = 50


@dataclass(frozen=True, slots=True)
class ModelRecipe:
    """One base model: its corpus, its Llama geometry and how long it trains."""

    name: str
    corpus: str  # code | chat; also names the tokenizer, so models of one corpus share it
    hidden: int
    layers: int
    heads: int
    intermediate: int
    steps: int
    seed: int
    optimization: Optimization
    head_dim: int = 64
    positions: int = 2048
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class FleetRecipe:
    """The whole fleet."""

    corpus: CorpusRecipe
    tokenizer: TokenizerRecipe
    models: tuple[ModelRecipe, ...]
    build_folder: Path = Path(".specfleet/build")
    models_folder: Path = Path("models")

    def checkpoint(self, name: str) -> Path:
        """Where the training of the base `name` keeps its state."""
        return self.build_folder / name / "checkpoint.pt"

    def model(self, name: str) -> ModelRecipe:
        """The model called `name`; raises KeyError when the fleet has none."""
        for model in self.models:
            if model.name == name:
                return model
        raise KeyError(f"the demo fleet has no model {name!r}; it has {', '.join(model.name for model in self.models)}")


def fingerprint(recipes: Iterable[Any], text: bytes = b"") -> str:
    """What a checkpoint or a corpus belongs to: recipes (dataclasses), and the text trained on. Hex digits."""
    digest = hashlib.sha256(json.dumps([asdict(recipe) for recipe in recipes], sort_keys=True).encode())
    digest.update(text)
    return digest.hexdigest()


def demo_packages() -> tuple[Package, ...]:
    small = ("numpy", "pydantic", "fastapi", "starlette", "httpx", "httpcore", "redis", "rich", "typer", "tokenizers", "safetensors")
    smaller = ("click", "uvicorn", "anyio", "aiohttp", "huggingface_hub", "jinja2", "jsonschema", "requests", "urllib3", "yaml")
    smallest = ("fsspec", "filelock", "websockets", "prometheus_client", "virtualenv", "attr", "networkx")
    return (
        Package("stdlib", 20_000_000, 20_000_000),
        Package("torch", 9_000_000, 20_000_000),
        Package("transformers", 5_000_000, 8_000_000),
        Package("ray", 5_000_000, 12_000_000),
        Package("openai", 1_000_000, 1_000_000),
        Package("sympy", 2_000_000, 8_000_000),
        *(Package(name, 2_500_000, 4_000_000) for name in (*small, *smaller, *smallest)),
    )


def growing_windows(short: float) -> tuple[Phase, ...]:
    """Windows of 256 tokens for a share `short` of the steps, then 512, at last up to 2048; the batch doubles once."""
    return (Phase(short, 256, 16), Phase(0.86, 512, 16), Phase(0.96, 1024, 8), Phase(1.0, 2048, 4))


def demo_models() -> tuple[ModelRecipe, ...]:
    chat = Optimization(growing_windows(262 / 650), warmup=15 / 650, decay=162 / 650)
    code = Optimization(growing_windows(0.4))
    large = Optimization(growing_windows(350 / 680), warmup=20 / 680)
    return (
        ModelRecipe("demo-chat", "chat", hidden=256, layers=5, heads=4, intermediate=688, steps=650, seed=2, optimization=chat),
        ModelRecipe("demo-code", "code", hidden=192, layers=5, heads=3, intermediate=512, steps=480, seed=3, optimization=code),
        ModelRecipe("demo-code-large", "code", hidden=320, layers=6, heads=5, intermediate=864, steps=680, seed=1, optimization=large),
    )


def demo_fleet() -> FleetRecipe:
    """The fleet that `models/` holds."""
    return FleetRecipe(corpus=CorpusRecipe(demo_packages()), tokenizer=TokenizerRecipe(), models=demo_models())
