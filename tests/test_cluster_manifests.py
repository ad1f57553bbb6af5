"""cluster/kuberay: every manifest keeps to its schema, and all of them to the same laws."""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError

from tests.manifests import (
    CLUSTER,
    KUBERAY,
    OVERLAYS,
    Document,
    Pod,
    check,
    crd_folder,
    documents,
    matches,
    pods,
    ray_cluster,
    rendered,
)

MANIFESTS = sorted(
    path
    for path in [*KUBERAY.rglob("*.yaml"), *(CLUSTER / "object-store" / "minio").glob("*.yaml")]
    if path.name != "kustomization.yaml"
)
WORK = ("cluster", "prepare", "train", "restore", "evaluate")
SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL")


def all_of(overlay: str) -> list[Document]:
    """Everything that is applied of an overlay, dev or production."""
    return [document for folder in OVERLAYS if f"/{overlay}/" in folder for document in rendered(folder)]


def all_pods(overlay: str) -> list[Pod]:
    return [pod for document in all_of(overlay) for pod in pods(document)]


every_overlay = pytest.mark.parametrize("overlay", ["dev", "production"])


# ---- schemas ----


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_files_keep_to_their_schema(path: Any) -> None:
    for document in documents(path.read_text()):
        if document["apiVersion"].startswith("ray.io/"):
            crd_folder()
        check(document)


@pytest.mark.parametrize("folder", OVERLAYS)
def test_results_of_kustomize_keep_to_their_schema(folder: str) -> None:
    crd_folder()
    found = rendered(folder)
    assert found
    for document in found:
        check(document)
        if document["kind"] not in ("Namespace", "PriorityClass"):
            assert document["metadata"]["namespace"] == "ldbfr", document["metadata"]


@pytest.mark.parametrize(
    "place",
    [
        ("spec",),
        ("spec", "headGroupSpec"),
        ("spec", "headGroupSpec", "template", "spec"),
        ("spec", "headGroupSpec", "template", "spec", "containers", 0),
        ("spec", "headGroupSpec", "template", "spec", "containers", 0, "livenessProbe", "httpGet"),
        ("spec", "workerGroupSpecs", 0, "template", "metadata"),
        ("spec", "autoscalerOptions", "securityContext"),
        ("metadata",),
    ],
)
def test_a_misspelt_field_is_refused_wherever_it_stands(place: tuple[str | int, ...]) -> None:
    crd_folder()
    (document,) = documents((KUBERAY / "base" / "cluster" / "raycluster.yaml").read_text())
    check(document)
    document = copy.deepcopy(document)
    target: Any = document
    for step in place:
        target = target[step]
    target["misspelt"] = 1
    with pytest.raises(ValidationError, match="misspelt"):
        check(document)


def test_what_each_overlay_applies() -> None:
    for overlay in ("dev", "production"):
        kinds = {document["kind"]: document for document in all_of(overlay)}
        assert {"RayCluster", "RayJob", "RayService", "NetworkPolicy", "PodDisruptionBudget", "PriorityClass"} <= set(
            kinds
        )
        jobs = {document["metadata"]["name"] for document in all_of(overlay) if document["kind"] == "RayJob"}
        assert jobs == {"prepare", "train", "restore", "evaluate"}
    gpus = [pod for pod in all_pods("dev") if "nvidia.com/gpu" in str(pod.spec)]
    assert not gpus


# ---- pods ----


@every_overlay
def test_pods_are_confined(overlay: str) -> None:
    for pod in all_pods(overlay):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True, pod
        assert context["runAsUser"] > 0, pod
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod
        assert pod.spec.get("automountServiceAccountToken") is False, pod
        for container in pod.spec["containers"]:
            confined(container["securityContext"])
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}, pod
    for document in all_of(overlay):
        if cluster := ray_cluster(document):
            confined(cluster["autoscalerOptions"]["securityContext"])


