"""The Serve application: one gateway, one deployment for each model, and the named actors they share.

`serve run services.app:build config=FILE` and `specfleet serve FILE` both begin here.
"""

import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType

import httpx
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.schema import DeploymentStatusOverview

from actors.artefacts import check_artefacts
from actors.policy import PolicyError, parse_policy
from configs.problems import ConfigError
from configs.settings import ModelSettings, Settings, load_settings
from services.autoscaling import routing, scaling
from services.cluster import QUIET, begin, end
from services.gateway.deployment import ingress
from services.named import log_actor, policy_actor
from services.refresh_actors import refresh_plan
from services.replica import ModelReplica

GATEWAY = "gateway"
PATIENCE_S = 30.0  # seconds without an answer before it is said why
FAREWELL_S = 10.0  # seconds that a replica may take to end; one that is not needed any more first answers what it has
SPARE = 64  # calls beside generating ones: statuses, health checks


class AppArgs(BaseModel):
    """What `serve run services.app:build` accepts."""

    model_config = ConfigDict(extra="forbid")

    config: str | None = Field(default=None, description="A configuration file; none: configs/demo.yaml.")


def build(args: AppArgs) -> serve.Application:
    """The application of a configuration file. Raises ConfigError."""
    return application(load_settings(args.config))


def application(settings: Settings) -> serve.Application:
    """The application of a fleet. Raises ConfigError for a policy that is none, and for versions kept where none can be."""
    check_policies(settings)
    check_refresh(settings)
    models = {model.name: model_application(model, settings) for model in settings.models}
    return gateway_application(settings, models)


def check_policies(settings: Settings) -> None:
    for index, model in enumerate(settings.models):
        try:
            parse_policy(model.policy)
        except PolicyError as error:
            raise ConfigError("configuration", [f"models[{index}].policy.{error}"]) from None


def check_refresh(settings: Settings) -> None:
    if any(model.refresh.enabled for model in settings.models):
        try:
            check_artefacts(settings.refresh.artefacts)
        except ValueError as error:
            raise ConfigError("configuration", [f"refresh.artefacts: {error}"]) from None


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
        graceful_shutdown_timeout_s=FAREWELL_S if model.replicas.fixed else settings.gateway.request_timeout_s,
        ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
        logging_config=QUIET,
        request_router_config=routing(),
        **scaling(model),
    )
    return deployment.bind(model, policy_actor(settings), log_actor(settings), refresh_plan(settings, model))


def gateway_application(settings: Settings, models: Mapping[str, serve.Application]) -> serve.Application:
    """The HTTP deployment; the models are bound to it so that they belong to one application."""
    most = 2 * settings.gateway.max_ongoing + SPARE
    deployment = serve.deployment(
        ingress(settings),
        name=GATEWAY,
        num_replicas=1,
        max_ongoing_requests=most,
        max_queued_requests=most,
        health_check_timeout_s=30,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=FAREWELL_S,
        ray_actor_options={"num_cpus": 0.5},
        logging_config=QUIET,
    )
    return deployment.bind(*models.values())


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


def deploy(app: serve.Application, settings: Settings) -> None:
    """Deploy without waiting for the models."""
    target = serve.RunTarget(app, name=settings.ray.application, route_prefix="/", logging_config=QUIET)
    serve.run_many([target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)


def wait_for_answer(settings: Settings, stop: threading.Event, patience: float = PATIENCE_S) -> None:
    """Return when the gateway answers, or when asked to stop; after every `patience` seconds say why not. Models may still be loading."""
    word = time.monotonic() + patience
    while not stop.is_set():
        try:
            httpx.get(f"{url(settings)}/healthz", timeout=5).raise_for_status()
            return
        except httpx.HTTPError:
            stop.wait(0.2)
        if time.monotonic() > word and not stop.is_set():
            print(f"The gateway does not answer at {url(settings)} yet. {standing(settings.ray.application)}", file=sys.stderr, flush=True)
            word = time.monotonic() + patience


def standing(application: str) -> str:
    """How an application and its deployments are, in words of Serve."""
    try:
        found = serve.status().applications.get(application)
    except Exception as error:  # whatever Serve raises while it is coming up or going down
        return f"Serve does not say how it is ({type(error).__name__})."
    if found is None:
        return f"Serve knows no application {application}."
    lines = [f"{name}: {state.status.value}: {replicas(state)} {state.message}".rstrip() for name, state in found.deployments.items()]
    return "\n  ".join([f"{application}: {found.status.value} {found.message}".rstrip(), *lines])


def replicas(state: DeploymentStatusOverview) -> str:
    return ", ".join(f"{count} {name}" for name, count in state.replica_states.items()) or "no replica"


def url(settings: Settings) -> str:
    """Where this machine reaches the gateway."""
    host = settings.gateway.host
    local = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{local}:{settings.gateway.port}"


def banner(settings: Settings) -> str:
    names = ", ".join(model.name for model in settings.models)
    access = f"{len(settings.keys)} API keys" if settings.keys else "open to everybody on this machine, no API keys"
    return f"Specfleet answers at {url(settings)}/v1 ({access}): {names}"
