resource "aws_db_subnet_group" "this" {
  name       = var.name
  subnet_ids = var.subnet_ids
}

resource "aws_db_parameter_group" "this" {
  name   = var.name
  family = "postgres16"
  parameter {
    name  = "rds.force_ssl"
    value = "1"
  }
  parameter {
    name  = "log_statement"
    value = "ddl"
  }
}

resource "aws_security_group" "database" {
  name        = "${var.name}-database"
  description = "MLflow's database"
  vpc_id      = var.vpc_id
  tags        = { Name = "${var.name}-database" }
}

resource "aws_vpc_security_group_ingress_rule" "database" {
  description                  = "Postgres from MLflow's server only"
  security_group_id            = aws_security_group.database.id
  referenced_security_group_id = aws_security_group.server.id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}

resource "aws_db_instance" "this" {
  # checkov:skip=CKV_AWS_157: a standby doubles the cost; runs go on without MLflow and deliver later
  # checkov:skip=CKV_AWS_118: no enhanced monitoring of a database that is hardly used
  # checkov:skip=CKV_AWS_353: the same
  # checkov:skip=CKV_AWS_161: RDS makes and rotates the password; MLflow cannot renew IAM tokens
  identifier                      = "${var.name}-mlflow"
  engine                          = "postgres"
  engine_version                  = "16"
  instance_class                  = "db.t4g.small"
  allocated_storage               = 20
  max_allocated_storage           = 100
  storage_type                    = "gp3"
  storage_encrypted               = true
  kms_key_id                      = var.kms_key_arn
  db_name                         = "mlflow"
  username                        = "mlflow"
  manage_master_user_password     = true
  master_user_secret_kms_key_id   = var.kms_key_arn
  db_subnet_group_name            = aws_db_subnet_group.this.name
  parameter_group_name            = aws_db_parameter_group.this.name
  vpc_security_group_ids          = [aws_security_group.database.id]
  publicly_accessible             = false
  backup_retention_period         = 14
  copy_tags_to_snapshot           = true
  auto_minor_version_upgrade      = true
  deletion_protection             = var.protect
  skip_final_snapshot             = !var.protect
  final_snapshot_identifier       = "${var.name}-mlflow-final"
  enabled_cloudwatch_logs_exports = ["postgresql", "upgrade"]
}
