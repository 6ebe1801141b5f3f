# Who may do what: a role for each kind of node. Ray's own default gives the head all of EC2 and S3.

variable "name" { type = string }
variable "bucket_arn" { type = string }
variable "kms_key_arn" { type = string }
variable "subnet_ids" { type = list(string) }
variable "public_key" { type = string }

data "aws_caller_identity" "current" {}
data "aws_region" "current" {}

locals {
  # What training does: read and write the bucket's objects, list them, use the key.
  training = templatefile("${path.module}/training.json", {
    bucket_arn  = var.bucket_arn
    kms_key_arn = var.kms_key_arn
  })
  ec2 = "arn:aws:ec2:${data.aws_region.current.name}:${data.aws_caller_identity.current.account_id}"
}

data "aws_iam_policy_document" "machines" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

# What the head does besides: it starts and ends the workers, and lets people in.
data "aws_iam_policy_document" "head" {
  source_policy_documents = [local.training]

  # checkov:skip=CKV_AWS_111: what may be started is bound by tag and IMDSv2, what is ended by tag
  # checkov:skip=CKV_AWS_356: the Describe actions of EC2, and Session Manager's channels, know no resources
  statement {
    sid = "Look"
    actions = [
      "ec2:DescribeInstances", "ec2:DescribeInstanceStatus", "ec2:DescribeInstanceTypes",
      "ec2:DescribeSubnets", "ec2:DescribeSecurityGroups", "ec2:DescribeImages",
      "ec2:DescribeKeyPairs", "ec2:DescribeTags",
    ]
    resources = ["*"]
  }
  statement {
    sid     = "StartFrom"
    actions = ["ec2:RunInstances"]
    resources = concat(
      ["arn:aws:ec2:${data.aws_region.current.name}::image/*", "${local.ec2}:image/*"],
      ["${local.ec2}:security-group/*", "${local.ec2}:key-pair/${var.name}"],
      ["${local.ec2}:network-interface/*", "${local.ec2}:volume/*"],
      [for id in var.subnet_ids : "${local.ec2}:subnet/${id}"],
    )
  }
  statement {
    sid       = "StartAs"
    actions   = ["ec2:RunInstances"]
    resources = ["${local.ec2}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.name]
    }
    condition {
      test     = "StringEquals"
      variable = "ec2:MetadataHttpTokens"
      values   = ["required"]
    }
  }
  statement {
    sid       = "StartSpot"
    actions   = ["ec2:RunInstances"]
    resources = ["${local.ec2}:spot-instances-request/*"]
  }
  statement {
    sid       = "TagNew"
    actions   = ["ec2:CreateTags"]
    resources = ["${local.ec2}:instance/*", "${local.ec2}:volume/*", "${local.ec2}:spot-instances-request/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }
  statement {
    sid       = "OwnMachines"
    actions   = ["ec2:CreateTags", "ec2:TerminateInstances"]
    resources = ["${local.ec2}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid       = "WorkersRoleOnly"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.worker.arn]
    condition {
      test     = "StringEquals"
      variable = "iam:PassedToService"
      values   = ["ec2.amazonaws.com"]
    }
  }
  # What new encrypted volumes need.
  statement {
    sid       = "Volumes"
    actions   = ["kms:CreateGrant", "kms:DescribeKey", "kms:GenerateDataKeyWithoutPlaintext", "kms:ReEncrypt*"]
    resources = [var.kms_key_arn]
    condition {
      test     = "StringEquals"
      variable = "kms:ViaService"
      values   = ["ec2.${data.aws_region.current.name}.amazonaws.com"]
    }
  }
  statement {
    sid = "SessionManager"
    actions = [
      "ssm:UpdateInstanceInformation", "ssmmessages:CreateControlChannel",
      "ssmmessages:CreateDataChannel", "ssmmessages:OpenControlChannel",
      "ssmmessages:OpenDataChannel",
    ]
    resources = ["*"]
  }
}

resource "aws_iam_role" "worker" {
  name               = "${var.name}-worker"
  assume_role_policy = data.aws_iam_policy_document.machines.json
}

resource "aws_iam_role_policy" "worker" {
  name   = "training"
  role   = aws_iam_role.worker.id
  policy = local.training
}

resource "aws_iam_instance_profile" "worker" {
  name = "${var.name}-worker"
  role = aws_iam_role.worker.name
}

resource "aws_iam_role" "head" {
  name               = "${var.name}-head"
  assume_role_policy = data.aws_iam_policy_document.machines.json
}

resource "aws_iam_role_policy" "head" {
  name   = "head"
  role   = aws_iam_role.head.id
  policy = data.aws_iam_policy_document.head.json
}

resource "aws_iam_instance_profile" "head" {
  name = "${var.name}-head"
  role = aws_iam_role.head.name
}

resource "aws_key_pair" "this" {
  key_name   = var.name
  public_key = var.public_key
}

output "head_profile" { value = aws_iam_instance_profile.head.name }
output "worker_profile" { value = aws_iam_instance_profile.worker.name }
output "key_pair" { value = aws_key_pair.this.key_name }
