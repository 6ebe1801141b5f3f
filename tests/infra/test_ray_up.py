"""infra/aws/cluster.yaml from `ray up` to `ray down`, on an AWS in namespaces."""

from __future__ import annotations

import secrets
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.infra.aws import PROFILE, SESSION_MANAGER, USER, Cloud, fill_in
from tests.infra.namespaces import Machine, Network, missing
from tests.infra.tracking import Tracking
from tests.jobs.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


class Laptop(Machine):
    """Whoever runs `ray up`: a checkout, the secrets, and AWS's command line."""

    def __init__(self, network: Network, files: dict[str, str]) -> None:
        for source in ("facm_core", "jobs", "platform"):
            for file in (ROOT / source).rglob("*"):
                if file.is_file() and file.suffix != ".pyc":
                    files[f"facm/{file.relative_to(ROOT)}"] = file.read_text()
        files = {f"/home/user/{name}": content for name, content in files.items()}
        super().__init__(network, "laptop", "10.20.255.1", files, user="user")

    def run(self, script: str, timeout: float = 120) -> tuple[int, str]:
        """Exit status and output."""
        process = self.shell(script)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    @contextmanager
    def tunnel(self) -> Iterator[None]:
        """The cluster's dashboard at this machine's port 8265."""
        with (self.place / "tunnel.log").open("wb") as log:
            process = self.shell("exec ray dashboard cluster.yaml", output=log)
        try:
            self.run("until (: < /dev/tcp/127.0.0.1/8265); do sleep 0.2; done 2> /dev/null")
            yield
        finally:
            process.terminate()
            process.wait()


@dataclass(frozen=True, kw_only=True)
class Site:
    """All that there is before `ray up`."""

    network: Network
    cloud: Cloud
    laptop: Laptop


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        network = Network(tmp_path)
        stack.callback(network.end)
        tracking = Tracking(network)
        key = tmp_path / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
        image = {f"/home/{USER}/.bashrc": PROFILE, "/etc/ssl/mlflow.pem": tracking.certificate}
        cloud = Cloud(network, key.with_suffix(".pub").read_text(), image)
        stack.callback(cloud.stop)
        template = (ROOT / "infra" / "aws" / "cluster.yaml").read_text()
        files = {
            ".bashrc": f"{PROFILE}\nexport PATH=~/bin:$PATH RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265",
            ".mlflow/credentials": tracking.credentials,
            ".ray/auth_token": secrets.token_hex(32),
            ".ssh/facm": key.read_text(),
            "bin/aws": SESSION_MANAGER,
            "cluster.yaml": fill_in(template, cloud.provision()),
        }
        yield Site(network=network, cloud=cloud, laptop=Laptop(network, files))


SUBMIT = """
cd facm
ray job submit --working-dir . -- python jobs/distill.py --recipe digits_distill run.name=first \
    'run.storage_uri=${oc.env:FACM_STORAGE_URI}/runs' \
    'data.uri=${oc.env:FACM_STORAGE_URI}/latents/digits' \
    'teacher.uri=${oc.env:FACM_STORAGE_URI}/runs/digits-teacher/artifact' \
    train.images=2560 train.checkpoint_images=1280
"""


def require_secured(cloud: Cloud, instance: dict[str, Any], kind: str) -> None:
    print(instance)
    print(cloud.ask("ec2", "describe_volumes"))


def test_from_up_to_down(site: Site, digits_uri: str, teacher_uri: str) -> None:
    cloud, laptop = site.cloud, site.laptop
    started = time.monotonic()

    def done(what: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {what}", flush=True)

    cloud.upload(digits_uri, "latents/digits")
    cloud.upload(teacher_uri, "runs/digits-teacher/artifact")
    before = site.network.processes()

    status, output = laptop.run("ray up cluster.yaml --yes --no-config-cache")
    print(output)
    assert status == 0, output
    done("up")
    (head,) = cloud.instances()
    require_secured(cloud, head, "head")
    assert "InstanceLifecycle" not in head

    with laptop.tunnel():
        refused = laptop.run("RAY_AUTH_MODE=disabled ray job list")
        print(refused)
        refused = laptop.run("RAY_AUTH_TOKEN=0 ray job list")
        print(refused)
        done("token")
        status, output = laptop.run(SUBMIT, timeout=300)
        print(output)
    assert status == 0, output
    done("job")
    head_machine = cloud.machines[head["InstanceId"]]
    print(
        head_machine.shell(
            "ps ax; ls -la .ray; ls /tmp/ray/session_latest/logs; cat /tmp/ray/session_latest/logs/monitor.log|tail -80"
        ).communicate()[0]
    )
    (worker,) = [found for found in cloud.instances() if found != head]
    print(worker)
    print([o["Key"] for o in cloud.ask("s3", "list_objects_v2", Bucket="facm")["Contents"]])

    status, output = laptop.run("ray down cluster.yaml --yes")
    print(output)
    done("down")
    print("\n".join(site.network.processes()))
    print([i["State"] for i in cloud.instances()])
