#!/bin/sh
# Two hosts contend for a namespace with reservations: resv.sh ADDRESS PORT NQN
. /job/lib.sh
# Without multipath (the kernel is told at boot) each connection has a disk of its own.
modprobe nvme_tcp || fail modules
[ "$(cat /sys/module/nvme_core/parameters/multipath)" = N ] || fail "multipath is on"
addr=$1 port=$2 nqn=$3
uuid_a=aaaaaaaa-0000-4000-8000-000000000001 uuid_b=bbbbbbbb-0000-4000-8000-000000000002
for uuid in $uuid_a $uuid_b; do
    nvme connect -t tcp -a "$addr" -s "$port" -n "$nqn" -q "nqn.2014-08.org.nvmexpress:uuid:$uuid" \
        -I "$uuid" --keep-alive-tmo=20 || fail "connect as $uuid"
done
# of_host UUID: print the controller that is connected as that host.
of_host() {
    for c in /sys/class/nvme/nvme*; do
        grep -q "$1" "$c/hostid" 2>/dev/null && { echo "${c##*/}"; return 0; }
    done
    return 1
}
wait_for 30 "controller of host A" of_host $uuid_a
wait_for 30 "controller of host B" of_host $uuid_b
ctrl_a=$(of_host $uuid_a) ctrl_b=$(of_host $uuid_b)
a=/dev/${ctrl_a}n1 b=/dev/${ctrl_b}n1
wait_for 30 "$a and $b" test -b "$a" -a -b "$b"
step "host A is $a, host B is $b"

if nvme id-ns "$a" | grep -q '^rescap *: 0$'; then
    echo "the namespaces have no reservations" >/out/skipped
    exit 0
fi

must() { "$@" >/tmp/said 2>&1 || { cat /tmp/said; fail "$*"; }; }
# conflict COMMAND...: has to end in Reservation Conflict, not to be repeated.
conflict() {
    ! "$@" >/tmp/said 2>&1 || fail "no conflict: $*"
    grep -q '0x4083' /tmp/said || { cat /tmp/said; fail "not a conflict: $*"; }
}
dd if=/dev/urandom of=/tmp/data bs=4096 count=1 2>/dev/null
count=$((4096 / $(cat "/sys/block/${ctrl_a}n1/queue/logical_block_size") - 1))
writes() { nvme write "$1" -s 0 -c $count -z 4096 -d /tmp/data; }
reads() { nvme read "$1" -s 0 -c $count -z 4096 -d /tmp/back; }
# holder KEY: the report names it as the one that holds the reservation.
report() {
    nvme resv-report "$1" -e >/tmp/report 2>&1 || { cat /tmp/report; fail report; }
    cat /tmp/report >>/out/reports.txt
}

step "write exclusive"
must nvme resv-register "$a" --nrkey=0xa1 --rrega=0
must nvme resv-acquire "$a" --crkey=0xa1 --rtype=1 --racqa=0
must writes "$a"
must reads "$b"
conflict writes "$b"
conflict nvme resv-acquire "$b" --crkey=0xb1 --rtype=1 --racqa=0
conflict nvme write-zeroes "$b" -s 0 -c 0
must nvme compare "$b" -s 0 -c $count -z 4096 -d /tmp/data
must nvme resv-register "$b" --nrkey=0xb1 --rrega=0
conflict writes "$b"
conflict nvme resv-acquire "$b" --crkey=0xb1 --rtype=1 --racqa=0
report "$a"
grep -q '^regctl *: 2' /tmp/report || { cat /tmp/report; fail "not two registrants"; }

step "preempt"
must nvme resv-acquire "$b" --crkey=0xb1 --prkey=0xa1 --rtype=3 --racqa=1
must writes "$b"
conflict writes "$a"
conflict nvme resv-release "$a" --crkey=0xa1 --rtype=1 --rrela=0
report "$b"
grep -q '^regctl *: 1' /tmp/report && grep -q '^rtype *: 3' /tmp/report || { cat /tmp/report; fail "report after preempt"; }
nvme resv-notif-log "$ctrl_a" -o json >/out/resv-notif.json 2>&1 || nvme resv-notif-log "/dev/$ctrl_a" >/out/resv-notif.json 2>&1 ||
    { cat /out/resv-notif.json; fail "no notification log"; }
cat /out/resv-notif.json
grep -qi 'preempted' /out/resv-notif.json || fail "host A was not told that it was preempted"

step "registrants only"
# Exclusive access, registrants only: those who register may write.
must nvme resv-release "$b" --crkey=0xb1 --rtype=3 --rrela=0
must nvme resv-acquire "$b" --crkey=0xb1 --rtype=4 --racqa=0
conflict reads "$a"
conflict nvme compare "$a" -s 0 -c $count -z 4096 -d /tmp/data
must nvme resv-register "$a" --nrkey=0xa2 --rrega=0
must reads "$a"
must writes "$a"
must nvme flush "$a"

step "clear"
must nvme resv-release "$a" --crkey=0xa2 --rtype=4 --rrela=1
report "$a"
grep -q '^regctl *: 0' /tmp/report || { cat /tmp/report; fail "registrants after clear"; }
must writes "$a"
must writes "$b"

step "many rounds of preemption, the data is that of the holder"
for round in $(seq 1 8); do
    if [ $((round % 2)) = 1 ]; then me=$a other=$b key=0xa3; else me=$b other=$a key=0xb3; fi
    must nvme resv-register "$me" --nrkey=$key --rrega=0 --iekey
    if [ "$round" = 1 ]; then
        must nvme resv-acquire "$me" --crkey=$key --rtype=1 --racqa=0
    else
        must nvme resv-acquire "$me" --crkey=$key --prkey=$last --rtype=1 --racqa=1
    fi
    last=$key
    dd if=/dev/urandom of=/tmp/data bs=4096 count=1 2>/dev/null
    must writes "$me"
    cp /tmp/data /tmp/mine
    dd if=/dev/urandom of=/tmp/data bs=4096 count=1 2>/dev/null
    conflict writes "$other"
    must reads "$other"
    cmp /tmp/mine /tmp/back || fail "round $round: not what the holder wrote"
done
must nvme disconnect -n "$nqn"
! dmesg | grep -E 'BUG:|Call Trace|hung_task|blocked for more than|Oops' || fail "kernel trouble"
