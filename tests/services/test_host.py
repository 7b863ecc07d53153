"""One model whole: text in, text out, the same text whatever is drafted; overload, cancellation and failure are answers."""

from __future__ import annotations

import asyncio
import gc
from contextlib import aclosing
from pathlib import Path

import pytest

from actors.policy import parse_policy
from actors.request_log import RequestRecord
from configs.settings import EngineSettings, ModelSettings
from engine.engine import Engine
from engine.executor import Eager
from policies import CostModel, GoodputPolicy, Plan, StepSample
from services.host import ModelHost, joined
from services.pilot import Pilot
from services.protocol import Accepted, Failure, Job, Piece, Speculation, Usage
from tests.conftest import wait_until
from tests.services.folders import write_model

TOKEN_BYTES = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, width, float32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def settings(folder, **engine):
    sizes = EngineSettings(**{"kv_bytes": 2048 * TOKEN_BYTES, "max_running": 8, **engine})
    return ModelSettings(name="toy", base=str(folder), speculator=str(folder / "speculator"), engine=sizes, threads=1, packed_weights=None)


@pytest.fixture
async def host(folder):
    async for made in running(settings(folder)):
        yield made


async def running(model_settings, policy=None):
    records = []
    plan = Plan.of(0, "toy", parse_policy(policy or {"kind": "fixed", "depth": 3, "width": 3}))
    host = ModelHost(model_settings, Pilot("r1", plan), records.append)
    host.records = records
    await host.start()
    yield host
    host.stop()
    host.runner.engine.check()


async def answer(host, job):
    """All items of a job, and its choices' texts."""
    items = [item async for item in host.generate(job)]
    texts: dict[int, str] = {}
    for item in items:
        if isinstance(item, tuple):
            for piece in item:
                texts[piece.choice] = texts.get(piece.choice, "") + piece.text
    return items, texts


def last(items, choice=0):
    return next(p for item in reversed(items) if isinstance(item, tuple) for p in reversed(item) if p.choice == choice and p.finish)


OFF = Speculation("off")


async def test_asking_the_plan_is_timed_as_its_steps_are(host):
    assert host.pilot.clock is host.runner.engine.clock is host.runner.turns.clock


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.7, "presence_penalty": 1.0}]
)
async def test_text_does_not_depend_on_speculation(host, sampling):
    job = dict(model="toy", prompts=("The quick",), max_tokens=40, seed=11, **sampling)
    _, off = await answer(host, Job(id="a", speculation=OFF, **job))
    for i, wish in enumerate((Speculation(), Speculation("fixed", 2), Speculation("auto", 1, 1), Speculation("fixed", 3, 4))):
        items, texts = await answer(host, Job(id=f"b{i}", **job, speculation=wish))
        assert texts == off
        report = last(items).speculation
        assert report.drafted > 0 and report.depth_max <= (wish.max_depth or 3)


async def test_a_speculator_may_be_named_by_a_hub_id(folder, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder / "speculator")

    monkeypatch.setattr("services.hub.snapshot_download", download)
    async for host in running(settings(folder).model_copy(update={"speculator": "somebody/toy-accelerator"})):
        items, _ = await answer(host, Job(id="a", model="toy", prompts=("The",), max_tokens=5, seed=1))
        assert last(items).speculation.drafted > 0 and items[0].prompt_tokens == len(host.tokenizer.encode("The"))
    assert asked[0][0] == "somebody/toy-accelerator" and "*.bin" in asked[0][1]


async def test_the_last_piece_accounts_for_everything(host):
    items, _ = await answer(host, Job(id="a", model="toy", prompts=("The quick brown fox",), max_tokens=20, seed=1, logprobs=2))
    assert isinstance(items[0], Accepted) and items[0].seeds == (1,)
    end = last(items)
    tokens = [t for item in items[1:] for p in item for t in p.tokens]
    assert end.usage.completion_tokens == len(tokens) <= 20 and end.usage.prompt_tokens == len(host.tokenizer.encode("The quick brown fox"))
    assert end.usage.accepted + end.usage.rejected == end.speculation.drafted
    assert end.speculation.steps + end.usage.accepted == len(tokens)
    logprobs = [lp for item in items[1:] for p in item for lp in p.logprobs]
    assert len(logprobs) == len(tokens) and all(len(lp.top) == 2 and lp.logprob <= 0 for lp in logprobs)
    assert host.records[-1].output == tuple(tokens) and host.records[-1].steps == end.speculation.steps


