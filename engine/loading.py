"""Load a base model with transformers, attach ragged attention, and prove by numbers that the two agree.

The models of transformers are imported where one is loaded: they take seconds and a hundred MiB, which a process that maps packed weights,
or only says what is to be deployed, can do without.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME

from engine.attention import IMPLEMENTATION, KVStore, Row, ragged_attention
from engine.executor import Choice, Eager, Executor
from engine.gpu.graphs import Graphed
from engine.native import weights
from engine.native.program import Native, pack_model, possible, supported
from engine.packed import pack
from engine.tree import Tree

log = logging.getLogger(__name__)
PROBE_TOLERANCE = 2e-3  # largest difference of logits, relative to the largest logit, in float32
ACCELERATORS = frozenset({"cuda"})  # types of devices that the kernels of `engine.gpu` are for
SUPPORTED_LAYERS = frozenset({"full_attention", "sliding_attention"})


class UnsupportedModel(ValueError):
    """The base cannot be served by ragged attention, and why."""


@dataclass(slots=True, eq=False)
class Base:
    """A base model ready for the engine.

    executor: what computes its forwards. context: longest text, in tokens. revision: its commit in the hub, "" for a folder.
    """

    executor: Executor
    vocab_size: int
    hidden_size: int
    context: int
    eos: frozenset[int]
    device: torch.device
    dtype: torch.dtype
    kv_bytes_per_token: int
    revision: str = ""

    def forward(self, store: KVStore, rows: Sequence[Row], tokens: Sequence[int], keep: Sequence[int]) -> tuple[Tensor, Tensor]:
        """One ragged pass over the tokens of all rows, packed in row order. keep: which of the T tokens need logits.

        Returns logits [len(keep), vocab] and the hidden states that the LM head read [len(keep), hidden_size].
        """
        return self.executor.forward(store, rows, tokens, keep)


def load_base(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    cache: Path | None = None,
    executor: Choice = "auto",
    invariant: bool = False,
) -> Base:
    """Load a base from a local folder or a hub id in the published format.

    cache: where weights packed for this processor are kept, to be mapped by every process of the host; None: private memory.
    executor, invariant: see `attach`.
    Raises UnsupportedModel for an architecture that cannot be served, or not so, OSError for a folder that cannot be read.
    """
    config = AutoConfig.from_pretrained(folder)
    refuse_layers(config)
    packable = executor == "auto" and device == "cpu" and Path(folder).is_dir() and possible(config)
    if cache is None or not packable:
        revision = commit(folder)
        return replace(attach(pretrained(config, folder, device, dtype, revision), executor, invariant), revision=revision)
    file = weights.file_for(Path(folder), cache, dtype)
    with weights.turn(file):
        if (tensors := weights.present(file)) is not None:
            return mapped(config, folder, tensors, dtype)
        return attach(pretrained(config, folder, device, dtype), executor, invariant, file)


def commit(folder: str | Path) -> str:
    """The commit that a hub id stands for in the hub's cache on this machine, which the configuration was read from; "" for a folder."""
    found = None if Path(folder).is_dir() else try_to_load_from_cache(str(folder), CONFIG_NAME)
    return Path(found).parent.name if isinstance(found, str) else ""


def pretrained(config: PretrainedConfig, folder: str | Path, device: str, dtype: torch.dtype, revision: str = "") -> Any:
    """The transformers model of a checkpoint, with our attention. revision: a commit of the hub, whatever is the latest now. Raises
    UnsupportedModel, OSError."""
    from transformers import AutoModelForCausalLM

    register()
    options = {"dtype": dtype, "attn_implementation": IMPLEMENTATION, "revision": revision or "main"}
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, config=copy.deepcopy(config), **options)
    except ValueError as error:
        raise UnsupportedModel(f"{folder}: {error}") from error
    return model.to(device).eval()


