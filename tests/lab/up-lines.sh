#!/bin/sh
# The lines that `penstock up` prints for a Linux host, run as they are:
#   up-lines.sh PORT DISCOVERY-PORT NQN
# /job/lines has one per row, after a word that says which it is.
. /job/lib.sh
run_line() {
    line=$(sed -n "s/^$1 //p" /job/lines)
    [ -n "$line" ] || fail "no line for $1"
    step "$line"
    sh -c "$line" || fail "$1"
}
# The lines name this machine's 127.0.0.1, which for the guest is elsewhere.
for port in "$1" "$2"; do
    nc -ll -p "$port" -e /usr/bin/nc 10.0.2.2 "$port" &
    wait_for 30 "listener on $port" grep -q ":$(printf %04X "$port") .* 0A " /proc/net/tcp /proc/net/tcp6
done
run_line modprobe
run_line discover
run_line connect-all
wait_for 30 "namespace 1" ns_device "$3" 1
file_system "$(ns_device "$3" 1)"
run_line list
run_line disconnect
! ns_device "$3" 1 || fail "the namespace is still there"
run_line connect
wait_for 30 "namespace 1" ns_device "$3" 1
check_files "$(ns_device "$3" 1)"
run_line fio
run_line disconnect
kernel_complaints "$NVME_COMPLAINTS"
