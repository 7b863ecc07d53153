"""The settings tree: every field documented, bounded, frozen, and read from one YAML file with environment overrides.

It knows no other room: a model's `policy` stays a plain mapping here, and whoever builds the application validates it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote, urlsplit

import yaml
from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from configs.problems import ConfigError, explain

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "SPECFLEET_"
SQLITE = "sqlite:///"
TAG = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # what names a domain of requests
LOOPBACK = ("127.0.0.1", "localhost", "::1")

DrafterKind = Literal["none", "ngram", "mlp", "mlp+ngram"]
Positive = Annotated[int, Field(ge=1, le=2**31)]
Bytes = Annotated[
    ByteSize, Field(ge=2**12, le=2**50), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer", "minimum": 2**12}]})
]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Confidence = Annotated[float, Field(ge=0.5, lt=1, allow_inf_nan=False)]
AtLeast0 = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Tag = Annotated[str, Field(pattern=TAG)]
Objective = Literal["cross_entropy", "forward_kl", "reverse_kl", "jsd", "tv", "acceptance", "lk_hybrid"]


class Section(BaseModel):
    """A frozen group of settings in which an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ReplicaRange(Section):
    """How many replicas of a model may run, and what makes it more or fewer; see docs/autoscaling.md. With min and max alike, that many."""

    min: int = Field(default=1, ge=0, le=1000, description="Replicas that always run; 0 lets an idle model sleep until it is asked.")
    max: int = Field(default=1, ge=1, le=1000, description="Replicas that may run under load; at least min.")
    target_tpot_s: float = Field(
        default=0.1, ge=0.001, le=60, allow_inf_nan=False, description="Seconds per output token of a request that replicas are to keep to."
    )
    target_ttft_s: float = Field(
        default=2.0, ge=0.01, le=600, allow_inf_nan=False, description="Seconds to the first token that nine requests in ten are to see."
    )
    target_backlog_s: float = Field(
        default=4.0, ge=0.1, le=3600, allow_inf_nan=False, description="Seconds of queued work that a replica may have before it."
    )
    up_delay_s: float = Field(default=3.0, ge=0, le=3600, allow_inf_nan=False, description="Seconds of need before replicas are added.")
    down_delay_s: float = Field(
        default=120.0, ge=0, le=86400, allow_inf_nan=False, description="Seconds of ease before one replica is taken away."
    )
    idle_s: float = Field(
        default=600.0, ge=1, le=864000, allow_inf_nan=False, description="Seconds without a request after which a model with min 0 sleeps."
    )
    stale_s: float = Field(
        default=10.0, ge=3, le=600, allow_inf_nan=False, description="Seconds without news after which a replica's numbers do not count."
    )
    cold_start_s: float = Field(
        default=120.0, ge=1, le=3600, allow_inf_nan=False, description="Seconds that a request waits for a sleeping model to come up."
    )
    weight: float = Field(
        default=1.0, ge=0.01, le=1000, allow_inf_nan=False, description="How much this model's need counts where models share their GPUs."
    )

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max must be at least min ({self.min})")
        return self

    @property
    def fixed(self) -> bool:
        """Whether their number never changes."""
        return self.min == self.max

    @property
    def sleeps(self) -> bool:
        """Whether there may be none, so that requests wait for the first."""
        return self.min == 0


class EngineSettings(Section):
    """The engine of one replica. Lengths are in tokens."""

    kv_bytes: Bytes = Field(
        default="256MiB",
        validate_default=True,
        description="Memory for keys and values, never exceeded: bytes, or a number and a unit such as 256MiB or 4GiB.",
    )
    max_running: int = Field(default=16, ge=1, le=4096, description="Requests decoded together.")
    max_waiting: int = Field(default=256, ge=1, le=2**20, description="Requests that may wait for a place; more are answered with 429.")
    chunk: int = Field(default=256, ge=1, le=2**20, description="Prompt tokens computed in one step, beside decoding.")
    max_context: Positive | None = Field(default=None, description="Longest prompt and answer together; none: the base's own.")
    executor: Literal["auto", "eager"] = Field(
        default="auto",
        description="What computes forwards. auto: compiled kernels on a CPU, fused ones and CUDA graphs on a GPU, where they prove to "
        "compute what the base does, and the base itself elsewhere; eager: the base itself, module by module in PyTorch.",
    )
    batch_invariant: bool = Field(
        default=False,
        description="Whether a token's logits must be the same bits whatever else is in a step, drafts included. The compiled kernels of "
        "a CPU always compute so; on a GPU it costs speed, see docs/gpu.md. A model that cannot be computed so does not start.",
    )

    @model_validator(mode="after")
    def computable(self) -> Self:
        if self.batch_invariant and self.executor == "eager":
            raise ValueError("batch_invariant needs executor auto: PyTorch's kernels depend on how many rows they compute")
        return self


