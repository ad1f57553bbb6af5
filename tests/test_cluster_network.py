"""Who reaches whom in the namespace, by the network policies as they are applied, and what the README promises."""

from __future__ import annotations

import ipaddress
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.manifests import CLUSTER, OVERLAYS, Document, built, check, matches, pods, rendered

every_overlay = pytest.mark.parametrize("overlay", ["dev", "production"])


@dataclass(frozen=True)
class Peer:
    """Something that speaks or is spoken to: a pod by its labels and its namespace's, or an address outside."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: dict[str, str] = field(default_factory=lambda: {"kubernetes.io/metadata.name": "ldbfr"})
    address: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.address is None and self.namespace["kubernetes.io/metadata.name"] == "ldbfr"


def policies(overlay: str) -> list[Document]:
    return [
        document for document in rendered(f"kuberay/overlays/{overlay}/setup") if document["kind"] == "NetworkPolicy"
    ]


def chosen(rule: Document, side: str, peer: Peer, port: int) -> bool:
    """Whether one rule of a policy is about this peer and port."""
    if "ports" in rule and not any(entry["port"] == port for entry in rule["ports"]):
        return False
    if side not in rule:
        return True
    for entry in rule[side]:
        if "ipBlock" in entry:
            block = ipaddress.ip_network(entry["ipBlock"]["cidr"])
            if peer.address is not None and ipaddress.ip_address(peer.address) in block:
                return True
            continue
        if peer.address is not None:
            continue
        here = matches(entry["namespaceSelector"], peer.namespace) if "namespaceSelector" in entry else peer.is_ours
        if here and matches(entry.get("podSelector", {}), peer.labels):
            return True
    return False


def allowed(overlay: str, source: Peer, target: Peer, port: int) -> bool:
    """As Kubernetes decides: each of our ends lets it through that has no policy, or one with a rule for it."""
    for end, other, direction, side in ((source, target, "Egress", "to"), (target, source, "Ingress", "from")):
        if not end.is_ours:
            continue
        about = [
            policy["spec"]
            for policy in policies(overlay)
            if direction in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], end.labels)
        ]
        rules = [rule for spec in about for rule in spec.get(direction.lower(), ())]
        if about and not any(chosen(rule, side, other, port) for rule in rules):
            return False
    return True


def namespace(name: str, **labels: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name, **{f"ldbfr.io/{key}": value for key, value in labels.items()}}


def ours(overlay: str) -> dict[tuple[str, str], Peer]:
    """Every kind of pod of ours, by its work and role."""
    found = {}
    for folder in OVERLAYS:
        if f"/{overlay}/" in folder:
            for document in rendered(folder):
                for pod in pods(document):
                    if work := pod.labels.get("ldbfr.io/work"):
                        found[work, pod.role] = Peer(pod.labels)
    return found


OPERATOR = Peer({}, namespace("ray-system"))
INGRESS = Peer({}, namespace("ingress-nginx", clients="true"))
PROMETHEUS = Peer({}, namespace("ldbfr-monitoring", monitoring="true"))
STRANGER = Peer({}, namespace("default"))
NAMES = Peer({}, namespace("kube-system"))
NODE_DNS, CLOUD_DNS = Peer(address="169.254.20.10"), Peer(address="169.254.169.254")
BUCKET, METADATA, ELSEWHERE = Peer(address="52.95.1.1"), Peer(address="169.254.169.254"), Peer(address="8.8.8.8")
REDIS, MINIO = Peer({"app.kubernetes.io/name": "redis"}), Peer({"app.kubernetes.io/name": "minio"})


@every_overlay
def test_what_has_to_work_works(overlay: str) -> None:
    found = ours(overlay)
    assert len(found) >= 6 + 6 + 4, found
    for (work, role), pod in found.items():
        for names in (NAMES, NODE_DNS, CLOUD_DNS):
            assert allowed(overlay, pod, names, 53)
        assert allowed(overlay, pod, BUCKET, 443)
        assert allowed(overlay, pod, METADATA, 80)
        if role == "head":
            worker = found[work, "worker"]
            for port in (6379, 8265, 10001, 30123):
                assert allowed(overlay, worker, pod, port)
                assert allowed(overlay, pod, worker, port)
            assert allowed(overlay, OPERATOR, pod, 8265)
        if role in ("head", "worker"):
            assert allowed(overlay, PROMETHEUS, pod, 8080)
        if role == "submitter":
            assert allowed(overlay, pod, found[work, "head"], 8265)
    for role in ("head", "worker"):
        assert allowed(overlay, INGRESS, found["serve", role], 8000)
        assert allowed(overlay, OPERATOR, found["serve", role], 8000)
    assert allowed(overlay, found["serve", "head"], REDIS, 6379)
    if overlay == "dev":
        assert all(allowed(overlay, pod, MINIO, 9000) for pod in found.values())


@every_overlay
def test_what_nobody_needs_does_not(overlay: str) -> None:
    found = ours(overlay)
    for (work, _), pod in found.items():
        for port in (22, 6379, 8000, 8080, 8265, 10001, 30123):
            assert not allowed(overlay, STRANGER, pod, port)
            assert not allowed(overlay, BUCKET, pod, port)
            if port != 8080:
                assert not allowed(overlay, PROMETHEUS, pod, port)
            if (work, port) != ("serve", 8000):
                assert not allowed(overlay, INGRESS, pod, port)
        assert not allowed(overlay, pod, ELSEWHERE, 25)
        assert not allowed(overlay, pod, ELSEWHERE, 80)
        assert not allowed(overlay, pod, ELSEWHERE, 53), "a name server outside would be a way out for data"
        assert not allowed(overlay, pod, NODE_DNS, 80)
        assert not allowed(overlay, pod, STRANGER, 80)
        if work != "serve":
            assert not allowed(overlay, pod, REDIS, 6379)
    for peer in (STRANGER, INGRESS, OPERATOR, PROMETHEUS):
        assert not allowed(overlay, peer, REDIS, 6379)
    for pod in (REDIS, Peer({"app": "somebody-elses"})):
        assert not allowed(overlay, pod, BUCKET, 443), "what bears none of our labels reaches nothing"


def test_the_readme_names_the_namespaces_that_are_let_in() -> None:
    text = (CLUSTER / "README.md").read_text()
    assert "--namespace ray-system --create-namespace" in text
    assert "kubectl label namespace ingress-nginx ldbfr.io/clients=true" in text
    (created,) = [document for document in rendered("monitoring") if document["kind"] == "Namespace"]
    labels: dict[str, Any] = created["metadata"]["labels"]
    assert labels["ldbfr.io/monitoring"] == "true"


def test_every_file_and_folder_that_the_readmes_name_is_there() -> None:
    for readme in (CLUSTER / "README.md", CLUSTER / "object-store" / "README.md"):
        text = readme.read_text()
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert (readme.parent / link).exists(), link
        for path in re.findall(r"(?<![\w/.])(cluster/[\w./*$-]+)", text):
            for overlay in ("dev", "production"):
                path_there = (
                    path.rstrip(".").replace("$OVERLAY", overlay).replace("$work", "train").replace("$role", "head")
                )
                assert list(CLUSTER.parent.glob(path_there)), path


def test_the_rule_for_a_bucket_at_another_port_is_applied_as_it_stands_in_the_readme(tmp_path: Path) -> None:
    text = (CLUSTER / "object-store" / "README.md").read_text()
    (patch,) = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.S) if "name: outside" in block]
    shutil.copytree(CLUSTER / "kuberay" / "base" / "foundation", tmp_path / "foundation")
    (tmp_path / "kustomization.yaml").write_text("resources: [foundation]\n" + patch)
    (policy,) = [document for document in built(tmp_path) if document["metadata"]["name"] == "outside"]
    check(policy)
    rule = policy["spec"]["egress"][-1]
    assert chosen(rule, "to", Peer(address="192.0.2.10"), 9000)
    assert not chosen(rule, "to", Peer(address="192.0.2.11"), 9000)
    assert not chosen(rule, "to", Peer(address="192.0.2.10"), 22)
