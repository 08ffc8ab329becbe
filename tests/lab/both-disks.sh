#!/bin/sh
# An NVMe controller of PCIe with two namespaces, and a virtio disk.
. /job/lib.sh
modprobe nvme 2>/dev/null
modprobe virtio_blk || fail modules
wait_for 30 /dev/nvme0n1 test -b /dev/nvme0n1
wait_for 30 /dev/nvme0n2 test -b /dev/nvme0n2
wait_for 30 /dev/vda test -b /dev/vda
lspci -nnvv 2>/dev/null | grep -A40 '\[0108\]' >/out/lspci.txt
cat /out/lspci.txt
grep -q 'MSI-X: Enable+' /out/lspci.txt || fail "MSI-X is not in use"
cat /sys/block/vda/serial >/out/virtio-serial
for n in 1 2; do cat /sys/block/nvme0n$n/uuid >/out/uuid-$n || fail "UUID of $n"; done
nvme id-ctrl /dev/nvme0 -o json >/out/id-ctrl.json || fail id-ctrl
nvme id-ns /dev/nvme0n2 >/dev/null || fail id-ns
nvme error-log /dev/nvme0 >/dev/null || fail error-log
for f in 1 2 4 5 6 7 8 9 0xa 0xb; do
    nvme get-feature /dev/nvme0 -f $f >/dev/null || fail "get-feature $f"
done
step "nvme-cli"
fio_verify /dev/nvme0n1 4k 16 16M
fio_verify /dev/nvme0n2 64k 8 16M
fio_verify /dev/vda 16k 8 16M
step "fio verify on three disks"
zeroes /dev/nvme0n1 no
file_system /dev/nvme0n1
nvme reset /dev/nvme0 || fail reset
wait_for 30 "controller after a reset" is_live nvme0
check_files /dev/nvme0n1
step "the files are right after a controller reset"
nvme smart-log /dev/nvme0 -o json >/out/smart-log.json || fail smart-log
kernel_complaints "$IO_COMPLAINTS"
