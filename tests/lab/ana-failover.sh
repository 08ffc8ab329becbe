#!/bin/sh
# One namespace by two ports, with native multipath, under fio that verifies:
#   ana-failover.sh ADDRESS PORT-1 PORT-2 STOP-PORT NQN
# Prints a line "paths: IO-1 IO-2 STATE-1 STATE-2" several times a second: finished reads and
# writes by each port, and what the kernel thinks of it. Ends when STOP-PORT takes connections.
. /job/lib.sh
modprobe nvme_tcp || fail modules
[ "$(cat /sys/module/nvme_core/parameters/multipath)" = Y ] || fail "no native multipath"
addr=$1 stop=$4 nqn=$5

# by_port PORT: print the number of the controller that has it.
by_port() {
    for c in /sys/class/nvme/nvme*; do
        grep -q "trsvcid=$1\>" "$c/address" 2>/dev/null && { echo "${c##*/nvme}"; return 0; }
    done
    return 1
}
# ios CONTROLLER: finished reads and writes by its path.
ios() { cat /sys/block/nvme*c"$1"n1/stat 2>/dev/null | awk '{n += $1 + $5} END {print n + 0}'; }
state() { cat /sys/block/nvme*c"$1"n1/ana_state 2>/dev/null | head -n1 | grep . || echo gone; }
is_over() { nc -w 2 "$addr" "$stop" </dev/null >/dev/null 2>&1; }

for port in "$2" "$3"; do
    nvme connect -t tcp -a "$addr" -s "$port" -n "$nqn" --ctrl-loss-tmo=600 --reconnect-delay=1 \
        --keep-alive-tmo=20 || fail "connect to $port"
done
wait_for 30 "namespace 1" ns_device "$nqn" 1
dev=$(ns_device "$nqn" 1) one=$(by_port "$2") two=$(by_port "$3")
wait_for 30 "two paths" ls /sys/block/nvme*c"$one"n1 /sys/block/nvme*c"$two"n1
step "$dev by nvme$one and nvme$two"

(
    round=0
    until [ -e /tmp/over ]; do
        round=$((round + 1))
        fio --name="fio-round-$round" --filename="$dev" --direct=1 --ioengine=libaio --rw=randwrite \
            --bsrange=512-32k --iodepth=8 --size=4M --rate=2m --verify=crc32c --verify_fatal=1 \
            --do_verify=1 --randrepeat=0 --eta=never --output-format=json \
            --output="/out/fio-round-$round.json" || { echo "fio round $round: $?"; exit 1; }
    done
) &
load=$!
while kill -0 $load 2>/dev/null; do
    echo "paths: $(ios "$one") $(ios "$two") $(state "$one") $(state "$two")"
    [ -e /tmp/over ] || { is_over && touch /tmp/over; }
    sleep 0.3
done
wait $load || fail "fio failed"
[ -e /tmp/over ] || fail "the load ended by itself"
step "$(ls /out/fio-round-*.json | wc -l) rounds of fio"
kernel_complaints "$IO_COMPLAINTS"
nvme disconnect -n "$nqn" || fail disconnect
