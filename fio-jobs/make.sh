#!/bin/sh
# Puts every point and every engine together, to files that fio takes as they are:
#   sh fio-jobs/make.sh [FOLDER]       (default: the folder this is in)
set -e
here=$(dirname "$0")
to=${1:-$here}
make() {
    mkdir -p "$to/$1"
    for job in "$here"/*.fio; do
        name=$(basename "$job")
        {
            echo "# Made by fio-jobs/make.sh from engine/$2.fio and $name."
            echo "#   $3 RUNTIME=30 fio fio-jobs/$1/$name"
            cat "$here/engine/$2.fio" "$job"
        } >"$to/$1/$name"
    done
}
make kernel-nvme-tcp kernel 'FILENAME=/dev/nvme0n1'
make emulated-nvme kernel 'FILENAME=/dev/nvme0n1'
make virtio-blk kernel 'FILENAME=/dev/vda'
make libblkio libblkio 'SOCKET=/run/disk.sock'