async def test_choices_have_their_own_seeds_and_can_be_had_again(host):
    job = dict(model="toy", prompts=("The", "def"), max_tokens=8, seed=5)
    items, texts = await answer(host, Job(id="a", n=2, **job))
    assert sorted(texts) == [0, 1, 2, 3] and items[0].seeds == (5, 6, 7, 8)
    _, single = await answer(host, Job(id="b", model="toy", prompts=("def",), max_tokens=8, seed=7))
    assert single[0] == texts[2]


async def test_stop_strings_stop_tokens_and_echo(host):
    job = dict(model="toy", prompts=("The quick",), max_tokens=40, seed=2)
    first, whole = await answer(host, Job(id="a", **job))
    stop = whole[0][5:8]
    items, cut = await answer(host, Job(id="b", stop=(stop,), **job))
    assert cut[0] == whole[0][: whole[0].index(stop)] and last(items).finish == "stop"
    _, echoed = await answer(host, Job(id="c", echo=True, **job))
    assert echoed[0] == "The quick" + whole[0]
    token = [t for item in first[1:] for p in item for t in p.tokens][3]
    items, _ = await answer(host, Job(id="d", stop_token_ids=(token,), **job))
    assert last(items).finish == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (dict(prompts=("x " * 400,)), "prompt"),
        (dict(prompts=("x",), max_tokens=5000), "max_tokens"),
        (dict(prompts=((99999,),)), "prompt"),
        (dict(prompts=("",)), "prompt"),
        (dict(prompts=("x",), logit_bias={99999: 1.0}), "logit_bias"),
        (dict(messages=({"role": "robot", "content": "x"},)), "messages"),
        (dict(messages=({"role": "user", "content": "x " * 400},)), "messages"),
    ],
)
async def test_what_does_not_fit_the_model_is_a_400_that_names_the_field(host, fields, param):
    items, _ = await answer(host, Job(id="a", model="toy", **fields))
    assert len(items) == 1 and isinstance(items[0], Failure)
    assert (items[0].status, items[0].param) == (400, param)


async def test_a_record_says_what_its_tokens_were_drawn_with(host):
    given = dict(temperature=0.8, top_p=0.9, top_k=40, min_p=0.01, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.1)
    job = dict(model="toy", prompts=("The",), max_tokens=12, ignore_eos=True)
    await answer(host, Job(id="a", logit_bias={7: 5.0, 9: -100.0}, **job, **given))
    record = RequestRecord.from_json(host.records[-1].to_json())
    assert record.sampling == given | {"logit_bias": {"7": 5.0, "9": -100.0}}
    drawn = record.sampling | {"logit_bias": {int(token): value for token, value in record.sampling["logit_bias"].items()}}
    await answer(host, Job(id="b", seed=record.seed, **job, **drawn))
    assert host.records[-1].output == record.output


async def test_requests_that_opt_out_are_not_recorded(host):
    await answer(host, Job(id="no", model="toy", prompts=("The",), max_tokens=3, store=False))
    await answer(host, Job(id="yes", model="toy", prompts=("The",), max_tokens=3))
    assert [r.id for r in host.records] == ["yes-0"]


async def test_a_model_with_its_log_switched_off_records_nothing(folder):
    async for host in running(settings(folder).model_copy(update={"log": False})):
        await answer(host, Job(id="a", model="toy", prompts=("The",), max_tokens=3))
        assert not host.records


async def test_a_prediction_is_drafted_from_and_a_long_one_is_cut(host):
    job = dict(model="toy", prompts=("The",), max_tokens=30, seed=4, temperature=0.0, ignore_eos=True)
    _, plain = await answer(host, Job(id="a", **job))
    items, texts = await answer(host, Job(id="b", prediction=plain[0] + " and" * 5000, **job))
    assert texts == plain and last(items).usage.accepted > 0
    assert len(host.prediction(Job(id="c", model="toy", prediction="and " * 5000))) <= host.longest


