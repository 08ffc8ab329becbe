#!/bin/sh
# fio verify on a device whose target goes away meanwhile:
#   verify-outage.sh nvme ADDRESS PORT NQN | verify-outage.sh virtio [SIZE] | verify-outage.sh pci [SIZE]
# SIZE is how much is written.
# Prints a line "progress: READS WRITES STATE" twice a second, by which the
# other side chooses its moments.
. /job/lib.sh
size=32M
[ "$1" = nvme ] || size=${2:-$size}
if [ "$1" = nvme ]; then
    modprobe nvme_tcp || fail modules
    nvme connect -t tcp -a "$2" -s "$3" -n "$4" --ctrl-loss-tmo=600 --reconnect-delay=1 || fail connect
    wait_for 30 "namespace 1" ns_device "$4" 1
    dev=$(ns_device "$4" 1) state=/sys/class/nvme/$(controller "$4")/state
    # With native multipath the path's device does the counting.
    disks=$(ls /sys/block | grep -E '^nvme[0-9]+c[0-9]+n1$') || disks=${dev#/dev/}
elif [ "$1" = pci ]; then
    modprobe nvme 2>/dev/null
    wait_for 30 /dev/nvme0n1 test -b /dev/nvme0n1
    dev=/dev/nvme0n1 state=/sys/class/nvme/nvme0/state disks=nvme0n1
    [ -e /sys/block/nvme0c0n1 ] && disks=nvme0c0n1
else
    modprobe virtio_blk || fail modules
    wait_for 30 /dev/vda test -b /dev/vda
    dev=/dev/vda state=/sys/block/vda/ro disks=vda
fi
step "fio on $dev, counted on $disks"
# Written at a bounded rate, so that all outages fall into the run whatever
# the speed of the machine; checked while writing goes on, and again at the end.
fio --name=fio-outage --filename="$dev" --direct=1 --ioengine=libaio --rw=randwrite --bsrange=512-32k \
    --iodepth=16 --size="$size" --rate=2m --verify=crc32c --verify_fatal=1 --do_verify=1 \
    --verify_backlog=256 --randrepeat=0 --eta=never --output-format=json --output=/out/fio-outage.json &
fio=$!
while kill -0 $fio 2>/dev/null; do
    echo "progress: $(count_io $disks) $(cat "$state")"
    sleep 0.5
done
wait $fio || { cat /out/fio-outage.json; fail "fio during outages"; }
step "fio is done"
# The device is whole afterwards.
file_system "$dev"
kernel_complaints "$IO_COMPLAINTS"
