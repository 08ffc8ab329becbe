#!/bin/sh
# Every command of nvme-cli that asks a target something:
#   nvme-cli.sh ADDRESS PORT DISCOVERY-PORT NQN
# Each leaves its output in /out/NAME.txt and a row "NAME EXIT-STATUS" in /out/commands; the
# other side knows what each has to say. The script itself only does what they are about.
. /job/lib.sh
# A reset of the subsystem cuts the connection by which the kernel goes on to disable the
# controller; it waits for that answer until this time is over.
modprobe nvme_tcp || fail modules
echo 5 >/sys/module/nvme_core/parameters/admin_timeout || fail admin_timeout
addr=$1 port=$2 discovery=$3 nqn=$4

# run NAME COMMAND...
run() {
    name=$1
    shift
    "$@" >"/out/$name.txt" 2>&1
    echo "$name $?" >>/out/commands
}

nvme connect -t tcp -a "$addr" -s "$port" -n "$nqn" --keep-alive-tmo=30 --reconnect-delay=1 || fail connect
wait_for 30 "namespace 1" ns_device "$nqn" 1
dev=$(ns_device "$nqn" 1) ctrl=/dev/$(controller "$nqn")
step "connected as $ctrl, $dev"

step "identify"
run id-ctrl nvme id-ctrl "$ctrl" -o json
run id-ns nvme id-ns "$dev" -o json
run id-ns-2 nvme id-ns "$ctrl" -n 2 -o json
run id-ns-none nvme id-ns "$ctrl" -n 77
run ns-descs nvme ns-descs "$dev" -o json
run list-ns nvme list-ns "$ctrl" -o json
run list-ns-all nvme list-ns "$ctrl" --all -o json
run nvm-id-ctrl nvme nvm-id-ctrl "$ctrl" -o json
run nvm-id-ns nvme nvm-id-ns "$dev" -o json
run cmdset-ind-id-ns nvme cmdset-ind-id-ns "$dev" -o json
run list-ctrl nvme list-ctrl "$ctrl" -o json
run list-ctrl-ns nvme list-ctrl "$ctrl" -n 1 -o json
run list-endgrp nvme list-endgrp "$ctrl" -o json

step "logs"
run fw-log nvme fw-log "$ctrl" -o json
run effects-log nvme effects-log "$ctrl" -o json
run ana-log nvme ana-log "$ctrl" -o json
run changed-ns-list-log nvme changed-ns-list-log "$ctrl" -o json
run supported-log-pages nvme supported-log-pages "$ctrl" -o json
run endurance-log nvme endurance-log "$ctrl" -g 1
run resv-notif-log nvme resv-notif-log "$ctrl"
run fid-support-effects-log nvme fid-support-effects-log "$ctrl" -o json
run self-test-log nvme self-test-log "$ctrl"
run persistent-event-log nvme persistent-event-log "$ctrl" -a 0
run error-log nvme error-log "$ctrl" -e 16 -o json

step "smart-log around counted I/O"
run smart-before nvme smart-log "$ctrl" -o json
# 2000 units of 512 bytes each way: two counts of the thousand that the log counts in.
fio --name=counted --filename="$dev" --direct=1 --rw=write --bs=4k --size=1000k --eta=never \
    --output=/dev/null || fail fio
fio --name=counted --filename="$dev" --direct=1 --rw=read --bs=4k --size=1000k --eta=never \
    --output=/dev/null || fail fio
run smart-after nvme smart-log "$ctrl" -o json

step "features"
for fid in 01 02 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f 10 11 16 17 78 79 7a 7b 7c 7d 7e 7f 80 81 82 83 84; do
    for sel in 0 1 2 3; do
        run "feature-$fid-$sel" nvme get-feature "$ctrl" -f "0x$fid" -s $sel -n 1 -o json
    done
done
# The kernel sets the number of queues when it connects; this one it leaves to us.
run set-threshold nvme set-feature "$ctrl" -f 4 --value=0x157
run feature-04-set nvme get-feature "$ctrl" -f 4 -s 0
run host-id sh -c "nvme get-feature $ctrl -f 0x81 --cdw11=1 -l 16 -b | od -An -tx1"
run set-unknown nvme set-feature "$ctrl" -f 0x7f --value=1
run feature-0f-human nvme get-feature "$ctrl" -f 0xf -H

