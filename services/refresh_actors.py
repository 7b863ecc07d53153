"""The actors of the refresh loop, made from settings: the registry of all models, and a trainer for each that is refreshed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from actors.registry import NAME as REGISTRY
from actors.registry import RegistrySettings, start_registry
from actors.releases import Base
from actors.trainer import NAME as TRAINER
from actors.trainer import TrainerSettings, start_trainer
from configs.settings import ModelRefreshSettings, ModelSettings, Settings
from configs.settings import RefreshSettings as Places
from drafters.refresh import RefreshSettings
from drafters.replay import BufferSettings
from policies import CanaryRule
from policies.gate import GateRule
from services.named import Named


@dataclass(frozen=True, slots=True)
class RefreshPlan:
    """What a replica needs to take part: the registry, how its model's trainer is found once base, folder and version of the configured
    speculator are known, where versions are kept, and this machine's cache of them."""

    registry: Callable[[], Any]
    trainer: Callable[[Base, str, str], Callable[[], Any]]
    artefacts: str
    cache: Path


def refresh_plan(settings: Settings, model: ModelSettings) -> RefreshPlan | None:
    """The plan of one model; None if its speculator is not refreshed."""
    if not model.refresh.enabled:
        return None
    trainer = partial(trainer_actor, settings.refresh, settings.ray.namespace, model, settings.request_log.max_age_s)
    return RefreshPlan(registry_actor(settings), trainer, settings.refresh.artefacts, Path(settings.refresh.cache))


def registry_actor(settings: Settings) -> Named:
    r, namespace = settings.refresh, settings.ray.namespace
    rule = CanaryRule(**r.canary.model_dump())
    cache = str(Path(r.cache) / "registry")
    chosen = RegistrySettings(automatic=r.automatic, rule=rule)
    return Named(REGISTRY, namespace, partial(start_registry, settings.state.url, r.artefacts, cache, chosen, REGISTRY, namespace))


def trainer_actor(
    kept: Places,
    namespace: str,
    model: ModelSettings,
    max_age: float | None = None,
    base: Base | None = None,
    folder: str = "",
    version: str = "",
) -> Named:
    """The model's trainer; to be started it must know base, folder and version of the configured speculator. max_age: seconds that it may
    keep what was answered."""
    t, work = model.refresh.trainer, str(Path(kept.work) / model.name)

    def start() -> Any:
        if base is None:
            raise ValueError(f"no trainer of {model.name} runs")
        options = {"num_cpus": t.num_cpus, "num_gpus": t.num_gpus} | ({"memory": int(t.memory)} if t.memory else {})
        place = kept.artefacts
        return start_trainer(
            model.name, base, folder, version, place, work, REGISTRY, trainer_settings(model.refresh, max_age), namespace, **options
        )

    return Named(f"{TRAINER}-{model.name}", namespace, start)


def trainer_settings(refresh: ModelRefreshSettings, max_age: float | None = None) -> TrainerSettings:
    """As the trainer reads them."""
    r, t = refresh, refresh.trainer
    shared = [field.name for field in fields(RefreshSettings) if field.name in ModelRefreshSettings.model_fields]
    return TrainerSettings(
        refresh=RefreshSettings(**{name: getattr(r, name) for name in shared}),
        buffer=BufferSettings(budget=int(r.buffer_bytes), held_out=r.held_out, tags=r.tags),
        rule=GateRule(**r.gate.model_dump()),
        running=t.running,
        quiet=t.quiet_s,
        checkpoint=t.checkpoint_s,
        device=t.device,
        threads=t.threads,
        max_age=max_age,
    )