class SamplingDefaults(Section):
    """What a request gets for the sampling fields that it leaves out."""

    temperature: float = Field(default=1.0, ge=0, le=2, description="0 is greedy.")
    top_p: float = Field(default=1.0, ge=1e-6, le=1, description="Nucleus mass; 1 is off.")
    top_k: int = Field(default=0, ge=0, le=2**31, description="Most likely tokens kept; 0 is off.")
    min_p: float = Field(default=0.0, ge=0, le=1, description="Least probability, relative to the most likely token; 0 is off.")
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=10, description="1 is off.")


class CaptureSettings(Section):
    """What a replica keeps of its answers for training. All of it is dropped, oldest first, when nobody takes it."""

    share: float = Field(default=0.25, gt=0, le=1, allow_inf_nan=False, description="Share of requests kept, by a hash of their ids.")
    top: int = Field(default=8, ge=1, le=128, description="Most likely tokens kept with their log-probabilities at every place.")
    longest: int = Field(default=2048, ge=2, le=2**20, description="Tokens of an answer kept, its first ones.")
    running_bytes: Bytes = Field(default="64MiB", validate_default=True, description="Memory for what is kept of running requests.")
    waiting_bytes: Bytes = Field(default="64MiB", validate_default=True, description="Memory for finished ones until the trainer has them.")


class GateSettings(Section):
    """What a candidate must show on held-out requests before traffic sees it."""

    least: int = Field(default=100, ge=2, le=2**20, description="Held-out requests below which nothing passes.")
    margin: AtLeast0 = Field(default=0.0, description="Expected tokens per step by which it must surely be better.")
    confidence: Confidence = Field(default=0.95, description="Of the two-sided interval that must lie above the margin.")


class TrainerSettings(Section):
    """Where a model's trainer runs, and when it makes way."""

    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N.")
    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads.")
    num_cpus: float = Field(default=0.01, ge=0.001, le=1024, description="CPUs that Ray reserves for it.")
    num_gpus: float = Field(default=0.0, ge=0, le=64, description="GPUs that Ray reserves for it.")
    memory: Bytes | None = Field(default=None, description="Memory that Ray reserves for it; none: it may come to lie on any node.")
    running: int | None = Field(
        default=0, ge=0, le=2**20, description="Running requests of the model up to which it works; none: it has a device of its own."
    )
    quiet_s: Seconds = Field(default=1.0, description="Seconds without more of them before it goes on.")
    checkpoint_s: Seconds = Field(default=60.0, description="Seconds between two checkpoints.")


