"""The gateway as a Serve deployment. Its process loads no model, and torch only where a speculator is refreshed: Ray loads the class of
every actor that it finds by name, and registry and trainers are of torch."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve

from configs.settings import Settings
from services.gateway.app import create_app
from services.gateway.ray_desk import RayDesk
from services.gateway.ray_fleet import RayFleet
from services.gateway.ray_refresh import ray_refresh
from services.named import log_actor, policy_actor


def ingress(settings: Settings) -> Any:
    """The class to deploy; its application is built within the replica, where the handles are."""

    def asgi() -> FastAPI:
        return gateway_app(settings)

    return serve.ingress(asgi)()


def gateway_app(settings: Settings) -> FastAPI:
    """The gateway within its replica, over the handles of this application."""
    application_name = serve.get_replica_context().app_name
    handles = {model.name: serve.get_deployment_handle(model.name, application_name) for model in settings.models}
    patience = {model.name: model.replicas.cold_start_s for model in settings.models if model.replicas.sleeps}
    desk = RayDesk(policy_actor(settings), log_actor(settings))
    return create_app(settings, RayFleet(handles, settings.gateway.poll_s, patience), desk, ray_refresh(settings, log_actor(settings)))
