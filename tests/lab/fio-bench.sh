#!/bin/sh
# Every job file, some rounds, on an NVMe disk, a virtio disk and, if a target is named, a namespace
# of the kernel's NVMe/TCP host, in turn:
#   fio-bench.sh RUNTIME ROUNDS [ADDRESS PORT NQN NSID]
. /job/lib.sh
modprobe nvme 2>/dev/null
modprobe virtio_blk || fail modules
wait_for 30 /dev/vda test -b /dev/vda
# Named by its place among the controller's, whatever its number is.
disk=/dev/nvme0n1
wait_for 30 $disk test -b $disk
disks="$disk /dev/vda" remote=
if [ $# -gt 2 ]; then
    modprobe nvme_tcp || fail modules
    nvme connect -t tcp -a "$3" -s "$4" -n "$5" || fail connect
    wait_for 30 "namespace $6" ns_device "$5" "$6"
    remote=$(ns_device "$5" "$6") disks="$disks $remote"
fi
export FILENAME RUNTIME=$1
for job in /job/*.fio; do
    name=$(basename "$job" .fio)
    cat /job/engine "$job" >/tmp/job.fio
    round=0
    while [ $round -lt "$2" ]; do
        for FILENAME in $disks; do
            case $FILENAME in /dev/vda) engine=virtio ;; "$remote") engine=kernel ;; *) engine=nvme ;; esac
            out=/out/${engine}_${name}_$round.json
            fio --eta=never --output-format=json --output="$out" /tmp/job.fio || { cat "$out"; fail "$name on $FILENAME"; }
        done
        round=$((round + 1))
    done
    step "$name"
done
