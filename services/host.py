"""One model, whole: text in, text out, with its engine, its drafter and the plan in force. Plain asyncio; knows no Ray and no HTTP."""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from actors.request_log import RequestRecord
from configs.settings import ModelSettings
from drafters.bundle import fingerprint
from drafters.choices import choice_of
from drafters.registry import build_drafter, load_version, versions_of
from drafters.traces import Trace
from drafters.versions import Line, Versions
from engine.capture import Features, Recorder
from engine.drafter import Drafter
from engine.engine import Engine
from engine.loading import Base, load_base
from engine.request import Outcome, Overloaded, Priority, Request, TokenScore
from engine.sampling import InvalidRequest, SamplingParams
from policies import in_canary
from policies.telemetry import NAME
from services.cli.machine import processor
from services.hub import local_copy
from services.pilot import Pilot
from services.profile import profile, warm_up
from services.protocol import Accepted, Failure, Finish, Item, Job, ModelStatus, Piece, SpeculationReport, TokenLogprob, Usage
from services.runner import EngineDied, EngineRunner, Stream
from services.text import Answer, Tokenizer

log = logging.getLogger(__name__)
SPECULATOR_FILES = ("*.json", "*.safetensors", "*.bin")
LEAST_TOKENS = 64  # that memory for keys and values must hold
SEED_BITS = 53  # exact in every JSON reader
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")  # in every record


@dataclass(slots=True, eq=False)
class Choice:
    """One choice of a job: its request and its text. `started` is monotonic seconds."""

    index: int
    request: Request
    answer: Answer
    prefix: str
    tokens: list[int] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)