class ModelRefreshSettings(Section):
    """How one model's speculator is refreshed from its own traffic; see docs/refresh.md. Off, nothing is kept and nothing trained."""

    enabled: bool = Field(default=False, description="Whether it is.")
    capture: CaptureSettings = Field(default_factory=CaptureSettings, description="What replicas keep.")
    tags: tuple[Tag, ...] = Field(
        default=(), max_length=16, description="Tags of requests that are domains of their own; all other requests are one domain."
    )
    buffer_bytes: Bytes = Field(default="256MiB", validate_default=True, description="Memory for what the trainer remembers.")
    held_out: Share = Field(default=0.2, description="Share of it that no training sees, to judge by.")
    objective: Objective = Field(default="forward_kl", description="What training minimises.")
    positions: Literal["all", "rejected"] = Field(default="rejected", description="Places trained on: all, or those where drafts failed.")
    rate: float = Field(default=1e-3, gt=0, le=1, allow_inf_nan=False, description="Learning rate.")
    requests: int = Field(default=16, ge=1, le=4096, description="Requests in one training step.")
    window: int = Field(default=64, ge=1, le=2**16, description="Places of each request in one training step.")
    steps: int = Field(default=200, ge=1, le=2**20, description="Training steps of a round at most.")
    interval: int = Field(default=40, ge=1, le=2**20, description="Training steps between two measurements.")
    patience: int = Field(default=2, ge=1, le=1024, description="Measurements in which the copy got no better that end a round.")
    least_gain: AtLeast0 = Field(default=0.02, description="Tokens per step that a candidate must gain.")
    least_tokens: int = Field(default=8192, ge=0, le=2**40, description="Fresh answer tokens that a round waits for.")
    least_held: int = Field(default=8, ge=1, le=2**20, description="Held-out requests that a round needs to choose by.")
    most_held: int = Field(
        default=256, ge=1, le=2**20, description="Answers to held-out requests that a round chooses by at most, the latest."
    )
    gate: GateSettings = Field(default_factory=GateSettings, description="What lets a candidate pass.")
    trainer: TrainerSettings = Field(default_factory=TrainerSettings, description="Where training runs.")

    @field_validator("tags")
    @classmethod
    def distinct(cls, tags: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted({tag for tag in tags if tags.count(tag) > 1}):
            raise ValueError(f"tags must differ: {', '.join(twice)}")
        return tags

    @model_validator(mode="after")
    def held(self) -> Self:
        if self.most_held < self.least_held:
            raise ValueError(f"most_held is {self.most_held}, which is less than least_held, {self.least_held}")
        return self

    def domain(self, tag: str) -> str:
        """The domain of requests with a tag; "" is the common one."""
        return tag if tag in self.tags else ""


class ModelSettings(Section):
    """One served model: its base, its speculator and its share of the machine."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", description="The id that clients name in `model`.")
    base: str = Field(min_length=1, description="Folder or hub id of the base model.")
    speculator: str | None = Field(default=None, description="Folder or hub id of the MLP speculator.")
    drafter: DrafterKind = Field(default="mlp+ngram", description="What drafts for the base.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of the weights; auto: float32 on a CPU, bfloat16 elsewhere."
    )
    device: str = Field(default="cpu", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N.")
    threads: int | None = Field(default=None, ge=1, le=1024, description="CPU threads of one replica; none: as many as it has CPUs.")
    packed_weights: str | None = Field(
        default=".specfleet/packed",
        description="Folder for weights packed for the CPU, mapped by every replica of a host; none: each replica keeps its own.",
    )
    replicas: ReplicaRange = Field(default_factory=ReplicaRange, description="How many replicas run.")
    num_cpus: float = Field(default=1.0, ge=0, le=1024, description="CPUs that Ray reserves for each replica.")
    num_gpus: float = Field(default=0.0, ge=0, le=64, description="GPUs that Ray reserves for each replica.")
    engine: EngineSettings = Field(default_factory=EngineSettings, description="Sizes of the engine.")
    sampling: SamplingDefaults = Field(default_factory=SamplingDefaults, description="Defaults of requests.")
    policy: dict[str, Any] = Field(
        default_factory=lambda: {"kind": "goodput"}, description="The first speculation policy, tunable while running."
    )
    log: bool = Field(default=True, description="Whether finished requests go to the request log; without it nothing is trained on either.")
    refresh: ModelRefreshSettings = Field(default_factory=ModelRefreshSettings, description="Refreshing the speculator from traffic.")

    @model_validator(mode="after")
    def drafted(self) -> Self:
        if self.drafter.startswith("mlp") and self.speculator is None:
            raise ValueError(f"drafter {self.drafter} needs a speculator (a folder or hub id); without one use ngram or none")
        if self.refresh.enabled and not self.drafter.startswith("mlp"):
            raise ValueError(f"refresh.enabled needs a drafter with a speculator (mlp or mlp+ngram), not {self.drafter}")
        return self


class Limits(Section):
    """What one key may use. Unset is unlimited."""

    requests_per_minute: Positive | None = Field(default=None, description="Requests started per minute; bursts up to this number.")
    tokens_per_minute: Positive | None = Field(default=None, description="Prompt and completion tokens per minute, charged when used.")


class KeySettings(Section):
    """One API key, given as itself or as the SHA-256 of it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$", description="Who holds it, as history and logs say.")
    key: SecretStr | None = Field(default=None, min_length=8, description="The key itself; best given through the environment.")
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="SHA-256 of the key, as 64 lower-case hex digits.")
    admin: bool = Field(default=False, description="Whether it opens /admin.")
    store: bool = Field(default=True, description="Whether its finished requests may go to the request log.")
    tag: Tag | None = Field(default=None, description="Tag of its requests that give none themselves.")
    limits: Limits | None = Field(default=None, description="Limits of this key; none: those of the gateway.")

    @model_validator(mode="after")
    def one_secret(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError(f"give exactly one of key and sha256, for instance in {PREFIX}KEYS__{variable(self.name)}__KEY")
        return self


class GatewaySettings(Section):
    """The HTTP edge."""

    host: str = Field(default="127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(default=8000, ge=1, le=65535, description="Port to listen on.")
    max_body_bytes: int = Field(default=4 * 2**20, ge=1024, le=2**30, description="Largest request body.")
    max_prompt_chars: Positive = Field(default=1_000_000, description="Longest prompt or conversation, in characters.")
    max_choices: int = Field(default=128, ge=1, le=4096, description="Most choices of one request: prompts times n.")
    request_timeout_s: Seconds = Field(default=600.0, description="Seconds from a request's arrival to its last token.")
    max_ongoing: Positive = Field(default=1024, description="Requests in the gateway at once; more are answered with 503.")
    poll_s: Seconds = Field(default=1.0, description="Seconds between questions to the models how they are.")
    limits: Limits = Field(default_factory=Limits, description="Limits of each key that has none of its own.")


class RequestLogSettings(Section):
    """Where finished requests are kept for training."""

    url: str = Field(default="sqlite:///.specfleet/requests.db", description="sqlite:///FILE or redis://HOST:PORT/DB.")
    max_records: Positive = Field(default=100_000, description="Records kept; the oldest go first.")
    max_age_s: float = Field(default=30 * 86400.0, gt=0, le=10 * 366 * 86400, description="Seconds that a record is kept.")
    max_bytes: Bytes = Field(
        default="1GiB", validate_default=True, description="Room in the store: bytes, or a number and a unit; the oldest records go first."
    )


class StateSettings(Section):
    """Where policies and their history survive a restart."""

    url: str = Field(default="sqlite:///.specfleet/state.db", description="sqlite:///FILE or redis://HOST:PORT/DB.")


class CanarySettings(Section):
    """How a new version is tried on traffic; see docs/refresh-releases.md."""

    share: Share = Field(default=0.1, description="Share of requests that it serves.")
    least: int = Field(default=50, ge=2, le=2**30, description="Requests of either version before anything is decided.")
    most: int = Field(default=2000, ge=2, le=2**30, description="Its requests after which the means decide, with the tolerance.")
    confidence: Confidence = Field(default=0.95, description="That no decision before that is wrong.")
    tolerance: AtLeast0 = Field(default=0.02, description="Kept tokens per draft by which it may be worse and still be promoted.")
    effect: float = Field(default=0.1, gt=0, le=1e6, allow_inf_nan=False, description="Difference in them that is found soonest.")

    @model_validator(mode="after")
    def ordered(self) -> Self:
        if self.most < self.least:
            raise ValueError(f"most must be at least least ({self.least})")
        return self


class RefreshSettings(Section):
    """Versions of speculators: where they are kept and how a new one is released. What is trained is said for each model."""

    artefacts: str = Field(
        default=".specfleet/bundles", min_length=1, description="Folder or URL (s3://..) of all versions, for all machines."
    )
    cache: str = Field(default=".specfleet/cache", min_length=1, description="Folder for those that this machine used last.")
    work: str = Field(default=".specfleet/training", min_length=1, description="Folder for traces and progress of trainers.")
    automatic: bool = Field(default=True, description="Whether a candidate that passed its gate becomes a canary by itself.")
    canary: CanarySettings = Field(default_factory=CanarySettings, description="How it is tried.")


class RaySettings(Section):
    """The Ray cluster to run on."""

    address: str | None = Field(default=None, description="Address of a running cluster, or auto; none: start one on this machine.")
    num_cpus: int | None = Field(default=None, ge=1, le=4096, description="CPUs that a started cluster declares; none: count them.")
    num_gpus: int | None = Field(default=None, ge=0, le=1024, description="GPUs that a started cluster declares; none: count them.")
    object_store_mb: int | None = Field(
        default=None, ge=80, le=2**20, description="Object store of a started cluster, MiB; none: Ray decides."
    )
    namespace: str = Field(default="specfleet", pattern=r"^[A-Za-z0-9._-]+$", description="Ray namespace of the named actors.")
    application: str = Field(default="specfleet", pattern=r"^[A-Za-z0-9._-]+$", description="Name of the Serve application.")
    auth: Literal["token", "disabled", "inherit"] = Field(
        default="token", description="RAY_AUTH_MODE: a token shared by the cluster's processes, none, or whatever the environment says."
    )


class Settings(BaseSettings):
    """The whole of Specfleet's configuration."""

    model_config = SettingsConfigDict(extra="forbid", frozen=True, env_prefix=PREFIX, env_nested_delimiter="__")

    models: tuple[ModelSettings, ...] = Field(min_length=1, description="The fleet.")
    gateway: GatewaySettings = Field(default_factory=GatewaySettings, description="The HTTP edge.")
    keys: tuple[KeySettings, ...] = Field(default=(), description="API keys; none: open, on loopback only.")
    request_log: RequestLogSettings = Field(default_factory=RequestLogSettings, description="Finished requests.")
    state: StateSettings = Field(default_factory=StateSettings, description="Policies and their history.")
    refresh: RefreshSettings = Field(default_factory=RefreshSettings, description="Versions of speculators and their release.")
    ray: RaySettings = Field(default_factory=lambda: RaySettings(), description="The cluster.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed: `load_settings` alone reads the environment."""
        return (init_settings,)

    @field_validator("models", "keys")
    @classmethod
    def distinct(cls, entries: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [variable(entry.name) for entry in entries]
        if twice := [entry.name for entry in entries if names.count(variable(entry.name)) > 1]:
            raise ValueError(f"names must differ: {', '.join(sorted(set(twice)))}")
        return entries

    @field_validator("request_log", "state")
    @classmethod
    def storable(cls, section: Any) -> Any:
        if urlsplit(section.url).scheme not in ("sqlite", "redis", "rediss"):
            raise ValueError("url must begin with sqlite:///, redis:// or rediss://")
        return section

    @model_validator(mode="after")
    def closed_or_local(self) -> Self:
        if not self.keys and self.gateway.host not in LOOPBACK:
            raise ValueError(f"keys is empty, so gateway.host must be a loopback address ({', '.join(LOOPBACK)}), not {self.gateway.host}")
        return self

    def model(self, name: str) -> ModelSettings:
        """The settings of one model. Raises KeyError for a name that is not configured."""
        return {model.name: model for model in self.models}[name]


def load_settings(path: str | Path | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Read a YAML file (default: configs/demo.yaml), then the environment over it. Raises ConfigError.

    SPECFLEET_GATEWAY__PORT=9000 sets gateway.port; SPECFLEET_MODELS__DEMO_CHAT__DEVICE=cuda sets the device of the model
    demo-chat. environ stands in for the process's environment. Relative folders and files start at the checkout for a
    file inside it, and at the YAML file's folder otherwise.
    """
    file = Path(path) if path is not None else ROOT / "configs" / "demo.yaml"
    try:
        merged = overlay(read_yaml(file), environment(environ))
        settings = Settings(**merged)
    except ValidationError as error:
        raise ConfigError(str(file), explain(error, Settings)) from None
    except ValueError as error:
        raise ConfigError(str(file), [str(error)]) from None
    return anchored(settings, home(file))


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file's mapping. Raises ValueError."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError("must be a mapping of setting names to values")
    return content


def environment(environ: Mapping[str, str] | None) -> dict[str, Any]:
    """The SPECFLEET_ variables as a tree. Raises ValueError for a nested variable of no section."""
    source = EnvSettingsSource(Settings)
    if environ is not None:
        source.env_vars = {name.lower(): value for name, value in environ.items()}
    for name in source.env_vars:
        section = re.match(rf"{PREFIX}([^_].*?)__", name, re.IGNORECASE)
        if section and section[1].lower() not in Settings.model_fields:
            raise ValueError(f"environment variable {name.upper()}: accepted after {PREFIX} are {', '.join(Settings.model_fields).upper()}")
    return {name: decoded(value) for name, value in source().items()}


def decoded(value: Any) -> Any:
    """A tree in which lists are lists: below the entries of a list the source does not know that they are given as JSON."""
    if isinstance(value, dict):
        return {name: decoded(below) for name, below in value.items()}
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):
            return json.loads(value)
    return value


def overlay(base: Any, over: Any) -> Any:
    """`over` laid upon `base`: mappings merge, a mapping over a list of named entries picks them by name, all else replaces."""
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {name: overlay(base.get(name), value) for name, value in over.items()}
    if isinstance(over, dict) and named(base):
        return [overlay(entry, over.get(variable(entry["name"]).lower(), {})) for entry in base] + strangers(base, over)
    return over


def named(entries: Any) -> bool:
    return isinstance(entries, list) and all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in entries)


def strangers(base: list[dict[str, Any]], over: dict[str, Any]) -> list[dict[str, Any]]:
    known = {variable(entry["name"]).lower() for entry in base}
    return [{"name": name, **entry} for name, entry in over.items() if name not in known]


def variable(name: str) -> str:
    """A name as an environment variable spells it: demo-chat is DEMO_CHAT."""
    return re.sub(r"[^A-Za-z0-9]", "_", name).upper()


def home(file: Path) -> Path:
    folder = file.resolve().parent
    return ROOT if folder.is_relative_to(ROOT) else folder


def anchored(settings: Settings, folder: Path) -> Settings:
    """The settings with every local folder and file made absolute."""
    models = tuple(model.model_copy(update=places(model, folder)) for model in settings.models)
    log = settings.request_log.model_copy(update={"url": stored(settings.request_log.url, folder)})
    state = settings.state.model_copy(update={"url": stored(settings.state.url, folder)})
    kept = {name: kept_at(getattr(settings.refresh, name), folder) for name in ("artefacts", "cache", "work")}
    refresh = settings.refresh.model_copy(update=kept)
    return settings.model_copy(update={"models": models, "request_log": log, "state": state, "refresh": refresh})


def places(model: ModelSettings, folder: Path) -> dict[str, str | None]:
    return {
        "base": local(model.base, folder),
        "speculator": model.speculator and local(model.speculator, folder),
        "packed_weights": model.packed_weights and str((folder / Path(model.packed_weights).expanduser()).resolve()),
    }


def local(name: str, folder: Path) -> str:
    """An existing folder of that name, absolute; otherwise the name unchanged, which is then a hub id."""
    places = (folder / Path(name).expanduser(), ROOT / name)
    return next((str(place.resolve()) for place in places if place.is_dir()), name)


def kept_at(place: str, folder: Path) -> str:
    """A folder, absolute; URLs unchanged."""
    return place if "://" in place else str((folder / Path(place).expanduser()).resolve())


def stored(url: str, folder: Path) -> str:
    """sqlite:///FILE, where FILE is written as it is named, with an absolute FILE and quoted; other addresses unchanged."""
    if not url.startswith(SQLITE):
        return url
    return SQLITE + quote(str((folder / Path(url.removeprefix(SQLITE)).expanduser()).resolve()))
