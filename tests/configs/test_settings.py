"""Settings: what the shipped files say, what the environment overrides, and how each mistake is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from actors.store import sqlite_path
from configs.problems import ConfigError
from configs.settings import ROOT, ModelRefreshSettings, ModelSettings, Settings, load_settings
from drafters.objectives import ObjectiveName
from drafters.places import Positions
from drafters.refresh import RefreshSettings
from drafters.replay import BufferSettings
from policies import CanaryRule
from policies.gate import GateRule
from services.refresh_actors import trainer_settings

KEYS = {"SPECFLEET_KEYS__OPERATOR__KEY": "operator-secret", "SPECFLEET_KEYS__CLIENTS__SHA256": "ab" * 32}
MODEL = {"name": "one", "base": "org/base", "drafter": "ngram"}


def load(tmp_path: Path, tree: Any, **environ: str) -> Settings:
    file = tmp_path / "config.yaml"
    file.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return load_settings(file, environ)


def test_demo() -> None:
    settings = load_settings(environ={})
    assert [model.name for model in settings.models] == ["demo-chat", "demo-code", "demo-code-large"]
    assert settings.gateway.host == "127.0.0.1" and settings.gateway.port == 8000 and not settings.keys
    assert settings.request_log.url == f"sqlite:///{ROOT}/.specfleet/requests.db"
    assert {model.device for model in settings.models} == {"cpu"} and settings.ray.address is None


def test_production() -> None:
    settings = load_settings(ROOT / "configs" / "production.yaml", KEYS)
    assert len(settings.models) == 4 and all(model.speculator and model.num_gpus for model in settings.models)
    assert all(model.refresh.enabled and model.log for model in settings.models) and settings.refresh.artefacts.startswith("/")
    assert settings.keys[0].admin and settings.keys[0].key.get_secret_value() == "operator-secret"
    assert "operator-secret" not in repr(settings)


@pytest.mark.parametrize(("place", "hidden"), [(0, 4096), (1, 5120), (2, 5120), (3, 6144)])
def test_production_has_room_for_the_requests_that_judge(place: int, hidden: int) -> None:
    """Answers of 300 tokens, half of the held-out requests, and a fifth to spare for chance."""
    found = load_settings(ROOT / "configs" / "production.yaml", KEYS).models[place].refresh
    wanted = 2.4 * found.gate.least * 300 * (2 * hidden + 8 * found.capture.top + 5)
    assert int(found.buffer_bytes) * found.held_out >= wanted


def test_production_without_keys_names_the_variables() -> None:
    with pytest.raises(ConfigError, match="SPECFLEET_KEYS__OPERATOR__KEY") as caught:
        load_settings(ROOT / "configs" / "production.yaml", {})
    assert len(caught.value.problems) == 2 and caught.value.file.endswith("production.yaml")


def test_environment(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        {"models": [MODEL, MODEL | {"name": "two-b.1"}], "gateway": {"port": 1}},
        SPECFLEET_GATEWAY__PORT="9000",
        SPECFLEET_GATEWAY__LIMITS__REQUESTS_PER_MINUTE="5",
        SPECFLEET_MODELS__TWO_B_1__ENGINE__KV_BYTES="1.5GiB",
        SPECFLEET_RAY__ADDRESS="auto",
        OTHER="x",
        SPECFLEET_SERVICE_HOST="kubernetes sets such",
    )
    assert settings.gateway.port == 9000 and settings.gateway.limits.requests_per_minute == 5 and settings.ray.address == "auto"
    assert [model.engine.kv_bytes for model in settings.models] == [256 * 2**20, 3 * 2**29]


def test_environment_replaces_a_list(tmp_path: Path) -> None:
    settings = load(tmp_path, {"models": [MODEL]}, SPECFLEET_MODELS='[{"name": "env", "base": "b", "drafter": "none"}]')
    assert [model.name for model in settings.models] == ["env"]


def test_the_environment_is_read_by_load_settings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECFLEET_GATEWAY__PORT", "9001")
    assert Settings(models=[MODEL]).gateway.port == 8000
    assert load_settings().gateway.port == 9001


def test_paths(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    settings = load(tmp_path, {"models": [MODEL | {"base": "mine"}, MODEL | {"name": "hub"}], "state": {"url": "sqlite:///s/state.db"}})
    assert settings.models[0].base == str(tmp_path / "mine") and settings.models[1].base == "org/base"
    assert settings.state.url == f"sqlite:///{tmp_path}/s/state.db"
    assert load(tmp_path, {"models": [MODEL], "state": {"url": "sqlite:////abs/x.db"}}).state.url == "sqlite:////abs/x.db"
    assert load(tmp_path, {"models": [MODEL], "state": {"url": "redis://h:1/0"}}).state.url == "redis://h:1/0"


@pytest.mark.parametrize("name", ["a#b", "a?b=c", "100%25", "a b", "ü+&"])
def test_a_file_of_any_name_is_the_file_that_is_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    file = tmp_path / name / f"{name}.db"
    for url in (f"sqlite:///{name}/{name}.db", f"sqlite:///{file}"):
        assert sqlite_path(load(tmp_path, {"models": [MODEL], "state": {"url": url}}).state.url) == file
    config = tmp_path / name / "config.yaml"
    config.write_text(yaml.safe_dump({"models": [MODEL]}))
    assert sqlite_path(load_settings(config, {}).request_log.url) == tmp_path / name / ".specfleet" / "requests.db"


def test_frozen(tmp_path: Path) -> None:
    settings = load(tmp_path, {"models": [MODEL]})
    with pytest.raises(ValueError, match="frozen"):
        settings.gateway.port = 5  # type: ignore[misc]


BAD: list[tuple[Any, tuple[str, ...]]] = [
    ({"models": []}, ("models",)),
    ({}, ("models", "required")),
    ({"models": [MODEL], "gatway": {}}, ("gatway", "gateway")),
    ({"models": [MODEL | {"devce": "cpu"}]}, ("models[0].devce", "device")),
    ({"models": [MODEL | {"device": "tpu"}]}, ("models[0].device", "'tpu'", "cuda")),
    ({"models": [MODEL | {"device": "mps"}]}, ("models[0].device", "'mps'", "cuda")),
    ({"models": [MODEL | {"engine": {"max_waiting": 0}}]}, ("models[0].engine.max_waiting", "0", "1")),
    ({"models": [MODEL | {"sampling": {"top_p": 1e-7}}]}, ("models[0].sampling.top_p", "1e-07", "0.000001")),
    ({"models": [MODEL | {"drafter": "magic"}]}, ("models[0].drafter", "'magic'", "mlp+ngram")),
    ({"models": [MODEL | {"drafter": "mlp"}]}, ("models[0]", "speculator")),
    ({"models": [MODEL | {"name": "a/b"}]}, ("models[0].name", "'a/b'")),
    ({"models": [MODEL, MODEL]}, ("models", "one")),
    ({"models": [MODEL | {"replicas": {"min": 3, "max": 2}}]}, ("models[0].replicas", "max")),
    ({"models": [MODEL | {"engine": {"slots": 4096}}]}, ("models[0].engine.slots", "accepted", "kv_bytes")),
    ({"models": [MODEL | {"engine": {"kv_bytes": 5}}]}, ("models[0].engine.kv_bytes", "5", "4096", "MiB")),
    ({"models": [MODEL | {"engine": {"kv_bytes": "plenty"}}]}, ("models[0].engine.kv_bytes", "'plenty'", "256MiB")),
    ({"models": [MODEL | {"engine": {"kv_bytes": "4XB"}}]}, ("models[0].engine.kv_bytes", "'4XB'", "4GiB")),
    ({"models": [MODEL | {"engine": {"max_waiting": "many"}}]}, ("models[0].engine.max_waiting", "'many'")),
    ({"models": [MODEL | {"engine": {"executor": "fast"}}]}, ("models[0].engine.executor", "'fast'", "eager")),
    ({"models": [MODEL | {"engine": {"executor": "eager", "batch_invariant": True}}]}, ("models[0].engine", "batch_invariant", "auto")),
    ({"models": [MODEL | {"sampling": {"temperature": 9}}]}, ("models[0].sampling.temperature", "9")),
    ({"models": [MODEL | {"policy": "fast"}]}, ("models[0].policy", "'fast'")),
    ({"models": [MODEL], "gateway": {"port": 70000}}, ("gateway.port", "70000", "65535")),
    ({"models": [MODEL], "gateway": {"request_timeout_s": float("nan")}}, ("gateway.request_timeout_s",)),
    ({"models": [MODEL], "gateway": {"host": "0.0.0.0"}}, ("keys", "gateway.host", "127.0.0.1")),
    ({"models": [MODEL], "gateway": {"limits": {"tokens_per_minute": 0}}}, ("gateway.limits.tokens_per_minute", "0")),
    ({"models": [MODEL], "keys": [{"name": "a"}]}, ("keys[0]", "sha256")),
    ({"models": [MODEL], "keys": [{"name": "a", "sha256": "xyz"}]}, ("keys[0].sha256", "64")),
    ({"models": [MODEL], "keys": [{"name": "a", "sha256": "ab" * 32, "tag": "a b"}]}, ("keys[0].tag", "'a b'", "A-Za-z0-9")),
    ({"models": [MODEL | {"refresh": {"tags": ["sql", "a/b"]}}]}, ("models[0].refresh.tags[1]", "'a/b'", "A-Za-z0-9")),
    ({"models": [MODEL | {"refresh": {"tags": ["sql", "law", "sql"]}}]}, ("models[0].refresh.tags", "must differ: sql")),
    ({"models": [MODEL | {"refresh": {"tags": [f"t{i}" for i in range(17)]}}]}, ("models[0].refresh.tags", "16")),
    ({"models": [MODEL | {"refresh": {"tags": "sql"}}]}, ("models[0].refresh.tags", "'sql'")),
    ({"models": [MODEL | {"refresh": {"most_held": 7}}]}, ("models[0].refresh", "most_held is 7", "least_held, 8")),
    ({"models": [MODEL], "request_log": {"url": "mysql://x"}}, ("request_log", "sqlite:///")),
    ({"models": [MODEL], "state": {"url": "file"}}, ("state", "redis://")),
    ({"models": [MODEL], "ray": {"auth": "maybe"}}, ("ray.auth", "token")),
    ("models: [", ("cannot be read",)),
    ("- 1", ("mapping",)),
]


@pytest.mark.parametrize(("tree", "words"), BAD, ids=lambda value: str(value)[:60])
def test_bad(tmp_path: Path, tree: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, tree)
    assert str(caught.value).startswith(str(tmp_path / "config.yaml"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_secrets_stay_out_of_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, {"models": [MODEL], "keys": [{"name": "a", "key": "hunter2"}]})
    assert "keys[0].key" in str(caught.value) and "hunter2" not in str(caught.value)


def test_bad_environment(tmp_path: Path) -> None:
    for name in ("SPECFLEET_GATWAY__PORT", "SPECFLEET_GATEWAY__PRT"):
        with pytest.raises(ConfigError, match=name.rpartition("__")[2] + "|prt"):
            load(tmp_path, {"models": [MODEL]}, **{name: "1"})


def test_no_such_file() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        load_settings("nowhere.yaml", {})


def test_every_field_is_described() -> None:
    def walk(section: type[BaseModel]) -> None:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"

    for section in (Settings, *BaseModel.__subclasses__()):
        if section.__module__ == "configs.settings":
            walk(section)


def test_refresh_is_off_unless_asked_for_and_needs_a_speculator(tmp_path: Path) -> None:
    assert not any(model.refresh.enabled for model in load_settings(environ={}).models)
    with pytest.raises(ConfigError, match=r"refresh\.enabled needs a drafter with a speculator"):
        load(tmp_path, {"models": [MODEL | {"refresh": {"enabled": True}}]})
    with pytest.raises(ConfigError, match="most must be at least"):
        load(tmp_path, {"models": [MODEL], "refresh": {"canary": {"least": 60, "most": 50}}})


def test_tags_are_domains_of_their_own(tmp_path: Path) -> None:
    made = load(tmp_path, {"models": [MODEL | {"refresh": {"tags": ["sql"]}}]}, SPECFLEET_MODELS__ONE__REFRESH__TAGS='["law", "tax"]')
    refresh = made.models[0].refresh
    assert [refresh.domain(tag) for tag in ("law", "tax", "sql", "")] == ["law", "tax", "", ""]
    assert trainer_settings(refresh).buffer.tags == ("law", "tax")


def test_where_versions_are_kept(tmp_path: Path) -> None:
    made = load(tmp_path, {"models": [MODEL], "refresh": {"artefacts": "s3://fleet/bundles", "cache": "near"}}).refresh
    assert (made.artefacts, made.cache, made.work) == ("s3://fleet/bundles", f"{tmp_path}/near", f"{tmp_path}/.specfleet/training")


def test_what_is_trained_on_is_what_drafters_know() -> None:
    fields = ModelRefreshSettings.model_fields
    assert get_args(fields["objective"].annotation) == get_args(ObjectiveName)
    assert get_args(fields["positions"].annotation) == get_args(Positions)


def test_defaults_are_those_of_the_rooms_below() -> None:
    settings = Settings(models=[ModelSettings(**MODEL | {"drafter": "mlp", "speculator": "org/spec", "refresh": {"enabled": True}})])
    known = trainer_settings(settings.models[0].refresh)
    assert (known.refresh, known.rule, known.buffer) == (RefreshSettings(), GateRule(), BufferSettings())
    assert CanaryRule(**settings.refresh.canary.model_dump()) == CanaryRule()
