"""Terraform and an AWS account of our own: moto on loopback."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from tests.conftest import answers_on, free_port

ROOT = Path(__file__).resolve().parents[2]
REGION = "us-west-2"
PROVIDER = "registry.terraform.io/hashicorp/aws/5.100."
_PLUGINS = (
    *("~/.terraform.d/plugins", "~/.local/share/terraform/plugins"),
    *("/usr/local/share/terraform/plugins", "/usr/share/terraform/plugins"),
)


def plugin_folder() -> Path | None:
    """Where the AWS provider lies on this machine: nothing is downloaded."""
    usual = [Path(folder).expanduser() for folder in _PLUGINS]
    for folder in (*usual, *Path("/opt").glob("*")):
        if list(folder.glob(f"{PROVIDER}*")):
            return folder
    return None


def missing() -> str:
    """Why Terraform cannot run here; empty if it can."""
    if shutil.which("terraform") is None:
        return "no terraform here"
    if plugin_folder() is None:
        return f"no folder of Terraform plugins with {PROVIDER}* here"
    return ""


class Terraform:
    """The configuration in a folder of its own, with the provider that lies on this machine."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder / "aws"
        shutil.copytree(ROOT / "infra" / "aws", self.folder)
        settings = folder / "terraform.rc"
        mirror = f'filesystem_mirror {{ path = "{plugin_folder()}" }}'
        settings.write_text(f"provider_installation {{\n  {mirror}\n}}\n")
        self.environment = environment | {
            "TF_CLI_CONFIG_FILE": str(settings),
            "TF_IN_AUTOMATION": "1",
            "CHECKPOINT_DISABLE": "1",
        }

    def __call__(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
        done = subprocess.run(
            ["terraform", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=420,
        )
        assert done.returncode in codes, (done.stderr or done.stdout)[-4000:]
        return done.stdout


@contextmanager
def account(folder: Path) -> Iterator[dict[str, str]]:
    """A moto server with nothing in it; gives the environment of its clients."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "moto.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 60
        while not answers_on(port):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield {name: value for name, value in os.environ.items() if "AWS_" not in name} | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_DEFAULT_REGION": REGION,
        }
    finally:
        process.kill()
        process.wait()


def client(service: str, environment: dict[str, str]) -> Any:
    """A boto3 client of the account."""
    return boto3.client(
        service,
        region_name=REGION,
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )


def variables(environment: dict[str, str]) -> dict[str, str]:
    """What a person brings along: a zone, a certificate, an image, a key."""
    zone = client("route53", environment).create_hosted_zone(
        Name="example.com", CallerReference="1"
    )
    image = client("ec2", environment).describe_images(Owners=["amazon"])["Images"][0]
    digest = "4fbb8e6a8395de5a7550b33509421a2bafbc0aab6c06ba2cef9ebffbc7092d90"
    return {
        "machine_image": image["ImageId"],
        "mlflow_image": f"123456789012.dkr.ecr.us-west-2.amazonaws.com/facm@sha256:{digest}",
        "mlflow_host": "mlflow.example.com",
        "zone_id": zone["HostedZone"]["Id"].removeprefix("/hostedzone/"),
        "certificate_arn": _certificate(environment),
        "public_key": _public_key(),
    }


def write_variables(terraform: Terraform, values: dict[str, str]) -> None:
    """As terraform.tfvars.json, and the provider told that S3 has no names of hosts here."""
    (terraform.folder / "terraform.tfvars.json").write_text(json.dumps(values))
    override = 'provider "aws" {\n  s3_use_path_style = true\n}\n'
    (terraform.folder / "moto_override.tf").write_text(override)


def _public_key() -> str:
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    key = ed25519.Ed25519PrivateKey.generate().public_key()
    return key.public_bytes(encoding, form).decode()


def _certificate(environment: dict[str, str]) -> str:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mlflow.example.com")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).serial_number(1)
    builder = builder.not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    certificate = builder.public_key(key.public_key()).sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    imported = client("acm", environment).import_certificate(
        Certificate=certificate.public_bytes(pem),
        PrivateKey=key.private_bytes(
            pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption()
        ),
    )
    return str(imported["CertificateArn"])
