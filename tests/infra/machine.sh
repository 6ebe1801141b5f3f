#!/bin/sh
# Process 1 of a machine: machine.sh NAME PLACE FOLDER...
# Makes PLACE/root of the system's programs, the FOLDERs and a copy of PLACE/files, all else empty.
set -eu
name=$1 place=$2 root=$2/root
shift 2
hostname "$name"
mount -t tmpfs -o mode=755 tmpfs "$root"
for folder in /bin /dev /lib /lib64 /sbin /sys /usr "$@"; do
    [ -e "$folder" ] || continue
    mkdir -p "$root$folder"
    mount --rbind "$folder" "$root$folder"
done
mkdir -p "$root/proc" "$root/run/sshd" "$root/tmp" "$root/var/tmp"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/dev/shm"
cp -a /etc "$root"
cp -a --remove-destination "$place/files/." "$root"
ssh-keygen -q -t ed25519 -N "" -f "$root/etc/ssh/host_key"

echo ready
read -r _ # until it has a network, and that has been looked at
exec chroot "$root" /usr/sbin/sshd -D -e -f /dev/null -o HostKey=/etc/ssh/host_key \
    -o PasswordAuthentication=no -o KbdInteractiveAuthentication=no -o PrintLastLog=no \
    -o UsePAM=no
