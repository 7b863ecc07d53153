"""Ray and Serve around the application: started or joined, and left behind as they were found."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig

from configs.settings import LOOPBACK, Settings
from services.named import Named, log_actor, policy_actor
from services.refresh_actors import registry_actor, trainer_actor

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
MIB = 2**20
# How Serve's processes talk, told to them by the environment of the cluster: a chunk over gRPC costs a third of one over Ray's objects,
# and what never blocks its event loop needs no loops of its own beside Serve's, between which every chunk would hop.
TRANSPORT = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}


def begin(settings: Settings) -> None:
    """Start or join the cluster, and start Serve's HTTP proxies."""
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", **TRANSPORT})
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


def end(settings: Settings) -> None:
    """Take the application and its actors away; Serve and the cluster only if they were started here."""
    if not ray.is_initialized():
        return
    if settings.ray.address is None:
        serve.shutdown()
    else:
        with contextlib.suppress(TimeoutError):  # a replica may still owe an answer; Serve goes on without us
            serve.delete(settings.ray.application)
    for model in settings.models:
        if model.refresh.enabled:
            dismiss(trainer_actor(settings.refresh, settings.ray.namespace, model), "close")
    for actor, last_call in ((policy_actor(settings), "save"), (log_actor(settings), "close"), (registry_actor(settings), "close")):
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
