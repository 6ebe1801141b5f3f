#!/bin/sh
# Make the machine image of the nodes: Ubuntu 24.04 with NVIDIA's driver, and from the container
# image its Python environment, at the same place.   bake.sh IMAGE SUBNET PROFILE
#   IMAGE    REPOSITORY@sha256:..., already pushed
#   SUBNET   one with a way to the registry and to Ubuntu's packages
#   PROFILE  instance profile that may pull the image (AmazonEC2ContainerRegistryReadOnly)
set -eu
image=${1:?IMAGE} subnet=${2:?SUBNET} profile=${3:?PROFILE}
base=$(aws ssm get-parameter --query Parameter.Value --output text --name \
    /aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id)
work=$(mktemp)
trap 'rm -f "$work"' EXIT
# The machine ends itself when it is done; what it prints is in its console output.
cat > "$work" <<SCRIPT
#!/bin/sh
set -eux
trap poweroff EXIT
apt-get update
apt-get install --yes --no-install-recommends python3.12-venv python3.12-dev gcc rsync awscli
aws ecr get-login-password | docker login --username AWS --password-stdin ${image%%/*}
docker create --name facm $image
docker cp facm:/opt/facm /opt/facm
docker rm facm
docker image prune --all --force
echo 'PATH=/opt/facm/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' > /etc/environment
SCRIPT
machine=$(aws ec2 run-instances --image-id "$base" --instance-type m7i.xlarge \
    --subnet-id "$subnet" --iam-instance-profile "Name=$profile" --user-data "file://$work" \
    --metadata-options HttpTokens=required --query 'Instances[0].InstanceId' --output text)
aws ec2 wait instance-stopped --instance-ids "$machine"
baked=$(aws ec2 create-image --instance-id "$machine" --name "facm-$(date +%Y%m%d%H%M)" \
    --query ImageId --output text)
aws ec2 wait image-available --image-ids "$baked"
aws ec2 terminate-instances --instance-ids "$machine" > /dev/null
echo "$baked"
