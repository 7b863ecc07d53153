"""The desks of the refresh loop over named actors: the registry, every model's trainer, the request log."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.folder_lock import FolderLock, InUse
from actors.log_contents import Deleted, Purge, Selection
from actors.policy import UnknownModel
from actors.store import StateStore, StoreError, Value, open_state
from configs.settings import Settings
from drafters.durable import sync_folder
from services.gateway.errors import ApiError, refused
from services.gateway.ray_desk import ANSWER_S, told
from services.gateway.refresh import Pause, Purged, Refresh, Release, State, known
from services.peers import Finder

LOG = logging.getLogger(__name__)
REGISTRY = "specfleet-registry"
TRAINER = "specfleet-trainer"  # before the model's name
LEFT = ("traces", "checkpoint")  # what files of a trainer's work folder begin with that hold what was answered, or were learning from it
CONTENTS_S, PURGE_S = 30.0, 120.0  # seconds in which every record of the log is looked at


class Absent(LookupError):
    """There is no such actor, or it does not know the model."""


class Contact:
    """A named actor, looked up anew at every call, so that one that was started again is found too."""

    def __init__(self, who: str, code: str, find: Callable[[], Any]) -> None:
        """who, code: its name in errors, in words and for programs. find: looks it up, ValueError if there is none."""
        self.who, self.code, self.find = who, code, Finder(find)

    async def call(self, method: str, *arguments: object, patience: float = ANSWER_S) -> Any:
        """The actor's answer within so many seconds. Raises Absent, ApiError."""
        try:
            async with asyncio.timeout(patience):
                return await getattr(await self.find(), method).remote(*arguments)
        except RayTaskError as error:
            if isinstance(error.cause, UnknownModel):
                raise Absent from None
            raise told(error.cause, self.who) from None
        except ValueError:
            raise Absent from None
        except (TimeoutError, RayError):
            raise self.away() from None

    def away(self) -> ApiError:
        return refused(503, f"The {self.who} is away.", code=f"{self.code}_away", retry_after=1.0)


class RaySpeculators:
    """The registry. find: looks its actor up, ValueError if there is none. refreshed: models that it is to know, sooner or later, with the
    tags of their domains."""

    def __init__(self, find: Callable[[], Any], refreshed: Mapping[str, Sequence[str]]) -> None:
        self._registry, self._refreshed = Contact("speculator registry", "registry", find), refreshed

    async def state(self, model: str, tag: str | None = None) -> State:
        line = await self._line(model, tag or "")
        if tag is not None:
            return line
        tags = self._refreshed.get(model, ())
        others = await asyncio.gather(*(known(self._line(model, name)) for name in tags))
        return {**line, "domains": dict(zip(tags, others, strict=True))}

    async def _line(self, model: str, tag: str) -> State:
        found = await self._ask(model, "state", model, tag)
        return unknown(model, tag) if found is None else {"state": "on", **found}

    async def history(self, model: str, tag: str = "") -> Sequence[State]:
        return list(await self._ask(model, "history", model, None, tag) or ())

    async def change(self, release: Release) -> State:
        method, arguments = call(release)
        if (found := await self._ask(release.model, method, *arguments)) is None:
            raise off(release.model)
        return dict(found)

    async def _ask(self, model: str, method: str, *arguments: object) -> Any:
        """The registry's answer; None for a model that is not refreshed."""
        try:
            return await self._registry.call(method, *arguments)
        except Absent:
            if model in self._refreshed:
                raise self._registry.away() from None
            return None


def unknown(model: str, tag: str) -> State:
    """The state of a model that is not refreshed."""
    line = {"state": "off", "model": model, "tag": tag, "revision": 0, "live": None, "serving": None, "pinned": False, "canary": None}
    return {**line, "versions": [], "replicas": {}}


def call(release: Release) -> tuple[str, tuple[object, ...]]:
    """The registry's method for a change, and its arguments."""
    r = release
    match r.action:
        case "unpin":
            return "unpin", (r.model, r.who, r.why, r.expected, r.tag)
        case "rollback":
            return "rollback", (r.model, r.who, r.why, r.version, r.expected, r.tag)
        case "canary":
            return "start_canary", (r.model, r.version, r.who, r.why, r.share, r.expected, r.tag)
    return r.action, (r.model, r.version, r.who, r.why, r.expected, r.tag)


