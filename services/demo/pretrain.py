"""Trains a base model of the demo fleet from scratch, resumably, and saves it as transformers reads it."""

import json
import math
import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from services.demo.measure import bits_per_byte
from services.demo.recipe import FleetRecipe, ModelRecipe, Optimization, Phase, RecipeError, TokenizerRecipe, demo_fleet, fingerprint
from services.demo.tokenizer import save_tokenizer
from services.demo.tokens import TokenizedCorpus, load_corpus


@dataclass(slots=True)
class Progressed:
    """How far a training run has come; what a checkpoint remembers beside weights and optimizers."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = math.nan  # mean over the last steps, nats per token


@dataclass(frozen=True, slots=True)
class Run:
    """A model, its optimizers and its place in the recipe."""

    recipe: ModelRecipe
    model: LlamaForCausalLM
    optimizers: tuple[torch.optim.Optimizer, ...]
    progressed: Progressed
    checkpoint: Path
    fingerprint: str  # of the recipe and the text


def pretrain(name: str, fleet: FleetRecipe | None = None, device: str = "cpu", threads: int = 1) -> Path:
    """Trains the model `name`, or continues to, measures it and saves it; returns its folder.

    A checkpoint under the build folder is written every two minutes, so a run that was cut off continues from there.
    Raises RecipeError when that checkpoint, or the corpus, is of another recipe.
    """
    torch.set_num_threads(threads)
    fleet = fleet or demo_fleet()
    recipe = fleet.model(name)
    corpus = load_corpus(recipe.corpus, fleet)
    run = start_run(recipe, fleet.tokenizer, corpus.train, fleet.checkpoint(name), device)
    train(run, corpus.train)
    return save(run, corpus, fleet)


def start_run(recipe: ModelRecipe, tokens: TokenizerRecipe, ids: torch.Tensor, checkpoint: Path, device: str) -> Run:
    """A fresh run over the text `ids` from the recipe's seed, or the one in the checkpoint. Raises RecipeError for another run's."""
    belongs_to = fingerprint([recipe, tokens], ids.numpy().tobytes())
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(llama_config(recipe, tokens)).to(device)
    run = Run(recipe, model, optimizers(model, recipe.optimization), Progressed(), checkpoint, belongs_to)
    if checkpoint.exists():
        restore(run, torch.load(checkpoint, map_location=device, weights_only=True))
    return run


def llama_config(recipe: ModelRecipe, tokens: TokenizerRecipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokens.vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.head_dim,
        max_position_embeddings=recipe.positions,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        rms_norm_eps=recipe.norm_eps,
        tie_word_embeddings=True,
        bos_token_id=tokens.specials.index(tokens.document),
        eos_token_id=stop_tokens(recipe, tokens),
    )


def stop_tokens(recipe: ModelRecipe, tokens: TokenizerRecipe) -> list[int]:
    """The ids that end a text: for a chat model the end of a turn, for every model the document marker."""
    end, document = tokens.specials.index(tokens.end), tokens.specials.index(tokens.document)
    return [end, document] if recipe.corpus == "chat" else [document]


def optimizers(model: LlamaForCausalLM, recipe: Optimization) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms; each group remembers its peak rate."""
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    muon = torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=recipe.muon_decay, momentum=recipe.momentum)
    groups = [
        {"params": [model.get_input_embeddings().weight], "lr": recipe.embedding_rate},
        {"params": norms, "lr": recipe.norm_rate},
    ]
    adam = torch.optim.AdamW(groups, betas=recipe.betas, weight_decay=0.0)
    for group in (*muon.param_groups, *adam.param_groups):
        group["peak"] = group["lr"]
    return muon, adam


def rate(step: int, steps: int, recipe: Optimization) -> float:
    """The trapezoid: the share of the peak learning rate at a step."""
    warmup, decay = max(1, round(recipe.warmup * steps)), max(1, round(recipe.decay * steps))
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


def phase_at(step: int, recipe: ModelRecipe) -> tuple[int, Phase]:
    """The phase a step belongs to, and the step it began at."""
    begin = 0
    for phase in recipe.optimization.phases:
        end = round(phase.until * recipe.steps)
        if step < end:
            return begin, phase
        begin = end
    raise ValueError(f"step {step} is past the last phase")


