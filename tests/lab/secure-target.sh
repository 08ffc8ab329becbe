#!/bin/sh
# The kernel's target with TLS and authentication, for a host outside of the guest:
#   secure-target.sh NQN HOST-TLS HOST-AUTH HOST-MUTUAL TLS-KEY SECRET CONTROLLER-SECRET
# Port 4420 speaks TLS alone, port 4421 does not. HOST-TLS has a key of identity version 0 for NQN:v0 and
# one of version 1 for NQN:v1. It serves until the guest is ended.
. /job/lib.sh
nqn=$1 host_tls=$2 host_auth=$3 host_mutual=$4 key=$5 secret=$6 controller_secret=$7
CFG=/sys/kernel/config/nvmet
modprobe nvmet_tcp && modprobe loop || fail modules
modprobe nvme_keyring 2>/dev/null
modprobe tls || fail "no kernel TLS"
grep -q ' \.nvme' /proc/keys || fail "no .nvme keyring"
tlshd --stderr >/out/tlshd.log 2>&1 &
wait_for 10 "handshake agent" kill -0 $!
for version in 0 1; do
    nvme check-tls-key --keyring=.nvme --hostnqn="$host_tls" --subsysnqn="$nqn:v$version" \
        --identity=$version --insert --keydata="$key" >/dev/null || fail "key $version"
done
grep psk /proc/keys

# subsystem NQN: with a namespace of its own in memory.
subsystem() {
    file=/tmp/$(echo "$1" | md5sum | cut -c1-8).img
    truncate -s 32M "$file"
    backing=$(losetup -f)
    losetup "$backing" "$file" || fail losetup
    mkdir "$CFG/subsystems/$1" "$CFG/subsystems/$1/namespaces/1" || fail nvmet
    echo "$backing" >"$CFG/subsystems/$1/namespaces/1/device_path"
    echo 1 >"$CFG/subsystems/$1/namespaces/1/enable" || fail "nvmet namespace"
}
# port N SERVICE tls|plain SUBSYSTEM...
port() {
    p=$CFG/ports/$1
    mkdir "$p" || fail ports
    echo ipv4 >"$p/addr_adrfam"
    echo tcp >"$p/addr_trtype"
    echo 0.0.0.0 >"$p/addr_traddr"
    echo "$2" >"$p/addr_trsvcid"
    # To name the transport forgets what was said of TLS, so that comes last.
    if [ "$3" = tls ]; then
        echo tls1.3 >"$p/addr_tsas" || fail "no TLS in nvmet"
        echo required >"$p/addr_treq"
    fi
    shift 3
    for s in "$@"; do
        ln -s "$CFG/subsystems/$s" "$p/subsystems/$s" || fail "nvmet port"
    done
}
for s in v0 v1; do
    subsystem "$nqn:$s"
    echo 1 >"$CFG/subsystems/$nqn:$s/attr_allow_any_host"
done
subsystem "$nqn:auth"
for h in "$host_auth" "$host_mutual"; do
    mkdir "$CFG/hosts/$h" || fail "nvmet host"
    echo "$secret" >"$CFG/hosts/$h/dhchap_key" || fail "secret of the host"
    echo "hmac(sha384)" >"$CFG/hosts/$h/dhchap_hash" || fail hash
    echo ffdhe2048 >"$CFG/hosts/$h/dhchap_dhgroup" || fail group
    ln -s "$CFG/hosts/$h" "$CFG/subsystems/$nqn:auth/allowed_hosts/$h" || fail "allowed host"
done
echo "$controller_secret" >"$CFG/hosts/$host_mutual/dhchap_ctrl_key" || fail "secret of the controller"
port 1 4420 tls "$nqn:v0" "$nqn:v1"
port 2 4421 plain "$nqn:auth"
echo "serving: now"
while :; do
    sleep 5
    dmesg -c
    cat /out/tlshd.log
    : >/out/tlshd.log
done
