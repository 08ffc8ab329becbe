#!/bin/sh
# Every job file on a kernel host's namespace and on a virtio disk:
#   fio-jobs.sh ADDRESS PORT NQN RUNTIME
. /job/lib.sh
modprobe nvme_tcp && modprobe virtio_blk || fail modules
nvme connect -t tcp -a "$1" -s "$2" -n "$3" || fail connect
wait_for 30 "namespace 1" ns_device "$3" 1
wait_for 30 /dev/vda test -b /dev/vda
export FILENAME RUNTIME=$4
for FILENAME in "$(ns_device "$3" 1)" /dev/vda; do
    for job in /job/*.fio; do
        name=$(basename "$job" .fio)
        [ "$name" != kernel ] || continue
        out=/out/${FILENAME#/dev/}-$name.json
        cat /job/kernel.fio "$job" >/tmp/job.fio
        fio --eta=never --output-format=json --output="$out" /tmp/job.fio || { cat "$out"; fail "$name on $FILENAME"; }
        step "$name on $FILENAME"
    done
done
nvme disconnect -n "$3" || fail disconnect
kernel_complaints "$NVME_COMPLAINTS"