class ModelHost:
    """Serves one model. `load` blocks for as long as the weights take; until it is done every job is answered with 503.

    record: called with every finished request that may be logged. To be set before `start`: capture, called in the engine's thread with
    what the base computed for a sample of them, None to keep nothing; counted, called there with (line, version, drafts, kept tokens) of
    every request that ended while two versions were compared, see `Versions`.
    """

    def __init__(self, settings: ModelSettings, pilot: Pilot, record: Callable[[RequestRecord], None] = lambda _: None) -> None:
        self.settings, self.pilot, self.record = settings, pilot, record
        self.created = int(time.time())
        self.failure: str | None = None
        self.tokenizer: Tokenizer | None = None
        self.runner: EngineRunner | None = None
        self.capture: Callable[[Trace], None] | None = None
        self.counted: Callable[[str, str, int, int], None] = lambda line, version, drafts, kept: None
        self.speculator: Path | None = None  # the folder of the configured speculator
        self.configured_version = ""

    # -- life ---------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Load and begin to serve. Raises what loading raised; the status says so too."""
        try:
            self.tokenizer, engine = await asyncio.to_thread(self.load)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        self.failure = None
        stays()
        runner = EngineRunner(engine, self.pilot.observe)
        runner.start()
        self.runner = runner

    def load(self) -> tuple[Tokenizer, Engine]:
        """The tokenizer and an engine around base and drafter, warmed up by a few tokens."""
        s = self.settings
        if s.threads:
            torch.set_num_threads(s.threads)
        e = s.engine
        base = load_base(s.base, device(s.device), dtype(s.dtype, s.device), self.packed, e.executor, e.batch_invariant)
        self.speculator = local_copy(s.speculator, SPECULATOR_FILES) if s.speculator and s.drafter.startswith("mlp") else None
        version = self.configured_version = fingerprint(self.speculator) if self.speculator else ""
        drafter = build_drafter(s.drafter, self.speculator, version=version, **self.fitting(base))
        if (versions := versions_of(drafter)) is not None:
            versions.ended = self.counted
        slots = affordable(e.kv_bytes, base.kv_bytes_per_token)
        sizes: dict[str, Any] = {"chunk": e.chunk, "max_running": e.max_running, "max_waiting": e.max_waiting}
        engine = self.pilot.engine(base, drafter, recorder=self.recorder(), slots=slots, **sizes)
        warm_up(engine)
        if not self.pilot.plan.knowledge.measured:
            profile(engine, self.pilot)
        return Tokenizer(s.base), engine

    def stop(self) -> None:
        if self.runner is not None:
            self.runner.stop()

    def status(self) -> ModelStatus:
        """How this model is, without waiting for anything."""
        name, drafter = self.settings.name, self.pilot.drafter_name
        if self.failure is not None:
            return ModelStatus(name, "failed", self.failure, created=self.created)
        if self.runner is None or self.tokenizer is None:
            return ModelStatus(name, "loading", "its weights are being loaded", created=self.created)
        if not self.runner.alive:
            return ModelStatus(name, "failed", f"its engine stopped: {self.runner.death}", created=self.created)
        kind: Literal["chat", "completion"] = "chat" if self.tokenizer.chats else "completion"
        return ModelStatus(name, "ready", "", self.longest, drafter, self.pilot.version, kind, self.created, *self.memory())

    def memory(self) -> tuple[int, int, int]:
        """Bytes for keys and values: all, those held by running requests, and those of blocks that only the prefix cache holds."""
        assert self.runner is not None
        pool, each = self.runner.engine.pool, self.runner.engine.base.kv_bytes_per_token
        return pool.size * each, (pool.capacity - pool.available) * each, (pool.available - len(pool.free)) * each

    @property
    def longest(self) -> int:
        """Prompt and answer together, in tokens."""
        assert self.runner is not None
        engine = self.runner.engine
        return min(engine.base.context, engine.pool.capacity, self.settings.engine.max_context or engine.base.context)

    # -- versions of the speculator -----------------------------------------------------------------------------------------

    @property
    def versions(self) -> Versions | None:
        """Where versions are exchanged; None without a speculator, and until the model is loaded."""
        return versions_of(self.runner.engine.drafter) if self.runner is not None else None

    def load_version(self, folder: Path, version: str) -> Drafter:
        """Another version of the speculator, ready to draft beside the one that does. Blocks. Raises CheckpointError."""
        assert self.runner is not None
        return load_version(folder, version=version, **self.fitting(self.runner.engine.base))

    def fitting(self, base: Base) -> dict[str, Any]:
        """What a speculator must fit, and where it is to be."""
        speculators = self.packed / "speculators" if self.packed else None
        sizes = {"hidden_size": base.hidden_size, "vocab_size": base.vocab_size}
        return {**sizes, "device": device(self.settings.device), "dtype": base.dtype, "cache": speculators}

    @property
    def packed(self) -> Path | None:
        """Where weights are packed for every replica of the host."""
        return Path(self.settings.packed_weights) if self.settings.packed_weights else None

    def load_configured(self) -> Drafter:
        """The version that the model was configured with. Blocks. Raises CheckpointError."""
        assert self.speculator is not None
        return self.load_version(self.speculator, self.configured_version)

    async def swap(self, lines: Mapping[str, Line], done: Callable[[], None] = lambda: None) -> None:
        """Draft with these from the next step on; requests in flight go on with them. done: called between the same two steps.

        Raises EngineDied.
        """
        runner, versions = self.runner, self.versions
        assert runner is not None and versions is not None

        def exchange() -> None:
            versions.swap(lines, {name: text.request.tag for name, text in runner.engine.texts.items()})
            self.pilot.take(runner.engine.drafter)
            done()

        await runner.between(exchange)

    def version_of(self, request: Request) -> str:
        """The version that drafts for a request."""
        versions = self.versions
        return versions.serving(request.id, request.tag).version if versions is not None else self.pilot.version

    # -- features for training ----------------------------------------------------------------------------------------------

    def recorder(self) -> Recorder | None:
        c = self.settings.refresh.capture
        return Recorder(self.keep, c.top, c.longest, int(c.running_bytes)) if self.capture is not None else None

    def recorded(self, job: Job, request: str) -> bool:
        """Whether a request's features are kept: it may be logged, and belongs to the sample."""
        return self.capture is not None and self.may_log(job) and in_canary(request, "capture", self.settings.refresh.capture.share)

    def keep(self, found: Features) -> None:
        """Hand a finished request's features on. Of the prompt only what its penalties need. Runs in the engine's thread."""
        if self.capture is None:
            return
        request = found.request
        before = list(request.prompt) if request.params.repetition_penalty != 1 else []
        trace = Trace(
            request=request.id,
            model=self.settings.name,
            tag=request.tag,
            version=self.version_of(request),
            params=request.params,
            prompt_length=len(before),
            position=len(request.prompt),
            tokens=torch.cat([torch.tensor(before, dtype=torch.int32), found.tokens]),
            hidden=found.hidden,
            top_ids=found.top_ids,
            top_logprobs=found.top_logprobs,
            accepted=found.accepted,
            at=time.time(),
        )
        self.capture(trace)

    # -- one job ------------------------------------------------------------------------------------------------------------

    async def generate(self, job: Job) -> AsyncGenerator[Item, None]:
        """A job's items: `Accepted` and tuples of pieces, or a `Failure`. Closing the generator cancels what still runs."""
        stream: Stream[Piece] | None = None
        try:
            runner = self.ready()
            choices = await asyncio.to_thread(self.choices, job)
            by_id = {c.request.id: c for c in choices}
            stream = await runner.submit([c.request for c in choices], lambda outcome: self.piece(job, by_id[outcome.request.id], outcome))
            prompt_tokens = sum(len(c.request.prompt) for c in choices if c.index % job.n == 0)
            yield Accepted(tuple(c.request.params.seed for c in choices), prompt_tokens)
            async for pieces in chunks(stream, lambda: runner.apart):
                yield pieces
            stream = None
        except Exception as error:
            yield failure(job, error)
        finally:
            if stream is not None and self.runner is not None:
                self.runner.cancel(stream)

    def ready(self) -> EngineRunner:
        status = self.status()
        if self.runner is None or status.state != "ready":
            raise NotReady(status)
        return self.runner

    def choices(self, job: Job) -> list[Choice]:
        """The requests a job asks for, prompt-major. Raises InvalidRequest."""
        prompts = self.prompts(job)
        self.fits(len(prompts) * job.n)
        prediction = self.prediction(job)
        seed = secrets.randbits(SEED_BITS) if job.seed is None else job.seed
        count = len(prompts) * job.n
        return [self.choice(job, i, prompts[i // job.n], prediction, (seed + i) % 2**63) for i in range(count)]

    def fits(self, count: int) -> None:
        """Refuse a job of more choices than the engine ever holds."""
        most = self.settings.engine.max_running + self.settings.engine.max_waiting
        if count > most:
            raise InvalidRequest("n", f"the request asks for {count} choices; this model takes at most {most} at once")

    def prediction(self, job: Job) -> list[int]:
        """The predicted answer in tokens, as much of it as an answer can have."""
        assert self.tokenizer is not None
        return self.tokenizer.encode_inside(job.prediction)[: self.longest] if job.prediction else []

    def prompts(self, job: Job) -> list[tuple[list[int], str]]:
        """Every prompt in tokens, and the text that is echoed in front of its answers."""
        assert self.tokenizer is not None
        if job.messages is not None:
            return [(self.tokenizer.chat(job.messages), "")]
        encoded = [(self.tokenizer.encode(p) if isinstance(p, str) else list(p), p) for p in job.prompts or ()]
        return [(ids, (p if isinstance(p, str) else self.tokenizer.decode(ids)) if job.echo else "") for ids, p in encoded]

    def choice(self, job: Job, index: int, prompt: tuple[list[int], str], prediction: Sequence[int], seed: int) -> Choice:
        assert self.tokenizer is not None
        ids, prefix = prompt
        answer = Answer(self.tokenizer, ids, job.stop)
        params, priority = self.params(job, ids, seed), Priority[job.priority.upper()]
        name = choice_of(job.id, index)
        request = Request(name, ids, params, answer.push, prediction, job.speculation, priority, self.recorded(job, name), job.tag)
        return Choice(index, request, answer, prefix)

    def params(self, job: Job, prompt: Sequence[int], seed: int) -> SamplingParams:
        assert self.runner is not None
        room = self.longest - len(prompt)
        where = "messages" if job.messages is not None else "prompt"
        if room < 1:
            raise InvalidRequest(where, f"the prompt has {len(prompt)} tokens; this model reads {self.longest} with the answer")
        if job.max_tokens is not None and job.max_tokens > room:
            message = f"the prompt has {len(prompt)} tokens, so max_tokens can be at most {room}, not {job.max_tokens}"
            raise InvalidRequest("max_tokens", message)
        eos = frozenset() if job.ignore_eos else self.runner.engine.base.eos
        return SamplingParams(
            temperature=job.temperature,
            top_p=job.top_p,
            top_k=job.top_k,
            min_p=job.min_p,
            presence_penalty=job.presence_penalty,
            frequency_penalty=job.frequency_penalty,
            repetition_penalty=job.repetition_penalty,
            logit_bias=job.logit_bias,
            seed=seed,
            max_tokens=room if job.max_tokens is None else job.max_tokens,
            stop_tokens=eos | frozenset(job.stop_token_ids),
            logprobs=job.logprobs,
        )

    # -- from tokens to text ------------------------------------------------------------------------------------------------

    def piece(self, job: Job, choice: Choice, outcome: Outcome) -> Piece:
        """What one step of the engine means to the client. Runs in the engine's thread."""
        text = choice.answer.take() if outcome.finish is None else choice.answer.finish()
        prefix, choice.prefix = choice.prefix, ""
        tokens = outcome.tokens
        choice.tokens += tokens
        shown = [(t, s) for t, s in zip(tokens, outcome.scores, strict=False) if t not in choice.request.params.stop_tokens]
        logprobs = tuple(self.logprob(t, s) for t, s in shown)
        if outcome.finish is None or outcome.stats is None:
            return Piece(choice.index, prefix + text, tokens, logprobs, seed=choice.request.params.seed)
        self.log(job, choice, outcome)
        if outcome.finish == "error":
            log.error("request %s failed: %s", choice.request.id, outcome.error)
        usage, speculation = self.account(choice, outcome)
        finish = cast(Finish, outcome.finish)
        return Piece(choice.index, prefix + text, tokens, logprobs, finish, usage, speculation, choice.request.params.seed)

    def logprob(self, token: int, score: TokenScore) -> TokenLogprob:
        assert self.tokenizer is not None
        top = tuple((*self.named(t), value) for t, value in score.top)
        return TokenLogprob(*self.named(token), score.logprob, top)

    def named(self, token: int) -> tuple[str, tuple[int, ...]]:
        assert self.tokenizer is not None
        raw = self.tokenizer.token_bytes(token)
        return raw.decode(errors="replace"), tuple(raw)

    def account(self, choice: Choice, outcome: Outcome) -> tuple[Usage, SpeculationReport]:
        stats, count = outcome.stats, len(choice.tokens)
        assert stats is not None
        usage = Usage(len(choice.request.prompt), count, stats.cached, stats.accepted, stats.drafted - stats.accepted)
        name, version = self.pilot.drafter_name, self.version_of(choice.request)
        report = SpeculationReport(name, version, stats.steps, stats.drafted, stats.accepted, count, stats.depth_sum, stats.depth_max)
        return usage, report

    def may_log(self, job: Job) -> bool:
        return self.settings.log and job.store

    def log(self, job: Job, choice: Choice, outcome: Outcome) -> None:
        """Offer a finished request to the log unless the model or the request says no."""
        if not self.may_log(job) or outcome.finish not in ("stop", "length") or outcome.stats is None:
            return
        p, stats = choice.request.params, outcome.stats
        bias = {str(token): value for token, value in p.logit_bias.items()}
        sampling: dict[str, Any] = {name: getattr(p, name) for name in SAMPLING} | {"logit_bias": bias}
        self.record(
            RequestRecord(
                id=choice.request.id,
                model=job.model,
                created=time.time(),
                key=job.key,
                prompt=tuple(choice.request.prompt),
                output=tuple(choice.tokens),
                seed=p.seed,
                sampling=sampling,
                finish_reason=outcome.finish,
                drafter=self.pilot.drafter_name,
                speculator_version=self.version_of(choice.request),
                steps=stats.steps,
                drafted=stats.drafted,
                accepted=stats.accepted,
                seconds=time.monotonic() - choice.started,
                tag=job.tag,
            )
        )


class NotReady(RuntimeError):
    """The model cannot serve yet, or no more."""

    def __init__(self, status: ModelStatus) -> None:
        super().__init__(f"The model {status.model} is {status.state}: {status.detail}")
        self.status = status


async def chunks(stream: Stream[Piece], apart: Callable[[], float]) -> AsyncGenerator[tuple[Piece, ...], None]:
    """The pieces of a stream as they come, those of one choice that are there at the same time as one; apart: seconds between two chunks
    now."""
    clock, earliest = asyncio.get_running_loop().time, 0.0
    while pieces := await stream.take(earliest):
        yield joined(pieces)
        earliest = clock() + apart()


def joined(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
    """One piece for each choice, in order of first arrival."""
    found: dict[int, Piece] = {}
    for piece in pieces:
        before = found.get(piece.choice)
        found[piece.choice] = piece if before is None else after(before, piece)
    return tuple(found.values())


def after(first: Piece, second: Piece) -> Piece:
    """Two pieces of a choice as one; how it ended is told by the second."""
    text, tokens = first.text + second.text, first.tokens + second.tokens
    seed = first.seed if second.seed is None else second.seed
    return replace(second, text=text, tokens=tokens, logprobs=first.logprobs + second.logprobs, seed=seed)


def failure(job: Job, error: Exception) -> Failure:
    """An exception as the client will see it."""
    match error:
        case InvalidRequest():
            chat = job.messages is not None and error.param == "prompt"
            code = "context_length_exceeded" if error.param in ("prompt", "max_tokens") and "tokens" in str(error) else None
            return Failure(400, str(error), "invalid_request_error", "messages" if chat else error.param, code)
        case Overloaded():
            return Failure(429, f"The model {job.model} is overloaded: {error}.", "rate_limit_error", None, "overloaded", 1.0)
        case NotReady():
            code = "model_loading" if error.status.state == "loading" else "model_failed"
            return Failure(503, str(error), "service_unavailable_error", None, code, 2.0 if error.status.state == "loading" else 30.0)
        case EngineDied():
            return Failure(503, f"The model {job.model} is restarting.", "service_unavailable_error", None, "engine_restarting", 5.0)
    log.exception("job %s failed", job.id, exc_info=error)
    return Failure(500, f"The request {job.id} failed inside the service.", "server_error", None, "internal_error")


def affordable(kv_bytes: int, each: int) -> int:
    """Tokens whose keys and values fit in `kv_bytes` at `each` bytes per token. Raises ValueError if that is no room for a request."""
    if kv_bytes < LEAST_TOKENS * each:
        raise ValueError(
            f"engine.kv_bytes: {kv_bytes} bytes hold {kv_bytes // each} tokens of {each} bytes; "
            f"at least {LEAST_TOKENS * each} bytes ({LEAST_TOKENS} tokens) are needed"
        )
    return kv_bytes // each


def stays() -> None:
    """What is there now stays: the garbage collector need not look at libraries and weights again, which stops all threads for half a
    second whenever it does."""
    gc.collect()
    gc.freeze()


def device(name: str) -> str:
    """A device name for torch; auto is the GPU if there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def hardware(settings: ModelSettings) -> str:
    """What a replica computes on, what, and how precisely, in words."""
    place, precision = device(settings.device), dtype(settings.dtype, settings.device)
    name = torch.cuda.get_device_name(place) if place.startswith("cuda") and torch.cuda.is_available() else processor()
    return f"{name}, {Path(settings.base).name}, {str(precision).removeprefix('torch.')}"[:NAME]


def dtype(name: str, device_name: str) -> torch.dtype:
    """A torch type; auto is float32 on a CPU and bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device(device_name) == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
