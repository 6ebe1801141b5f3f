"""KubeRay's manifests, against the schemas of the custom resources and of Kubernetes."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.infra.manifests import KUBERAY, OVERLAYS, Manifest, base, build, findings, pods

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="no kubectl here, which builds the overlays"
)
IMAGE = "registry.example.com/facm:1"


def only(manifests: list[Manifest], kind: str) -> Manifest:
    (found,) = [m for m in manifests if m["kind"] == kind]
    return found


def test_nothing_is_wrong_with_the_base() -> None:
    assert findings(base()) == []


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_build_and_nothing_is_wrong_with_them(overlay: str) -> None:
    manifests = build(KUBERAY / "overlays" / overlay)
    assert findings(manifests) == []
    named = [m for m in manifests if m["kind"] != "Namespace"]
    assert {m["metadata"]["namespace"] for m in named} == {"facm"}
    images = {c["image"] for _, pod in pods(manifests) for c in pod["spec"]["containers"]}
    assert images == {IMAGE}
    # A policy or a monitor that selects other labels than the pods have does nothing, silently.
    labels = {"app.kubernetes.io/name": "facm"}
    assert all(pod["metadata"]["labels"] == labels for _, pod in pods(manifests))
    monitor = only(manifests, "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"] == labels
    ports = {p["name"] for _, pod in pods(manifests) for c in pod["spec"]["containers"]
             for p in c.get("ports", [])}  # fmt: skip
    assert {e["port"] for e in monitor["podMetricsEndpoints"]} <= ports
    job = only(manifests, "RayJob")["spec"]
    assert "/app/jobs/distill.py" in job["entrypoint"]
    cluster = only(manifests, "RayCluster")
    assert job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}


@needs_kubectl
def test_spot_workers_come_first_and_others_follow() -> None:
    cluster = only(build(KUBERAY / "overlays" / "spot"), "RayCluster")
    groups = {g["groupName"]: g for g in cluster["spec"]["workerGroupSpecs"]}
    assert {name: g["priority"] for name, g in groups.items()} == {
        "gpu-spot": 1,
        "gpu-on-demand": 0,
    }
    selected = {g["template"]["spec"]["nodeSelector"]["karpenter.sh/capacity-type"]
                for g in groups.values()}  # fmt: skip
    assert selected == {"spot", "on-demand"}


def test_pods_are_closed_but_for_what_is_listed() -> None:
    policies = {m["metadata"]["name"]: m["spec"] for m in base() if m["kind"] == "NetworkPolicy"}
    assert policies["nothing"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule["from"], name
            assert all("ipBlock" not in source for source in rule["from"]), name
    (_, outside) = policies["services"]["egress"]
    assert outside["to"] == [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]
    assert {port["port"] for port in outside["ports"]} == {443, 6443}


def head(manifests: list[Manifest]) -> Manifest:
    pod: Manifest = only(manifests, "RayCluster")["spec"]["headGroupSpec"]["template"]["spec"]
    return pod


def container(manifests: list[Manifest]) -> Manifest:
    found: Manifest = head(manifests)["containers"][0]
    return found


def cluster(manifests: list[Manifest]) -> Manifest:
    spec: Manifest = only(manifests, "RayCluster")["spec"]
    return spec


Mutation = Callable[[list[Manifest]], object]
FAULTS: list[tuple[Mutation, str]] = [
    (lambda m: cluster(m).update(enableAutoscaling=True), "enableAutoscaling"),
    (lambda m: cluster(m).update(authOptions={"mode": "disabled"}), "without a token"),
    (lambda m: cluster(m)["authOptions"].update(mode="tokens"), "tokens"),
    (lambda m: cluster(m)["workerGroupSpecs"][0].update(minReplica=1), "minReplica"),
    (lambda m: cluster(m)["workerGroupSpecs"][0].update(maxReplicas="8"), "maxReplicas"),
    (lambda m: cluster(m)["workerGroupSpecs"][0].update(replicas=9), "out of range"),
    (lambda m: only(m, "RayJob")["spec"].update(entryPoint="x"), "entryPoint"),
    (lambda m: only(m, "RayJob").update(specs={}), "specs"),
    (lambda m: head(m).update(serviceAccount2="x"), "serviceAccount2"),
    (lambda m: head(m).update(hostNetwork=True), "host's namespaces"),
    (lambda m: head(m).pop("securityContext"), "as root"),
    (lambda m: head(m)["securityContext"].pop("seccompProfile"), "seccomp"),
    (lambda m: container(m).pop("resources"), "no bounds"),
    (lambda m: container(m)["resources"].update(limits={"cpu": "1 core"}), "1 core"),
    (lambda m: container(m)["securityContext"].update(privileged=1), "privileged"),
    (lambda m: container(m)["securityContext"].pop("capabilities"), "capabilities"),
    (lambda m: container(m)["securityContext"].pop("readOnlyRootFilesystem"), "can be written"),
    (
        lambda m: container(m).update(env=[{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}]),
        "written down",
    ),
    (lambda m: head(m)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "host's files"),
    (lambda m: m[-2]["spec"].update(egres=[]), "egres"),
]


@pytest.mark.parametrize(("mutation", "said"), FAULTS)
def test_a_fault_is_seen(mutation: Mutation, said: str) -> None:
    manifests = copy.deepcopy([*base()])
    mutation(manifests)
    assert any(said in finding for finding in findings(manifests)), findings(manifests)


@needs_kubectl
def test_a_patch_that_hits_nothing_is_an_error(tmp_path: Path) -> None:
    shutil.copytree(KUBERAY, tmp_path / "kuberay")
    overlay = tmp_path / "kuberay" / "overlays" / "gpu" / "kustomization.yaml"
    overlay.write_text(overlay.read_text().replace("/volumes/2/", "/volumes/7/"))
    with pytest.raises(AssertionError, match="volumes/7"):
        build(overlay.parent)
