# Made by AWS and handed over once: no secret is in Terraform's state.
ephemeral "aws_secretsmanager_random_password" "this" {
  for_each            = local.secrets
  password_length     = 40
  exclude_punctuation = true
}

locals {
  secrets = toset(["mlflow-admin-password", "mlflow-flask-secret"])
}

resource "aws_secretsmanager_secret" "this" {
  # checkov:skip=CKV2_AWS_57: MLflow reads the first password once; README.md says how to change it
  for_each   = local.secrets
  name       = "${var.name}/${each.key}"
  kms_key_id = var.kms_key_arn
  # Otherwise the name stays taken for a month after a tear-down.
  recovery_window_in_days = var.protect ? 30 : 0
}

resource "aws_secretsmanager_secret_version" "this" {
  for_each                 = local.secrets
  secret_id                = aws_secretsmanager_secret.this[each.key].id
  secret_string_wo         = ephemeral.aws_secretsmanager_random_password.this[each.key].random_password
  secret_string_wo_version = 1
}
