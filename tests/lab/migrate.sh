#!/bin/sh
# fio verify on a virtio disk while the guest moves from one machine to another, until the disk
# grows. Prints a line "progress: READS WRITES -" twice a second.
. /job/lib.sh
modprobe virtio_blk || fail modules
wait_for 30 /dev/vda test -b /dev/vda
before=$(cat /sys/block/vda/size)
load moves /dev/vda & load=$!
while kill -0 $load 2>/dev/null; do
    echo "progress: $(count_io vda) -"
    [ "$(cat /sys/block/vda/size)" = "$before" ] || touch /tmp/over-moves
    sleep 0.5
done
end_load moves $load
step "the disk grew from $before to $(cat /sys/block/vda/size) sectors"
fio_verify /dev/vda 64k 8 16M --offset=$((before * 512 - 8388608))
file_system /dev/vda
kernel_complaints "$IO_COMPLAINTS"
