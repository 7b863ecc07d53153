"""The Serve application: one gateway, one deployment for each model, and the named actors they share.

`serve run services.app:build config=FILE` and `specfleet serve FILE` both begin here.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import httpx
import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from actors.policy import NAME as POLICY_ACTOR
from actors.policy import PolicyError, parse_policy, start_policy
from actors.request_log import NAME as LOG_ACTOR
from actors.request_log import start_request_log
from configs.problems import ConfigError
from configs.settings import LOOPBACK, ModelSettings, Settings, load_settings
from services.gateway.app import create_app
from services.gateway.ray_desk import RayDesk
from services.gateway.ray_fleet import RayFleet
from services.replica import ModelReplica

GATEWAY = "gateway"
QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
SPARE = 64  # calls beside generating ones: statuses, health checks
MIB = 2**20


class AppArgs(BaseModel):
    """What `serve run services.app:build` accepts."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = Field(default=None, description="A configuration file; none: configs/demo.yaml.")


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


def build(args: AppArgs) -> serve.Application:
    """The application of a configuration file. Raises ConfigError."""
    return application(load_settings(args.config))


def application(settings: Settings) -> serve.Application:
    """The application of a fleet. Raises ConfigError for a policy that is none."""
    check_policies(settings)
    models = {model.name: model_application(model, settings) for model in settings.models}
    return gateway_application(settings, models)


def check_policies(settings: Settings) -> None:
    for index, model in enumerate(settings.models):
        try:
            parse_policy(model.policy)
        except PolicyError as error:
            raise ConfigError("configuration", [f"models[{index}].policy.{error}"]) from None


def model_application(model: ModelSettings, settings: Settings) -> serve.Application:
    """One model's deployment, named as the model. Its queue is the engine's; what passes both is refused."""
    room = model.engine.max_running + model.engine.max_waiting + SPARE
    deployment = serve.deployment(
        ModelReplica,
        name=model.name,
        max_ongoing_requests=room,
        max_queued_requests=room,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
        logging_config=QUIET,
        **scale(model),
    )
    return deployment.bind(model, policy_actor(settings), log_actor(settings))


