variable "name" {
  description = "Prefix of every name; two platforms in one account need two."
  type        = string
  default     = "facm"
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,19}$", var.name))
    error_message = "name: 2 to 20 lower-case letters, digits and dashes, a letter first."
  }
}

variable "region" {
  description = "Region of everything."
  type        = string
  default     = "us-west-2"
}

variable "availability_zones" {
  description = "Zones of the region; spot machines are looked for in the order given. RDS wants two."
  type        = list(string)
  default     = ["us-west-2a", "us-west-2b"]
  validation {
    condition     = length(var.availability_zones) >= 2
    error_message = "availability_zones: give two or more; RDS needs two."
  }
}

variable "machine_image" {
  description = "AMI of the nodes, made by bake.sh."
  type        = string
  validation {
    condition     = startswith(var.machine_image, "ami-")
    error_message = "machine_image: give the id that bake.sh printed, ami-..."
  }
}

variable "mlflow_image" {
  description = "Image of MLflow's server, by digest: REPOSITORY@sha256:..."
  type        = string
  validation {
    condition     = can(regex("@sha256:[0-9a-f]{64}$", var.mlflow_image))
    error_message = "mlflow_image: name the image by its digest, REPOSITORY@sha256:..."
  }
}

variable "mlflow_host" {
  description = "Name of MLflow's server in the certificate and in the zone."
  type        = string
}

variable "zone_id" {
  description = "Route 53 zone that gets the record of mlflow_host; it points to private addresses."
  type        = string
}

variable "certificate_arn" {
  description = "ACM certificate for mlflow_host."
  type        = string
}

variable "public_key" {
  description = "SSH public key with which Ray logs in to its nodes."
  type        = string
}

variable "protect" {
  description = "Whether database, bucket and balancer refuse to be destroyed. False only to tear down."
  type        = bool
  default     = true
}