def mapped(config: PretrainedConfig, folder: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Base:
    """A base whose packed weights were in a file already: proven when they were packed, and not loaded again."""
    executor = Native(config, tensors, torch.get_num_threads(), dtype)
    try:
        generation: Any = GenerationConfig.from_pretrained(folder)
    except OSError:
        generation = None
    return describe(config, executor, eos_tokens(generation, config), torch.device("cpu"), dtype, executor.bytes_per_token)


def describe(
    config: PretrainedConfig, executor: Executor, eos: frozenset[int], device: torch.device, dtype: torch.dtype, kv_bytes_per_token: int
) -> Base:
    text = config.get_text_config()
    return Base(
        executor=executor,
        vocab_size=int(text.vocab_size),
        hidden_size=executor.hidden_size,
        context=int(getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 2048),
        eos=eos,
        device=device,
        dtype=dtype,
        kv_bytes_per_token=kv_bytes_per_token,
    )


def register() -> None:
    """Make ragged attention known to transformers, and transformers quiet; doing so twice changes nothing."""
    from transformers import AttentionInterface

    transformers.utils.logging.disable_progress_bar()
    AttentionInterface.register(IMPLEMENTATION, ragged_attention)


@torch.inference_mode()
def attach(model: Any, executor: Choice = "auto", invariant: bool = False, file: Path | None = None) -> Base:
    """Wrap a loaded model whose attention implementation is ours, after probing it.

    executor: whether kernels of ours may take over where they compute what the model does; file: where its packed weights will be kept.
    invariant: a token's logits must be the same bits whatever else is in a step. Raises UnsupportedModel where they would not be.
    """
    refuse_layers(model.config)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    eos = eos_tokens(getattr(model, "generation_config", None), model.config)
    eager = Eager(model, device, dtype)
    expected = plain_probe(model, eager.vocab_size)
    measured = probe(model, eager, expected, dtype)
    chosen: Executor = eager if executor == "eager" else fastest(eager, expected, invariant, file)
    if invariant and not chosen.invariant:
        raise UnsupportedModel(varying(model.config, chosen))
    return describe(model.config, chosen, eos, device, dtype, chosen.bytes_per_token if isinstance(chosen, Native) else measured)


def fastest(eager: Eager, expected: Tensor, invariant: bool, file: Path | None) -> Executor:
    """The fastest executor for the device that computes what the model does; each proves it by numbers, and says in the log why not."""
    model, device, dtype = eager.model, eager.device, eager.dtype
    if device.type in ACCELERATORS:
        return Graphed(eager, invariant=invariant)
    if device.type == "cpu" and (native := compile_native(model, expected, dtype, file)):
        return native
    return Eager(model, device, dtype) if pack(model) else eager


def varying(config: PretrainedConfig, executor: Executor) -> str:
    """Why logits would depend on what else is in a step, and what is needed so that they do not."""
    why = f" ({executor.why})" if isinstance(executor, Graphed) else ""
    return (
        f"{config.model_type}: batch_invariant cannot be had from the {type(executor).__name__} executor{why}; it takes executor auto, and "
        "a model that the native kernels serve (on a CPU, with a C compiler) or that is computed fused (on a GPU, with Triton)"
    )


def compile_native(model: Any, expected: Tensor, dtype: torch.dtype, file: Path | None) -> Native | None:
    """The model on compiled kernels, if they serve it and compute the same logits."""
    if not supported(model):
        return None
    tensors = dict(pack_model(model))
    executor = Native(model.config, weights.private(tensors), torch.get_num_threads(), dtype)
    try:
        probe(model, executor, expected, dtype)
    except UnsupportedModel as error:
        log.warning("native kernels do not serve this model: %s", error)
        return None
    if file is None:
        return executor
    try:
        weights.save(tensors, file)
        return Native(model.config, weights.load(file), torch.get_num_threads(), dtype)
    except OSError as error:
        log.warning("packed weights cannot be shared in %s: %s", file.parent, error)
        return executor


def eos_tokens(*configs: Any) -> frozenset[int]:
    """End-of-text tokens of the first config that names any: the generation config before the model's."""
    for config in configs:
        eos = getattr(config, "eos_token_id", None)
        if eos is not None:
            return frozenset(eos if isinstance(eos, (list, tuple)) else [eos])
    return frozenset()


def refuse_layers(config: PretrainedConfig) -> None:
    """Refuse layers whose state is not a plain KV cache."""
    config = config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - SUPPORTED_LAYERS
    if other:
        raise UnsupportedModel(f"{config.model_type}: layers of type {sorted(other)} are not served; accepted: {sorted(SUPPORTED_LAYERS)}")


def probe_text(vocab_size: int) -> tuple[list[int], Tree]:
    """A prompt and a small tree after it, of random tokens."""
    text = np.random.default_rng(0).integers(1, vocab_size - 1, 20).tolist()
    return text[:16], Tree(tokens=text[16:], parents=[-1, 0, 0, 2], forced=1, depths=[0, 1, 1, 2])


@torch.inference_mode()
def probe(model: Any, executor: Executor, expected: Tensor, dtype: torch.dtype) -> int:
    """Compare a chunked ragged prefill and a small tree with the plain forward; every layer must have written its keys.

    Returns the bytes that one token's keys and values take. Raises UnsupportedModel with what disagreed. Costs about a second.
    """
    store = KVStore(64)
    prompt, tree = probe_text(executor.vocab_size)
    try:
        ragged = probe_ragged(executor, store, prompt, tree)
    except Exception as error:
        raise UnsupportedModel(f"{model.config.model_type} does not run with ragged attention: {error}") from error
    judge(model.config, store, ragged, expected, dtype)
    return store.bytes_per_slot()


def probe_ragged(executor: Executor, store: KVStore, prompt: list[int], tree: Tree) -> Tensor:
    """Logits of a prompt read in two chunks and of a tree after it. [len(prompt) + len(tree), V]"""
    slots = list(range(1, 1 + len(prompt) + len(tree)))
    cut, end = len(prompt) * 2 // 3, len(prompt)
    parts = []
    for begin, stop in ((0, cut), (cut, end)):
        chain = Tree.chain(prompt[begin:stop])
        parts.append((Row(np.array(slots[:begin], dtype=np.int64), slots[begin:stop], chain.parents, chain.depths), chain.tokens))
    parts.append((Row(np.array(slots[:end]), slots[end:], tree.parents, tree.depths), tree.tokens))
    return torch.cat([executor.forward(store, [row], tokens, range(len(tokens)))[0] for row, tokens in parts])


def plain_probe(model: Any, vocab_size: int) -> Tensor:
    """What the model's own forward with its eager attention says of the probe's tokens. Raises UnsupportedModel."""
    prompt, tree = probe_text(vocab_size)
    paths = [prompt + [tree.tokens[0]] + [tree.tokens[i] for i in tree.ancestry(node)] for node in range(len(tree))]
    model.set_attn_implementation("eager")
    try:
        return torch.cat([plain_logits(model, prompt)] + [plain_logits(model, path)[-1:] for path in paths])[:, :vocab_size]
    except Exception as error:
        raise UnsupportedModel(f"{model.config.model_type} does not run: {error}") from error
    finally:
        model.set_attn_implementation(IMPLEMENTATION)


def plain_logits(model: Any, tokens: list[int]) -> Tensor:
    """[len(tokens), V]"""
    ids = torch.tensor([tokens], device=next(model.parameters()).device)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits


def judge(config: PretrainedConfig, store: KVStore, ragged: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Raise unless the logits agree and every layer wrote its keys."""
    name, text = config.model_type, config.get_text_config()
    layers = int(text.num_hidden_layers) - int(getattr(text, "num_kv_shared_layers", 0) or 0)
    if len(store.keys) < layers:
        raise UnsupportedModel(f"{name}: only {len(store.keys)} of {layers} layers hand their keys to ragged attention")
    scale = max(1.0, float(plain.float().abs().max()))
    worst = float((ragged.float() - plain.float()).abs().max())
    limit = PROBE_TOLERANCE if dtype == torch.float32 else 5e-2
    if not worst <= limit * scale:
        raise UnsupportedModel(f"{name}: ragged attention differs from the plain forward by {worst:.2g} in logits up to {scale:.2g}")
