"""The scaling law of `policies/` as Ray Serve's controller calls it: one policy for each model, and one for an application whose models
share their GPUs. Also how a deployment is told to use it, and to route past replicas that are still loading.

The controller calls a policy several times a second in its own loop, so nothing here waits, and nothing raises. Serve itself waits for the
delays, keeps to the bounds, and starts the first replica of a sleeping model as soon as a request is queued.
"""

from __future__ import annotations

import logging
import random
import warnings
from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, RequestRouterConfig
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from configs.settings import ModelSettings
from policies.autoscaling import Memory, Observation, ScalingDecision, ScalingRule, decide
from policies.sharing import Claim, shared

LOG = logging.getLogger("ray.serve")  # the controller's own log
NEWS_S = 1.0  # seconds between reports of replicas and handles to the controller
LOOK_BACK_S = 3.0  # seconds over which Serve averages the number of requests


class ModelScaling:
    """The policy of one model's deployment. Its arguments are those of `ScalingRule`, and what its model asks of shared GPUs."""

    def __init__(self, gpus: float = 0.0, weight: float = 1.0, **rule: Any) -> None:
        self.rule, self.gpus, self.weight = ScalingRule(**rule), gpus, weight
        self.memory = Memory()
        self.target: int | None = None
        self.last = ScalingDecision(0, "first decision")

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        return self.decide(context).replicas, {}

    def decide(self, context: AutoscalingContext) -> ScalingDecision:
        """The law's decision; the present target if anything goes wrong."""
        self.tell(context)
        try:
            self.last, self.memory = decide(self.rule, observed(context), self.memory)
        except Exception:
            LOG.exception("no scaling decision for %s; it keeps its replicas", context.deployment_name)
            self.last = ScalingDecision(context.target_num_replicas, "no decision")
        return self.last

    def tell(self, context: AutoscalingContext) -> None:
        """Log a target that has changed, with the reason of the decision before."""
        now = context.target_num_replicas
        if self.target is not None and now != self.target:
            reason = self.last.reason if self.target else "a request is queued"  # Serve itself wakes a sleeping model
            LOG.warning("scaling %s from %d to %d replicas: %s", context.deployment_name, self.target, now, reason)
        self.target = now

    def claim(self, context: AutoscalingContext) -> Claim:
        """What the model asks of GPUs that others share."""
        wanted = self.decide(context).replicas
        return Claim(context.deployment_name, wanted, context.target_num_replicas, self.rule.least, self.gpus, self.weight)


class SharedScaling:
    """The policy of an application whose models share `gpus` GPUs, given in a Serve configuration file:

    autoscaling_policy: {policy_function: "services.autoscaling:SharedScaling", policy_kwargs: {gpus: 8}}

    Bounds, targets and weights are those that each model's deployment was given. Only models whose number of replicas may change take part.
    """

    def __init__(self, gpus: float) -> None:
        self.gpus = gpus
        self.models: dict[Any, ModelScaling] = {}

    def __call__(self, contexts: Mapping[Any, AutoscalingContext]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        self.models = {identity: self.scaling(identity, context) for identity, context in contexts.items()}
        claims = {identity: scaling.claim(contexts[identity]) for identity, scaling in self.models.items()}
        granted = shared(list(claims.values()), self.gpus)
        for identity, claim in claims.items():
            if granted[claim.model] < claim.wanted:
                reason = f"{claim.wanted} wanted, for which the shared GPUs do not suffice"
                self.models[identity].last = ScalingDecision(granted[claim.model], reason)
        return {identity: granted[claim.model] for identity, claim in claims.items()}, {}

    def scaling(self, identity: Any, context: AutoscalingContext) -> ModelScaling:
        """The scaling of one model by the rule that its deployment was given."""
        known, told = self.models.get(identity), ModelScaling(**context.config.policy.policy_kwargs)
        return known if known is not None and known.rule == told.rule else told


class ReadyFirst(FIFOMixin, RequestRouter):
    """Power of two choices among the replicas that are ready, and among all while none is.

    A replica that loads answers at once that it does, so its queue is the shortest of all, and a router that went by that would send it
    every request.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        ready = [replica for replica in candidate_replicas if replica.routing_stats.get("ready")]
        among = ready or list(candidate_replicas)
        return [random.sample(among, min(2, len(among)))]


def observed(context: AutoscalingContext) -> Observation:
    """A deployment as the law sees it, from the latest numbers of each replica."""
    said: dict[str, dict[str, object]] = {}
    for name, replicas in (context.raw_metrics or {}).items():
        for replica, series in replicas.items():
            if series:
                said.setdefault(replica.unique_id, {})[name] = series[-1].value
    return Observation(
        target=context.target_num_replicas,
        replicas=tuple(replica.unique_id for replica in context.running_replicas),
        requests=context.total_num_requests,
        queued=context.total_queued_requests or 0.0,
        said=said,
        now=context.current_time or 0.0,
    )


def routing() -> RequestRouterConfig:
    """How a model's requests find a replica."""
    return RequestRouterConfig(request_router_class="services.autoscaling.ReadyFirst", request_routing_stats_period_s=NEWS_S)


def scaling(model: ModelSettings) -> dict[str, Any]:
    """A fixed number of replicas, or a range within which the law decides."""
    replicas = model.replicas
    if replicas.fixed:
        return {"num_replicas": replicas.min}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # metrics_interval_s is called deprecated, and is what sets the interval
        return {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=replicas.min,
                max_replicas=replicas.max,
                upscale_delay_s=replicas.up_delay_s,
                downscale_delay_s=replicas.down_delay_s,
                downscale_to_zero_delay_s=0.0,  # the law has seen to it that it was idle for long
                metrics_interval_s=NEWS_S,
                look_back_period_s=LOOK_BACK_S,
                policy={"policy_function": "services.autoscaling:ModelScaling", "policy_kwargs": arguments(model)},
            )
        }


def arguments(model: ModelSettings) -> dict[str, float]:
    """What `ModelScaling` is made of."""
    replicas = model.replicas
    rule: dict[str, float] = {
        "least": replicas.min,
        "most": replicas.max,
        "tpot": replicas.target_tpot_s,
        "ttft": replicas.target_ttft_s,
        "backlog": replicas.target_backlog_s,
        "idle": replicas.idle_s,
        "stale": replicas.stale_s,
        "seats": model.engine.max_running,
    }
    longest = {"longest": model.engine.max_context} if model.engine.max_context else {}
    return {**rule, **longest, "gpus": model.num_gpus, "weight": replicas.weight}
