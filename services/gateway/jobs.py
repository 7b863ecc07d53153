"""From a checked body to the job that travels to a replica: the fields that both kinds of completion share."""

from __future__ import annotations

from typing import Any, TypedDict

from configs.settings import GatewaySettings, SamplingDefaults
from services.gateway.errors import refused
from services.gateway.schemas import Generation, joined
from services.protocol import Speculation, Urgency


class Shared(TypedDict, total=False):
    """Keyword arguments of a Job."""

    n: int
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: dict[int, float]
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    prediction: str | None
    speculation: Speculation
    store: bool
    priority: Urgency
    tag: str


def shared(body: Generation, defaults: SamplingDefaults, limits: GatewaySettings) -> Shared:
    """What a body says about sampling, stopping, speculation, storing and its domain, with the model's defaults for what it leaves out.

    Raises ApiError 400 for a prediction that is too long.
    """
    prediction = joined(body.prediction.content) if body.prediction else None
    check_length("prediction", len(prediction or ""), limits)
    return Shared(
        n=body.n or 1,
        max_tokens=body.max_tokens,
        temperature=given(body.temperature, defaults.temperature),
        top_p=given(body.top_p, defaults.top_p),
        top_k=max(0, given(body.top_k, defaults.top_k)),
        min_p=given(body.min_p, defaults.min_p),
        presence_penalty=given(body.presence_penalty, 0.0),
        frequency_penalty=given(body.frequency_penalty, 0.0),
        repetition_penalty=given(body.repetition_penalty, defaults.repetition_penalty),
        logit_bias=dict(body.bias()),
        seed=body.seed,
        stop=body.stops(),
        stop_token_ids=body.stop_token_ids or (),
        ignore_eos=bool(body.ignore_eos),
        prediction=prediction,
        speculation=speculation(body),
        store=body.store is not False,
        priority=body.priority or "normal",
        tag=(body.metadata and body.metadata.tag) or "",
    )


def given(value: Any, default: Any) -> Any:
    return default if value is None else value


def speculation(body: Generation) -> Speculation:
    wanted = body.speculation
    return Speculation(wanted.mode, wanted.max_depth, wanted.width) if wanted else Speculation()


def check_length(param: str, size: int, limits: GatewaySettings) -> None:
    """Refuse prompts and predictions that are longer than any model's context could be. Raises ApiError 400."""
    if size > limits.max_prompt_chars:
        message = f"Invalid {param}: {size} characters are more than the {limits.max_prompt_chars} accepted here."
        raise refused(400, message, param=param, code="context_length_exceeded")


def check_choices(prompts: int, n: int, limits: GatewaySettings) -> None:
    """Refuse requests for too many choices. Raises ApiError 400."""
    if prompts * n > limits.max_choices:
        message = f"Invalid n: {prompts} prompts with n={n} ask for more than the {limits.max_choices} choices accepted here."
        raise refused(400, message, param="n", code="invalid_value")
