"""Terraform's configuration: its own checks, and a real apply to an account of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.infra.cloud import ROOT, Terraform, account, client, missing, variables, write_variables
from tests.infra.cluster_files import findings

needs_provider = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

# What moto takes and does not give back, so that a plan wants to set it once more.
FORGOTTEN = {
    "aws_vpc_security_group_egress_rule": {"description"},
    "aws_vpc_security_group_ingress_rule": {"description"},
    "aws_db_parameter_group": {"parameter"},
    "aws_ecs_service": {"availability_zone_rebalancing"},
}


@pytest.mark.skipif(shutil.which("terraform") is None, reason="no terraform here")
def test_it_is_formatted() -> None:
    command = ["terraform", f"-chdir={ROOT / 'infra' / 'aws'}", "fmt", "-check", "-recursive"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@needs_provider
def test_it_is_valid(tmp_path: Path) -> None:
    terraform = Terraform(tmp_path, dict(os.environ))
    terraform("init", "-input=false")
    assert json.loads(terraform("validate", "-json"))["diagnostics"] == []
    mutant = terraform.folder / "modules" / "access" / "main.tf"
    mutant.write_text(mutant.read_text().replace("assume_role_policy", "assume_policy"))
    assert "assume_policy" in terraform("validate", "-json", codes=(1,))


@needs_provider
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_it_refuses_bad_values(tmp_path: Path) -> None:
    with account(tmp_path) as environment:
        terraform = Terraform(tmp_path, environment)
        terraform("init", "-input=false")
        assert "5 passed, 0 failed" in terraform("test", "-no-color")


@pytest.fixture(scope="module")
def applied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Terraform, dict[str, str]]]:
    """The whole platform, made in an account of our own."""
    folder = tmp_path_factory.mktemp("terraform")
    with account(folder) as environment:
        terraform = Terraform(folder, environment)
        write_variables(terraform, variables(environment))
        terraform("init", "-input=false")
        terraform("apply", "-input=false", "-auto-approve", "-parallelism=30", "-no-color")
        yield terraform, environment


Applied = tuple[Terraform, dict[str, str]]
slow = [pytest.mark.slow, pytest.mark.timeout(600), needs_provider]


class TestApplied:
    pytestmark = slow

    def test_a_second_plan_changes_nothing(self, applied: Applied) -> None:
        terraform, _ = applied
        terraform("plan", "-input=false", "-out=again", "-detailed-exitcode", codes=(0, 2))
        plan = json.loads(terraform("show", "-json", "again"))
        changes = [
            change
            for change in plan["resource_changes"]
            if change["change"]["actions"] not in (["no-op"], ["read"])
        ]
        for change in changes:
            assert change["change"]["actions"] == ["update"], change["address"]
            assert changed(change["change"]) == FORGOTTEN.get(change["type"]), change["address"]

    def test_the_cluster_file_is_filled_in(self, applied: Applied) -> None:
        terraform, environment = applied
        text = terraform("output", "-raw", "cluster")
        assert "${" not in text
        config = yaml.safe_load(text)
        machines = {n: t["node_config"] for n, t in config["available_node_types"].items()}
        # Those that want the placeholder itself.
        placeholders = ("another profile", "one security group")
        assert not [f for f in findings(config) if not any(p in f for p in placeholders)]
        ec2 = client("ec2", environment)
        for name, machine in machines.items():
            profile = machine["IamInstanceProfile"]["Name"]
            assert profile == ("facm-head" if name == "head" else "facm-worker")
            (group,) = ec2.describe_security_groups(GroupIds=machine["SecurityGroupIds"])[
                "SecurityGroups"
            ]
            assert group["GroupName"] == "facm-cluster"
            subnets = ec2.describe_subnets(SubnetIds=machine["SubnetIds"])["Subnets"]
            assert not any(subnet["MapPublicIpOnLaunch"] for subnet in subnets)

    def test_nothing_is_open_to_the_world(self, applied: Applied) -> None:
        ec2 = client("ec2", applied[1])
        vpc = ec2.describe_vpcs(Filters=[{"Name": "tag:Name", "Values": ["facm"]}])["Vpcs"][0]
        of_vpc = [{"Name": "vpc-id", "Values": [vpc["VpcId"]]}]
        groups = ec2.describe_security_groups(Filters=of_vpc)["SecurityGroups"]
        assert len(groups) == 6
        for group in groups:
            for rule in [*group["IpPermissions"], *group["IpPermissionsEgress"]]:
                cidrs = {r["CidrIp"] for r in rule["IpRanges"]}
                assert cidrs <= {vpc["CidrBlock"]}, group["GroupName"]
                assert not rule["Ipv6Ranges"]
        (cluster,) = [g for g in groups if g["GroupName"] == "facm-cluster"]
        (ingress,) = cluster["IpPermissions"]
        assert [p["GroupId"] for p in ingress["UserIdGroupPairs"]] == [cluster["GroupId"]]
        (default,) = [g for g in groups if g["GroupName"] == "default"]
        assert default["IpPermissions"] == default["IpPermissionsEgress"] == []
        gateways = [{"Name": "attachment.vpc-id", "Values": [vpc["VpcId"]]}]
        assert ec2.describe_internet_gateways(Filters=gateways)["InternetGateways"] == []
        assert ec2.describe_nat_gateways(Filters=of_vpc)["NatGateways"] == []
        logs = ec2.describe_flow_logs(Filters=[])["FlowLogs"]
        assert [log["ResourceId"] for log in logs] == [vpc["VpcId"]]

    def test_the_bucket(self, applied: Applied) -> None:
        terraform, environment = applied
        s3, name = client("s3", environment), terraform("output", "-raw", "bucket")
        assert all(
            s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"].values()
        )
        assert s3.get_bucket_versioning(Bucket=name)["Status"] == "Enabled"
        (rule,) = s3.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"][
            "Rules"
        ]
        assert rule["ApplyServerSideEncryptionByDefault"] == {
            "SSEAlgorithm": "aws:kms",
            "KMSMasterKeyID": key(environment)["Arn"],
        }
        (statement,) = json.loads(s3.get_bucket_policy(Bucket=name)["Policy"])["Statement"]
        assert statement["Effect"] == "Deny"
        assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
        assert statement["Principal"] == "*"
        assert set(statement["Resource"]) == {f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"}
        rules = s3.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
        by_id = {rule["ID"]: rule for rule in rules}
        assert by_id["old-checkpoints"]["NoncurrentVersionExpiration"]["NoncurrentDays"] == 7
        assert by_id["broken-uploads"]["AbortIncompleteMultipartUpload"] == {
            "DaysAfterInitiation": 2
        }
        # A run's results never expire by age.
        assert all("Days" not in rule.get("Expiration", {}) for rule in rules)

    def test_the_key_rotates(self, applied: Applied) -> None:
        kms, ours = client("kms", applied[1]), key(applied[1])
        assert kms.get_key_rotation_status(KeyId=ours["KeyId"])["KeyRotationEnabled"]

    def test_the_database(self, applied: Applied) -> None:
        rds = client("rds", applied[1])
        (database,) = rds.describe_db_instances()["DBInstances"]
        assert database["StorageEncrypted"]
        assert database["KmsKeyId"] == key(applied[1])["Arn"]
        assert not database["PubliclyAccessible"]
        assert database["DeletionProtection"]
        assert database["BackupRetentionPeriod"] == 14
        assert database["MasterUserSecret"]["SecretStatus"] == "active"

    def test_mlflow(self, applied: Applied) -> None:
        ecs, elb = client("ecs", applied[1]), client("elbv2", applied[1])
        task = ecs.describe_task_definition(taskDefinition="facm-mlflow")["taskDefinition"]
        (container,) = task["containerDefinitions"]
        assert container["readonlyRootFilesystem"]
        assert container["user"] == "10001:10001"
        secrets = {secret["name"] for secret in container["secrets"]}
        assert secrets == {
            "PGPASSWORD",
            "MLFLOW_AUTH_ADMIN_PASSWORD",
            "MLFLOW_FLASK_SERVER_SECRET_KEY",
        }
        assert not secrets & {variable["name"] for variable in container["environment"]}
        (balancer,) = elb.describe_load_balancers()["LoadBalancers"]
        assert balancer["Scheme"] == "internal"
        (listener,) = elb.describe_listeners(LoadBalancerArn=balancer["LoadBalancerArn"])[
            "Listeners"
        ]
        assert (listener["Protocol"], listener["Port"]) == ("HTTPS", 443)
        assert "TLS13" in listener["SslPolicy"]

    def test_images_are_scanned_and_never_replaced(self, applied: Applied) -> None:
        (repository,) = client("ecr", applied[1]).describe_repositories()["repositories"]
        assert repository["imageTagMutability"] == "IMMUTABLE"
        assert repository["imageScanningConfiguration"]["scanOnPush"]
        assert repository["encryptionConfiguration"]["encryptionType"] == "KMS"

    def test_roles(self, applied: Applied) -> None:
        iam = client("iam", applied[1])
        training = json.loads((ROOT / "infra/aws/modules/access/training.json").read_text())
        worker = statements(iam, "facm-worker")
        assert [s["Sid"] for s in worker] == [s["Sid"] for s in training["Statement"]]
        head = {s["Sid"]: s for s in statements(iam, "facm-head")}
        assert {s["Sid"] for s in worker} < set(head)
        actions = {a for s in head.values() for a in as_list(s["Action"])}
        assert not any(a.endswith(":*") or a == "*" for a in actions)
        assert as_list(head["WorkersRoleOnly"]["Resource"]) == [
            "arn:aws:iam::123456789012:role/facm-worker"
        ]
        assert head["OwnMachines"]["Condition"] == {
            "StringEquals": {"ec2:ResourceTag/ray-cluster-name": "facm"}
        }
        assert head["StartAs"]["Condition"]["StringEquals"]["ec2:MetadataHttpTokens"] == "required"

    def test_no_secret_is_in_the_state(self, applied: Applied) -> None:
        terraform, environment = applied
        manager = client("secretsmanager", environment)
        state = (terraform.folder / "terraform.tfstate").read_text()
        listed = [s["Name"] for s in manager.list_secrets()["SecretList"]]
        ours = [name for name in listed if name.startswith("facm/")]
        assert len(ours) == 2
        for name in ours:
            secret = manager.get_secret_value(SecretId=name)["SecretString"]
            assert len(secret) == 40
            assert secret not in state


def changed(change: dict[str, Any]) -> set[str]:
    before, after = change["before"] or {}, change["after"] or {}
    return {name for name in before | after if before.get(name) != after.get(name)}


def key(environment: dict[str, str]) -> dict[str, Any]:
    kms = client("kms", environment)
    found: dict[str, Any] = kms.describe_key(KeyId="alias/facm")["KeyMetadata"]
    return found


def statements(iam: Any, role: str) -> list[dict[str, Any]]:
    """Of the role's one policy; it has no other."""
    assert iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"] == []
    (name,) = iam.list_role_policies(RoleName=role)["PolicyNames"]
    document: dict[str, Any] = iam.get_role_policy(RoleName=role, PolicyName=name)["PolicyDocument"]
    found: list[dict[str, Any]] = document["Statement"]
    return found


def as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value