def batch(step: int, recipe: ModelRecipe, ids: torch.Tensor) -> torch.Tensor:
    """The step's windows [rows, length + 1]; a function of the recipe, its seed and the step.

    Within a phase every window of the corpus is seen once before any is seen again.
    """
    begin, phase = phase_at(step, recipe)
    count = (len(ids) - 1) // phase.length
    rows = torch.arange((step - begin) * phase.rows, (step - begin + 1) * phase.rows)
    chosen = [window_order(recipe.seed, phase.length, int(row) // count, count)[int(row) % count] for row in rows]
    starts = torch.stack(chosen) * phase.length
    return ids[starts[:, None] + torch.arange(phase.length + 1)].long()


def window_order(seed: int, length: int, epoch: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + length * 101 + epoch)
    return torch.randperm(count, generator=generator)


def train(run: Run, ids: torch.Tensor) -> None:
    """Runs the steps that are left, with a checkpoint every two minutes and one at the end."""
    recipe, progressed = run.recipe, run.progressed
    began, saved, before = time.monotonic(), time.monotonic(), progressed.seconds
    with progress_bar() as progress:
        task = progress.add_task(recipe.name, total=recipe.steps, completed=progressed.step, loss=math.nan)
        for step in range(progressed.step, recipe.steps):
            windows = batch(step, recipe, ids)
            loss = train_step(run, windows)
            now = time.monotonic()
            note(progressed, loss, windows.shape[0] * (windows.shape[1] - 1), before + now - began)
            progress.update(task, completed=step + 1, loss=progressed.loss)
            if (step + 1) % recipe.optimization.log_steps == 0 or step < 5:
                progress.console.print(log_line(run), highlight=False)
            if now - saved > recipe.optimization.checkpoint_seconds or step + 1 == recipe.steps:
                saved = now
                write_checkpoint(run)


def progress_bar() -> Progress:
    loss = TextColumn("{task.fields[loss]:.3f} nats")
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn())


def note(progressed: Progressed, loss: float, tokens: int, seconds: float) -> None:
    """Moves the record one step on; the loss is averaged over about 50 steps."""
    progressed.step += 1
    progressed.tokens += tokens
    progressed.seconds = seconds
    weight = max(0.02, 1 / progressed.step)
    progressed.loss = loss if math.isnan(progressed.loss) else (1 - weight) * progressed.loss + weight * loss


def log_line(run: Run) -> str:
    progressed = run.progressed
    speed = progressed.tokens / max(progressed.seconds, 1e-9)
    return f"{run.recipe.name} step {progressed.step} loss {progressed.loss:.4f} tokens {progressed.tokens} tokens/s {speed:.0f}"


def train_step(run: Run, windows: torch.Tensor) -> float:
    """One step of all optimizers on windows [rows, length + 1]; returns the mean loss in nats per token."""
    optimization = run.recipe.optimization
    scale = rate(run.progressed.step, run.recipe.steps, optimization)
    rows = max(1, optimization.micro_tokens // (windows.shape[1] - 1))
    loss = 0.0
    for piece in torch.split(windows.to(run.model.device), rows):
        part = window_loss(run.model, piece) * (len(piece) / len(windows))
        part.backward()  # type: ignore[no-untyped-call]
        loss += float(part.detach())
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), optimization.clip)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return loss


def window_loss(model: LlamaForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of windows [rows, length + 1], matrix products in bfloat16."""
    with torch.autocast(model.device.type, torch.bfloat16):
        logits = model(windows[:, :-1], use_cache=False).logits  # [rows, length, vocab]
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def write_checkpoint(run: Run) -> None:
    """Writes weights, optimizers, random state and progress, replacing the last checkpoint in one move."""
    run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": run.model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "progressed": asdict(run.progressed),
        "random": torch.get_rng_state(),
        "fingerprint": run.fingerprint,
    }
    temporary = run.checkpoint.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, run.checkpoint)


def restore(run: Run, state: dict[str, Any]) -> None:
    """Puts a checkpoint's state into the run. Raises RecipeError, and leaves the run as it is, when it is of another recipe or text."""
    if state.get("fingerprint") != run.fingerprint:
        raise RecipeError(f"{run.checkpoint} is of another recipe or text")
    run.model.load_state_dict(state["model"])
    for optimizer, remembered in zip(run.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(remembered)
    for field, value in state["progressed"].items():
        setattr(run.progressed, field, value)
    torch.set_rng_state(state["random"].cpu())


def save(run: Run, corpus: TokenizedCorpus, fleet: FleetRecipe) -> Path:
    """Writes config, bfloat16 weights, generation config, tokenizer and the measured numbers into the model's folder."""
    folder = fleet.models_folder / run.recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    model = run.model.to(torch.bfloat16).eval()
    model.generation_config = generation_config(run.recipe, fleet.tokenizer)
    model.save_pretrained(folder)
    save_tokenizer(corpus.tokenizer, folder, fleet.tokenizer, run.recipe.positions, chat=run.recipe.corpus == "chat")
    record = training_record(run, corpus, bits_per_byte(model.float(), corpus.held_out))
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    return folder


def generation_config(recipe: ModelRecipe, tokens: TokenizerRecipe) -> GenerationConfig:
    document = tokens.specials.index(tokens.document)
    return GenerationConfig(bos_token_id=document, eos_token_id=stop_tokens(recipe, tokens), pad_token_id=document)


def training_record(run: Run, corpus: TokenizedCorpus, scores: dict[str, float]) -> dict[str, Any]:
    """What training.json holds."""
    return {
        "name": run.recipe.name,
        "parameters": run.model.num_parameters(),
        "recipe": asdict(run.recipe),
        "steps": run.progressed.step,
        "tokens": run.progressed.tokens,
        "seconds": round(run.progressed.seconds),
        "train_loss_nats_per_token": round(run.progressed.loss, 4),
        "corpus_tokens": len(corpus.train),
        "corpus_bytes": corpus.sizes,
        "held_out_documents": len(corpus.held_out),
        "held_out_tokens": sum(len(scored.ids) for scored in corpus.held_out),
        "held_out_bits_per_byte": {part: round(score, 4) for part, score in scores.items()},
        "window": 1024,
        "overlap": 512,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
