"""The named actors that gateway and replicas share: looked up by name, and started by whoever finds none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from actors.policy import NAME as POLICY_ACTOR
from actors.policy import start_policy
from actors.request_log import NAME as LOG_ACTOR
from actors.request_log import start_request_log
from configs.settings import Settings


@dataclass(frozen=True, slots=True)
class Named:
    """Looks a named actor up, and starts it where there is none."""

    name: str
    namespace: str
    start: Callable[[], Any]

    def __call__(self) -> Any:
        try:
            return ray.get_actor(self.name, self.namespace)
        except ValueError:
            return self.start()


def policy_actor(settings: Settings) -> Named:
    models = {model.name: dict(model.policy) for model in settings.models}
    start = partial(start_policy, settings.state.url, models, name=POLICY_ACTOR, namespace=settings.ray.namespace)
    return Named(POLICY_ACTOR, settings.ray.namespace, start)


def log_actor(settings: Settings) -> Named:
    log = settings.request_log
    kept = {"max_records": log.max_records, "max_age": log.max_age_s, "max_bytes": int(log.max_bytes)}
    start = partial(start_request_log, log.url, name=LOG_ACTOR, namespace=settings.ray.namespace, **kept)
    return Named(LOG_ACTOR, settings.ray.namespace, start)
