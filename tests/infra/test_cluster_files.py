"""The files for `ray up`: right as they are, and every fault in them is seen."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.infra.cluster_files import Config, findings, load

Mutation = Callable[[Config], object]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_nothing_is_wrong(cloud: str) -> None:
    assert findings(load(cloud)) == []


def machine(config: Config, kind: str = "gpu_spot") -> Config:
    node: Config = config["available_node_types"][kind]["node_config"]
    return node


# what is done to the file, and a word of what must be said about it
COMMON: list[tuple[Mutation, str]] = [
    (lambda c: c.update(idle_timeout_minute=5), "idle_timeout_minute"),
    (lambda c: c.pop("cluster_name"), "cluster_name is missing"),
    (lambda c: c.update(head_node_type="heads"), "ray: "),
    (lambda c: c["provider"].update(cache_stoped_nodes=False), "cache_stoped_nodes is unknown"),
    (lambda c: c["provider"].pop("use_internal_ips"), "public addresses"),
    (lambda c: c["provider"].update(use_internal_ips=False), "public addresses"),
    (lambda c: c.pop("setup_commands"), "setup lists"),
    (lambda c: c["setup_commands"].append("pip install ray"), "setup lists"),
    (lambda c: c["file_mounts"].pop("~/.ray/auth_token"), "no node gets the token"),
    (lambda c: c["head_start_ray_commands"].pop(), "without the token"),
    (lambda c: c.update(worker_start_ray_commands=["ray start"]), "without the token"),
    (
        lambda c: c.update(
            head_start_ray_commands=[
                line.replace("127.0.0.1", "0.0.0.0") for line in c["head_start_ray_commands"]
            ]
        ),
        "dashboard listens",
    ),
    (lambda c: c["available_node_types"].pop("gpu_on_demand"), "fall back"),
    (lambda c: c["available_node_types"].pop("gpu_spot"), "no spot workers"),
    (lambda c: c["available_node_types"]["gpu_spot"].update(max_workers=0), "range to scale"),
    (lambda c: c["available_node_types"]["gpu_on_demand"].update(priority=1), "priority"),
]
AWS: list[tuple[Mutation, str]] = [
    (lambda c: c.update(worker_start_ray_commands=["RAY_AUTH_MODE=token ray start"]), "no region"),
    (lambda c: machine(c).update(InstanceTyp="p5.4xlarge"), "no InstanceTyp"),
    (lambda c: machine(c).update(InstanceType=["p5.4xlarge"]), "Invalid type"),
    (lambda c: machine(c)["MetadataOptions"].update(HttpToken="required"), "no HttpToken"),
    (lambda c: machine(c)["MetadataOptions"].update(HttpTokens="optional"), "IMDSv1"),
    (lambda c: machine(c).pop("MetadataOptions"), "IMDSv1"),
    (lambda c: machine(c, "head").pop("IamInstanceProfile"), "profile"),
    (lambda c: machine(c).update(IamInstanceProfile={"Name": "${head_profile}"}), "profile"),
    (lambda c: machine(c).pop("SecurityGroupIds"), "security group"),
    (
        lambda c: c["provider"].update(
            security_group={"IpPermissions": [{"FromPort": 22, "ToPort": 22}]}
        ),
        "security_group is unknown",
    ),
    (lambda c: machine(c)["BlockDeviceMappings"][0]["Ebs"].pop("Encrypted"), "not encrypted"),
    (lambda c: machine(c)["BlockDeviceMappings"][0]["Ebs"].update(Encrypt=True), "no Encrypt"),
    (lambda c: machine(c).pop("BlockDeviceMappings"), "not encrypted"),
    (lambda c: machine(c).pop("SubnetIds"), "Ray would take any"),
    (lambda c: machine(c).pop("KeyName"), "no key pair"),
    (
        lambda c: machine(c, "head").update(InstanceMarketOptions={"MarketType": "spot"}),
        "takes the cluster with it",
    ),
]
GCP: list[tuple[Mutation, str]] = [
    (lambda c: machine(c).update(machineTyp="a3"), "machineTyp"),
    (lambda c: machine(c).update(machineType=3), "machineType"),
    (lambda c: machine(c)["shieldedInstanceConfig"].update(secureBoot=True), "secureBoot"),
    (lambda c: machine(c)["shieldedInstanceConfig"].update(enableVtpm=False), "not shielded"),
    (lambda c: machine(c)["disks"][0].update(autodelete=True), "autodelete"),
    (lambda c: machine(c)["disks"][0].pop("diskEncryptionKey"), "not encrypted"),
    (lambda c: machine(c).pop("serviceAccounts"), "service account"),
    (
        lambda c: machine(c)["networkInterfaces"][0].update(
            accessConfigs=[{"type": "ONE_TO_ONE_NAT"}]
        ),
        "public address",
    ),
    (lambda c: machine(c)["scheduling"].update(provisioningModel="CHEAP"), "CHEAP"),
    (lambda c: c["provider"].pop("project_id"), "project_id is missing"),
]


@pytest.mark.parametrize(
    ("cloud", "mutation", "said"),
    [(cloud, *m) for cloud in ("aws", "gcp") for m in COMMON]
    + [("aws", *m) for m in AWS]
    + [("gcp", *m) for m in GCP],
)
def test_a_fault_is_seen(cloud: str, mutation: Mutation, said: str) -> None:
    config = unshared(load(cloud))
    mutation(config)
    assert any(said in finding for finding in findings(config)), findings(config)


def unshared(value: object) -> Config:
    """Without YAML's anchors, which make one machine of several: a mutation changes one."""
    config: Config = json.loads(json.dumps(value))
    return config
