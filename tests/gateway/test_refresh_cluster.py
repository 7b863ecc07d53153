"""The desks of the refresh loop on a real Ray, with the actors that a service has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from actors.artefacts import Artefacts
from actors.folder_lock import FolderLock, InUse
from actors.log_contents import Purge, Selection
from actors.registry import start_registry
from actors.request_log import RequestRecord
from actors.trainer import NAME as TRAINER_NAME
from actors.trainer import start_trainer
from configs.settings import Settings
from drafters.bundle import Origin, adopt_folder
from services.gateway.errors import ApiError
from services.gateway.ray_refresh import ray_refresh
from services.gateway.refresh import Pause, Purged, Refresh, Release
from services.named import log_actor
from tests.actors.test_trainer import BASE, TRAINER
from tests.conftest import wait_until
from tests.drafters.test_refresh import speculator

pytestmark = pytest.mark.cluster
SPACE = "desks"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    root = str(Path(__file__).parents[2])
    ray.init(num_cpus=2, namespace=SPACE, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    yield
    ray.shutdown()


def settings(folder: Path) -> Settings:
    model = {"base": "x", "speculator": "y", "drafter": "mlp", "refresh": {"enabled": True}}
    return Settings(
        models=[model | {"name": "toy"}, {"name": "plain", "base": "x", "drafter": "none"}],
        ray={"namespace": SPACE},
        state={"url": f"sqlite:///{folder}/state.db"},
        request_log={"url": f"sqlite:///{folder}/requests.db"},
        refresh={"work": str(folder / "work")},
    )


async def refusal(asked: Any) -> tuple[int, str | None]:
    with pytest.raises(ApiError) as caught:
        await asked
    return caught.value.failure.status, caught.value.failure.code


async def begun(folder: Path, chosen: Settings) -> str:
    """Registry and trainer of the model toy; the version that it was configured with."""
    published, place = folder / "published", str(folder / "artefacts")
    speculator().save_pretrained(published)
    bundle = adopt_folder(folder / "bundles", published, Origin(model="toy", base=BASE.name, base_revision=BASE.revision, created=1.0))
    url, version = Artefacts(place, folder / "cache").publish(bundle), bundle.manifest.version
    registry = start_registry(chosen.state.url, place, str(folder / "registry"), namespace=SPACE)
    await registry.register.remote("toy", BASE, url, bundle.manifest)
    trainer = start_trainer("toy", BASE, str(published), version, place, str(folder / "work" / "toy"), settings=TRAINER, namespace=SPACE)
    await trainer.status.remote()  # it is up
    return version


async def test_the_desks_find_their_actors(cluster: None, tmp_path: Path) -> None:
    chosen = settings(tmp_path)
    desks = ray_refresh(chosen, log_actor(chosen))
    assert (await desks.speculators.state("plain"))["state"] == (await desks.training.state("plain"))["state"] == "off"
    assert await refusal(desks.speculators.state("toy")) == (503, "registry_away")
    assert await refusal(desks.training.state("toy")) == (503, "trainer_away")
    version = await begun(tmp_path, chosen)
    await releases(desks, version)
    await training(desks)
    await log(desks, chosen)
    await switched_off(chosen)
    assert set(await desks.survey(["toy", "plain"])) == {"toy", "plain"}


async def releases(desks: Refresh, version: str) -> None:
    assert (await desks.speculators.state("toy"))["live"] == version
    assert (await desks.speculators.change(Release("toy", "pin", "me", "night", version, expected=1)))["pinned"]
    assert await refusal(desks.speculators.change(Release("toy", "promote", "me", "", version))) == (409, "version_conflict")
    assert await refusal(desks.speculators.change(Release("toy", "pin", "me", "", "none"))) == (404, "version_not_found")
    assert [change["action"] for change in await desks.speculators.history("toy")] == ["register", "pin"]


async def training(desks: Refresh) -> None:
    assert (await desks.training.pause(Pause("toy", True, "me", "night")))["state"] == "paused"
    assert (await desks.training.state("toy"))["paused"] and (await desks.training.history("toy"))[0]["who"] == "me"


async def switched_off(chosen: Settings) -> None:
    """A purge reaches the trainer of a model that is not logged any more, which goes on, and when it is killed what it leaves."""
    silent = chosen.model_copy(update={"models": tuple(model.model_copy(update={"log": False}) for model in chosen.models)})
    desks = ray_refresh(silent, log_actor(silent))
    assert (await desks.training.state("toy"))["state"] == "off"
    assert await desks.log.purge(Purge(Selection(), "me")) == Purged(0, {"toy": 0}, (), {})
    ray.kill(ray.get_actor(f"{TRAINER_NAME}-toy", SPACE))
    work = Path(chosen.refresh.work) / "toy"
    await asyncio.to_thread(wait_until, lambda: not runs() and free(work))
    assert (work / "traces").is_file()
    assert await desks.log.purge(Purge(Selection(), "me")) == Purged(0, {}, ("toy",), {})
    assert not (work / "traces").exists() and await desks.log.purge(Purge(Selection(), "me")) == Purged(0, {}, (), {})


def runs() -> bool:
    """Whether there is a trainer to be found."""
    try:
        ray.get_actor(f"{TRAINER_NAME}-toy", SPACE)
    except ValueError:
        return False
    return True


def free(folder: Path) -> bool:
    """Whether the process of the trainer that used the folder has ended."""
    lock = FolderLock(folder)
    try:
        lock.enter()
    except InUse:
        return False
    lock.leave()
    return True


async def log(desks: Refresh, chosen: Settings) -> None:
    await log_actor(chosen)().append.remote([RequestRecord("cmpl-1-0", "toy", time.time(), "me", (1,), (2,), None)])
    assert await desks.log.purge(Purge(Selection(model="toy"), "me")) == Purged(1, {"toy": 0}, (), {})
    assert (await desks.log.state())["records"] == 0 and (await desks.log.history())[0]["records"] == 1