class RayTraining:
    """The trainers of the models that are refreshed; who paused one and when is a stream of the state store.

    finds: by model, what looks its trainer up, ValueError if it is not there. budgets: bytes of their buffers. opener: of the state store.
    """

    def __init__(
        self,
        finds: Mapping[str, Callable[[], Any]],
        budgets: Mapping[str, int],
        opener: Callable[[], StateStore],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._trainers = contacts(finds)
        self._budgets, self._open, self._clock = budgets, opener, clock

    async def state(self, model: str, tag: str | None = None) -> State:
        if model not in self._trainers:
            return {"state": "off", "model": model, "tag": tag or ""}
        whole = self._stated(model, await self._ask(model, "status"))
        return whole if tag is None else self._domain(whole, tag)

    async def history(self, model: str) -> Sequence[State]:
        return list(await self._stored(model, lambda store: store.entries(stream(model))))

    async def pause(self, pause: Pause) -> State:
        """The change is recorded before it is made, so that none goes unrecorded. One that changes nothing is not recorded."""
        if pause.model not in self._trainers:
            raise off(pause.model)
        before = bool((await self._ask(pause.model, "status"))["paused"])
        if before != pause.paused:
            entry = self._entry(pause, before)
            await self._stored(pause.model, lambda store: store.append(stream(pause.model), entry))
        return self._stated(pause.model, await self._ask(pause.model, "pause", pause.paused))

    def _stated(self, model: str, status: Mapping[str, Any]) -> State:
        return {"state": "paused" if status["paused"] else "on", **status, "buffer_bytes": self._budgets[model]}

    def _domain(self, whole: State, tag: str) -> State:
        """The state of one domain's training. A trainer that does not have it yet is one from before it was configured."""
        if tag not in whole["domains"]:
            raise self._trainers[whole["model"]].away()
        return {name: value for name, value in {**whole, **whole["domains"][tag]}.items() if name != "domains"}

    async def _ask(self, model: str, method: str, *arguments: object) -> Any:
        trainer = self._trainers[model]
        try:
            return await trainer.call(method, *arguments)
        except Absent:
            raise trainer.away() from None

    def _entry(self, pause: Pause, before: bool) -> Value:
        change = {"from": {"paused": before}, "to": {"paused": pause.paused}}
        return {"at": self._clock(), "who": pause.who, "why": pause.why, **change}

    async def _stored(self, model: str, act: Callable[[StateStore], Any]) -> Any:
        try:
            return await asyncio.to_thread(lambda: act(self._open()))
        except StoreError as error:
            raise told(error, f"trainer of {model}") from None


def contacts(finds: Mapping[str, Callable[[], Any]]) -> dict[str, Contact]:
    """Trainers by model."""
    return {model: Contact(f"trainer of {model}", "trainer", find) for model, find in finds.items()}


def stream(model: str) -> str:
    """The stream of what was done to a model's training."""
    return f"training/{model}"


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What became of a model's traces. count: that its trainer gave up, None if no trainer did. cleared: whether what a trainer had left on
    the disk was deleted. why: they may still be there."""

    count: int | None = None
    cleared: bool = False
    why: str = ""


class RayLog:
    """The request log. find: looks its actor up, or starts it. finds: by model, what looks up the trainer that keeps traces of the same
    requests. left: by model that is not to have a trainer, the folder where an earlier one kept its traces."""

    def __init__(
        self,
        find: Callable[[], Any],
        retention: Mapping[str, float],
        finds: Mapping[str, Callable[[], Any]],
        left: Mapping[str, Path],
    ) -> None:
        self._log, self._retention = Contact("request log", "log", find), dict(retention)
        self._trainers, self._left = contacts(finds), dict(left)

    async def state(self) -> State:
        contents, counts = await asyncio.gather(self._ask("contents", patience=CONTENTS_S), self._ask("stats"))
        return {**contents, "retention": self._retention, "writer": counts}

    async def history(self) -> Sequence[State]:
        return list(await self._ask("purges"))

    async def purge(self, purge: Purge) -> Purged:
        """The log first: when it refuses, nothing is forgotten either."""
        deleted: Deleted = await self._ask("purge", purge, patience=PURGE_S)
        models = [model for model in self._trainers if purge.what.model in (None, model)]
        told = dict(zip(models, await asyncio.gather(*(self._forget(model, purge.what) for model in models)), strict=True))
        traces = {model: found.count for model, found in told.items() if found.count is not None}
        untold = {model: found.why for model, found in told.items() if found.why}
        for model, why in untold.items():
            LOG.warning("traces of %s may have outlived a purge: %s", model, why)
        cleared = tuple(model for model, found in told.items() if found.cleared)
        return Purged(deleted.records, traces, cleared, untold, deleted.readable)

    async def _forget(self, model: str, what: Selection) -> Forgotten:
        """Have a model's trainer forget. Where there is none and none is to come, what one left on the disk is deleted, as a whole."""
        trainer = self._trainers[model]
        try:
            return Forgotten(int(await trainer.call("forget", what, patience=PURGE_S)))
        except ApiError as error:
            return Forgotten(why=str(error))
        except Absent:
            if model not in self._left:
                return Forgotten(why=str(trainer.away()))
            return await asyncio.to_thread(clear, self._left[model], what)

    async def _ask(self, method: str, *arguments: object, patience: float = ANSWER_S) -> Any:
        try:
            return await self._log.call(method, *arguments, patience=patience)
        except Absent:
            raise self._log.away() from None


def clear(folder: Path, what: Selection) -> Forgotten:
    """Delete what a trainer that runs no more left in its work folder, if all of it is meant: only a trainer tells one trace from another.
    Traces carry no key. A folder that a trainer of another cluster uses is left to that."""
    if not folder.exists():
        return Forgotten()
    alone = FolderLock(folder)
    try:
        alone.enter()
        files = [folder / name for name in os.listdir(folder) if name.startswith(LEFT)]
        if not files:
            return Forgotten()
        if any(part is not None for part in (what.request, what.before, what.tag)):
            return Forgotten(why=f"No trainer runs, and what one left in {folder} goes as a whole: purge by model or key alone, or all.")
        for file in files:
            file.unlink(missing_ok=True)
        sync_folder(folder)
    except InUse:
        return Forgotten(why=f"Another trainer than this cluster's uses {folder}: purge there.")
    except OSError as error:
        return Forgotten(why=f"No trainer runs, and what one left in {folder} cannot be deleted: {error}.")
    finally:
        alone.leave()
    return Forgotten(cleared=True)


def off(model: str) -> ApiError:
    return refused(409, f"The speculator of {model} is not refreshed, so there is nothing to change.", param="model", code="refresh_off")


def ray_refresh(settings: Settings, log: Callable[[], Any]) -> Refresh:
    """The desks of a service. Registry and trainers are not started here, they come with the models. log: finds the request log."""
    find = partial(ray.get_actor, namespace=settings.ray.namespace)
    refreshed = {model.name: model.refresh.tags for model in settings.models if model.refresh.enabled}
    trainers = {model.name: partial(find, f"{TRAINER}-{model.name}") for model in settings.models}
    budgets = {model.name: int(model.refresh.buffer_bytes) for model in settings.models if model.refresh.enabled and model.log}
    left = {name: Path(settings.refresh.work) / name for name in trainers if name not in budgets}
    kept = settings.request_log
    retention = {"max_records": kept.max_records, "max_bytes": int(kept.max_bytes), "max_age_s": kept.max_age_s}
    training = RayTraining({name: trainers[name] for name in budgets}, budgets, Once(partial(open_state, settings.state.url)))
    return Refresh(RaySpeculators(partial(find, REGISTRY), refreshed), training, RayLog(log, retention, trainers, left))


class Once:
    """Opens a store when it is first needed."""

    def __init__(self, opener: Callable[[], StateStore]) -> None:
        self._open = opener
        self._store: StateStore | None = None

    def __call__(self) -> StateStore:
        self._store = self._store or self._open()
        return self._store
