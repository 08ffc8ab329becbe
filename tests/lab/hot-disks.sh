#!/bin/sh
# Disks with 1 to 4 queues, that grow, are reset, unplugged and plugged in:
#   hot-disks.sh ADDRESS PORT NQN
# NVMe controllers are in PCI slots 10h to 13h, virtio disks in 18h to 1bh, each with one queue more
# than the one before. A controller behind a root port comes later; its namespace 1 is also the
# virtio disk behind the other root port, which goes and comes again, and namespace 1 of the target.
# The controller in slot 14h has no namespace at first; its namespace 1 comes and goes twice.
# "please: WORD" asks the other side to do something.
. /job/lib.sh
modprobe nvme 2>/dev/null
modprobe virtio_blk || fail modules

# nvme_at PCI-ADDRESS: name of the controller.
nvme_at() {
    for c in /sys/class/nvme/nvme*; do
        [ "$(cat "$c/address" 2>/dev/null)" = "$1" ] && { echo "${c##*/}"; return 0; }
    done
    return 1
}
# nvme_disk PCI-ADDRESS NSID: its block device. The controllers of a PCI bus are their subsystems'
# only ones, so there are no devices of paths.
nvme_disk() {
    c=$(nvme_at "$1") || return 1
    for n in "/sys/class/nvme/$c"/nvme*n*; do
        [ "$(cat "$n/nsid" 2>/dev/null)" = "$2" ] && [ -b "/dev/${n##*/}" ] && { echo "/dev/${n##*/}"; return 0; }
    done
    return 1
}
# virtio_disk PCI-ADDRESS: block device.
virtio_disk() {
    for d in "/sys/bus/pci/devices/$1"/virtio*/block/vd*; do
        [ -b "/dev/${d##*/}" ] && { echo "/dev/${d##*/}"; return 0; }
    done
    return 1
}
sectors() { cat "/sys/block/${1#/dev/}/size"; }
is_size() { [ "$(sectors "$1")" = "$2" ]; }

for i in 0 1 2 3; do
    eval "nvme$i=0000:00:1$i.0 virtio$i=0000:00:1$(printf %x $((8 + i))).0"
