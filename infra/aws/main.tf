# The platform on AWS: a network without a way to the Internet, and in it the nodes that `ray up`
# starts, MLflow with its database, and the bucket.

module "network" {
  source             = "./modules/network"
  name               = var.name
  region             = var.region
  availability_zones = var.availability_zones
  kms_key_arn        = module.storage.kms_key_arn
}

module "storage" {
  source  = "./modules/storage"
  name    = var.name
  protect = var.protect
}

module "registry" {
  source      = "./modules/registry"
  name        = var.name
  kms_key_arn = module.storage.kms_key_arn
}

module "access" {
  source      = "./modules/access"
  name        = var.name
  bucket_arn  = module.storage.bucket_arn
  kms_key_arn = module.storage.kms_key_arn
  subnet_ids  = module.network.subnet_ids
  public_key  = var.public_key
}

module "tracking" {
  source                    = "./modules/tracking"
  name                      = var.name
  region                    = var.region
  vpc_id                    = module.network.vpc_id
  subnet_ids                = module.network.subnet_ids
  cluster_security_group_id = module.network.cluster_security_group_id
  services_prefix_list_id   = module.network.s3_prefix_list_id
  endpoints_security_group  = module.network.endpoints_security_group_id
  bucket                    = module.storage.bucket
  bucket_arn                = module.storage.bucket_arn
  kms_key_arn               = module.storage.kms_key_arn
  repository_arn            = module.registry.repository_arn
  image                     = var.mlflow_image
  host                      = var.mlflow_host
  zone_id                   = var.zone_id
  certificate_arn           = var.certificate_arn
  protect                   = var.protect
}