async def test_more_choices_than_ever_fit_are_refused(host):
    items, _ = await answer(host, Job(id="a", model="toy", prompts=("The",), n=100_000, max_tokens=1))
    assert (items[0].status, items[0].param) == (400, "n")


async def test_an_outcome_that_cannot_be_told_fails_its_request_only(host, monkeypatch):
    original = host.piece

    def piece(job, choice, outcome):
        if job.id == "bad":
            raise ValueError("no words")
        return original(job, choice, outcome)

    monkeypatch.setattr(host, "piece", piece)
    jobs = [Job(id=name, model="toy", prompts=("The",), max_tokens=20, seed=1) for name in ("bad", "good")]
    (bad, _), (good, _) = await asyncio.gather(*(answer(host, job) for job in jobs))
    assert bad[-1].status == 500 and last(good).finish
    assert host.runner.alive


async def test_a_model_that_cannot_compute_is_not_ready(folder, monkeypatch):
    def broken(self, *_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("engine.loading.Base.forward", broken)
    host = ModelHost(settings(folder), Pilot("r", Plan.of(0, "toy", parse_policy({"kind": "off"}))))
    with pytest.raises((RuntimeError, ValueError), match="out of memory"):
        await host.start()
    assert host.status().state == "failed"


async def test_closing_the_stream_cancels_and_frees(host):
    engine: Engine = host.runner.engine
    async with aclosing(host.generate(Job(id="gone", model="toy", prompts=("The",), max_tokens=200, ignore_eos=True))) as stream:
        await anext(stream)
        await anext(stream)
        assert engine.running
    await asyncio.to_thread(wait_until, lambda: not engine.busy)
    assert not host.runner.streams and not host.records


async def test_a_full_queue_is_an_answer(folder):
    async for host in running(settings(folder, max_running=1, max_waiting=1)):
        jobs = [Job(id=f"j{i}", model="toy", prompts=("The",), max_tokens=100, ignore_eos=True, seed=1) for i in range(8)]
        results = await asyncio.gather(*(answer(host, job) for job in jobs))
        refused = [items[0] for items, _ in results if isinstance(items[0], Failure)]
        assert refused and all(f.status == 429 and f.retry_after for f in refused)
        assert len({texts[0] for _, texts in results if texts}) == 1


async def test_32_requests_at_once_do_not_disturb_each_other(folder):
    async for host in running(settings(folder, kv_bytes=1024 * TOKEN_BYTES)):
        jobs = [
            Job(id=f"j{i}", model="toy", prompts=("The quick" * (i % 3 + 1),), max_tokens=16, seed=i, temperature=i % 2) for i in range(32)
        ]
        together = await asyncio.gather(*(answer(host, job) for job in jobs))
        for i in (0, 7, 31):
            assert (await answer(host, jobs[i]))[1] == together[i][1]


@pytest.mark.parametrize("kv_bytes", [100_000, 262_143, "1MiB"])
async def test_keys_and_values_stay_within_their_budget(folder, kv_bytes):
    async for host in running(settings(folder, kv_bytes=kv_bytes)):
        budget = host.settings.engine.kv_bytes
        jobs = [Job(id=f"j{i}", model="toy", prompts=("The quick brown fox" * 3,), max_tokens=30, seed=i, n=3) for i in range(8)]
        await asyncio.gather(*(answer(host, job) for job in jobs))
        store = host.runner.engine.store
        allocated = sum(t.numel() * t.element_size() for layers in (store.keys, store.values) for t in layers.values())
        status = host.status()
        assert budget - TOKEN_BYTES < allocated <= budget and status.kv_bytes == allocated
        assert status.kv_held == 0 and 0 < status.kv_cached < allocated


async def test_a_budget_that_holds_nothing_says_so(folder):
    host = ModelHost(settings(folder, kv_bytes=4096), Pilot("r", Plan.of(0, "toy", parse_policy({"kind": "off"}))))
    with pytest.raises(ValueError, match=r"engine.kv_bytes: 4096 bytes hold 5 tokens of 768 bytes; at least 49152 bytes"):
        await host.start()
    assert "kv_bytes" in host.status().detail


async def test_what_computes_forwards_is_what_the_settings_say(folder):
    async for host in running(settings(folder, executor="eager")):
        assert isinstance(host.runner.engine.base.executor, Eager)
        items, _ = await answer(host, Job(id="e", model="toy", prompts=("The",), max_tokens=2))
        assert not isinstance(items[0], Failure)


async def test_a_model_that_cannot_be_invariant_does_not_start_and_says_why(folder, monkeypatch):
    monkeypatch.setattr("engine.loading.supported", lambda model: False)
    host = ModelHost(settings(folder, batch_invariant=True), Pilot("r", Plan.of(0, "toy", parse_policy({"kind": "off"}))))
    with pytest.raises(ValueError, match="batch_invariant cannot be had"):
        await host.start()
    assert "native kernels" in host.status().detail


async def test_priority_reaches_the_engine(host, monkeypatch):
    engine, seen = host.runner.engine, []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: (seen.append(request.priority.name.lower()), submit(request)))
    for priority in ("interactive", "normal", "batch"):
        await answer(host, Job(id=priority, model="toy", prompts=("The",), max_tokens=2, priority=priority))
    assert seen == ["interactive", "normal", "batch"]


