"""What would be wrong with manifests for KubeRay, said before they reach a cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator

KUBERAY = Path(__file__).resolve().parents[2] / "infra" / "kuberay"
OVERLAYS = ("dev", "gpu", "spot")
Manifest = dict[str, Any]

_CUSTOM = {"RayCluster": "rayclusters.v1.json", "RayJob": "rayjobs.v1.json"}
_TOP_LEVEL = {"apiVersion", "kind", "metadata", "spec"}
# PodMonitor's schema is not at hand; the others are Kubernetes' own.
_UNCHECKED = {"PodMonitor"}


def build(folder: Path) -> list[Manifest]:
    """The manifests of an overlay, as ``kubectl apply --kustomize`` would send them."""
    kubectl = shutil.which("kubectl")
    assert kubectl is not None
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def base() -> list[Manifest]:
    """The manifests of the base, as they are written."""
    listed = yaml.safe_load((KUBERAY / "base" / "kustomization.yaml").read_text())["resources"]
    texts = [(KUBERAY / "base" / name).read_text() for name in listed]
    return [manifest for text in texts for manifest in yaml.safe_load_all(text)]


def findings(manifests: list[Manifest]) -> list[str]:
    """Everything that is wrong with these manifests."""
    found = []
    for manifest in manifests:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        found += [f"{name}: {finding}" for finding in _one(manifest)]
    return found


def pods(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """(name, Pod) of every pod template of the custom resources."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "RayCluster":
            groups = [("head", spec["headGroupSpec"])]
            groups += [(group["groupName"], group) for group in spec["workerGroupSpecs"]]
            for name, group in groups:
                yield name, _pod(name, group["template"])
        elif manifest["kind"] == "RayJob":
            yield "submitter", _pod("submitter", spec["submitterPodTemplate"])


def _pod(name: str, template: Manifest) -> Manifest:
    metadata = template.get("metadata", {}) | {"name": name, "namespace": "facm"}
    return {"apiVersion": "v1", "kind": "Pod"} | template | {"metadata": metadata}


def _one(manifest: Manifest) -> Iterator[str]:
    kind = manifest["kind"]
    if kind in _UNCHECKED:
        return
    if kind not in _CUSTOM:
        yield from _kubernetes(manifest)
        return
    wrong = [
        f"{'.'.join(map(str, error.path))}: {error.message[:200]}"
        for error in _schema(kind).iter_errors(manifest)
    ]
    if wrong:  # the rest reads what the schema warrants
        yield from wrong
        return
    for name, pod in pods([manifest]):
        yield from (f"{name}: {finding}" for finding in _kubernetes(pod))
        yield from (f"{name}: {finding}" for finding in _insecure(pod["spec"]))
    if kind == "RayCluster":
        if manifest["spec"].get("authOptions", {}).get("mode") != "token":
            yield "Ray obeys without a token"
        for group in manifest["spec"]["workerGroupSpecs"]:
            if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                yield f"{group['groupName']}: replicas are out of range"


def _kubernetes(manifest: Manifest) -> Iterator[str]:
    try:
        kubernetes_validate.validate(manifest, "1.34", strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{'.'.join(map(str, error.path))}: {error.message[:200]}"


def _insecure(spec: Manifest) -> Iterator[str]:
    """What Kubernetes' restricted profile forbids, and what else we want."""
    of_pod = spec.get("securityContext", {})
    if not of_pod.get("runAsNonRoot") or of_pod.get("runAsUser", 0) == 0:
        yield "runs as root"
    if of_pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
        yield "no seccomp profile"
    if any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")):
        yield "shares the host's namespaces"
    if any("hostPath" in volume for volume in spec.get("volumes", [])):
        yield "mounts the host's files"
    for container in spec["containers"]:
        of_container = container.get("securityContext", {})
        if of_container.get("allowPrivilegeEscalation") is not False:
            yield "may gain privileges"
        if of_container.get("capabilities") != {"drop": ["ALL"]}:
            yield "keeps capabilities"
        if of_container.get("readOnlyRootFilesystem") is not True:
            yield "its root can be written"
        resources = container.get("resources", {})
        if not all({"cpu", "memory"} <= set(resources.get(k, ())) for k in ("requests", "limits")):
            yield "no bounds for CPU and memory"
        for variable in container.get("env", []):
            if "value" in variable and any(
                word in variable["name"] for word in ("KEY", "PASSWORD", "SECRET", "TOKEN")
            ):
                yield f"{variable['name']} is written down"


@cache
def _schema(kind: str) -> Draft202012Validator:
    text = (Path(__file__).parent / "schemas" / _CUSTOM[kind]).read_text()
    spec = _closed(json.loads(text)["properties"]["spec"])
    properties: Manifest = {key: {} for key in _TOP_LEVEL} | {"spec": spec}
    return Draft202012Validator(
        {"type": "object", "properties": properties, "additionalProperties": False}
    )


def _closed(schema: Any) -> Any:
    """The schema with unknown fields refused, and Kubernetes' own words understood."""
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"], "pattern": schema.get("pattern", "")}
    closed = {key: _closed(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        closed["properties"] = {key: _closed(v) for key, v in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed.setdefault("additionalProperties", False)
    return closed
