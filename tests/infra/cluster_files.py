"""What Ray's own validation of a cluster file lets through, and we do not."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import botocore.session
import yaml
from botocore.validate import ParamValidator
from jsonschema import Draft202012Validator
from ray.autoscaler._private.util import prepare_config, validate_config

INFRA = Path(__file__).resolve().parents[2] / "infra"
Config = dict[str, Any]

PROVIDER_KEYS = {
    "aws": {"type", "region", "availability_zone", "use_internal_ips", "cache_stopped_nodes"},
    "gcp": {
        *("type", "region", "availability_zone", "project_id"),
        *("use_internal_ips", "cache_stopped_nodes"),
    },
}
SETUP = ("setup_commands", "head_setup_commands", "worker_setup_commands")
START = ("head_start_ray_commands", "worker_start_ray_commands")


def load(cloud: str) -> Config:
    """The cluster file of a cloud, as it is committed: with names in braces to be filled in."""
    config: Config = yaml.safe_load((INFRA / cloud / "cluster.yaml").read_text())
    return config


def findings(config: Config) -> list[str]:
    """Everything that is wrong with a cluster file; nothing, if it is right."""
    try:
        validate_config(prepare_config(json.loads(json.dumps(config))))
    except Exception as error:
        return [f"ray: {str(error).splitlines()[0]}"]
    cloud = config["provider"]["type"]
    machine = {"aws": _aws_machine, "gcp": _gcp_machine}[cloud]
    found = list(_common(config, cloud))
    for name, node in config["available_node_types"].items():
        head = name == config["head_node_type"]
        found += [f"{name}: {finding}" for finding in machine(node["node_config"], head)]
    return found


def _common(config: Config, cloud: str) -> Iterator[str]:
    provider, types = config["provider"], config["available_node_types"]
    if not config.get("cluster_name"):
        yield "cluster_name is missing"
    for key in sorted(set(provider) ^ PROVIDER_KEYS[cloud]):
        yield f"provider: {key} is {'unknown' if key in provider else 'missing'}"
    if provider.get("use_internal_ips") is not True:
        yield "provider: nodes get public addresses"
    if any(config.get(key) != [] for key in SETUP):
        yield "the image has everything: the setup lists are empty"
    if "~/.ray/auth_token" not in config.get("file_mounts", {}):
        yield "no node gets the token"
    for key in START:
        if not any("RAY_AUTH_MODE=token" in line for line in config[key]):
            yield f"{key} start Ray without the token"
        if cloud == "aws" and "AWS_DEFAULT_REGION=" not in str(config[key]):
            yield f"{key} tell no region: S3 is asked in us-east-1"
    if not any("--dashboard-host=127.0.0.1" in line for line in config[START[0]]):
        yield "the dashboard listens on the network"
    workers = [name for name in types if name != config["head_node_type"]]
    if not any(_is_spot(types[name]["node_config"]) for name in workers):
        yield "no spot workers"
    if all(_is_spot(types[name]["node_config"]) for name in workers):
        yield "no workers to fall back to when there is no spot machine"
    if _is_spot(types[config["head_node_type"]]["node_config"]):
        yield "a head on a spot machine takes the cluster with it"
    for name in workers:
        most = types[name].get("max_workers", 0)
        if not 0 <= types[name].get("min_workers", 0) <= most or not most:
            yield f"{name}: no range to scale in"
        if _is_spot(types[name]["node_config"]) != (types[name].get("priority") == 1):
            yield f"{name}: spot has priority 1, and nothing else has"


def _is_spot(machine: Config) -> bool:
    aws = machine.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return aws or machine.get("scheduling", {}).get("provisioningModel") == "SPOT"


def _aws_machine(machine: Config, head: bool) -> Iterator[str]:
    # Ray makes SubnetId of one of these, and counts for itself.
    asked = {k: v for k, v in machine.items() if k != "SubnetIds"}
    shape = _run_instances()
    for key in sorted(set(asked) - set(shape.members)):
        yield f"RunInstances has no {key}"
    counted = asked | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(counted, shape)
    yield from (line for line in report.generate_report().splitlines() if line)
    yield from _unknown(asked, shape, "")
    profile = machine.get("IamInstanceProfile", {}).get("Name")
    if profile != ("${head_profile}" if head else "${worker_profile}"):
        yield "it runs under another profile than Terraform's for its kind"
    if machine.get("SecurityGroupIds") != ["${security_group}"]:
        yield "not in the one security group of the cluster"
    if not machine.get("SubnetIds"):
        yield "no subnets: Ray would take any"
    if machine.get("MetadataOptions", {}).get("HttpTokens") != "required":
        yield "IMDSv1 answers"
    volumes = [volume.get("Ebs", {}) for volume in machine.get("BlockDeviceMappings", [])]
    if not volumes or not all(v.get("Encrypted") and v.get("KmsKeyId") for v in volumes):
        yield "a volume is not encrypted with the platform's key"
    if "KeyName" not in machine:
        yield "no key pair: Ray would make one"


@cache
def _run_instances() -> Any:
    return (
        botocore.session.get_session()
        .get_service_model("ec2")
        .operation_model("RunInstances")
        .input_shape
    )


def _unknown(value: Any, shape: Any, path: str) -> Iterator[str]:
    """Keys that botocore would drop without a word, at any depth; the outermost are known."""
    if shape.type_name == "structure" and isinstance(value, dict):
        for key, item in value.items():
            if key in shape.members:
                yield from _unknown(item, shape.members[key], f"{path}.{key}")
            elif path:
                yield f"{path[1:]} has no {key}"
    elif shape.type_name == "list" and isinstance(value, list):
        for item in value:
            yield from _unknown(item, shape.member, path)


def _gcp_machine(machine: Config, head: bool) -> Iterator[str]:
    for error in _instance_schema().iter_errors(machine):
        yield f"{'.'.join(map(str, error.path))}: {error.message}"
    wanted = f"facm-{'head' if head else 'worker'}@${{FACM_PROJECT}}.iam.gserviceaccount.com"
    if [a["email"] for a in machine.get("serviceAccounts", [])] != [wanted]:
        yield "it runs under another service account than that of its kind"
    nets = machine.get("networkInterfaces", [])
    if not nets or any("accessConfigs" in net for net in nets):
        yield "it has a public address"
    shielded = machine.get("shieldedInstanceConfig", {})
    if not all(shielded.get(k) for k in ("enableSecureBoot", "enableVtpm")):
        yield "it is not shielded"
    if not all("kmsKeyName" in d.get("diskEncryptionKey", {}) for d in machine.get("disks", [])):
        yield "a disk is not encrypted with the platform's key"


@cache
def _instance_schema() -> Draft202012Validator:
    """Compute Engine's Instance, from the API's own description; unknown keys are refused."""
    documents = importlib.resources.files("googleapiclient") / "discovery_cache" / "documents"
    described = json.loads((documents / "compute.v1.json").read_text())["schemas"]
    known = {name: _closed(schema) for name, schema in described.items()}
    return Draft202012Validator({"$ref": "#/$defs/Instance", "$defs": known})


def _closed(schema: Any) -> Any:
    """The description as a JSON schema: references resolved, nothing beside what it names."""
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return {"$ref": f"#/$defs/{schema['$ref']}"}
    kept = {k: schema[k] for k in ("type", "enum", "pattern") if k in schema and k != "id"}
    if schema.get("type") == "any":
        kept = {}
    if "items" in schema:
        kept["items"] = _closed(schema["items"])
    if "properties" in schema:
        kept["properties"] = {k: _closed(v) for k, v in schema["properties"].items()}
    if schema.get("type") == "object":
        kept["additionalProperties"] = _closed(schema.get("additionalProperties", False))
    return kept
