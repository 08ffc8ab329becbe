#!/bin/sh
# Every job file, some rounds, on an NVMe disk and a virtio disk in turn:
#   fio-bench.sh RUNTIME ROUNDS
. /job/lib.sh
modprobe nvme 2>/dev/null
modprobe virtio_blk || fail modules
wait_for 30 /dev/vda test -b /dev/vda
disk=/dev/nvme0n2
wait_for 30 $disk test -b $disk
export FILENAME RUNTIME=$1
for job in /job/*.fio; do
    name=$(basename "$job" .fio)
    cat /job/engine "$job" >/tmp/job.fio
    round=0
    while [ $round -lt "$2" ]; do
        for FILENAME in "$disk" /dev/vda; do
            case $FILENAME in /dev/vda) engine=virtio ;; *) engine=nvme ;; esac
            out=/out/${engine}_${name}_$round.json
            fio --eta=never --output-format=json --output="$out" /tmp/job.fio || { cat "$out"; fail "$name on $FILENAME"; }
        done
        round=$((round + 1))
    done
    step "$name"
done
