"""What tests of cluster/ share: manifests as kustomize makes them, and the schemas that they have to keep to.

Unknown fields are refused everywhere, as `kubectl apply --validate=strict` does.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.conftest import REPOSITORY

CLUSTER = REPOSITORY / "cluster"
KUBERAY = CLUSTER / "kuberay"
KUBERNETES = "1.34.0"
"""The version whose schemas the core manifests are held against."""

Document = dict[str, Any]


def documents(text: str) -> list[Document]:
    """The documents of a YAML text."""
    return [document for document in yaml.safe_load_all(text) if document]


@cache
def rendered(folder: str) -> tuple[Document, ...]:
    """What `kubectl apply -k` would send of a folder below cluster/; skips where nothing can build it."""
    return built(CLUSTER / folder)


def built(folder: Path) -> tuple[Document, ...]:
    """What kustomize makes of a folder; skips, and says so, where there is none."""
    if kustomize := shutil.which("kustomize"):
        command = [kustomize, "build"]
    elif kubectl := shutil.which("kubectl"):
        command = [kubectl, "kustomize"]
    else:
        pytest.skip("this test needs kustomize or kubectl on PATH")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return tuple(documents(done.stdout))


def overlays() -> list[str]:
    """Every folder that an operator applies."""
    found = sorted(path.parent for path in (KUBERAY / "overlays").rglob("kustomization.yaml"))
    applied = [
        folder for folder in found if yaml.safe_load((folder / "kustomization.yaml").read_text())["kind"] != "Component"
    ]
    return [str(folder.relative_to(CLUSTER)) for folder in applied]


OVERLAYS = overlays()


# ---- schemas ----


def crd_folder() -> Path:
    """KubeRay's CRDs beside the checkout; skips where they are not."""
    folder = REPOSITORY.parent / "shared" / "data" / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip(f"this test needs KubeRay's CRDs, which are not at {folder}")
    return folder


@cache
def crd_schema(kind: str) -> Document:
    """The v1 schema of a kind of KubeRay's, with unknown fields refused."""
    crd = yaml.safe_load((crd_folder() / f"ray.io_{kind.lower()}s.yaml").read_text())
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    return closed(version["schema"]["openAPIV3Schema"])


def closed(schema: Any) -> Any:
    """A schema in which an object with listed properties has no others."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made.setdefault("additionalProperties", False)
    return made


def check(document: Document) -> None:
    """Hold a manifest against its schema.

    Raises:
        jsonschema.ValidationError: it does not keep to it.
    """
    if document["apiVersion"].startswith("ray.io/"):
        Draft202012Validator(crd_schema(document["kind"])).validate(document)
        core("ConfigMap", "v1").validate({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
        for pod in pods(document):
            as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": pod.metadata, "spec": pod.spec}
            core("Pod", "v1").validate(as_pod)
    else:
        core(document["kind"], document["apiVersion"]).validate(document)


@cache
def core(kind: str, api_version: str) -> Draft202012Validator:
    """The schema of a kind of Kubernetes' own; the package's own function reads 3 MB for every document."""
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}-local-strict"
    group, _, version = api_version.rpartition("/")
    name = "-".join(filter(None, [kind.lower(), group.split(".")[0], version]))
    registry: Any = Registry()
    for file in ("_definitions.json", f"{name}.json"):
        resource = Resource.from_contents(json.loads((folder / file).read_text()))
        registry = resource @ registry
    return Draft202012Validator(resource.contents, registry=registry)


# ---- pods ----


@dataclass(frozen=True)
class Pod:
    """A pod that a manifest leads to: head, worker, submitter, or of a workload of Kubernetes' own."""

    owner: str
    role: str
    metadata: Document
    spec: Document
    start: Document
    """rayStartParams; {} of what is no node of Ray."""
    group: str = ""
    """Of a worker, its group's name."""

    @property
    def labels(self) -> dict[str, str]:
        """The template's, with what KubeRay adds."""
        added = {"ray.io/node-type": self.role} if self.role in ("head", "worker") else {}
        if self.group:
            added["ray.io/group"] = self.group
        return {**self.metadata.get("labels", {}), **added}

    def __str__(self) -> str:
        return f"{self.owner}/{self.role}"


def ray_cluster(document: Document) -> Document | None:
    """The RayCluster's spec that a manifest has."""
    spec: Document = document.get("spec", {})
    if document["kind"] == "RayCluster":
        return spec
    found: Document | None = spec.get(
        {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(document["kind"], "")
    )
    return found


def pods(document: Document) -> Iterator[Pod]:
    """Every pod template of a manifest."""
    owner = f"{document['kind']} {document['metadata']['name']}"
    if cluster := ray_cluster(document):
        head = cluster["headGroupSpec"]
        template = head["template"]
        yield Pod(owner, "head", template.get("metadata", {}), template["spec"], head["rayStartParams"])
        for group in cluster.get("workerGroupSpecs", ()):
            template = group["template"]
            metadata = template.get("metadata", {})
            yield Pod(owner, "worker", metadata, template["spec"], group["rayStartParams"], group["groupName"])
    if document["kind"] == "RayJob":
        template = document["spec"]["submitterPodTemplate"]
        yield Pod(owner, "submitter", template.get("metadata", {}), template["spec"], {})
    if document["kind"] in ("StatefulSet", "Deployment"):
        template = document["spec"]["template"]
        yield Pod(owner, "pod", template.get("metadata", {}), template["spec"], {})


def matches(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a label selector chooses a pod or a namespace of these labels."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for expression in selector.get("matchExpressions", ()):
        assert expression["operator"] == "In"
        if labels.get(expression["key"]) not in expression["values"]:
            return False
    return True
