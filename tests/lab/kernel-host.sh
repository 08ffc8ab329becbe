#!/bin/sh
# What a stock host does with a target: kernel-host.sh ADDRESS DISCOVERY-PORT NQN
. /job/lib.sh
modprobe nvme_tcp || fail modules
kernel_host() {
    addr=$1 port=$2 nqn=$3
    step "nvme discover"
    nvme discover -t tcp -a "$addr" -s "$port" || fail discover
    nvme discover -t tcp -a "$addr" -s "$port" -o json >/out/discover.json || fail discover
    step "nvme connect-all"
    nvme connect-all -t tcp -a "$addr" -s "$port" || fail connect-all
    wait_for 30 "namespace 1 of $nqn" ns_device "$nqn" 1
    dev=$(ns_device "$nqn" 1) ctrl=$(controller "$nqn")
    nvme list || fail list
    nvme list-subsys
    nvme list -o json >/out/list.json || fail list
    nvme id-ctrl "/dev/$ctrl" -o json >/out/id-ctrl.json || fail id-ctrl
    nvme id-ns "$dev" -o json >/out/id-ns.json || fail id-ns
    nvme ns-descs "$dev" || fail ns-descs
    nvme smart-log "/dev/$ctrl" >/out/smart-log.txt || fail smart-log
    cat "/sys/block/${dev#/dev/}/size" >/out/sectors
    cat "/sys/class/nvme/$ctrl/queue_count" >/out/queue-count
    # Where connect-all went: discovery and I/O may share a port, as they do at the kernel's own target.
    io_port=$(sed 's/.*trsvcid=\([0-9]*\).*/\1/' "/sys/class/nvme/$ctrl/address")

    file_system "$dev"
    fio_matrix "$dev"
    # DLFEAT 1: the target says that deallocated blocks read zero.
    reads_zero=no
    [ $(($(nvme id-ns "$dev" | awk '$1 == "dlfeat" {print $3}') & 7)) = 1 ] && reads_zero=yes
    zeroes "$dev" $reads_zero

    step "nvme reset"
    nvme reset "/dev/$ctrl" || fail reset
    wait_for 30 "live controller after reset" is_live "$ctrl"
    fio_verify "$dev" 8k 16 4M
    file_system "$dev"
    step "nvme disconnect"
    nvme disconnect -n "$nqn" || fail disconnect
    ! ns_device "$nqn" 1 || fail "the namespace is still there"

    step "header and data digests"
    nvme connect -t tcp -a "$addr" -s "$io_port" -n "$nqn" --hdr-digest --data-digest ||
        fail "connect with digests"
    wait_for 30 "namespace 1 of $nqn" ns_device "$nqn" 1
    dev=$(ns_device "$nqn" 1)
    for bs in 4k 64k; do
        fio_verify "$dev" $bs 12 4M
    done
    nvme disconnect -n "$nqn" || fail "disconnect with digests"
    kernel_complaints "$NVME_COMPLAINTS"
}
[ -n "${NO_RUN-}" ] || kernel_host "$@"
