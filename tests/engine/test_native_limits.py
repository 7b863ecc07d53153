"""The compiled kernels at their limits: shapes drawn at random, other processors, many threads, faults of the machine around them."""

import ctypes
import logging
import math
import os
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

from engine import loading
from engine.attention import KVStore, Row
from engine.executor import Eager
from engine.loading import load_base
from engine.native import compiled, operations, weights
from engine.native.program import Native, pack_model, possible
from engine.sampling import plain_gumbel
from tests.engine.toys import toy_config, toy_model

pytestmark = pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="there is no C compiler")
CPU = torch.device("cpu")


def native(threads, dtype=torch.float32, **changes):
    model = toy_model(toy_config(**changes), "ragged").to(dtype)
    return Native(model.config, weights.private(dict(pack_model(model))), threads, dtype)


def chain(count, first=1, context=()):
    return Row(np.array(context, dtype=np.int64), list(range(first, first + count)), list(range(-1, count - 1)), list(range(count)))


# -- shapes drawn at random ---------------------------------------------------------------------------------------------------------


def drawn_config(draw):
    kind, dim, kv = (
        draw.choice(["llama", "mistral", "qwen2", "qwen3", "granite"]),
        draw.choice([16, 32, 48, 80, 128]),
        draw.choice([1, 1, 2, 3]),
    )
    heads = kv * draw.choice([1, 2, 3, 5, 8, 48 if kv == 1 and dim <= 32 else 4])
    fields = dict(
        hidden_size=math.lcm(32, heads) if kind == "llama" else 32 * draw.randrange(1, 5),
        intermediate_size=draw.choice([1, 7, 33, 96, 101]),
        num_hidden_layers=draw.randrange(1, 4),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=dim,
        vocab_size=draw.choice([31, 97, 131]),
        max_position_embeddings=1024,
    )
    window = dict(sliding_window=draw.choice([1, 2, 15, 16, 17, 33]))
    extras = {
        "llama": dict(attention_bias=draw.random() < 0.5, mlp_bias=draw.random() < 0.5),
        "mistral": window,
        "qwen2": dict(window, use_sliding_window=True, max_window_layers=1),
        "granite": dict(embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=2.0, attention_multiplier=0.2),
    }
    return CONFIG_MAPPING[kind](**fields, **extras.get(kind, {}))


def drawn_model(draw, config):
    """Some of its weights are exact in bfloat16."""
    model = toy_model(config, "ragged", 0.15)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
        if draw.random() < 0.5:
            parameter.data = parameter.data.bfloat16().float()
    return model


def drawn_row(draw, free):
    count, length = draw.choice([1, 1, 2, 3, 9, draw.randrange(1, 30), 80]), draw.choice([0, 0, 1, 15, 16, 17, draw.randrange(200)])
    forced, reach = draw.choice([0, count, draw.randrange(count)]), draw.choice([1, 2, 5, 100])
    parents = [i - 1 if i < forced else max(-1, i - 1 - draw.randrange(reach)) for i in range(count)]
    depths = []
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return Row(np.array([free.pop() for _ in range(length)], dtype=np.int64), [free.pop() for _ in parents], parents, depths)


def filled(config, slots, dtype, exact=torch.float32):
    """A store in which every slot holds something already, the same each time; exact: a type for numbers that `dtype` can hold."""
    store, generator = KVStore(slots), torch.Generator().manual_seed(5)
    for layer in range(config.num_hidden_layers):
        for tensor in store.reserve(layer, config.num_key_value_heads, config.head_dim, config.head_dim, exact, CPU):
            tensor.copy_(torch.randn(tensor.shape, generator=generator).to(dtype))
    return store


def alone(draw, executor, store, row, node, tokens):
    """What the executor says of one node when its path is computed by itself, as a chain in pieces. [vocab + hidden]"""
    path, context = [], list(row.context)
    while node >= 0:
        path.insert(0, node)
        node = row.parents[node]
    cuts = sorted({0, len(path), *(draw.randrange(len(path)) for _ in range(draw.randrange(3)))})
    for begin, end in pairwise(cuts):
        slots = [row.new[i] for i in path[begin:end]]
        piece = Row(np.array(context, dtype=np.int64), slots, list(range(-1, end - begin - 1)), list(range(end - begin)))
        out = executor.forward(store, [piece], [tokens[i] for i in path[begin:end]], [end - begin - 1])
        context += slots
    return torch.cat(out, 1)[0]


