"""What a worker's credentials allow: exactly what training does, and nothing else."""

from __future__ import annotations

import itertools
from pathlib import Path

import botocore.session
import pytest
from moto.iam.access_control import IAMPolicy, PermissionResult

ACCESS = Path(__file__).resolve().parents[2] / "infra" / "aws" / "modules" / "access"
BUCKET = "arn:aws:s3:::facm"
KEY = "arn:aws:kms:us-west-2:123456789012:key/ours"
OBJECT = f"{BUCKET}/runs/a/checkpoint"

ALLOWED = {
    *((f"s3:{action}Object", OBJECT) for action in ("Get", "Put", "Delete")),
    ("s3:AbortMultipartUpload", OBJECT),
    ("s3:ListMultipartUploadParts", OBJECT),
    ("s3:ListBucket", BUCKET),
    ("kms:Decrypt", KEY),
    ("kms:GenerateDataKey", KEY),
}
RESOURCES = (
    *(OBJECT, BUCKET, KEY, "*"),
    *("arn:aws:s3:::facm-others/runs/a", "arn:aws:s3:::facm-others", f"{BUCKET}s/object"),
    "arn:aws:kms:us-west-2:123456789012:key/others",
    "arn:aws:ec2:us-west-2:123456789012:instance/i-1",
    "arn:aws:iam::123456789012:role/facm-head",
    "arn:aws:secretsmanager:us-west-2:123456789012:secret:facm/mlflow-admin-password",
)


@pytest.fixture(scope="module")
def policy() -> IAMPolicy:
    """The policy as Terraform fills it in, read by moto's evaluator."""
    text = (ACCESS / "training.json").read_text()
    text = text.replace("${bucket_arn}", BUCKET).replace("${kms_key_arn}", KEY)
    assert "${" not in text
    return IAMPolicy(text)


def permits(policy: IAMPolicy, action: str, resource: str) -> bool:
    verdict = policy.is_action_permitted(action, resource=resource)
    return bool(verdict == PermissionResult.PERMITTED)


def actions() -> set[str]:
    """Every operation of the services on which a stolen credential would be tried, and the
    permissions of S3 that are not named as the operations are."""
    session = botocore.session.get_session()
    services = ("s3", "kms", "ec2", "iam", "sts", "ssm", "secretsmanager", "ecr", "rds", "logs")
    named = {
        f"{service}:{operation}"
        for service in services
        for operation in session.get_service_model(service).operation_names
    }
    return named | {action for action, _ in ALLOWED} | {"s3:PutBucketAcl", "s3:GetObjectVersion"}


def test_exactly_what_training_does(policy: IAMPolicy) -> None:
    every = itertools.product(sorted(actions()), RESOURCES)
    assert {pair for pair in every if permits(policy, *pair)} == ALLOWED


def test_a_wider_policy_would_be_seen() -> None:
    text = (ACCESS / "training.json").read_text().replace('"s3:GetObject"', '"s3:Get*"')
    wide = IAMPolicy(text.replace("${bucket_arn}", BUCKET))
    assert permits(wide, "s3:GetObjectAcl", OBJECT)
    assert ("s3:GetObjectAcl", OBJECT) not in ALLOWED


def test_the_workers_role_has_this_policy_and_no_other() -> None:
    text = (ACCESS / "main.tf").read_text()
    given = text.split('resource "aws_iam_role_policy" "worker"')[1].split("}")[0]
    assert "policy = local.training" in given
    assert text.count("aws_iam_role.worker.id") == 1
    assert "aws_iam_role_policy_attachment" not in text
    assert "managed_policy_arns" not in text
