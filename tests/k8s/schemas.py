"""Schemas of what is no part of Kubernetes itself, in which an unknown field is an error: RayService and prometheus-operator's monitors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict, Field

COPY = Path(__file__).resolve().parents[1] / "data" / "kuberay" / "rayservice.v1.schema.json"
FREE = "x-kubernetes-preserve-unknown-fields"
Schema = dict[str, Any]


def read_crd(path: Path, version: str = "v1") -> Schema:
    """The schema of one version of a CustomResourceDefinition, without its descriptions."""
    definition = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (schema,) = (entry["schema"]["openAPIV3Schema"] for entry in definition["spec"]["versions"] if entry["name"] == version)
    return dict(undescribed(schema))


def undescribed(node: Any) -> Any:
    if isinstance(node, list):
        return [undescribed(part) for part in node]
    if not isinstance(node, dict):
        return node
    return {name: undescribed(part) for name, part in node.items() if name != "description" or not isinstance(part, str)}


def strict(node: Schema) -> Schema:
    """The structural schema with its objects closed: Kubernetes drops unknown fields silently, here they are errors."""
    closed = dict(node)
    if "properties" in node:
        closed["properties"] = {name: strict(part) for name, part in node["properties"].items()}
        if "additionalProperties" not in node and not node.get(FREE):
            closed["additionalProperties"] = False
    for name in ("items", "additionalProperties"):
        if isinstance(node.get(name), dict):
            closed[name] = strict(node[name])
    return closed


def complaints(instance: Any, schema: Schema) -> list[str]:
    """What is wrong with an instance, as `path: message`."""
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(strict(schema)).iter_errors(instance)]


def rayservice() -> Schema:
    """The committed copy. Its metadata is an object without a schema, as in every CRD."""
    return dict(json.loads(COPY.read_text()))


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Requirement(Part):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []


class Selector(Part):
    matchLabels: dict[str, str] = {}
    matchExpressions: list[Requirement] = []


class Relabeling(Part):
    sourceLabels: list[str] = []
    separator: str | None = None
    targetLabel: str | None = None
    regex: str | None = None
    replacement: str | None = None
    action: Literal["replace", "keep", "drop", "labeldrop", "labelkeep", "labelmap", "hashmod"] = "replace"


class Endpoint(Part):
    port: str
    path: str | None = None
    interval: str | None = Field(default=None, pattern=r"^[0-9]+(ms|s|m|h)$")
    relabelings: list[Relabeling] = []


class ServiceMonitorSpec(Part):
    selector: Selector
    endpoints: list[Endpoint] = Field(min_length=1)


class PodMonitorSpec(Part):
    selector: Selector
    podTargetLabels: list[str] = []
    podMetricsEndpoints: list[Endpoint] = Field(min_length=1)


class Monitor(Part):
    apiVersion: Literal["monitoring.coreos.com/v1"]
    kind: Literal["ServiceMonitor", "PodMonitor"]
    metadata: dict[str, Any]
    spec: dict[str, Any]


def monitor_spec(resource: dict[str, Any]) -> ServiceMonitorSpec | PodMonitorSpec:
    """The spec of a monitor. Raises pydantic's ValidationError."""
    monitor = Monitor.model_validate(resource)
    kind = ServiceMonitorSpec if monitor.kind == "ServiceMonitor" else PodMonitorSpec
    return kind.model_validate(monitor.spec)