step "commands on blocks"
dd if=/dev/urandom of=/tmp/block bs=4096 count=4 2>/dev/null
dd if=/dev/urandom of=/tmp/other bs=4096 count=4 2>/dev/null
blocks=$((16384 / $(cat "/sys/block/${dev#/dev/}/queue/logical_block_size")))
last=$((blocks - 1))
run write nvme write "$dev" -s 0 -c $last -z 16384 -d /tmp/block
run read nvme read "$dev" -s 0 -c $last -z 16384 -d /tmp/back
cmp /tmp/block /tmp/back && run read-same true || run read-same false
run compare-same nvme compare "$dev" -s 0 -c $last -z 16384 -d /tmp/block
run compare-other nvme compare "$dev" -s 0 -c $last -z 16384 -d /tmp/other
run verify nvme verify "$dev" -s 0 -c $last
run verify-far nvme verify "$dev" -s 0xffffffffff -c 0
run copy nvme copy "$dev" -d 4096 -s 0 -b $last
nvme read "$dev" -s 4096 -c $last -z 16384 -d /tmp/copied >/dev/null 2>&1
cmp /tmp/block /tmp/copied && run copy-same true || run copy-same false
run write-zeroes nvme write-zeroes "$dev" -s 0 -c $last
nvme read "$dev" -s 0 -c $last -z 16384 -d /tmp/zeros >/dev/null 2>&1
head -c 16384 /dev/zero | cmp - /tmp/zeros && run zeroes-same true || run zeroes-same false
run dsm nvme dsm "$dev" -d 1 -s 4096 -b $blocks
run write-uncor nvme write-uncor "$dev" -s 8192 -c 0
run write-far nvme write "$dev" -s 0xffffffffff -c 0 -z $((16384 / blocks)) -d /tmp/block
run flush nvme flush "$dev"
run io-unknown nvme io-passthru "$dev" --opcode=0x3f --namespace-id=1
run admin-unknown nvme admin-passthru "$ctrl" --opcode=0x3f

step "media error"
# The other side cuts the file now, and makes it whole again when it has seen the next step.
end=$(($(cat "/sys/block/${dev#/dev/}/size") * blocks / 32 - blocks))
tries=300
while nvme read "$dev" -s $end -c $last -z 16384 -d /tmp/back >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || fail "no media error"
    sleep 0.1
done
run smart-media nvme smart-log "$ctrl" -o json
run read-media nvme read "$dev" -s $end -c $last -z 16384 -d /tmp/back
run error-log-after nvme error-log "$ctrl" -e 16 -o json
echo "$end" >/out/media-block
step "media is whole"
tries=300
until nvme read "$dev" -s $end -c $last -z 16384 -d /tmp/back >/dev/null 2>&1; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || fail "the media error stays"
    sleep 0.1
done
run smart-last nvme smart-log "$ctrl" -o json

step "reservations"
run resv-register nvme resv-register "$dev" --nrkey=0x1234 --rrega=0
run resv-acquire nvme resv-acquire "$dev" --crkey=0x1234 --rtype=1 --racqa=0
run resv-report nvme resv-report "$dev" -e -o json
run resv-write nvme write "$dev" -s 0 -c $last -z 16384 -d /tmp/block
run resv-wrong-key nvme resv-release "$dev" --crkey=0x9999 --rtype=1 --rrela=0
run resv-release nvme resv-release "$dev" --crkey=0x1234 --rtype=1 --rrela=0
run resv-unregister nvme resv-register "$dev" --crkey=0x1234 --rrega=1
run resv-report-last nvme resv-report "$dev" -e -o json

step "controller"
run show-regs nvme show-regs "$ctrl"
run ns-rescan nvme ns-rescan "$ctrl"
run reset nvme reset "$ctrl"
wait_for 30 "live controller after reset" is_live "${ctrl#/dev/}"
run subsystem-reset nvme subsystem-reset "$ctrl"
sleep 1
wait_for 60 "live controller after subsystem reset" is_live "${ctrl#/dev/}"
run read-after-resets nvme read "$dev" -s 0 -c $last -z 16384 -d /tmp/back
run discover nvme discover -t tcp -a "$addr" -s "$discovery" -o json
run discover-ctrl nvme discover -t tcp -a "$addr" -s "$discovery" -n nqn.2014-08.org.nvmexpress.discovery -o json
run disconnect nvme disconnect -n "$nqn"
run connect-all nvme connect-all -t tcp -a "$addr" -s "$discovery"
wait_for 30 "namespace 1 after connect-all" ns_device "$nqn" 1
run disconnect-again nvme disconnect -n "$nqn"
! ns_device "$nqn" 1 || fail "the namespace is still there"
dmesg >/out/dmesg-end.txt