def scale(model: ModelSettings) -> dict[str, Any]:
    """A fixed number of replicas, or a range that follows the requests."""
    least, most = model.replicas.min, model.replicas.max
    if least == most:
        return {"num_replicas": least}
    range_ = AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=max(1, model.engine.max_running * 3 // 4))
    return {"autoscaling_config": range_}


def policy_actor(settings: Settings) -> Named:
    models = {model.name: dict(model.policy) for model in settings.models}
    start = partial(start_policy, settings.state.url, models, name=POLICY_ACTOR, namespace=settings.ray.namespace)
    return Named(POLICY_ACTOR, settings.ray.namespace, start)


def log_actor(settings: Settings) -> Named:
    log = settings.request_log
    kept = {"max_records": log.max_records, "max_age": log.max_age_s}
    start = partial(start_request_log, log.url, name=LOG_ACTOR, namespace=settings.ray.namespace, **kept)
    return Named(LOG_ACTOR, settings.ray.namespace, start)


def gateway_application(settings: Settings, models: Mapping[str, serve.Application]) -> serve.Application:
    """The HTTP deployment; the models are bound to it so that they belong to one application."""

    def asgi() -> FastAPI:
        return gateway_app(settings)

    most = 2 * settings.gateway.max_ongoing + SPARE
    deployment = serve.deployment(
        serve.ingress(asgi)(),
        name=GATEWAY,
        num_replicas=1,
        max_ongoing_requests=most,
        max_queued_requests=most,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_cpus": 0.5},
        logging_config=QUIET,
    )
    return deployment.bind(*models.values())


def gateway_app(settings: Settings) -> FastAPI:
    """The gateway within its replica, over the handles of this application."""
    application_name = serve.get_replica_context().app_name
    handles = {model.name: serve.get_deployment_handle(model.name, application_name) for model in settings.models}
    return create_app(settings, RayFleet(handles, settings.gateway.poll_s), RayDesk(policy_actor(settings)))


def run(settings: Settings) -> None:
    """Serve until SIGINT or SIGTERM, then end what was started here. Raises ConfigError before anything is started."""
    app = application(settings)
    check_port(settings)
    try:
        begin(settings)
        stop = stopping()
        deploy(app, settings)
        wait_for_answer(settings, stop)
        print(banner(settings), flush=True)
        stop.wait()
    finally:
        end(settings)


def stopping() -> threading.Event:
    """An event that SIGINT and SIGTERM set; a second signal interrupts. To be called after ray.init, which sets handlers of its own."""
    stop = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    return stop


def check_port(settings: Settings) -> None:
    """Raises ConfigError when another process of this machine listens on the port."""
    host, port = settings.gateway.host, settings.gateway.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError("configuration", [f"gateway.port: {port}: cannot listen on {host}: {error.strerror}"]) from None


def begin(settings: Settings) -> None:
    """Start or join the cluster, and start Serve's HTTP proxies."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    authorise(settings)
    ray.init(address=settings.ray.address, namespace=settings.ray.namespace, logging_level="ERROR", **resources(settings))
    location = ProxyLocation.HeadOnly if settings.ray.address is None else ProxyLocation.EveryNode
    serve.start(proxy_location=location, http_options=http(settings), logging_config=QUIET)


def authorise(settings: Settings) -> None:
    """RAY_AUTH_MODE before Ray starts; unset, Ray makes a token for a cluster that it starts and finds it for one that it joins."""
    if settings.ray.auth == "token":
        os.environ.pop("RAY_AUTH_MODE", None)
    if settings.ray.auth == "disabled":
        os.environ["RAY_AUTH_MODE"] = "disabled"


def resources(settings: Settings) -> dict[str, Any]:
    """What a cluster that is started here declares; nothing for one that is joined."""
    if settings.ray.address is not None:
        return {}
    store = settings.ray.object_store_mb
    local = {"_node_ip_address": "127.0.0.1"} if settings.gateway.host in LOOPBACK else {}
    declared = {"num_cpus": settings.ray.num_cpus, "num_gpus": settings.ray.num_gpus, "object_store_memory": store and store * MIB}
    return {"include_dashboard": False, **local, **declared}


def http(settings: Settings) -> HTTPOptions:
    gateway = settings.gateway
    return HTTPOptions(host=gateway.host, port=gateway.port, request_timeout_s=gateway.request_timeout_s + 30)


def deploy(app: serve.Application, settings: Settings) -> None:
    """Deploy without waiting for the models."""
    target = serve.RunTarget(app, name=settings.ray.application, route_prefix="/", logging_config=QUIET)
    serve.run_many([target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)


def wait_for_answer(settings: Settings, stop: threading.Event) -> None:
    """Return when the gateway answers, or when asked to stop. Models may still be loading."""
    while not stop.is_set():
        try:
            httpx.get(f"{url(settings)}/healthz", timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            stop.wait(0.2)


def url(settings: Settings) -> str:
    """Where this machine reaches the gateway."""
    host = settings.gateway.host
    local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{local}:{settings.gateway.port}"


def banner(settings: Settings) -> str:
    names = ", ".join(model.name for model in settings.models)
    access = f"{len(settings.keys)} API keys" if settings.keys else "open to everybody on this machine, no API keys"
    return f"Specfleet answers at {url(settings)}/v1 ({access}): {names}"


def end(settings: Settings) -> None:
    """Take the application and its actors away; Serve and the cluster only if they were started here."""
    if not ray.is_initialized():
        return
    if settings.ray.address is None:
        serve.shutdown()
    else:
        serve.delete(settings.ray.application)
    for actor, last_call in ((policy_actor(settings), "save"), (log_actor(settings), "close")):
        dismiss(actor, last_call)
    ray.shutdown()


def dismiss(actor: Named, last_call: str) -> None:
    """Let a named actor finish its work, and end it."""
    try:
        handle = ray.get_actor(actor.name, actor.namespace)
        ray.wait([getattr(handle, last_call).remote()], timeout=5)
        ray.kill(handle)
    except (ValueError, ray.exceptions.RayError):
        return
