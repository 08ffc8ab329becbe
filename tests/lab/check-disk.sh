#!/bin/sh
# The virtio disk holds the files that /job/files.sha256 tells of.
. /job/lib.sh
modprobe virtio_blk || fail modules
wait_for 30 /dev/vda test -b /dev/vda
cp /job/files.sha256 /tmp/sums
check_files /dev/vda
kernel_complaints "$IO_COMPLAINTS"
