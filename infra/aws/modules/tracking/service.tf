# MLflow's server: two processes on Fargate behind a balancer that is reached from inside only.

resource "aws_cloudwatch_log_group" "this" {
  name              = "/${var.name}/mlflow"
  retention_in_days = 365
  kms_key_id        = var.kms_key_arn
}

resource "aws_ecs_cluster" "this" {
  name = var.name
  setting {
    name  = "containerInsights"
    value = "enabled"
  }
}

resource "aws_ecs_task_definition" "this" {
  family                   = "${var.name}-mlflow"
  requires_compatibilities = ["FARGATE"]
  network_mode             = "awsvpc"
  cpu                      = 1024
  memory                   = 4096
  execution_role_arn       = aws_iam_role.execution.arn
  task_role_arn            = aws_iam_role.server.arn
  volume {
    name = "scratch"
  }
  container_definitions = jsonencode([{
    name                   = "mlflow"
    image                  = var.image
    command                = ["mlflow"]
    essential              = true
    user                   = "10001:10001"
    readonlyRootFilesystem = true
    linuxParameters        = { initProcessEnabled = false }
    portMappings           = [{ containerPort = 5000, protocol = "tcp" }]
    mountPoints            = [{ sourceVolume = "scratch", containerPath = "/tmp", readOnly = false }]
    environment = [
      {
        name  = "MLFLOW_BACKEND_STORE_URI"
        value = "postgresql+psycopg2://mlflow@${aws_db_instance.this.endpoint}/mlflow?sslmode=require"
      },
      { name = "MLFLOW_ARTIFACTS_DESTINATION", value = "s3://${var.bucket}/mlflow" },
      { name = "MLFLOW_SERVER_ALLOWED_HOSTS", value = "${var.host},localhost:*,127.0.0.1:*" },
      { name = "HOME", value = "/tmp" },
    ]
    secrets = [
      {
        name      = "PGPASSWORD"
        valueFrom = "${aws_db_instance.this.master_user_secret[0].secret_arn}:password::"
      },
      {
        name      = "MLFLOW_AUTH_ADMIN_PASSWORD"
        valueFrom = aws_secretsmanager_secret.this["mlflow-admin-password"].arn
      },
      {
        name      = "MLFLOW_FLASK_SERVER_SECRET_KEY"
        valueFrom = aws_secretsmanager_secret.this["mlflow-flask-secret"].arn
      },
    ]
    healthCheck = {
      command     = ["CMD", "/app/infra/docker/healthy"]
      interval    = 30
      timeout     = 10
      retries     = 3
      startPeriod = 120
    }
    logConfiguration = {
      logDriver = "awslogs"
      options = {
        "awslogs-group"         = aws_cloudwatch_log_group.this.name
        "awslogs-region"        = var.region
        "awslogs-stream-prefix" = "mlflow"
      }
    }
  }])
}

resource "aws_ecs_service" "this" {
  name            = "mlflow"
  cluster         = aws_ecs_cluster.this.id
  task_definition = aws_ecs_task_definition.this.arn
  desired_count   = 1
  launch_type     = "FARGATE"
  network_configuration {
    subnets          = var.subnet_ids
    security_groups  = [aws_security_group.server.id]
    assign_public_ip = false
  }
  load_balancer {
    target_group_arn = aws_lb_target_group.this.arn
    container_name   = "mlflow"
    container_port   = 5000
  }
  depends_on = [aws_lb_listener.this]
}

# --- the balancer, which ends TLS ---------------------------------------------------------------

resource "aws_lb" "this" {
  # checkov:skip=CKV_AWS_91: MLflow itself logs who asked for what
  # checkov:skip=CKV2_AWS_28: reached from inside the network only, where a firewall for the web adds nothing
  name                       = "${var.name}-mlflow"
  internal                   = true
  load_balancer_type         = "application"
  subnets                    = var.subnet_ids
  security_groups            = [aws_security_group.balancer.id]
  drop_invalid_header_fields = true
  enable_deletion_protection = var.protect
}

resource "aws_lb_target_group" "this" {
  # checkov:skip=CKV_AWS_378: the two hops are in one private network, between two security groups
  name        = "${var.name}-mlflow"
  port        = 5000
  protocol    = "HTTP"
  target_type = "ip"
  vpc_id      = var.vpc_id
  health_check {
    path = "/health"
  }
}

resource "aws_lb_listener" "this" {
  load_balancer_arn = aws_lb.this.arn
  port              = 443
  protocol          = "HTTPS"
  ssl_policy        = "ELBSecurityPolicy-TLS13-1-2-2021-06"
  certificate_arn   = var.certificate_arn
  default_action {
    type             = "forward"
    target_group_arn = aws_lb_target_group.this.arn
  }
}

