#!/bin/sh
# The guest resets itself, or dies, while fio writes to a virtio disk and to an NVMe disk; afterwards
# both serve the same driver anew, and every byte that was written before is still right:
#   guest-reset.sh reset | die | next
# "die" writes until the machine is killed, "next" is a guest with the same disks after that.
. /job/lib.sh
modprobe virtio_blk || fail modules
modprobe nvme 2>/dev/null
disks='vda nvme0n1'
for d in $disks; do wait_for 30 "/dev/$d" test -b "/dev/$d"; done
last() { dd if="/dev/$1" bs=512 skip=$(($(cat "/sys/block/$1/size") - 1)) count=1 iflag=direct 2>/dev/null; }
has_written() { [ "$(count_io "$1" | cut -d' ' -f2)" -ge "$2" ]; }

# What lies outside of fio's area must survive.
keep() {
    dd if=/dev/urandom of=/tmp/kept bs=1M count=8 2>/dev/null
    dd if=/tmp/kept of="/dev/$1" bs=1M seek=48 oflag=direct 2>/dev/null || fail "write to $1"
    { echo penstock-reset; sha256sum </tmp/kept; } >/tmp/mark
    dd if=/tmp/mark of="/dev/$1" bs=512 seek=$(($(cat "/sys/block/$1/size") - 1)) conv=sync oflag=direct \
        2>/dev/null || fail "mark on $1"
}
if [ "$1" != next ] && ! last vda | grep -q penstock-reset; then
    # The mark that is looked for comes last.
    keep nvme0n1
    keep vda
    sync
    for d in $disks; do
        fio --name=reset --filename="/dev/$d" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k \
            --iodepth=32 --size=32M --time_based --runtime=600 --eta=never >/dev/null 2>&1 &
    done
    for d in $disks; do
        before=$(count_io $d)
        wait_for 30 "I/O on $d" has_written $d $((${before#* } + 200))
    done
    if [ "$1" = die ]; then
        echo "please: kill"
        sleep 300
        fail "nobody killed this guest"
    fi
    step "reset"
    echo b >/proc/sysrq-trigger
    sleep 30
    fail "the reset did not happen"
fi
for d in $disks; do
    dd if="/dev/$d" bs=1M skip=48 count=8 iflag=direct 2>/dev/null | sha256sum >/tmp/now
    last $d | grep -q "$(cut -d' ' -f1 /tmp/now)" || fail "bytes of $d from before are wrong"
done
step "bytes from before are right"
fio_verify /dev/vda 4k 16 16M
fio_verify /dev/nvme0n1 8k 16 16M
step "fio verify afterwards"
kernel_complaints "$IO_COMPLAINTS"