@every_overlay
def test_a_token_for_the_kubernetes_api_is_in_the_autoscalers_container_alone(overlay: str) -> None:
    """Where Ray's own autoscaler looks for it, with all that it reads there."""
    provider = pytest.importorskip("ray.autoscaler._private.kuberay.node_provider")
    folder = str(Path(provider.IN_CLUSTER_TOKEN_PATH).parent)
    assert str(Path(provider.IN_CLUSTER_CA_CERT_PATH).parent) == folder
    for document in all_of(overlay):
        for pod in pods(document):
            tokens = {volume["name"] for volume in pod.spec.get("volumes", ()) if "serviceAccountToken" in str(volume)}
            assert len(tokens) == (pod.role == "head"), pod
            for container in pod.spec["containers"]:
                assert not tokens & {mount["name"] for mount in container["volumeMounts"]}, pod
        if cluster := ray_cluster(document):
            spec = cluster["headGroupSpec"]["template"]["spec"]
            (mount,) = [one for one in cluster["autoscalerOptions"]["volumeMounts"] if one["mountPath"] == folder]
            (volume,) = [one for one in spec["volumes"] if one["name"] == mount["name"]]
            sources = volume["projected"]["sources"]
            assert sources[0]["serviceAccountToken"]["path"] == Path(provider.IN_CLUSTER_TOKEN_PATH).name
            assert sources[1]["configMap"]["items"][0]["path"] == Path(provider.IN_CLUSTER_CA_CERT_PATH).name
            assert {key for source in sources for key in source} == {"serviceAccountToken", "configMap", "downwardAPI"}
            known = {one["name"] for one in spec["volumes"]}
            assert {one["name"] for one in cluster["autoscalerOptions"]["volumeMounts"]} <= known


def confined(context: Document) -> None:
    assert context == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


@every_overlay
def test_pods_ask_for_what_they_may_take(overlay: str) -> None:
    for pod in all_pods(overlay):
        for container in pod.spec["containers"]:
            asked, most = container["resources"]["requests"], container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(asked), pod
            assert {"cpu", "memory"} <= set(most), pod
            assert asked.get("nvidia.com/gpu") == most.get("nvidia.com/gpu"), pod
            if pod.role in ("head", "worker"):
                assert re.fullmatch(r"[1-9]\d*", most["cpu"]), f"{pod}: KubeRay makes Ray's CPUs of the limit"


@every_overlay
def test_no_secret_is_written_down(overlay: str) -> None:
    for pod in all_pods(overlay):
        for container in pod.spec["containers"]:
            for variable in container.get("env", ()):
                assert "value" not in variable or not SECRET.search(variable["name"]), f"{pod}: {variable}"
    for document in all_of(overlay):
        assert document["kind"] != "Secret"
        for key in document.get("data", {}) if document["kind"] == "ConfigMap" else ():
            assert not SECRET.search(key), f"{key} belongs into a Secret"


@every_overlay
def test_what_pods_refer_to_exists(overlay: str) -> None:
    readme = (CLUSTER / "README.md").read_text() + (CLUSTER / "object-store" / "README.md").read_text()
    there = {(document["kind"], document["metadata"]["name"]) for document in all_of(overlay)}
    for pod in all_pods(overlay):
        if "serviceAccountName" in pod.spec:
            assert ("ServiceAccount", pod.spec["serviceAccountName"]) in there, pod
        if "priorityClassName" in pod.spec:
            assert ("PriorityClass", pod.spec["priorityClassName"]) in there, pod
        volumes = {volume["name"] for volume in pod.spec.get("volumes", ())}
        for container in pod.spec["containers"]:
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted <= volumes | {"data"}, pod
            for source in container.get("envFrom", ()):
                if "configMapRef" in source:
                    assert ("ConfigMap", source["configMapRef"]["name"]) in there, pod
        for secret, optional in secrets_of(pod):
            made = re.search(rf"create secret (generic|tls) {secret}\b", readme)
            assert made or (optional and f"`{secret}`" in readme), f"{pod}: nobody says how {secret} is made"


@every_overlay
def test_every_account_that_pulls_the_image_is_given_the_registrys_secret(overlay: str) -> None:
    """By the loop of the README; a pod that names no account has `default`."""
    (loop,) = re.findall(r"for account in (.+); do\n.*patch serviceaccount", (CLUSTER / "README.md").read_text())
    pulling = [pod for pod in all_pods(overlay) if pod.role in ("head", "worker", "submitter")]
    assert set(loop.split()) == {pod.spec.get("serviceAccountName", "default") for pod in pulling}


def test_the_readmes_table_of_machines_is_what_the_pods_ask_for() -> None:
    rows = re.findall(
        r"^\| (.+?) \| (\d+) \| (\d+) Gi \| (\d*) ?\| (yes|no) \|", (CLUSTER / "README.md").read_text(), re.M
    )
    said = {tuple(numbers) for _, *numbers in rows}
    asked = set()
    for pod in all_pods("production"):
        if pod.role not in ("head", "worker"):
            continue
        (container,) = [one for one in pod.spec["containers"] if one["name"].startswith("ray-")]
        requests = container["resources"]["requests"]
        tolerated = {toleration["key"] for toleration in pod.spec.get("tolerations", ())}
        gpus = requests.get("nvidia.com/gpu", "")
        spot = "yes" if "ldbfr.io/spot" in tolerated else "no"
        asked.add((requests["cpu"], requests["memory"].removesuffix("Gi"), gpus, spot))
    assert said == asked


