#!/bin/sh
# The kernel host against the kernel's own target, both in the guest.
NO_RUN=1
. /job/kernel-host.sh
# Both ends are emulated: less of it shows as much.
FIO_MATRIX='4k:2M 64k:8M'
NQN=nqn.2026-11.example.lab:kernel
CFG=/sys/kernel/config/nvmet
modprobe nvmet_tcp && modprobe loop || fail modules
truncate -s 128M /tmp/ns.img
backing=$(losetup -f)
losetup "$backing" /tmp/ns.img || fail losetup
mkdir "$CFG/subsystems/$NQN" || fail nvmet
echo 1 >"$CFG/subsystems/$NQN/attr_allow_any_host"
mkdir "$CFG/subsystems/$NQN/namespaces/1"
echo "$backing" >"$CFG/subsystems/$NQN/namespaces/1/device_path"
echo 1 >"$CFG/subsystems/$NQN/namespaces/1/enable" || fail "nvmet namespace"
mkdir "$CFG/ports/1"
echo ipv4 >"$CFG/ports/1/addr_adrfam"
echo tcp >"$CFG/ports/1/addr_trtype"
echo 127.0.0.1 >"$CFG/ports/1/addr_traddr"
echo 4420 >"$CFG/ports/1/addr_trsvcid"
ln -s "$CFG/subsystems/$NQN" "$CFG/ports/1/subsystems/$NQN" || fail "nvmet port"
kernel_host 127.0.0.1 4420 $NQN
