"""A training run as a progress bar in the terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from drafters.training import Advance


class TrainingBar:
    """One bar per stage, with the heads' losses. Use as `with TrainingBar(name) as bar: train(job, bar)`."""

    def __init__(self, name: str, console: Console | None = None) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[losses]}"))
        self.name, self.bars = name, Progress(*columns, TimeRemainingColumn(), console=console)
        self.tasks: dict[int, TaskID] = {}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def __call__(self, advance: Advance) -> None:
        if advance.stage not in self.tasks:
            self.tasks[advance.stage] = self.bars.add_task(f"{self.name} stage {advance.stage}", total=advance.steps, losses="")
        losses = " ".join(f"{loss:.2f}" for loss in advance.losses)
        self.bars.update(self.tasks[advance.stage], completed=advance.step, losses=f"{losses} nats")