def secrets_of(pod: Pod) -> list[tuple[str, bool]]:
    """The Secrets that a pod names, and whether it does without."""
    found = [(volume["secret"]["secretName"], False) for volume in pod.spec.get("volumes", ()) if "secret" in volume]
    for container in pod.spec["containers"]:
        references = [source.get("secretRef") for source in container.get("envFrom", ())]
        references += [variable.get("valueFrom", {}).get("secretKeyRef") for variable in container.get("env", ())]
        found += [(reference["name"], reference.get("optional", False)) for reference in references if reference]
    return found


# ---- Ray ----


@every_overlay
def test_clusters_are_of_the_tested_ray_with_a_token_and_a_head_without_work(overlay: str) -> None:
    version = re.search(r"^ray==(.+)$", (CLUSTER.parent / "constraints.txt").read_text(), re.M)
    assert version
    clusters = [cluster for document in all_of(overlay) if (cluster := ray_cluster(document))]
    assert len(clusters) == 6
    for cluster in clusters:
        assert cluster["rayVersion"] == version[1]
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["enableInTreeAutoscaling"] is True
        for group in cluster["workerGroupSpecs"]:
            assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"] > 0
        assert [group["groupName"] for group in cluster["workerGroupSpecs"]] in (["cpu"], ["cpu", "gpu"])