def check_drawn(seed, dtype=torch.float32):
    draw, slots = random.Random(seed), 4000
    config = drawn_config(draw)
    assert possible(config)
    model = drawn_model(draw, config).to(dtype)
    tensors = weights.private(dict(pack_model(model)))
    one, many = (Native(config, tensors, threads, dtype) for threads in (1, draw.randrange(2, 6)))
    free = draw.sample(range(slots), slots)
    rows = [drawn_row(draw, free) for _ in range(draw.choice([1, 2, 7, 14]))]
    owners = [(row, node) for row in rows for node in range(len(row.new))]
    tokens = [draw.randrange(config.vocab_size) for _ in owners]
    keep = draw.choice([list(range(len(tokens))), draw.sample(range(len(tokens)), draw.randrange(len(tokens) + 1))])
    results = [torch.cat(e.forward(filled(config, slots, dtype, dtype), rows, tokens, keep), 1) for e in (one, many)]
    assert torch.equal(*results)
    for place in draw.sample(range(len(keep)), min(2, len(keep))):
        row, node = owners[keep[place]]
        own = [token for token, (owner, _) in zip(tokens, owners, strict=True) if owner is row]
        assert torch.equal(alone(draw, draw.choice([one, many]), filled(config, slots, dtype, dtype), row, node, own), results[0][place])
    want = torch.cat(Eager(model.float(), CPU, torch.float32).forward(filled(config, slots, dtype), rows, tokens, keep), 1)
    near = 2e-4 if dtype == torch.float32 else 5e-2
    assert torch.allclose(results[0], want, atol=near * max(1.0, float(want.abs().max())) if keep else 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_any_shape_equals_plain_torch_with_the_same_bits_alone_and_in_company(seed, dtype):
    check_drawn(seed, dtype)


# -- other processors ---------------------------------------------------------------------------------------------------------------


def variants():
    """Flags for lesser processors whose code runs on this one, by their lanes and how they multiply pairs."""
    if platform.machine() != "x86_64":
        return {}
    flags, found = compiled.processor().split(), {(4, 0): ()}
    if "avx2" in flags and "fma" in flags:
        found[8, 0] = ("-mavx2", "-mfma")
    if "amx_bf16" in flags:
        found[16, 1] = ("-march=native", "-mno-amx-bf16")
    return found


@pytest.fixture
def forget():
    """Forget which kernels are loaded, before and after."""
    cached = (compiled.kernels, compiled.lanes, compiled.pairs, compiled.pool)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(("lanes", "pairs"), variants())
def test_kernels_for_lesser_processors_keep_the_same_promises(lanes, pairs, tmp_path, monkeypatch, forget):
    flags = tuple(flag for flag in compiled.FLAGS if flag not in ("-march=native", "-O3"))
    monkeypatch.setattr(compiled, "FLAGS", ("-O1", *flags, *variants()[lanes, pairs]))
    monkeypatch.setattr(compiled, "folders", lambda: [tmp_path])
    assert compiled.lanes() == lanes
    monkeypatch.setattr(compiled, "pairs", lambda: pairs)  # where this processor has a better way, it says no to a lesser one
    for seed in range(6):
        check_drawn(seed, torch.float32)
        check_drawn(seed + 6, torch.bfloat16)
    seeds, positions = torch.tensor([0, 2**32, 2**63 - 1]), torch.tensor([0, 2**31, 5])
    assert torch.allclose(operations.gumbel(seeds, positions, 1003), plain_gumbel(seeds, positions, 1003), rtol=1e-6, atol=1e-7)
    logits, noise = torch.randn(3, 1003), torch.randn(1003)
    want = [*logits[:2].argmax(1), (logits[2] / 0.5 + noise).argmax()]
    assert operations.draw(logits, range(3), [0.0, 0.0, 0.5], [None, None, noise]) == want


# -- threads ------------------------------------------------------------------------------------------------------------------------


def test_steps_that_want_no_logits_run_one_after_another():
    executor, store = native(4), KVStore(64)
    draw = random.Random(0)
    for _ in range(300):
        count = draw.randrange(1, 20)
        logits, hidden = executor.forward(store, [chain(count)], [5] * count, [])
        assert logits.shape == (0, 97) and hidden.shape == (0, 64)
    want, _ = native(1).forward(KVStore(64), [chain(20)], [5] * 20, range(20))
    assert torch.equal(executor.forward(store, [chain(20)], [5] * 20, range(20))[0], want)


def test_callers_in_several_threads_take_turns():
    layer, x = operations.NativeLinear.of(torch.randn(77, 48)), torch.randn(5, 48)
    executors = [native(3) for _ in range(3)]
    want, product, wrong = executors[0].forward(KVStore(64), [chain(20)], [5] * 20, [19])[0], layer(x), []

    def call(executor):
        store = KVStore(64)
        for _ in range(40):
            same = torch.equal(executor.forward(store, [chain(20)], [5] * 20, [19])[0], want) and torch.equal(layer(x), product)
            wrong.extend([] if same else [executor])

    threads = [threading.Thread(target=call, args=(executor,)) for executor in executors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    executor = native(3)
    want = executor.forward(KVStore(64), [chain(20)], [5] * 20, [19])[0].numpy().tobytes()
    child = os.fork()
    if child == 0:
        os._exit(int(executor.forward(KVStore(64), [chain(20)], [5] * 20, [19])[0].numpy().tobytes() != want))
    deadline = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_threads_that_wait_cost_nothing():
    executor = native(3)
    executor.forward(KVStore(64), [chain(20)], [5] * 20, [19])
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_fewer_threads_than_wanted_are_enough():
    """In a process of its own, which may have no more threads from then on."""
    script = """
import resource, torch
from tests.engine.test_native_limits import KVStore, chain, native
want = native(1).forward(KVStore(64), [chain(20)], [5] * 20, [19])[0]
resource.setrlimit(resource.RLIMIT_AS, (mapped := int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + 2**25, mapped))
assert torch.equal(native(64).forward(KVStore(64), [chain(20)], [5] * 20, [19])[0], want)
print("threads", sum(1 for _ in __import__("pathlib").Path("/proc/self/task").iterdir()))
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("threads are counted in /proc")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) < 64


def test_a_step_too_large_for_memory_fails_alone():
    layer, x = operations.NativeLinear.of(torch.randn(77, 48)), torch.randn(5, 48)
    want = layer(x)
    huge = compiled.Linear(0, 0, 2**30, 1, 0, 0)
    place = compiled.pool(torch.get_num_threads())
    assert compiled.load().linear(place, ctypes.byref(huge), x.data_ptr(), 2**30, x.data_ptr()) == -1
    assert torch.equal(layer(x), want)


def test_a_caller_that_flushes_small_numbers_changes_no_bit():
    layer, x = operations.NativeLinear.of(torch.full((2048, 32), 1e-20)), torch.full((1, 32), 1e-20)
    want = layer(x)
    assert 0 < float(want.min()) < torch.finfo(torch.float32).tiny
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor flushes nothing")
    try:
        got = layer(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got, want)


# -- inputs -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_in_its_row(value, dtype):
    executor, store = native(2, dtype), KVStore(64)
    executor.attach(store)
    rows = [chain(3, 1), chain(3, 11, [20, 21, 22]), chain(3, 31)]
    want = executor.forward(store, rows, [5] * 9, range(9))[0]
    store.keys[1][21] = value
    got = executor.forward(store, rows, [5] * 9, range(9))[0]
    assert got[3:6].isnan().all()
    assert torch.equal(got[:3], want[:3]) and torch.equal(got[6:], want[6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_that_are_no_numbers_give_logits_that_are_none(dtype):
    model = toy_model(toy_config(), "ragged").to(dtype)
    model.model.embed_tokens.weight.data[7] = math.nan
    executor = Native(model.config, weights.private(dict(pack_model(model))), 2, dtype)
    logits = executor.forward(KVStore(64), [chain(3), chain(3, 11)], [5, 7, 5, 5, 6, 5], range(6))[0]
    assert logits.isnan().all(1).tolist() == [False, True, True, False, False, False]


def test_keys_and_values_are_rounded_to_the_nearest_bfloat16():
    config, tensors = toy_config(), weights.private(dict(pack_model(toy_model(toy_config(), "ragged"))))
    stores = KVStore(64), KVStore(64)
    for store, dtype in zip(stores, (torch.float32, torch.bfloat16), strict=True):
        Native(config, tensors, 1, dtype).forward(store, [chain(20)], list(range(20)), [])
    assert torch.equal(stores[1].keys[0], stores[0].keys[0].bfloat16()) and torch.equal(stores[1].values[0], stores[0].values[0].bfloat16())


def test_a_store_of_another_type_is_refused():
    store = KVStore(64)
    native(1).forward(store, [chain(3)], [5] * 3, [2])
    with pytest.raises(AssertionError, match=r"store of torch\.float32"):
        native(1, torch.bfloat16).forward(store, [chain(3)], [5] * 3, [2])


def test_tokens_and_positions_outside_the_tables_are_refused():
    executor = native(1, max_position_embeddings=8)
    for token in (97, -1):
        with pytest.raises(IndexError, match="vocabulary of 97"):
            executor.forward(KVStore(64), [chain(1)], [token], [0])
    with pytest.raises(IndexError, match="context of 8"):
        executor.forward(KVStore(64), [chain(9)], [5] * 9, [8])


def test_operations_take_tensors_however_they_lie():
    layer, x = operations.NativeLinear.of(torch.randn(77, 48)), torch.randn(48, 5, dtype=torch.float64).T
    assert torch.equal(layer(x), layer(x.float().contiguous())) and layer(x[:0]).shape == (0, 77)
    pairs = torch.tensor([[3, 4], [5, 6]])
    assert torch.equal(operations.gumbel(pairs[:, 0], pairs[:, 1], 99), operations.gumbel(torch.tensor([3, 5]), torch.tensor([4, 6]), 99))


# -- the compiled file --------------------------------------------------------------------------------------------------------------


def test_a_broken_compiled_file_is_made_again(tmp_path, monkeypatch, caplog, forget):
    monkeypatch.setattr(compiled, "folders", lambda: [tmp_path])
    monkeypatch.setattr(compiled, "FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in compiled.FLAGS))
    compiled.build().write_bytes(b"no program")
    assert compiled.kernels() is not None and "broken" in caplog.text


def test_a_compiler_that_fails_is_told_of(tmp_path, monkeypatch, caplog, forget):
    monkeypatch.setattr(compiled, "folders", lambda: [tmp_path])
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-no-such-flag"))
    assert compiled.kernels() is None and "no-such-flag" in caplog.text
    assert list(tmp_path.glob("*.so")) == []


def test_kernels_are_compiled_where_they_can_be_kept(tmp_path, monkeypatch, forget):
    (tmp_path / "file").write_text("no folder can be made here")
    places = [tmp_path / "file" / "build", tmp_path / "cache"]
    assert compiled.writable(places) == places[1]
    monkeypatch.setattr(compiled, "folders", lambda: places[:1])
    assert compiled.kernels() is None

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.undo()
    monkeypatch.setattr(Path, "home", homeless)
    assert compiled.folders() == [compiled.SOURCE.parent / "build"]


def test_of_several_processes_one_compiles(tmp_path):
    script = f"""
from pathlib import Path
from engine.native import compiled
folder = Path({str(tmp_path)!r})
compiled.folders = lambda: [folder]
compile_into = compiled.compile_into
def counted(target, compiler):
    with (folder / "compiled").open("a") as told:
        told.write("once")
    compile_into(target, compiler)
compiled.compile_into = counted
compiled.FLAGS = tuple("-O0" if flag == "-O3" else flag for flag in compiled.FLAGS)
assert compiled.kernels() is not None
"""
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert len(list(tmp_path.glob("*.so"))) == 1 and (tmp_path / "compiled").read_text() == "once"


# -- packed weights -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    toy_model(toy_config(), "ragged").save_pretrained(tmp_path / "base[1]")
    return tmp_path / "base[1]"


def packings(cache):
    return list(cache.glob("*.safetensors"))


def packed(cache):
    (file,) = packings(cache)
    return file


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "header"])
def test_a_broken_packing_is_made_again(checkpoint, tmp_path, caplog, damage):
    cache = tmp_path / "cache"
    load_base(checkpoint, cache=cache)
    file = packed(cache)
    good = file.read_bytes()
    bad = {"cut": good[: len(good) // 2], "longer": good + b"\0", "empty": b"", "header": b"\xff" * len(good)}[damage]
    file.unlink()
    file.write_bytes(bad)
    with caplog.at_level(logging.WARNING):
        base = load_base(checkpoint, cache=cache)
    assert "broken" in caplog.text and isinstance(base.executor, Native)
    assert packed(cache).read_bytes() == good


def test_a_broken_packing_that_cannot_be_replaced_is_not_used(checkpoint, tmp_path, caplog, monkeypatch):
    cache = tmp_path / "cache"
    load_base(checkpoint, cache=cache)
    packed(cache).write_bytes(b"")

    def refuse(source, target):
        raise PermissionError(f"{target} is not yours")

    monkeypatch.setattr(os, "replace", refuse)
    assert isinstance(load_base(checkpoint, cache=cache).executor, Native) and "cannot be shared" in caplog.text
    assert packed(cache).read_bytes() == b""


def test_a_full_disk_leaves_weights_private(checkpoint, tmp_path, caplog):
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        base = load_base(checkpoint, cache=tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert isinstance(base.executor, Native) and "cannot be shared" in caplog.text
    assert packings(tmp_path / "cache") == []


def test_older_packings_go_and_those_of_other_processors_stay(checkpoint, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    load_base(checkpoint, cache=cache)
    mine = packed(cache)
    monkeypatch.setattr(compiled, "lanes", lambda lanes=compiled.lanes(): 2 * lanes)
    other = weights.file_for(checkpoint, cache, torch.float32)
    monkeypatch.undo()
    other.write_bytes(mine.read_bytes())
    os.utime(checkpoint / "config.json", ns=(1, 1))
    load_base(checkpoint, cache=cache)
    assert not mine.exists() and other.exists() and len(packings(cache)) == 2


def test_a_packing_replaced_under_a_base_does_not_change_it(checkpoint, tmp_path):
    cache = tmp_path / "cache"
    load_base(checkpoint, cache=cache)
    base = load_base(checkpoint, cache=cache)
    want = base.forward(KVStore(64), [chain(20)], [5] * 20, [19])[0]
    toy_model(toy_config(intermediate_size=128), "ragged").save_pretrained(checkpoint)
    other = load_base(checkpoint, cache=cache)
    assert not torch.equal(other.forward(KVStore(64), [chain(20)], [5] * 20, [19])[0], want)
    assert torch.equal(base.forward(KVStore(64), [chain(20)], [5] * 20, [19])[0], want)


def started(script, *arguments):
    """A Python process that runs a script and is spoken to by lines."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is mapped is told in /proc")
def test_processes_that_start_at_once_map_one_file(checkpoint, tmp_path):
    script = """
import sys
from pathlib import Path
from engine.loading import load_base
print("ready", flush=True)
sys.stdin.readline()
base = load_base(sys.argv[1], cache=Path(sys.argv[2]))
maps = [line.split() for line in open("/proc/self/maps") if sys.argv[2] in line and ".safetensors" in line]
print(*{inode for _, _, _, _, inode, *_ in maps}, flush=True)
sys.stdin.readline()
"""
    cache = tmp_path / "cache"
    running = [started(script, checkpoint, cache) for _ in range(2)]
    assert [process.stdout.readline() for process in running] == ["ready\n"] * 2
    for process in running:
        process.stdin.write("go\n"), process.stdin.flush()
    mapped = [process.stdout.readline().split() for process in running]
    assert mapped == [[str(packed(cache).stat().st_ino)]] * 2
    for process in running:
        process.communicate("end\n", timeout=60)


def test_a_lock_whose_holder_died_holds_up_nobody(checkpoint, tmp_path):
    script = """
import sys
from pathlib import Path
from engine.native import weights
with weights.turn(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""
    cache = tmp_path / "cache"
    holder, loaded = started(script, weights.file_for(checkpoint, cache, torch.float32)), []
    assert holder.stdout.readline() == "held\n"
    waiting = threading.Thread(target=lambda: loaded.append(load_base(checkpoint, cache=cache)), daemon=True)
    waiting.start()
    assert packings(cache) == []
    holder.kill(), holder.communicate()
    waiting.join(60)
    assert isinstance(loaded[0].executor, Native) and packed(cache) and list(cache.glob("*.lock"))


def test_a_packing_in_a_folder_that_takes_no_lock_is_mapped(checkpoint, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    load_base(checkpoint, cache=cache)
    for lock in cache.glob("*.lock"):
        lock.unlink()
        lock.mkdir()
    monkeypatch.setattr(loading, "attach", None)
    assert isinstance(load_base(checkpoint, cache=cache).executor, Native)