async def test_an_engine_that_dies_fails_everyone_and_says_so(host):
    def die():
        raise MemoryError("no more")

    streams = [host.generate(Job(id=f"d{i}", model="toy", prompts=("The",), max_tokens=200, ignore_eos=True)) for i in range(3)]
    for stream in streams:
        assert isinstance(await anext(stream), Accepted)
    host.runner.commands.put(die)
    for stream in streams:
        items = [item async for item in stream]
        assert isinstance(items[-1], Failure) and items[-1].status == 503
    assert host.status().state == "failed"
    items, _ = await answer(host, Job(id="late", model="toy", prompts=("The",)))
    assert items[0].status == 503


async def test_a_model_that_cannot_be_loaded_says_why(tmp_path):
    host = ModelHost(settings(tmp_path / "nothing"), Pilot("r", Plan.of(0, "toy", parse_policy({"kind": "off"}))))
    items, _ = await answer(host, Job(id="early", model="toy", prompts=("x",)))
    assert (items[0].status, items[0].code) == (503, "model_loading") and items[0].retry_after
    with pytest.raises(Exception):  # noqa: B017
        await host.start()
    assert host.status().state == "failed" and "nothing" in host.status().detail


def test_pieces_of_a_choice_join_and_keep_how_it_ended() -> None:
    first, other, last = Piece(0, "a", (1,)), Piece(1, "x", (9,)), Piece(0, "bc", (2, 3), finish="stop", usage=Usage(4, 3))
    assert joined([first, other, last]) == (Piece(0, "abc", (1, 2, 3), finish="stop", usage=Usage(4, 3)), other)
    assert joined([]) == ()


async def test_what_is_loaded_is_not_searched_for_garbage_while_serving(host) -> None:
    """A full collection stops every thread: it passes over what was there when the model was ready."""
    assert gc.get_freeze_count() > 10_000


@pytest.mark.parametrize("known", [False, True])
async def test_a_replica_measures_itself_only_where_nothing_is_known_of_what_steps_cost(folder, monkeypatch, known):
    measured = []
    monkeypatch.setattr("services.host.profile", lambda engine, pilot: measured.append(pilot))
    cost = CostModel()
    for depth in (0, 3) * 20:
        cost.add(StepSample(1, bool(depth), 1 + depth, 10, depth, 0.01, 0.001 * bool(depth)))
    plan = Plan.of(0, "toy", GoodputPolicy(), cost.table() if known else None)
    host = ModelHost(settings(folder), Pilot("r1", plan))
    await host.start()
    host.stop()
    assert measured == ([] if known else [host.pilot])


async def test_speculators_are_mapped_from_the_folder_of_packed_weights(folder, tmp_path):
    async for host in running(settings(folder).model_copy(update={"packed_weights": str(tmp_path)})):
        host.load_configured()
        (file,) = (tmp_path / "speculators").glob("*.safetensors")
        assert file.name in mapped()


def mapped() -> str:
    """What this process has in its memory."""
    return Path("/proc/self/maps").read_text()
