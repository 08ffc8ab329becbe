#!/bin/sh
# fio verify on a device whose target goes away meanwhile:
#   verify-outage.sh nvme ADDRESS PORT NQN | verify-outage.sh virtio [SIZE] | verify-outage.sh pci [SIZE] [NSIDS]
# SIZE is how much is written, NSIDS which namespaces the
# controller has in the end, joined by commas.
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
    # Disks are numbered as they are found, not as the namespaces are.
    first() { grep -lx 1 /sys/block/nvme0n*/nsid | sed -n 's|^/sys/block/\(.*\)/nsid$|\1|p' | grep .; }
    wait_for 30 "namespace 1" first
    disk=$(first)
    wait_for 30 "/dev/$disk" test -b "/dev/$disk"
    dev=/dev/$disk state=/sys/class/nvme/nvme0/state disks=$disk
    path=nvme0c0${disk#nvme0}
    [ -e "/sys/block/$path" ] && disks=$path
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
if [ "$1" = pci ] && [ -n "$3" ]; then
    has_namespaces() {
        [ "$(nvme list-ns /dev/nvme0 | sed -n 's/.*:0x//p' | tr '\n' ',')" = "$1," ]
    }
    wait_for 30 "namespaces $3" has_namespaces "$3"
    [ "$(ls /sys/block | grep -c '^nvme0n')" = "$(echo "$3" | tr , ' ' | wc -w)" ] || { ls /sys/block; fail disks; }
    sn=$(nvme id-ctrl /dev/nvme0 | sed -n 's/^sn *: *//p' | tr -d ' ')
    [ "$sn" = "$(tr -d ' ' </sys/class/nvme/nvme0/serial)" ] || fail "the serial number is $sn now"
    step "it has namespaces $3"
fi
# The device is whole afterwards.
file_system "$dev"
kernel_complaints "$IO_COMPLAINTS"
