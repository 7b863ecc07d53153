"""`specfleet train` on a tiny random base: text in, a published-format speculator out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from drafters.mlp import MLPSpeculator
from services.cli.problem import Problem
from services.cli.training_text import training_text

SMALL = ["--steps", "3,2", "--rows", "2", "--length", "24", "--inner-dim", "16", "--heads", "3,2", "--candidates", "3", "--prompts", "2"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama over bytes."""
    folder = tmp_path_factory.mktemp("base")
    letters = {letter: index for index, letter in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", bos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), max_position_embeddings=512, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index:02}.txt").write_text(f"File number {index}. " + "The quick brown fox jumps over the lazy dog. " * 8)
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    return folder


def test_trains_and_saves(run: Callable[..., object], base: Path, text: Path, tmp_path: Path) -> None:
    done = run("train", str(base), str(text), "-o", str(tmp_path / "out"), *SMALL, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert [stage["steps"] for stage in report["stages"]] == [3, 2]
    assert report["stages"][1]["greedy"]["prompts"] == 2 and report["stages"][1]["greedy"]["per_step"] >= 1
    speculator = MLPSpeculator.from_pretrained(tmp_path / "out")
    assert speculator.config.n_predict == 2 and tuple(speculator.config.top_k_tokens_per_head) == (3, 2)
    assert speculator.config.base_model_name_or_path == base.name


def test_goes_on_and_shows_a_table(run: Callable[..., object], base: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["train", str(base), str(text), "-o", str(tmp_path / "out"), *SMALL]
    first, again = run(*arguments), run(*arguments)
    assert first.code == again.code == 0 and "tokens/step" in again.out
    other = run(*arguments, "--rate", "0.5")
    assert other.code == 1 and "another base, text or recipe" in other.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--steps", "3"], "two numbers"),
        (["--heads", "3,x"], "whole numbers"),
        (["--length", "99000"], "more than"),
        (["--device", "cuda:99"], "no device"),
    ],
)
def test_errors(run: Callable[..., object], base: Path, text: Path, tmp_path: Path, change: list[str], said: str) -> None:
    done = run("train", str(base), str(text), "-o", str(tmp_path / "out"), *SMALL, *change)
    assert done.code == 1 and said in done.err and "Traceback" not in done.err


def test_no_base(run: Callable[..., object], tmp_path: Path) -> None:
    done = run("train", str(tmp_path), str(tmp_path), "-o", str(tmp_path / "out"))
    assert done.code == 1 and "config.json" in done.err


def test_base_without_a_tokenizer(run: Callable[..., object], base: Path, text: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in (*base.glob("*config.json"), *base.glob("*.safetensors")):
        if not file.name.startswith("tokenizer"):
            shutil.copy(file, bare)
    done = run("train", str(bare), str(text), "-o", str(tmp_path / "out"), *SMALL)
    assert done.code == 1 and "no tokenizer" in done.err and len(done.err.splitlines()) == 1
    np.save(tmp_path / "ids.npy", np.arange(4000, dtype=np.uint16) % 250)
    done = run("train", str(bare), str(tmp_path / "ids.npy"), "-o", str(tmp_path / "out"), *SMALL)
    assert done.code == 0, done.err


def test_base_cut_short(run: Callable[..., object], base: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:9000])
    done = run("train", str(broken), str(text), "-o", str(tmp_path / "out"), *SMALL)
    assert done.code == 1 and "The speculator was not trained" in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("error", [RuntimeError("drafting failed in 3 steps\nsomewhere"), ValueError("the base is not served")])
def test_measuring_that_fails(
    run: Callable[..., object], base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def measure(*_: object) -> None:
        raise error

    monkeypatch.setattr("drafters.training.measure", measure)
    done = run("train", str(base), str(text), "-o", str(tmp_path / "out"), *SMALL)
    assert done.code == 1 and str(error).splitlines()[0] in done.err and "somewhere" not in done.err


def test_whole_documents_are_held_out(text: Path) -> None:
    found = training_text([text], lambda words: list(words.encode()), 0.1)
    kept, held = (bytes(part.tolist()).decode() for part in (found.tokens, found.held_out))
    assert [index for index in range(30) if f"number {index}." in held] == [0, 10, 20]
    assert not any(f"number {index}." in kept for index in (0, 10, 20))
    prompts = found.prompts(5, 64)
    assert len(prompts) == 5 and all(len(prompt) == 64 for prompt in prompts) and len({tuple(prompt) for prompt in prompts}) > 1


def test_token_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(100, dtype=np.uint16))
    found = training_text([tmp_path / "ids.npy"], lambda _: [], 0.2)
    assert found.tokens.tolist() == list(range(80)) and found.held_out.tolist() == list(range(80, 100))
    assert training_text([tmp_path / "ids.npy"], lambda _: [], 0.0).prompts(3) == []


def test_text_errors(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    np.save(tmp_path / "square.npy", np.zeros((2, 2), dtype=np.int64))
    for source, said in (("none", "no such file"), ("latin.txt", "as text"), ("square.npy", "one row")):
        with pytest.raises(Problem, match=said):
            training_text([tmp_path / source], lambda words: list(words.encode()), 0.1)
