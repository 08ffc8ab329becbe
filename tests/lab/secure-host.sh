#!/bin/sh
# A stock host with TLS and authentication: secure-host.sh NQN TLS-PORT ANY-PORT AUTH-PORT...
# /job/lines.NAME is what `penstock key export` printed for a host and a port.
. /job/lib.sh
nqn=$1 tls_port=$2 any_port=$3
shift 3
addr=10.0.2.2
modprobe nvme_tcp || fail modules
modprobe nvme_keyring 2>/dev/null
modprobe tls || fail "no kernel TLS"
grep -q ' \.nvme' /proc/keys || fail "no .nvme keyring"
# The agent resolves the keyrings of its configuration when it starts.
tlshd --stderr >/out/tlshd.log 2>&1 &
tlshd_pid=$!
wait_for 10 "handshake agent" kill -0 $tlshd_pid

# run NAME: what the operator was told to run, with a host identifier of the name.
run() {
    id=$(echo "$1" | md5sum | cut -c1-8)
    sed "s/^nvme connect/& --hostid=$id-2222-4333-8444-555555555555 --ctrl-loss-tmo=5/" "/job/lines.$1" >/tmp/lines
    sh -e /tmp/lines
}
refused() {
    step "$2 (has to be refused)"
    run "$1" && fail "$2: connected"
    return 0
}
# io NAME [SIZE]: connect, verify, disconnect.
io() {
    step "$1"
    run "$1" || { cat /out/tlshd.log; fail "connect $1"; }
    wait_for 30 "namespace of $1" ns_device "$nqn" 1
    dev=$(ns_device "$nqn" 1)
    fio_verify "$dev" 16k 8 "${2:-1M}"
    mv /out/fio-16k-qd8.json "/out/fio-$1.json"
    nvme disconnect -n "$nqn" >/dev/null
    wait_for 30 "end of $1" sh -c "! grep -qs $nqn /sys/class/nvme/nvme*/subsysnqn"
}

refused plain "plaintext to a listener with TLS"
refused stranger "a host without a key"
refused wrong "the wrong key"
refused expired "an expired key"
io tls-v1 4M
grep -H . /proc/net/tls_stat | grep -E 'Tls(Curr)?(Tx|Rx)' || true
io tls-v0

step "a key is rotated during fio"
run tls-v1 || fail "connect"
wait_for 30 "namespace" ns_device "$nqn" 1
dev=$(ns_device "$nqn" 1)
fio_verify "$dev" 4k 8 1M --time_based --runtime=12 &
fio_pid=$!
echo "rotate: now"
wait $fio_pid || fail "fio"
mv /out/fio-4k-qd8.json /out/fio-rotation.json
nvme disconnect -n "$nqn" >/dev/null
dmesg | grep -iE 'reconnect|I/O error|keep-alive' && fail "the rotation was felt"
refused tls-v1 "the old key after the rotation"

step "an old key and a new one, until the old one is removed during fio"
io overlap-new
run overlap-old || fail "connect by the old key"
wait_for 30 "namespace" ns_device "$nqn" 1
dev=$(ns_device "$nqn" 1)
fio_verify "$dev" 4k 8 1M --time_based --runtime=12 &
fio_pid=$!
echo "overlap: over"
wait $fio_pid || fail "fio"
mv /out/fio-4k-qd8.json /out/fio-overlap.json
nvme disconnect -n "$nqn" >/dev/null
dmesg | grep -iE 'reconnect|I/O error|keep-alive' && fail "the removal was felt"
refused overlap-old "the old key after its removal"

n=1
for port in "$@"; do
    io "one-way-$n"
    io "mutual-$n"
    n=$((n + 1))
done
step "a host's secret is changed while it is connected, during fio"
seen=$(dmesg | wc -l)
run one-way-1 || fail "connect"
wait_for 30 "namespace" ns_device "$nqn" 1
dev=$(ns_device "$nqn" 1)
secret=$(dirname "$(grep -ls "$nqn" /sys/class/nvme/nvme*/subsysnqn)")/dhchap_secret
fio_verify "$dev" 4k 8 1M --time_based --runtime=20 &
fio_pid=$!
echo "secret: now"
new=$(sed -n 's/.*--dhchap-secret=\([^ ]*\).*/\1/p' /job/lines.new-secret)
# The old one is gone by then, or goes while the host proves itself by the new one.
sleep 5
echo "$new" >"$secret" || fail "the new secret was not taken"
wait $fio_pid || fail "fio"
[ "$(cat "$secret")" = "$new" ] || fail "the host has another secret"
mv /out/fio-4k-qd8.json /out/fio-secret.json
nvme disconnect -n "$nqn" >/dev/null
dmesg | tail -n +$((seen + 1)) | grep -iE 'reconnect|I/O error|keep-alive|auth.*(fail|error)' \
    && fail "the change was felt"
# The next connection is by it alone.
io new-secret
refused one-way-1 "the old secret after its removal"

refused bad-secret "the wrong secret"
refused no-secret "no secret where one is needed"
io both
if [ -e /job/lines.concat ]; then
    io concat
    grep ' psk ' /proc/keys | grep -q NVMe1G || fail "no generated key"
fi
kill $tlshd_pid
exit 0
