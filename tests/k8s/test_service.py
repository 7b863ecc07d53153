"""What Serve runs in each overlay: a configuration that Serve and the settings accept, on workers that have room for it."""

from __future__ import annotations

from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as as_the_autoscaler_reads
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.serve.schema import DeploymentSchema

from configs.settings import ModelSettings
from services.app import GATEWAY, AppArgs, application, build
from tests.k8s.conftest import SECRET, Overlay, environment, ray_container

HOLDS = "specfleet/holds"


def test_application_is_the_builder(overlay: Overlay) -> None:
    (deployed,) = overlay.deployed.applications
    assert deployed.import_path == f"{build.__module__}:{build.__name__}"
    assert AppArgs.model_validate(deployed.args).config
    assert (deployed.name, deployed.route_prefix) == (overlay.settings.ray.application, "/")


def test_http_fits_the_gateway(overlay: Overlay) -> None:
    options, gateway = overlay.deployed.http_options, overlay.settings.gateway
    assert options.request_timeout_s > gateway.request_timeout_s
    assert (options.host, options.port) == ("0.0.0.0", gateway.port)
    serve = [port["containerPort"] for group in overlay.groups() for port in ray_container(group)["ports"] if port["name"] == "serve"]
    assert serve == [options.port] * (1 + len(overlay.workers))


def test_environment_fills_the_settings(overlay: Overlay) -> None:
    settings, secret = overlay.settings, SECRET["stringData"]
    keys = {key.name: (key.key.get_secret_value() if key.key else None, key.admin) for key in settings.keys}
    assert keys == {"operator": (secret["operator-key"], True), "clients": (secret["clients-key"], False)}
    assert settings.state.url == f"redis://:{secret['redis-password']}@redis:6379/1"
    assert settings.request_log.url == f"redis://:{secret['redis-password']}@redis:6379/2"


def test_every_pod_can_build_the_application(overlay: Overlay) -> None:
    """Serve builds it wherever it likes, so the settings must come out the same everywhere."""
    head = environment(ray_container(overlay.head))
    ours = {name: value for name, value in head.items() if name.startswith("SPECFLEET_")}
    assert ours and all(ours.items() <= environment(ray_container(group)).items() for group in overlay.workers.values())


def test_every_secret_is_in_the_example_and_used(gpu: Overlay) -> None:
    def references(tree: Any) -> set[tuple[str, str]]:
        parts = tree if isinstance(tree, list) else tree.values() if isinstance(tree, dict) else ()
        own = {(tree["secretKeyRef"]["name"], tree["secretKeyRef"]["key"])} if isinstance(tree, dict) and "secretKeyRef" in tree else set()
        return own.union(*map(references, parts))

    assert references(list(gpu.resources.values())) == {(SECRET["metadata"]["name"], key) for key in SECRET["stringData"]}


def test_head_holds_no_work(overlay: Overlay) -> None:
    assert overlay.service["excludeHeadPodFromServeSvc"] is True
    head = scaling(overlay)["available_node_types"]["headgroup"]["resources"]
    assert head["CPU"] == 0 and "GPU" not in head


def test_longest_request_outlives_an_upgrade(gpu: Overlay) -> None:
    assert gpu.service["rayClusterDeletionDelaySeconds"] >= gpu.deployed.http_options.request_timeout_s


def test_a_pod_has_time_to_end(overlay: Overlay) -> None:
    """Kubernetes must outlast Ray's draining and the end of its processes."""
    for group in overlay.groups():
        drains = float(environment(ray_container(group))["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] >= drains + 30


# -- where it runs --------------------------------------------------------------------------------------------------------------


def test_deployments_are_those_of_the_application(gpu: Overlay) -> None:
    made = [GATEWAY, *(model.name for model in gpu.settings.models)]
    assert [deployment.name for deployment in placed(gpu)] == made
    assert application(gpu.settings)


def test_placing_changes_nothing_else(gpu: Overlay) -> None:
    """`ray_actor_options` replace those of the code as a whole, so they repeat its CPUs and GPUs."""
    for deployment in placed(gpu):
        options = deployment.ray_actor_options.model_dump(exclude_unset=True)
        assert options.pop("label_selector").keys() == {HOLDS}
        assert deployment.model_dump(exclude_unset=True).keys() == {"name", "ray_actor_options"}
        if deployment.name == GATEWAY:
            assert options == {"num_cpus": 0.5}
        else:
            model = gpu.settings.model(deployment.name)
            assert options == {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus}


def test_each_group_has_room_for_its_models(gpu: Overlay) -> None:
    for name, group in gpu.workers.items():
        models = [gpu.settings.model(d.name) for d in placed(gpu) if d.name != GATEWAY and held(d) == name]
        assert models or name == "gateway"
        assert group["labels"] == {HOLDS: name}
        if models:
            assert group["minReplicas"] == sum(model.replicas.min for model in models)
            assert group["maxReplicas"] == sum(model.replicas.max for model in models)
            assert all(fits(model, gpu, name) for model in models)


def fits(model: ModelSettings, overlay: Overlay, group: str) -> bool:
    resources = scaling(overlay)["available_node_types"][group]["resources"]
    return bool(resources["CPU"] >= model.num_cpus and resources.get("GPU", 0) >= model.num_gpus)


def test_demo_fits_on_one_worker(demo: Overlay) -> None:
    ((name, group),) = demo.workers.items()
    resources = scaling(demo)["available_node_types"][name]["resources"]
    assert group["minReplicas"] == 1
    assert resources["CPU"] >= 0.5 + sum(model.num_cpus for model in demo.settings.models)
    assert not any(model.num_gpus for model in demo.settings.models)


@pytest.mark.parametrize(
    ("name", "wanted", "launched", "left"),
    [("large", 2, 2, 0), ("large", 3, 2, 1), ("medium", 7, 7, 0), ("small", 1, 1, 0)],
)
def test_autoscaler_adds_workers_of_the_group(gpu: Overlay, name: str, wanted: int, launched: int, left: int) -> None:
    """Ray's own scheduler of the autoscaler v2, given the cluster as KubeRay shows it and replicas that wait for a place."""
    config = AutoscalingConfig(scaling(gpu), skip_content_hash=True)
    selector = [(HOLDS, LabelSelectorOperator.LABEL_OPERATOR_IN, [name])]
    replica = ResourceRequestUtil.make({"CPU": 4, "GPU": 1}, label_selectors=[selector])
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([replica] * wanted),
    )
    reply = ResourceDemandScheduler(Silent()).schedule(request)
    least = {group: spec["minReplicas"] for group, spec in gpu.workers.items()}
    assert {launch.instance_type: launch.count for launch in reply.to_launch} == least | {name: launched}
    assert sum(request.count for request in ResourceRequestUtil.group_by_count(reply.infeasible_resource_requests)) == left


class Silent:
    """An event logger for nobody."""

    def log_cluster_scheduling_update(self, *what: Any, **more: Any) -> None: ...


def placed(overlay: Overlay) -> list[DeploymentSchema]:
    (application,) = overlay.deployed.applications
    return list(application.deployments)


def held(deployment: DeploymentSchema) -> str:
    return str(deployment.ray_actor_options.label_selector[HOLDS])


def scaling(overlay: Overlay) -> dict[str, Any]:
    """The cluster as Ray's autoscaler reads it."""
    return dict(as_the_autoscaler_reads({"metadata": {"name": "specfleet", "namespace": "default"}, "spec": overlay.cluster}))
