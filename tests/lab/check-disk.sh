#!/bin/sh
# Every disk named holds the files that /job/files.sha256 tells of: check-disk.sh DEV...
. /job/lib.sh
modprobe virtio_blk || fail modules
modprobe nvme 2>/dev/null
cp /job/files.sha256 /tmp/sums
for d in "$@"; do
    wait_for 30 "$d" test -b "$d"
    check_files "$d"
done
kernel_complaints "$IO_COMPLAINTS"