resource "aws_route53_record" "this" {
  zone_id = var.zone_id
  name    = var.host
  type    = "A"
  alias {
    name                   = aws_lb.this.dns_name
    zone_id                = aws_lb.this.zone_id
    evaluate_target_health = false
  }
}

# --- who reaches whom: cluster -> balancer -> server -> database ---------------------------------

resource "aws_security_group" "balancer" {
  name        = "${var.name}-balancer"
  description = "Balancer before MLflow"
  vpc_id      = var.vpc_id
  tags        = { Name = "${var.name}-balancer" }
}

resource "aws_vpc_security_group_ingress_rule" "balancer" {
  description                  = "TLS from the cluster"
  security_group_id            = aws_security_group.balancer.id
  referenced_security_group_id = var.cluster_security_group_id
  ip_protocol                  = "tcp"
  from_port                    = 443
  to_port                      = 443
}

resource "aws_vpc_security_group_egress_rule" "balancer" {
  description                  = "To the server"
  security_group_id            = aws_security_group.balancer.id
  referenced_security_group_id = aws_security_group.server.id
  ip_protocol                  = "tcp"
  from_port                    = 5000
  to_port                      = 5000
}

resource "aws_security_group" "server" {
  name        = "${var.name}-mlflow"
  description = "MLflow's server"
  vpc_id      = var.vpc_id
  tags        = { Name = "${var.name}-mlflow" }
}

resource "aws_vpc_security_group_ingress_rule" "server" {
  description                  = "From the balancer"
  security_group_id            = aws_security_group.server.id
  referenced_security_group_id = aws_security_group.balancer.id
  ip_protocol                  = "tcp"
  from_port                    = 5000
  to_port                      = 5000
}

resource "aws_vpc_security_group_egress_rule" "server_database" {
  description                  = "To the database"
  security_group_id            = aws_security_group.server.id
  referenced_security_group_id = aws_security_group.database.id
  ip_protocol                  = "tcp"
  from_port                    = 5432
  to_port                      = 5432
}

resource "aws_vpc_security_group_egress_rule" "server_endpoints" {
  description                  = "To the endpoints: image, secrets, logs"
  security_group_id            = aws_security_group.server.id
  referenced_security_group_id = var.endpoints_security_group
  ip_protocol                  = "tcp"
  from_port                    = 443
  to_port                      = 443
}

resource "aws_vpc_security_group_egress_rule" "server_s3" {
  description       = "To S3: artifacts, layers of the image"
  security_group_id = aws_security_group.server.id
  prefix_list_id    = var.services_prefix_list_id
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

# --- roles --------------------------------------------------------------------------------------

data "aws_iam_policy_document" "tasks" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ecs-tasks.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "server" {
  statement {
    sid       = "Artifacts"
    actions   = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = ["${var.bucket_arn}/mlflow/*"]
  }
  statement {
    sid       = "List"
    actions   = ["s3:ListBucket"]
    resources = [var.bucket_arn]
    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = ["mlflow", "mlflow/*"]
    }
  }
  statement {
    sid       = "Key"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [var.kms_key_arn]
  }
}

data "aws_iam_policy_document" "execution" {
  # checkov:skip=CKV_AWS_356: GetAuthorizationToken knows no resources
  statement {
    sid       = "Login"
    actions   = ["ecr:GetAuthorizationToken"]
    resources = ["*"]
  }
  statement {
    sid       = "Image"
    actions   = ["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"]
    resources = [var.repository_arn]
  }
  statement {
    sid       = "Logs"
    actions   = ["logs:CreateLogStream", "logs:PutLogEvents"]
    resources = ["${aws_cloudwatch_log_group.this.arn}:*"]
  }
  statement {
    sid     = "Secrets"
    actions = ["secretsmanager:GetSecretValue"]
    resources = concat(
      [for secret in aws_secretsmanager_secret.this : secret.arn],
      [aws_db_instance.this.master_user_secret[0].secret_arn],
    )
  }
  statement {
    sid       = "Key"
    actions   = ["kms:Decrypt"]
    resources = [var.kms_key_arn]
  }
}

resource "aws_iam_role" "server" {
  name               = "${var.name}-mlflow"
  assume_role_policy = data.aws_iam_policy_document.tasks.json
}

resource "aws_iam_role_policy" "server" {
  name   = "artifacts"
  role   = aws_iam_role.server.id
  policy = data.aws_iam_policy_document.server.json
}

resource "aws_iam_role" "execution" {
  name               = "${var.name}-mlflow-start"
  assume_role_policy = data.aws_iam_policy_document.tasks.json
}

resource "aws_iam_role_policy" "execution" {
  name   = "start"
  role   = aws_iam_role.execution.id
  policy = data.aws_iam_policy_document.execution.json
}

output "admin_secret_arn" { value = aws_secretsmanager_secret.this["mlflow-admin-password"].arn }
output "database" { value = aws_db_instance.this.identifier }
