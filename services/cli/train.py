"""`specfleet train`: a speculator for a base, from text. torch is imported by the command itself, so that all others start quickly."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from services.cli import options
from services.cli.device import check_device
from services.cli.problem import TROUBLE, Problem, sentence
from services.cli.screen import console, emit_json, show, table


def train(
    base: Annotated[Path, typer.Argument(help="Folder of the base model, in Hugging Face's format.")],
    text: Annotated[list[Path], typer.Argument(help="Text files, folders of them, or .npy files of token ids.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the speculator.")],
    work: Annotated[Path | None, typer.Option("--work", help="Folder for checkpoints.", show_default="OUTPUT.work")] = None,
    heads: Annotated[str, typer.Option("--heads", help="Candidates kept by each head, first head first.")] = "5,3,2",
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="Paths of a draft.")] = 5,
    inner_dim: Annotated[int, typer.Option("--inner-dim", min=0, help="Width inside the heads; 0: that of the base.")] = 256,
    tied: Annotated[bool, typer.Option("--tied/--untied", help="Whether the heads share their weights.")] = True,
    steps: Annotated[str, typer.Option("--steps", help="Steps of stage 1 (given text) and stage 2 (the base's own text).")] = "500,200",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Texts in one step.")] = 8,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens of one text.")] = 256,
    rate: Annotated[float, typer.Option("--rate", help="Peak learning rate.")] = 1e-3,
    held_out: Annotated[float, typer.Option("--held-out", min=0.0, max=0.5, help="Share of the text to measure on.")] = 0.05,
    prompts: Annotated[int, typer.Option("--prompts", min=0, help="Held-out prompts to measure on after each stage.")] = 32,
    name: Annotated[str | None, typer.Option("--name", help="The base's name in the saved config.", show_default="its folder")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same weights.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N or mps.")] = "cpu",
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.", show_default="all cores")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Train a speculator in two stages; a run that was cut off goes on where it was."""
    if not (base / "config.json").is_file():
        raise Problem(f"{base} is not a model folder: it has no config.json.")
    from drafters.training import SpeculatorShape, Stage, TrainingJob

    limit_threads(threads)
    check_device(device)
    found = read(base, text, held_out)
    counts = numbers("--heads", heads)
    first, second = pair(steps)
    job = TrainingJob(
        base=base,
        output=output,
        work=work or output.with_name(output.name + ".work"),
        tokens=found.tokens,
        prompts=found.prompts(prompts),
        name=name or base.resolve().name,
        shape=SpeculatorShape(len(counts), candidates, counts, inner_dim, tied),
        first=Stage(first, rows, length, 1.0, 0.1),
        second=Stage(second, rows, length, 0.1, 0.01),
        peak=rate,
        seed=seed,
        device=device,
    )
    present(run(job), as_json)


def limit_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def read(base: Path, text: list[Path], share: float) -> Any:
    """The training text in the base's own tokens. Token arrays need no tokenizer: it is loaded for a first text. Raises Problem."""
    from services.cli.training_text import training_text

    @cache
    def tokenizer() -> Any:
        return load_tokenizer(base)

    def encode(words: str) -> list[int]:
        end = tokenizer().eos_token_id
        return [*tokenizer().encode(words, add_special_tokens=False, verbose=False), *([] if end is None else [end])]

    with console(error=True).status("reading text"):
        return training_text(text, encode, share)


def load_tokenizer(base: Path) -> Any:
    """The base's tokenizer. Raises Problem, whatever keeps transformers from reading it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(base)
    except Exception:
        raise Problem(f"{base} has no tokenizer that can be read; without one, give .npy files of token ids.") from None


def run(job: Any) -> dict[str, Any]:
    """Train and measure under a progress bar. Raises Problem."""
    from drafters.progress import TrainingBar
    from drafters.training import train as train_speculator

    try:
        with TrainingBar(job.name, console(error=True)) as bar:
            return train_speculator(job, bar).to_json()
    except TROUBLE as error:
        raise Problem(f"The speculator was not trained: {sentence(error)}") from None


def present(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        emit_json(report)
        return
    columns = ["stage", "steps", "seconds", "losses, nats", "tokens/step, greedy", "tokens/step, temperature 1"]
    show(table(f"Speculator of {report['base']}: {report['parameters']:,} parameters", columns, [row(stage) for stage in report["stages"]]))


def row(stage: dict[str, Any]) -> list[Any]:
    losses = " ".join(f"{loss:.2f}" for loss in stage["losses"])
    return [stage["stage"], stage["steps"], stage["seconds"], losses, stage["greedy"]["per_step"], stage["sampled"]["per_step"]]


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, separated by commas. Raises Problem."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) >= 1 for part in parts):
        raise Problem(f"{option} takes whole numbers separated by commas, not {text!r}.")
    return tuple(int(part) for part in parts)


def pair(text: str) -> tuple[int, int]:
    found = numbers("--steps", text)
    if len(found) != 2:
        raise Problem(f"--steps takes two numbers, such as 500,200, not {text!r}.")
    return found[0], found[1]
