#!/bin/sh
# The guest resets itself while fio writes; after the reset the disk serves the
# same driver anew, and every byte that was written before is still right:
#   guest-reset.sh [again]      again: an earlier guest did the first half
. /job/lib.sh
modprobe virtio_blk || fail modules
wait_for 30 /dev/vda test -b /dev/vda
sectors=$(cat /sys/block/vda/size)
last() { dd if=/dev/vda bs=512 skip=$((sectors - 1)) count=1 iflag=direct 2>/dev/null; }
if [ "$1" != again ] && ! last | grep -q penstock-reset; then
    # What lies outside of fio's area must survive the reset.
    dd if=/dev/urandom of=/tmp/kept bs=1M count=8 2>/dev/null
    dd if=/tmp/kept of=/dev/vda bs=1M seek=48 oflag=direct 2>/dev/null || fail "write before the reset"
    { echo penstock-reset; sha256sum </tmp/kept; } >/tmp/mark
    dd if=/tmp/mark of=/dev/vda bs=512 seek=$((sectors - 1)) conv=sync oflag=direct 2>/dev/null ||
        fail "mark before the reset"
    sync
    fio --name=reset --filename=/dev/vda --direct=1 --ioengine=libaio --rw=randwrite --bs=4k \
        --iodepth=32 --size=32M --time_based --runtime=60 --eta=never >/dev/null 2>&1 &
    before=$(count_io vda)
    wait_for 30 "I/O in flight" sh -c \
        ". /job/lib.sh; [ \$(count_io vda | cut -d' ' -f2) -gt $((${before#* } + 200)) ]"
    step "reset"
    echo b >/proc/sysrq-trigger
    sleep 30
    fail "the reset did not happen"
fi
if [ "$1" != again ]; then
    dd if=/dev/vda bs=1M skip=48 count=8 iflag=direct 2>/dev/null | sha256sum >/tmp/now
    last | grep -q "$(cut -d' ' -f1 /tmp/now)" || fail "bytes from before the reset are wrong"
    step "bytes from before the reset are right"
fi
fio_verify /dev/vda 4k 16 16M
step "fio verify afterwards"
kernel_complaints "$IO_COMPLAINTS"
