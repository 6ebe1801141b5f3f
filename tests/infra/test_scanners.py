"""Scanners that know more faults than we do. They have a lock and an environment of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.manifests import base, pods

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / ".venv-scan" / "bin"
CODE = ("infra", "dashboards", "platform", "facm_core", "jobs")

IMAGE = "registry.example.com/facm:1"

pytestmark = pytest.mark.skipif(
    not (BIN / "checkov").exists(), reason="no .venv-scan here; `make scanners` makes it"
)

# What checkov says of pods and is not so.
NOT_OURS = {
    "CKV_K8S_8": "the operator adds the liveness probes",
    "CKV_K8S_9": "and the readiness probes",
    "CKV_K8S_15": "images are never replaced under one tag",
    "CKV_K8S_35": "credentials come as environment, which is how every client of S3 takes them",
    "CKV_K8S_38": "the head's autoscaler talks with Kubernetes",
    "CKV_K8S_43": "an overlay names the image's digest",
}
# What bandit says of our code and is not so; the tests of other rooms cover each.
NOT_SO = {
    ("B704", "dashboards/facm_dashboards/view.py"): "the reader escapes all HTML of an author",
    ("B310", "infra/local/stack.py"): "the addresses are http://127.0.0.1, literally",
    ("B310", "platform/facm_platform/serving/prometheus.py"): "the address is http://, literally",
    ("B615", "facm_core/text_encoders.py"): "local_files_only",
    ("B615", "platform/facm_platform/evaluation/dinov2.py"): "local_files_only",
    ("B615", "platform/facm_platform/evaluation/scores.py"): "local_files_only",
}


# What detect-secrets takes for one.
NO_SECRET = {("dashboards/vendored.json", "Base64 High Entropy String"): "hashes of packages"}


def scan(tool: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / tool), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def failed(report: str) -> Iterator[tuple[str, str]]:
    """(check, file) of what checkov found."""
    parsed: Any = json.loads(report)
    for framework in parsed if isinstance(parsed, list) else [parsed]:
        for check in framework.get("results", {}).get("failed_checks", []):
            yield check["check_id"], f"{check['file_path']} {check['resource']}"


CHECKOV = ("--quiet", "--compact", "--skip-download", "--output", "json")


@pytest.mark.timeout(280)
def test_checkov() -> None:
    frameworks = ("--framework", "terraform", "dockerfile", "kubernetes", "secrets")
    done = scan("checkov", *CHECKOV, "--directory", "infra", *frameworks)
    assert list(failed(done.stdout)) == [], done.stdout[-3000:]


@pytest.mark.timeout(280)
def test_checkov_of_the_pods(tmp_path: Path) -> None:
    """It does not look into custom resources: it gets their pods as such."""
    policies = [m for m in base() if m["kind"] == "NetworkPolicy"]
    for policy in policies:
        policy["metadata"]["namespace"] = "facm"
    text = yaml.safe_dump_all([*policies, *(pod for _, pod in pods(base()))])
    # As the kustomization does it.
    (tmp_path / "pods.yaml").write_text(text.replace("image: facm\n", f"image: {IMAGE}\n"))
    done = scan("checkov", *CHECKOV, "--file", str(tmp_path / "pods.yaml"))
    found = list(failed(done.stdout))
    assert [(check, where) for check, where in found if check not in NOT_OURS] == []
    assert {check for check, _ in found} == set(NOT_OURS), "no reason without its finding"


OPEN_DOOR = """
resource "aws_security_group" "a" {
  ingress {
    from_port   = 22
    to_port     = 22
    protocol    = "tcp"
    cidr_blocks = ["0.0.0.0/0"]
  }
}
"""


@pytest.mark.timeout(280)
def test_checkov_sees_a_fault(tmp_path: Path) -> None:
    (tmp_path / "main.tf").write_text(OPEN_DOOR)
    done = scan("checkov", *CHECKOV, "--directory", str(tmp_path))
    assert "CKV_AWS_24" in {check for check, _ in failed(done.stdout)}


def test_hadolint(tmp_path: Path) -> None:
    dockerfile = ROOT / "infra" / "docker" / "Dockerfile"
    done = scan("hadolint", str(dockerfile))
    assert done.returncode == 0, done.stdout
    mutant = tmp_path / "Dockerfile"
    mutant.write_text(dockerfile.read_text().replace("--no-install-recommends", ""))
    assert "DL3015" in scan("hadolint", str(mutant)).stdout


def test_bandit(tmp_path: Path) -> None:
    code = [folder for folder in CODE if (ROOT / folder).is_dir()]
    # Medium and above: below it objects to assertions and to random numbers in tests of chance.
    done = scan("bandit", "--quiet", "-ll", "--format", "json", "--recursive", *code)
    found = {(r["test_id"], r["filename"]) for r in json.loads(done.stdout)["results"]}
    assert found == {known for known in NOT_SO if (ROOT / known[1]).exists()}
    (tmp_path / "a.py").write_text("import subprocess\nsubprocess.run(x, shell=True)\n")
    assert "B602" in scan("bandit", "--quiet", str(tmp_path / "a.py")).stdout


def test_detect_secrets(tmp_path: Path) -> None:
    code = [folder for folder in CODE if (ROOT / folder).is_dir()]
    assert secrets(ROOT, *code) == {known for known in NO_SECRET if (ROOT / known[0]).exists()}
    # Put together here, or the scanners of others would find it.
    (tmp_path / "a.yaml").write_text(f"{'AKIA'}{'Q3ZX5N7L' * 2}\n")
    assert secrets(tmp_path, "--all-files", ".") == {("a.yaml", "AWS Access Key")}


def secrets(folder: Path, *arguments: str) -> set[tuple[str, str]]:
    """From the locked environment: checkov brings another module of this name."""
    command = [sys.executable, "-m", "detect_secrets", "scan", "--no-verify", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    results = json.loads(done.stdout)["results"]
    return {(file, found["type"]) for file, all_of in results.items() for found in all_of}


def test_the_scanners_lock_carries_hashes_and_no_address() -> None:
    text = (ROOT / "infra" / "scanners.lock").read_text()
    assert "://" not in text
    assert text.count("==") <= text.count("--hash=sha256:")
