#!/bin/sh
# Read a volume that another machine wrote: read-back.sh ADDRESS PORT NQN NSID
# /job/files.sha256 holds the checksums of the files on it.
. /job/lib.sh
modprobe nvme_tcp || fail modules
step connect
nvme connect -t tcp -a "$1" -s "$2" -n "$3" || fail connect
wait_for 30 "namespace $4" ns_device "$3" "$4"
dev=$(ns_device "$3" "$4")
dd if="$dev" bs=1M iflag=direct 2>/dev/null | sha256sum >/out/device.sha256
step "whole device: $(cat /out/device.sha256)"
cp /job/files.sha256 /tmp/sums
check_files "$dev"
nvme disconnect -n "$3" || fail disconnect
kernel_complaints "$NVME_COMPLAINTS"
