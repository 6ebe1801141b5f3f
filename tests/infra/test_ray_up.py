"""infra/aws/cluster.yaml from `ray up` to `ray down`, on an AWS in namespaces."""

from __future__ import annotations

import re
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator
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
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

# What the README tells users of `ray job submit` to set.
CLIENT = "RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265"


class Laptop(Machine):
    """Whoever runs `ray up`: a checkout, the secrets, and AWS's command line."""

    def __init__(self, network: Network, files: dict[str, str]) -> None:
        for source in ("facm_core", "jobs", "platform"):
            for file in (ROOT / source).rglob("*"):
                if file.suffix in (".py", ".yaml"):
                    files[f"facm/{file.relative_to(ROOT)}"] = file.read_text()
        files = {f"/home/user/{name}": content for name, content in files.items()}
        super().__init__(network, "laptop", "10.20.255.1", files, user="user")

    def run(self, script: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.shell(script)
        output, _ = process.communicate(timeout=400)
        return process.returncode, output

    def jobs(self, header: str = "") -> str:
        """First line of the answer to a request for the cluster's jobs; "" when there is none."""
        request = f"GET /api/jobs/ HTTP/1.0\\r\\nHost: localhost\\r\\n{header}\\r\\n\\r\\n"
        connect = "{ exec 3<> /dev/tcp/127.0.0.1/8265; } 2> /dev/null || exit"
        return self.run(f'{connect}; printf "{request}" >&3; head -n 1 <&3')[1].strip()

    @contextmanager
    def tunnel(self) -> Iterator[None]:
        """The cluster's dashboard at this machine's port 8265."""
        with (self.place / "tunnel.log").open("wb") as log:
            process = self.shell("exec ray dashboard cluster.yaml", output=log)
        try:
            wait_until(lambda: self.jobs() != "", seconds=120)
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
            ".bashrc": f"{PROFILE}\nexport PATH=~/bin:$PATH {CLIENT}",
            ".mlflow/credentials": tracking.credentials,
            ".ray/auth_token": secrets.token_hex(32),
            ".ssh/facm": key.read_text(),
            "bin/aws": SESSION_MANAGER,
            "cluster.yaml": fill_in(template, cloud.provision()),
        }
        laptop = Laptop(network, files)
        stack.callback(laptop.end)
        yield Site(network=network, cloud=cloud, laptop=laptop)


SUBMIT = """
cd facm
ray job submit --working-dir . -- python jobs/distill.py --recipe digits_distill run.name=first \
    'run.storage_uri=${oc.env:FACM_STORAGE_URI}/runs' \
    'data.uri=${oc.env:FACM_STORAGE_URI}/latents/digits' \
    'teacher.uri=${oc.env:FACM_STORAGE_URI}/runs/digits-teacher/artifact' \
    train.images=1024 train.checkpoint_images=512
"""


def test_from_up_to_down(site: Site, digits_uri: str, teacher_uri: str) -> None:
    cloud, laptop = site.cloud, site.laptop
    started = time.monotonic()

    def done(what: str) -> None:
        print(f"{what}: {time.monotonic() - started:.0f} s", flush=True)

    cloud.upload(digits_uri, "latents/digits")
    cloud.upload(teacher_uri, "runs/digits-teacher/artifact")
    before = running(site)

    status, output = laptop.run("ray up cluster.yaml --yes --no-config-cache")
    assert status == 0, output
    done("ray up")
    (head,) = cloud.instances()
    require_as_told(cloud, head, "head")
    assert "InstanceLifecycle" not in head

    with laptop.tunnel():
        assert laptop.jobs() == "HTTP/1.0 401 Unauthorized"
        assert laptop.jobs("Authorization: Bearer 0000") == "HTTP/1.0 403 Forbidden"
        assert laptop.jobs("Authorization: Bearer $(cat ~/.ray/auth_token)") == "HTTP/1.0 200 OK"
        join = f"ray health-check --address {head['PrivateIpAddress']}:6379"
        status, output = laptop.run(f"RAY_AUTH_MODE=disabled {join}")
        assert status != 0
        assert "InvalidAuthToken" in output
        done("refusals")
        status, output = laptop.run(SUBMIT)
        assert status == 0, output
    done("job")
    (worker,) = [found for found in cloud.instances() if found["InstanceId"] != head["InstanceId"]]
    require_as_told(cloud, worker, "worker")
    assert worker["InstanceLifecycle"] == "spot"
    # Machines are named by their instance.
    workers = re.findall(r"worker (\d) of 2: process \d+ on (\S+)", output)
    assert sorted(set(workers)) == [(rank, worker["InstanceId"]) for rank in "01"]
    keys = cloud.keys("runs/first/")
    assert "runs/first/artifact/model.safetensors" in keys
    for images in (512, 1024):
        # The last file that a checkpoint gets.
        assert f"runs/first/checkpoint_{images:012}/.metadata" in keys

    status, output = laptop.run("ray down cluster.yaml --yes")
    assert status == 0, output
    states = {instance["State"]["Name"] for instance in cloud.instances()}
    assert states == {"terminated"}
    done("ray down")
    # ssh keeps a connection for ten seconds more.
    wait_until(lambda: running(site) == before, seconds=60)
    assert cloud.machines == {}


def running(site: Site) -> list[str]:
    """What runs anywhere in the network, but for MLflow's server, which may still be starting."""
    return sorted(line for line in site.network.processes() if "mlflow" not in line)


def require_as_told(cloud: Cloud, instance: dict[str, Any], kind: str) -> None:
    """As infra/aws/cluster.yaml has it, and not by Ray's defaults."""
    assert instance["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/facm-{kind}")
    assert [group["GroupName"] for group in instance["SecurityGroups"]] == ["facm"]
    assert instance["KeyName"] == "facm"
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    disks = [found["Ebs"]["VolumeId"] for found in instance["BlockDeviceMappings"]]
    volumes = cloud.ask("ec2", "describe_volumes", VolumeIds=disks)["Volumes"]
    assert [volume["Encrypted"] for volume in volumes] == [True]


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.5)
