output "cluster" {
  description = "The file for `ray up`: terraform output -raw cluster > cluster.yaml"
  value = templatefile("${path.module}/cluster.yaml", {
    name               = var.name
    region             = var.region
    availability_zones = join(",", var.availability_zones)
    machine_image      = var.machine_image
    key_pair           = module.access.key_pair
    head_profile       = module.access.head_profile
    worker_profile     = module.access.worker_profile
    security_group     = module.network.cluster_security_group_id
    subnet_a           = module.network.subnet_ids[0]
    subnet_b           = module.network.subnet_ids[1]
    kms_key            = module.storage.kms_key_arn
    bucket             = module.storage.bucket
    mlflow_host        = var.mlflow_host
  })
}

output "bucket" {
  description = "Bucket of latents, checkpoints and artifacts."
  value       = module.storage.bucket
}

output "repository" {
  description = "Where the image is pushed."
  value       = module.registry.repository_url
}

output "mlflow_admin_secret" {
  description = "Secret that holds the password of MLflow's user admin."
  value       = module.tracking.admin_secret_arn
}

output "database" {
  description = "Identifier of MLflow's database, for a restore."
  value       = module.tracking.database
}
