#!/bin/sh
# A virtio disk: fio verify, file system, and the checksum of every byte.
. /job/lib.sh
modprobe virtio_blk || fail modules
wait_for 30 /dev/vda test -b /dev/vda
for a in size ro queue/logical_block_size queue/physical_block_size queue/max_sectors_kb \
    queue/write_cache queue/discard_max_bytes queue/write_zeroes_max_bytes; do
    echo "$a: $(cat /sys/block/vda/$a)"
done
cat /sys/block/vda/size >/out/sectors
ls /sys/block/vda/mq | wc -l >/out/queue-count
echo "queues: $(cat /out/queue-count)"
fio_matrix /dev/vda
zeroes /dev/vda no
file_system /dev/vda
drop_caches
dd if=/dev/vda bs=1M iflag=direct 2>/dev/null | sha256sum >/out/device.sha256
step "whole device: $(cat /out/device.sha256)"
kernel_complaints "$IO_COMPLAINTS"