done
hot=0000:01:00.0 same=0000:02:00.0
disks=
for i in 0 1 2 3; do
    eval "nvme=\$nvme$i virtio=\$virtio$i"
    wait_for 30 "namespace in $nvme" nvme_disk "$nvme" $((3 + i))
    wait_for 30 "disk in $virtio" virtio_disk "$virtio"
    c=$(nvme_at "$nvme")
    # The admin queue counts.
    [ "$(cat "/sys/class/nvme/$c/queue_count")" = $((i + 2)) ] ||
        fail "$c has $(cat "/sys/class/nvme/$c/queue_count") queues"
    d=$(virtio_disk "$virtio")
    [ "$(ls "/sys/block/${d#/dev/}/mq" | wc -l)" = $((i + 1)) ] ||
        fail "$d has $(ls "/sys/block/${d#/dev/}/mq" | wc -l) queues"
    disks="$disks $(nvme_disk "$nvme" $((3 + i))) $d"
done
step "queues are as many as they should be:$disks"
# A process for each processor, so that every queue is used.
jobs=
for d in $disks; do jobs="$jobs --name=${d#/dev/} --filename=$d"; done
fio --direct=1 --ioengine=libaio --rw=randrw --bs=4k --iodepth=8 --size=1M --offset_increment=4M \
    --numjobs=4 --thread --cpus_allowed=0-3 --cpus_allowed_policy=split --verify=crc32c --verify_fatal=1 \
    --do_verify=1 --randrepeat=0 --eta=never --output-format=json --output=/out/fio-queues.json $jobs ||
    { cat /out/fio-queues.json; fail "fio on all disks"; }
step "fio verify through every queue"

# io_count CONTROLLER: finished reads and writes of all its namespaces.
io_count() { cat "/sys/class/nvme/$1"/nvme*n*/stat | awk '{n += $1 + $5} END {print n}'; }
has_done() { [ "$(io_count "$1")" -ge "$2" ]; }

a=$(nvme_disk "$nvme0" 3) b=$(virtio_disk "$virtio0")
load grow-nvme "$a" & load_a=$!
load grow-virtio "$b" & load_b=$!
before=$(sectors "$a")
echo "please: grow"
for d in "$a" "$b"; do wait_for 30 "growth of $d" is_size "$d" $((before * 2)); done
dd if=/dev/urandom of=/tmp/end bs=1M count=1 2>/dev/null
for d in "$a" "$b"; do
    dd if=/tmp/end of="$d" bs=1M seek=$((before / 1024 - 1)) oflag=direct 2>/dev/null || fail "write at the end of $d"
    dd if="$d" bs=1M skip=$((before / 1024 - 1)) count=1 iflag=direct 2>/dev/null | cmp - /tmp/end ||
        fail "the end of $d differs"
done
end_load grow-nvme $load_a
end_load grow-virtio $load_b
step "both disks grew under load"

c=$(nvme_at "$nvme3") d=$(nvme_disk "$nvme3" 6)
load resets "$d" & load=$!
wait_for 30 "I/O on $d" has_done "$c" $(($(io_count "$c") + 200))
# The queues go without a word; the driver finds out when nothing is answered any more.
nvme subsystem-reset "/dev/$c" || fail subsystem-reset
nvme show-regs "/dev/$c" -H >/out/regs.txt 2>&1 || { cat /out/regs.txt; fail show-regs; }
grep -i 'nssro' /out/regs.txt
was_reset() { dmesg | grep -iq "nvme $c.*reset"; }
wait_for 30 "reset by the driver" was_reset
wait_for 30 "controller after a subsystem reset" is_live "$c"
step "subsystem reset"
echo 1 >"/sys/bus/pci/devices/$nvme3/reset" || fail "reset of the PCI function"
wait_for 30 "controller after a function reset" is_live "$c"
step "function reset"
nvme reset "/dev/$c" || fail reset
wait_for 30 "controller after a reset" is_live "$c"
end_load resets $load
step "three kinds of reset under load"

# identity FACE NAME: what a disk says of itself, with what its controller does.
identity() {
    for f in uuid nguid; do cat "/sys/block/$2/$f" >"/out/$1-$f" 2>/dev/null; done
    cat "/sys/block/$2/size" >"/out/$1-sectors"
}
echo "please: plug"
wait_for 60 "namespace 1" nvme_disk $hot 1
wait_for 30 "namespace 2" nvme_disk $hot 2
step "a controller was plugged in"
c=$(nvme_at $hot) d=$(nvme_disk $hot 1) load_disk=$(nvme_disk $hot 2)
identity nvme-pci "${d#/dev/}"
cat "/sys/class/nvme/$c/serial" >/out/nvme-pci-serial
file_system "$d"
v=$(virtio_disk $same)
identity virtio "${v#/dev/}"
cat "/sys/block/${v#/dev/}/serial" >/out/virtio-serial
check_files "$v"
step "the virtio disk holds what was written by NVMe"
# What is in flight when the driver lets go is lost, and fio with it.
load released "$load_disk" >/dev/null 2>&1 & load=$!
wait_for 30 "I/O on $load_disk" has_done "$c" $(($(io_count "$c") + 200))
echo 1 >/sys/bus/pci/devices/$hot/remove || fail "removing the controller"
is_gone() { ! [ -e "$1" ]; }
wait_for 60 "end of the controller" is_gone "/sys/class/nvme/$c"
wait $load && fail "fio did not notice that its disk is gone"
rm -f /out/fio-released.json
step "the controller is removed under load"
modprobe nvme_tcp || fail modules
nvme connect -t tcp -a "$1" -s "$2" -n "$3" || fail connect
wait_for 30 "namespace 1 by TCP" ns_device "$3" 1
t=$(ns_device "$3" 1)
identity nvme-tcp "${t#/dev/}"
cat "/sys/class/nvme/$(controller "$3")/serial" >/out/nvme-tcp-serial
check_files "$t"
nvme disconnect -n "$3" || fail disconnect
step "a host of the network sees the same"
echo 1 >/sys/bus/pci/rescan
wait_for 60 "namespace 1 after a rescan" nvme_disk $hot 1
wait_for 30 "namespace 2 after a rescan" nvme_disk $hot 2
check_files "$(nvme_disk $hot 1)"
fio_verify "$(nvme_disk $hot 2)" 4k 16 4M
step "the controller is back"

load unplugged "$v" >/dev/null 2>&1 & load=$!
has_written() { [ "$(count_io "${1#/dev/}" | cut -d' ' -f2)" -ge "$2" ]; }
before=$(count_io "${v#/dev/}")
wait_for 30 "I/O on $v" has_written "$v" $((${before#* } + 200))
echo "please: unplug"
wait_for 60 "end of the virtio disk" is_gone "/sys/block/${v#/dev/}"
wait $load && fail "fio did not notice that its disk is gone"
rm -f /out/fio-unplugged.json
step "the virtio disk is unplugged under load"
echo "please: plug again"
wait_for 60 "virtio disk in the port" virtio_disk $same
fio_verify "$(virtio_disk $same)" 16k 8 8M
step "the virtio disk is plugged in again"

follows=0000:00:14.0
c=$(nvme_at $follows) || fail "no controller in $follows"
is_live "$c" || fail "the controller without namespaces is not ready"
nvme_disk $follows 1 && fail "it has a namespace"
echo "please: add"
for way in "detach by hand" take; do
    wait_for 30 "namespace 1 of $c" nvme_disk $follows 1
    n=$(nvme_disk $follows 1)
    nvme list-ns "/dev/$c" | grep -q ':0x1$' || { nvme list-ns "/dev/$c"; fail list-ns; }
    fio_verify "$n" 4k "$([ "$way" = take ] && echo 7 || echo 6)" 4M
    load detached "$n" >/dev/null 2>&1 & load=$!
    before=$(io_count "$c")
    wait_for 30 "I/O on $n" has_done "$c" $((before + 200))
    echo "please: $way"
    wait_for 30 "end of $n" is_gone "/sys/block/${n#/dev/}"
    wait $load && fail "fio did not notice that its namespace is gone"
    rm -f /out/fio-detached.json
    is_live "$c" || fail "$c is not live any more"
    step "namespace 1 of $c has gone under load: $way"
    [ "$way" = take ] || echo "please: attach by hand"
done
dmesg | grep -v -e "${load_disk#/dev/}" -e "${v#/dev/}" -e "${c}n" >/tmp/dmesg
! grep -E 'BUG:|Call Trace|hung_task|blocked for more than|Oops' /tmp/dmesg || fail "kernel trouble"
! grep -iE "$IO_COMPLAINTS" /tmp/dmesg || fail "the kernel complains"