@every_overlay
def test_workers_leave_before_they_are_ended(overlay: str) -> None:
    for pod in all_pods(overlay):
        if pod.role != "worker":
            continue
        (container,) = pod.spec["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command[:3] == ["python", "/opt/ldbfr/cluster/drain.py", "--seconds"]
        assert int(command[3]) < pod.spec["terminationGracePeriodSeconds"] <= 120, (
            "a spot machine has two minutes at most"
        )
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert probe in container, pod


@every_overlay
def test_work_that_can_be_taken_up_again_runs_on_spot_machines_and_nothing_else_does(overlay: str) -> None:
    for pod in all_pods(overlay):
        spot = any("spot" in toleration["key"] for toleration in pod.spec.get("tolerations", ()))
        assert spot == (pod.role == "worker" and pod.labels["ldbfr.io/work"] in WORK), pod
        if "nvidia.com/gpu" in str(pod.spec["containers"]):
            assert any(toleration["key"] == "nvidia.com/gpu" for toleration in pod.spec["tolerations"]), pod


@every_overlay
def test_each_job_runs_under_its_own_account_and_label(overlay: str) -> None:
    for document in all_of(overlay):
        if document["kind"] != "RayJob":
            continue
        name = document["metadata"]["name"]
        for pod in pods(document):
            assert pod.labels["ldbfr.io/work"] == name, pod
            if pod.role != "submitter":
                assert pod.spec["serviceAccountName"] == name, pod
        assert document["spec"]["shutdownAfterJobFinishes"] is True
        assert document["spec"]["backoffLimit"] > 0


# ---- jobs ----


def entrypoints(overlay: str) -> list[tuple[str, str]]:
    return [
        (document["metadata"]["name"], document["spec"]["entrypoint"])
        for document in all_of(overlay)
        if document["kind"] == "RayJob"
    ]


def environment(overlay: str) -> dict[str, str]:
    (found,) = [document for document in all_of(overlay) if document["kind"] == "ConfigMap"]
    data: dict[str, str] = found["data"]
    return data


@every_overlay
@pytest.mark.parametrize("name", ["prepare", "train", "restore", "evaluate"])
def test_a_jobs_command_is_understood_by_the_job(overlay: str, name: str) -> None:
    import tyro

    (command,) = [command for job, command in entrypoints(overlay) if job == name]
    variables = environment(overlay)
    words = [re.sub(r"\$(\w+)", lambda match: variables[match[1]], word) for word in shlex.split(command)]
    assert words[:2] == ["python", f"jobs/{name}.py"]
    module: Any = __import__(f"jobs.{name}", fromlist=["main"])
    known = getattr(module, name.capitalize(), None) or module.Command
    request: Any = tyro.cli(known, args=words[2:])
    assert request.output.startswith("s3://") if name != "train" else request.run.startswith("s3://")
    if name == "train":
        from ldbfr.config import load_preset

        module.check(request, load_preset(request.preset, request.set), module.parse_workers(request.workers))
    if name == "restore":
        module.check(request)


def test_the_shell_on_the_head_finds_its_variables_wherever_it_runs() -> None:
    """A command may be expanded by the submitter or by the head: both have the variables."""
    for document in all_of("production"):
        if document["kind"] == "RayJob":
            for pod in pods(document):
                assert {"configMapRef": {"name": "ldbfr-environment"}} in pod.spec["containers"][0]["envFrom"], pod


# ---- endpoint ----


@every_overlay
def test_the_endpoints_configuration_is_rays_and_ours(overlay: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    from serve.deployment import DeploymentSettings

    (service,) = [document for document in all_of(overlay) if document["kind"] == "RayService"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    known = (
        ServeDeploySchema.model_fields if hasattr(ServeDeploySchema, "model_fields") else ServeDeploySchema.__fields__
    )
    assert set(config) <= set(known)
    deployed = ServeDeploySchema(**config)
    (application,) = config["applications"]
    settings = DeploymentSettings.from_args(application["args"])
    assert application["import_path"] == "serve.app:build_app"
    assert set(application) <= {"name", "route_prefix", "import_path", "args", "runtime_env"}

    head, *workers = pods(service)
    keys = [mount for mount in head.spec["containers"][0]["volumeMounts"] if mount["name"] == "keys"]
    assert settings.keys_file is not None
    assert str(settings.keys_file).startswith(keys[0]["mountPath"] + "/")
    assert deployed.http_options.port == 8000
    assert config["http_options"]["request_timeout_s"] > settings.upload_seconds + settings.deadline_seconds
    for worker in workers:
        (container,) = worker.spec["containers"]
        assert {"name": "serve", "containerPort": 8000} in container["ports"]
        assert container["readinessProbe"]["httpGet"] == {"path": "/-/healthz", "port": 8000}
        wait = int(container["lifecycle"]["preStop"]["exec"]["command"][3])
        assert wait >= settings.deadline_seconds + 5, "what is under way is answered before the pod ends"
    assert service["spec"]["rayClusterDeletionDelaySeconds"] >= settings.deadline_seconds + 5
    gpus = any("nvidia.com/gpu" in str(worker.spec["containers"]) for worker in workers)
    assert gpus == bool(settings.gpus_per_replica)


@every_overlay
def test_the_endpoint_survives_its_head(overlay: str) -> None:
    (service,) = [document for document in all_of(overlay) if document["kind"] == "RayService"]
    cluster = service["spec"]["rayClusterConfig"]
    store = cluster["gcsFaultToleranceOptions"]
    host, port = store["redisAddress"].split(":")
    assert any(document["kind"] == "Service" and document["metadata"]["name"] == host for document in all_of(overlay))
    assert port == "6379"
    assert "valueFrom" in store["redisPassword"]
    assert "externalStorageNamespace" not in store, "the two clusters of an upgrade would share it"
    assert service["spec"]["upgradeStrategy"]["type"] == "NewCluster"
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True


@every_overlay
def test_disruption_budgets_are_of_pods_that_exist(overlay: str) -> None:
    found = all_pods(overlay)
    budgets = [document for document in all_of(overlay) if document["kind"] == "PodDisruptionBudget"]
    assert {budget["metadata"]["name"] for budget in budgets} == {"endpoint-cpu", "endpoint-gpu", "drivers"}
    for budget in budgets:
        chosen = [pod for pod in found if matches(budget["spec"]["selector"], pod.labels)]
        name, _, group = budget["metadata"]["name"].partition("-")
        if name == "endpoint":
            of_group = [pod for pod in found if pod.owner == "RayService endpoint" and pod.group == group]
            assert chosen == of_group
            assert len(of_group) == (overlay == "production" or group == "cpu"), "the smallest group is not hidden"
        else:
            assert chosen == [pod for pod in found if pod.role == "head" and pod.labels["ldbfr.io/work"] in WORK]
        assert "maxUnavailable" not in budget["spec"], "not for pods of custom resources"
        assert isinstance(budget["spec"]["minAvailable"], int), (
            "of custom resources Kubernetes takes whole numbers only"
        )
    values = {
        document["metadata"]["name"]: document["value"]
        for document in all_of(overlay)
        if document["kind"] == "PriorityClass"
    }
    assert values["ldbfr-serve"] > values["ldbfr-train"] > values["ldbfr-archive"]
