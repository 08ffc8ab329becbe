#!/bin/sh
# What the kernel sees of namespaces that change under load, without a rescan by hand:
#   namespaces.sh ADDRESS PORT STOP-PORT NQN
# Prints a line "sectors: NS-1 NS-2" several times a second, "-" for one that is not there. fio
# verifies on namespace 1 all the time; namespace 2 is read while it comes and goes. Ends when
# STOP-PORT takes connections.
. /job/lib.sh
modprobe nvme_tcp || fail modules
addr=$1 stop=$3 nqn=$4
nvme connect -t tcp -a "$addr" -s "$2" -n "$nqn" --keep-alive-tmo=20 || fail connect
wait_for 30 "namespace 1" ns_device "$nqn" 1
dev=$(ns_device "$nqn" 1)
is_over() { nc -w 2 "$addr" "$stop" </dev/null >/dev/null 2>&1; }
sectors() { d=$(ns_device "$nqn" "$1") && cat "/sys/block/${d#/dev/}/size" 2>/dev/null | grep . || echo -; }

(
    round=0
    until [ -e /tmp/over ]; do
        round=$((round + 1))
        fio --name="fio-round-$round" --filename="$dev" --direct=1 --ioengine=libaio --rw=randwrite \
            --bs=4k --iodepth=8 --size=4M --rate=2m --verify=crc32c --verify_fatal=1 --do_verify=1 \
            --randrepeat=0 --eta=never --output-format=json --output="/out/fio-round-$round.json" ||
            { echo "fio round $round: $?"; exit 1; }
    done
) &
load=$!
# Errors are what a namespace that goes away gives.
until [ -e /tmp/over ]; do
    d=$(ns_device "$nqn" 2) && dd if="$d" of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null
    sleep 0.1
done &
while kill -0 $load 2>/dev/null; do
    echo "sectors: $(sectors 1) $(sectors 2)"
    [ -e /tmp/over ] || { is_over && touch /tmp/over; }
    sleep 0.3
done
wait $load || fail "fio failed"
[ -e /tmp/over ] || fail "the load ended by itself"
# What was added to namespace 1 is there, too.
size=$(sectors 1)
dd if=/dev/urandom of=/tmp/end bs=1M count=1 2>/dev/null
dd if=/tmp/end of="$dev" bs=1M seek=$((size / 2048 - 1)) count=1 oflag=direct 2>/dev/null || fail "write at the end"
dd if="$dev" of=/tmp/back bs=1M skip=$((size / 2048 - 1)) count=1 iflag=direct 2>/dev/null
cmp /tmp/end /tmp/back || fail "the end differs"
! dmesg | grep -iE "nvme0n1.*(I/O error|critical)|$dev.*error" || fail "errors on namespace 1"
nvme disconnect -n "$nqn" || fail disconnect
