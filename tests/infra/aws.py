"""An AWS whose instances are real machines: moto's word, and namespaces that follow it."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
from botocore.exceptions import EndpointConnectionError

from tests.infra import tracking
from tests.infra.namespaces import GATEWAY, Machine, Network

REGION = "us-west-2"
ENDPOINT = f"http://{GATEWAY}:5000"
USER = "ubuntu"
# As moto expects them; it looks at neither.
_KEYS = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}

PROFILE = f"""
export PATH={sys.prefix}/bin:$PATH AWS_ENDPOINT_URL={ENDPOINT} AWS_EC2_METADATA_DISABLED=true
export {" ".join(f"{name.upper()}={value}" for name, value in _KEYS.items())}
export MLFLOW_TRACKING_SERVER_CERT_PATH=/etc/ssl/mlflow.pem
"""
"""What a machine's image and role give to those who log in."""

SESSION_MANAGER = f"""#!{sys.prefix}/bin/python
import socket, sys, threading
import boto3

options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
assert sys.argv[1:3] == ["ssm", "start-session"], sys.argv
assert options["--document-name"] == "AWS-StartSSHSession", sys.argv
port = options["--parameters"].removeprefix("portNumber=")
ec2 = boto3.client("ec2", options["--region"])
(found,) = ec2.describe_instances(InstanceIds=[options["--target"]])["Reservations"]
address = found["Instances"][0]["PrivateIpAddress"]
with socket.create_connection((address, int(port)), timeout=10) as server:
    server.settimeout(None)

    def send():
        while sent := sys.stdin.buffer.raw.read(65536):
            server.sendall(sent)
        server.shutdown(socket.SHUT_WR)

    threading.Thread(target=send, daemon=True).start()
    while received := server.recv(65536):
        sys.stdout.buffer.raw.write(received)
"""
"""``aws ssm start-session``, as far as ``ssh`` needs it."""


class Cloud:
    """moto's EC2, IAM, KMS and S3 at `ENDPOINT`, with a machine for each instance that runs.

    Args:
        network: Where the machines are.
        public_key: Who may log in to them.
        image: Their files, by absolute path.
    """

    def __init__(self, network: Network, public_key: str, image: dict[str, str]) -> None:
        self.machines: dict[str, Machine] = {}
        self._network, self._public_key, self._image = network, public_key, image
        strict = ("EC2_ENABLE_INSTANCE_TYPE", "ENABLE_AMI", "ENABLE_KEYPAIR")
        command = ["env", *(f"MOTO_{name}_VALIDATION=true" for name in strict)]
        command += [sys.executable, "-m", "moto.server", "-H", GATEWAY, "-p", "5000"]
        with (network.folder / "moto.log").open("wb") as log:
            network.start(*command, output=log)
        # Threads that live in the network; the tests themselves do not.
        self._pool = ThreadPoolExecutor(2, initializer=_enter, initargs=(network.init,))
        self._clients = {
            name: boto3.client(name, REGION, endpoint_url=ENDPOINT, **_KEYS)
            for name in ("ec2", "iam", "kms", "s3")
        }
        self._wait_for_moto()
        self._stopped = threading.Event()
        self._operator = self._pool.submit(self._operate)

    def ask(self, service: str, operation: str, /, **arguments: Any) -> Any:
        """Call boto3 inside the network."""
        return self._pool.submit(getattr(self._clients[service], operation), **arguments).result()

    def upload(self, folder: str, prefix: str) -> None:
        """Copy the files of a folder to the cluster's bucket."""
        for file in Path(folder).iterdir():
            key = f"{prefix}/{file.name}"
            self.ask("s3", "put_object", Bucket="facm", Key=key, Body=file.read_bytes())

    def keys(self, prefix: str) -> list[str]:
        """Of the bucket's objects."""
        found = self.ask("s3", "list_objects_v2", Bucket="facm", Prefix=prefix)
        return [entry["Key"] for entry in found["Contents"]]

    def instances(self) -> list[dict[str, Any]]:
        """All that were ever started."""
        return _instances(self.ask("ec2", "describe_instances"))

    def provision(self) -> dict[str, str]:
        """Make what infra/aws/*.tf makes, as far as the cluster's file names it."""
        ask = self.ask
        vpc = ask("ec2", "create_vpc", CidrBlock="10.20.0.0/16")["Vpc"]["VpcId"]
        subnet = {
            zone: ask(
                "ec2",
                "create_subnet",
                VpcId=vpc,
                CidrBlock=block,
                AvailabilityZone=f"{REGION}{zone}",
            )["Subnet"]["SubnetId"]
            for zone, block in (("a", "10.20.0.0/20"), ("b", "10.20.16.0/20"))
        }
        group = ask(
            "ec2", "create_security_group", GroupName="facm", Description="nodes", VpcId=vpc
        )["GroupId"]
        itself = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ask("ec2", "authorize_security_group_ingress", GroupId=group, IpPermissions=[itself])
        ask("ec2", "import_key_pair", KeyName="facm", PublicKeyMaterial=self._public_key.encode())
        for kind in ("head", "worker"):
            ask("iam", "create_instance_profile", InstanceProfileName=f"facm-{kind}")
        ask(
            "s3",
            "create_bucket",
            Bucket="facm",
            CreateBucketConfiguration={"LocationConstraint": REGION},
        )
        return {
            "name": "facm",
            "region": REGION,
            "availability_zones": f"{REGION}a,{REGION}b",
            "machine_image": ask("ec2", "register_image", Name="facm")["ImageId"],
            "key_pair": "facm",
            "head_profile": "facm-head",
            "worker_profile": "facm-worker",
            "security_group": group,
            "subnet_a": subnet["a"],
            "subnet_b": subnet["b"],
            "kms_key": ask("kms", "create_key")["KeyMetadata"]["Arn"],
            "bucket": "facm",
            "mlflow_host": tracking.HOST,
        }

    def stop(self) -> None:
        """Switch all machines off. moto ends with the network."""
        self._stopped.set()
        try:
            self._operator.result()
        finally:
            self._pool.shutdown()
            for machine in self.machines.values():
                machine.end()

    def _operate(self) -> None:
        """Start a machine for each new instance, and end those of the terminated ones."""
        while not self._stopped.wait(0.3):
            for instance in _instances(self._clients["ec2"].describe_instances()):
                name, state = instance["InstanceId"], instance["State"]["Name"]
                if state == "running" and name not in self.machines:
                    self.machines[name] = self._boot(name, instance["PrivateIpAddress"])
                elif state == "terminated" and name in self.machines:
                    self.machines.pop(name).end()

    def _boot(self, name: str, address: str) -> Machine:
        files = self._image | {f"/home/{USER}/.ssh/authorized_keys": self._public_key}
        return Machine(self._network, name, address, files, USER)

    def _wait_for_moto(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.ask("s3", "list_buckets")
            except EndpointConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


def fill_in(template: str, values: dict[str, str]) -> str:
    """As Terraform's ``templatefile`` does; a name without a value is an error."""
    return re.sub(r"\$\{(\w+)\}", lambda name: values[name[1]], template)


def _instances(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [found for group in answer["Reservations"] for found in group["Instances"]]


def _enter(process: int) -> None:
    """Move this thread into the network namespace of that process."""
    with Path(f"/proc/{process}/ns/net").open() as space:
        if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), "setns")
