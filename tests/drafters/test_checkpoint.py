"""Every form a published checkpoint comes in is read; every malformed one is refused with what was found and expected."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafters.checkpoint import CheckpointError
from drafters.mlp import MLPSpeculator

Make = Callable[..., MLPSpeculator]
Weights = dict[str, Tensor]
FORMS = ["safetensors", "bin", "sharded-safetensors", "sharded-bin"]


def write(folder: Path, speculator: MLPSpeculator, form: str, weights: Weights, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    fields = {k: v for k, v in {**speculator.config.to_json(), **config}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    suffix, stem = ("safetensors", "model") if "safetensors" in form else ("bin", "pytorch_model")
    if "sharded" not in form:
        save(weights, folder / f"{stem}.{suffix}")
        return folder
    names = sorted(weights)
    parts = {f"{stem}-0000{i + 1}-of-00002.{suffix}": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        save({key: weights[key] for key in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


def save(weights: Weights, file: Path) -> None:
    if file.suffix == ".safetensors":
        save_file({k: v.clone().contiguous() for k, v in weights.items()}, file)
    else:
        torch.save(weights, file)


def all_names(speculator: MLPSpeculator, prefix: str = "speculator.") -> Weights:
    return {prefix + name: value.detach().clone() for name, value in speculator.state_dict().items()}


def same(a: MLPSpeculator, b: MLPSpeculator) -> bool:
    hidden, tokens = torch.randn(2, 3, a.config.emb_dim), torch.randint(0, a.config.vocab_size, (2, 6))
    return torch.equal(a(hidden, tokens), b(hidden, tokens))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prefix", ["speculator.", ""])
def test_every_form_is_read(tmp_path: Path, make_speculator: Make, form: str, tied: bool, prefix: str) -> None:
    original = make_speculator(tie_weights=tied, scale_input=tied)
    folder = write(tmp_path / "s", original, form, all_names(original, prefix))
    assert same(original, MLPSpeculator.from_pretrained(folder))


@pytest.mark.parametrize("kept", [("emb.0", "head.0", "ln.0", "proj.0", "proj.1"), ("emb.2", "head.1", "ln.2", "proj.0", "proj.2"), ()])
def test_any_subset_of_aliases_is_read(tmp_path: Path, make_speculator: Make, kept: tuple[str, ...]) -> None:
    original = make_speculator(tie_weights=True)
    weights = {k: v for k, v in all_names(original).items() if not kept or k.removeprefix("speculator.").startswith(kept)}
    assert same(original, MLPSpeculator.from_pretrained(write(tmp_path / "s", original, "safetensors", weights)))


def test_optional_fields_may_be_missing(tmp_path: Path, make_speculator: Make) -> None:
    original = make_speculator(inner_dim=0)
    absent: dict[str, object] = {"tie_weights": None, "scale_input": None, "torch_dtype": None, "base_model_name_or_path": None}
    loaded = MLPSpeculator.from_pretrained(
        write(tmp_path / "s", original, "bin", all_names(original), **absent, transformers_version="4.38.2")
    )
    assert same(original, loaded)
    assert (loaded.config.tie_weights, loaded.config.scale_input, loaded.config.inner_dim) == (False, False, 0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pickled", [False, True])
def test_save_and_read_again(tmp_path: Path, make_speculator: Make, tied: bool, pickled: bool) -> None:
    original = make_speculator(tie_weights=tied, scale_input=True, base_model_name_or_path="some/base")
    original.save_pretrained(tmp_path / "a", pickled)
    loaded = MLPSpeculator.from_pretrained(tmp_path / "a")
    assert loaded.config == original.config
    assert same(original, loaded)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "pytorch_model.bin" if pickled else "model.safetensors"]


def test_saved_names_are_the_published_ones(tmp_path: Path, make_speculator: Make) -> None:
    tied = make_speculator(tie_weights=True)
    tied.save_pretrained(tmp_path / "once")
    assert sorted(load_file(tmp_path / "once" / "model.safetensors")) == [
        "speculator.emb.0.weight",
        "speculator.head.0.weight",
        "speculator.ln.0.bias",
        "speculator.ln.0.weight",
        "speculator.proj.0.weight",
        "speculator.proj.1.weight",
    ]
    tied.save_pretrained(tmp_path / "all", pickled=True)
    everything = torch.load(tmp_path / "all" / "pytorch_model.bin", weights_only=True)
    assert everything.keys() == all_names(tied).keys()
    assert everything["speculator.emb.0.weight"].data_ptr() == everything["speculator.emb.2.weight"].data_ptr()
    config = json.loads((tmp_path / "once" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mlp_speculator", ["MLPSpeculatorPreTrainedModel"])


def test_saved_in_the_configured_dtype(tmp_path: Path, make_speculator: Make) -> None:
    make_speculator(torch_dtype="bfloat16").save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert MLPSpeculator.from_pretrained(tmp_path).emb[0].weight.dtype == torch.float32


def drop(key: str) -> Callable[[Weights], Weights]:
    return lambda weights: {k: v for k, v in weights.items() if k != key}


def put(key: str, value: Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, key: value}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("speculator.proj.1.weight"), r"speculator.proj.1.weight is missing, expected shape \[16, 16\]"),
        (put("speculator.head.1.weight", torch.zeros(61, 15)), r"speculator.head.1.weight: shape \[61, 15\], expected \[61, 16\]"),
        (put("speculator.emb.0.weight", torch.full((61, 16), torch.nan)), r"speculator.emb.0.weight: has NaN or infinite values"),
        (put("speculator.ln.0.bias", torch.full((16,), torch.inf)), r"speculator.ln.0.bias: has NaN or infinite values"),
        (put("speculator.emb.3.weight", torch.zeros(61, 16)), r"speculator.emb.3.weight: unknown key; config.json has n_predict 3"),
        (put("speculator.attn.weight", torch.zeros(1)), r"speculator.attn.weight: unknown key"),
        (put("speculator.proj.0.bias", torch.zeros(16)), r"speculator.proj.0.bias: unknown key"),
        (put("speculator.ln.0.weight", torch.ones(16, dtype=torch.int64)), r"dtype torch.int64, expected a floating-point dtype"),
    ],
)
def test_bad_weights_are_refused(
    tmp_path: Path, make_speculator: Make, form: str, change: Callable[[Weights], Weights], message: str
) -> None:
    original = make_speculator()
    folder = write(tmp_path / "s", original, form, change(all_names(original)))
    with pytest.raises(CheckpointError, match=message) as caught:
        MLPSpeculator.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_unequal_aliases_are_refused(tmp_path: Path, make_speculator: Make) -> None:
    original = make_speculator(tie_weights=True)
    weights = put("speculator.head.2.weight", torch.zeros(61, 16))(all_names(original))
    with pytest.raises(CheckpointError, match=r"speculator.head.2.weight: differs from .*speculator.head.0.weight, which it is tied to"):
        MLPSpeculator.from_pretrained(write(tmp_path / "s", original, "bin", weights))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"n_predict": 0}, "n_predict must be an integer of at least 1, got 0"),
        ({"emb_dim": "wide"}, "emb_dim must be an integer"),
        ({"inner_dim": -1}, "inner_dim must be an integer of at least 0"),
        ({"top_k_tokens_per_head": [5, 3]}, "one number for each of 3 heads"),
        ({"top_k_tokens_per_head": [5, 3, 0]}, r"top_k_tokens_per_head\[2\]"),
        ({"top_k_tokens_per_head": [5, 3, 62]}, "more than the vocabulary's 61 tokens"),
        ({"n_candidates": 25}, "has 24 paths"),
        ({"tie_weights": "yes"}, "tie_weights must be true or false"),
        ({"n_predict": 1, "top_k_tokens_per_head": [5], "tie_weights": True}, "tie_weights needs n_predict of at least 2"),
        ({"torch_dtype": 16}, "torch_dtype must be a name"),
    ],
)
def test_bad_configs_are_refused(tmp_path: Path, make_speculator: Make, changes: dict[str, object], message: str) -> None:
    original = make_speculator()
    with pytest.raises(CheckpointError, match=message) as caught:
        MLPSpeculator.from_pretrained(write(tmp_path / "s", original, "safetensors", all_names(original), **changes))
    assert "config.json" in str(caught.value)


def test_unreadable_folders_are_refused(tmp_path: Path, make_speculator: Make) -> None:
    with pytest.raises(CheckpointError, match=r"config.json: not a readable JSON file"):
        MLPSpeculator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object"):
        MLPSpeculator.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make_speculator().config.to_json()))
    with pytest.raises(CheckpointError, match=r"no weights; expected one of model\.safetensors"):
        MLPSpeculator.from_pretrained(tmp_path)
    for name, what in (("pytorch_model.bin", "not a readable PyTorch file"), ("model.safetensors", "not a readable safetensors file")):
        (tmp_path / name).write_bytes(b"not a checkpoint")
        with pytest.raises(CheckpointError, match=what):
            MLPSpeculator.from_pretrained(tmp_path)


def test_pickles_of_code_do_not_run(tmp_path: Path, make_speculator: Make) -> None:
    original = make_speculator()
    folder = write(tmp_path / "s", original, "safetensors", {})
    (folder / "model.safetensors").unlink()
    torch.save({"speculator.emb.0.weight": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a readable PyTorch file of tensors"):
        MLPSpeculator.from_pretrained(folder)
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list, expected names with tensors"):
        MLPSpeculator.from_pretrained(folder)


def test_bad_indexes_are_refused(tmp_path: Path, make_speculator: Make) -> None:
    original = make_speculator()
    folder = write(tmp_path / "s", original, "sharded-safetensors", all_names(original))
    index = folder / "model.safetensors.index.json"
    good = json.loads(index.read_text())["weight_map"]
    for weight_map, message in (
        ({**good, "speculator.emb.0.weight": "../elsewhere.safetensors"}, "expected a file in the same folder"),
        ({**good, "speculator.emb.0.weight": "model-00003.safetensors"}, "no such file"),
        ({**good, "speculator.emb.9.weight": next(iter(good.values()))}, "speculator.emb.9.weight is missing, expected by"),
        ([1], "weight_map must map keys to file names"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            MLPSpeculator.from_pretrained(folder)
