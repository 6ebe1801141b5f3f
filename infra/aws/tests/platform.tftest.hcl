# `terraform test`: only plans, nothing is created. It asks AWS for a few facts, so it needs
# credentials, or AWS_ENDPOINT_URL naming a moto server.
variables {
  machine_image   = "ami-0123456789abcdef0"
  mlflow_image    = "example.com/facm@sha256:4fbb8e6a8395de5a7550b33509421a2bafbc0aab6c06ba2cef9ebffbc7092d90"
  mlflow_host     = "mlflow.example.com"
  zone_id         = "Z0123456789"
  certificate_arn = "arn:aws:acm:us-west-2:123456789012:certificate/1"
  public_key      = "ssh-ed25519 AAAA"
}

run "roles" {
  command = plan
  assert {
    condition     = module.access.head_profile != module.access.worker_profile
    error_message = "Head and workers share a profile."
  }
}

run "an_image_by_tag" {
  command = plan
  variables {
    mlflow_image = "example.com/facm:1"
  }
  expect_failures = [var.mlflow_image]
}

run "one_zone" {
  command = plan
  variables {
    availability_zones = ["us-west-2a"]
  }
  expect_failures = [var.availability_zones]
}

run "no_machine_image" {
  command = plan
  variables {
    machine_image = "facm"
  }
  expect_failures = [var.machine_image]
}

run "a_name_too_long" {
  command = plan
  variables {
    name = "a-name-that-no-balancer-takes"
  }
  expect_failures = [var.name]
}
