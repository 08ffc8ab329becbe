# What the guest's scripts share. Sourced: . /job/lib.sh

step() { echo "--- $* [$(cut -d' ' -f1 /proc/uptime) s]"; }
fail() { echo "FAILED: $*"; dmesg | tail -n 15; exit 1; }

# wait_for SECONDS WHAT COMMAND...: until the command succeeds.
wait_for() {
    tries=$(($1 * 10)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        tries=$((tries - 1))
        [ $tries -gt 0 ] || fail "no $what"
        sleep 0.1
    done
}

# ns_device NQN NSID: print the block device of a namespace. With native
# multipath the name of the head device, nvmeXnY, holds no controller.
ns_device() {
    for subsystem in /sys/class/nvme-subsystem/nvme-subsys*; do
        [ "$(cat "$subsystem/subsysnqn" 2>/dev/null)" = "$1" ] || continue
        for d in "$subsystem"/nvme*n*; do
            [ "$(cat "$d/nsid" 2>/dev/null)" = "$2" ] && [ -b "/dev/${d##*/}" ] || continue
            echo "/dev/${d##*/}"
            return 0
        done
    done
    return 1
}

# controller NQN: print the name of a subsystem's I/O controller, such as nvme0.
controller() {
    for c in /sys/class/nvme/nvme*; do
        [ "$(cat "$c/subsysnqn" 2>/dev/null)" = "$1" ] && { echo "${c##*/}"; return 0; }
    done
    return 1
}

is_live() { [ "$(cat "/sys/class/nvme/$1/state")" = live ]; }

drop_caches() { sync; echo 3 >/proc/sys/vm/drop_caches; }

# The files of the file system test: sizes around block and page limits.
make_files() {
    mkdir -p "$1"
    for size in 0 1 511 512 4095 4096 4097 65536 1048577 4194304; do
        head -c $size /dev/urandom >"$1/$size"
    done
    cp -r /usr/lib/modules "$1/"
}
sums() { (cd "$1" && find . -type f ! -path './lost+found/*' | sort | xargs sha256sum); }

# file_system DEV: make one, fill it, look at it again with nothing cached.
# The file system and its files stay on the device.
file_system() {
    step "mkfs.ext4 $1"
    mkfs.ext4 -q -F "$1" || fail mkfs
    mount -t ext4 "$1" /mnt || fail mount
    make_files /tmp/files
    sums /tmp/files >/tmp/sums
    cp -r /tmp/files/. /mnt/ || fail copy
    umount /mnt || fail umount
    check_files "$1"
    rm -r /tmp/files
    cp /tmp/sums /out/files.sha256
}

# check_files DEV: compare the file system with /tmp/sums.
check_files() {
    drop_caches
    mount -t ext4 -o ro "$1" /mnt || fail "mount again"
    sums /mnt >/tmp/sums.now
    umount /mnt || fail umount
    cmp /tmp/sums /tmp/sums.now || fail "files differ"
    e2fsck -fn "$1" >/tmp/e2fsck 2>&1 || { cat /tmp/e2fsck; fail e2fsck; }
    step "$(wc -l </tmp/sums) files are right, file system is clean"
}

# fio_verify DEV BS DEPTH SIZE [OPTION...]: mixed I/O, every written block is
# read back and its checksum compared.
fio_verify() {
    fio_name=fio-$2-qd$3 fio_dev=$1 fio_bs=$2 fio_depth=$3 fio_size=$4
    shift 4
    fio --name="$fio_name" --filename="$fio_dev" --direct=1 --ioengine=libaio --rw=randrw \
        --bs="$fio_bs" --iodepth="$fio_depth" --size="$fio_size" --verify=crc32c --verify_fatal=1 \
        --do_verify=1 --randrepeat=0 --eta=never --output-format=json --output="/out/$fio_name.json" "$@" ||
        { cat "/out/$fio_name.json"; fail "$fio_name"; }
}

# load NAME DEV: fio verify on the first 8 MiB, again and again until /tmp/over-NAME is there.
load() {
    until [ -e "/tmp/over-$1" ]; do
        fio --name="fio-$1" --filename="$2" --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=16 \
            --size=8M --rate=4m --verify=crc32c --verify_fatal=1 --do_verify=1 --randrepeat=0 --eta=never \
            --output-format=json --output="/out/fio-$1.json" || return 1
    done
}
# end_load NAME PID: end it after its round; it has to have gone well.
end_load() { touch "/tmp/over-$1"; wait "$2" || { cat "/out/fio-$1.json"; fail "load $1"; }; }

# fio_matrix DEV: several block sizes, each with the size of its area, and depths.
FIO_MATRIX='512:1M 4k:4M 64k:16M 256k:32M'
fio_matrix() {
    for bs_size in $FIO_MATRIX; do
        for depth in 1 16 32; do
            fio_verify "$1" "${bs_size%:*}" $depth "${bs_size#*:}"
        done
        step "fio verify, blocks of ${bs_size%:*}, depths 1, 16 and 32"
    done
}

# is_zero DEV OFFSET-MIB COUNT-MIB: read around the page cache.
is_zero() {
    dd if="$1" bs=1M skip="$2" count="$3" iflag=direct 2>/dev/null >/tmp/zero || return 1
    [ "$(sha256sum </tmp/zero)" = "$(dd if=/dev/zero bs=1M count="$3" 2>/dev/null | sha256sum)" ]
}

# fill DEV: random bytes in the first 16 MiB, so that zeros have to come from
# the command under test.
fill() {
    dd if=/dev/urandom of="$1" bs=1M count=16 oflag=direct 2>/dev/null || fail fill
    ! is_zero "$1" 0 1 || fail "a filled block is zero"
}

# By its path, because the shell prefers its own program of that name.
BLKDISCARD=/usr/bin/blkdiscard

# zeroes DEV DISCARD-READS-ZERO: write zeroes, then discard.
zeroes() {
    fill "$1"
    $BLKDISCARD -z -o 1048576 -l 8388608 "$1" || fail "write zeroes"
    is_zero "$1" 1 8 || fail "written zeroes are not zero"
    ! is_zero "$1" 0 1 && ! is_zero "$1" 9 1 || fail "write zeroes went too far"
    step "write zeroes"
    fill "$1"
    $BLKDISCARD -o 1048576 -l 8388608 "$1" || fail discard
    if [ "$2" = yes ]; then is_zero "$1" 1 8 || fail "discarded blocks are not zero"; fi
    ! is_zero "$1" 0 1 && ! is_zero "$1" 9 1 || fail "discard went too far"
    step "discard (has to read zero: $2)"
}

# count_io DISK...: finished reads and writes of block devices, by their names
# below /sys/block.
count_io() { for s in "$@"; do cat "/sys/block/$s/stat"; done | awk '{r += $1; w += $5} END {print r, w}'; }

# kernel_complaints PATTERN: nothing of the kind may be in the kernel's log.
kernel_complaints() {
    # Without UUIDs: one in a hundred has the letters of "bad".
    dmesg | sed -E 's/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/UUID/g' | grep -iE "$1" >/tmp/complaints && { cat /tmp/complaints; fail "the kernel complains"; }
    ! dmesg | grep -E 'BUG:|Call Trace|hung_task|blocked for more than|Oops' || fail "kernel trouble"
}
IO_COMPLAINTS='I/O error|critical|Buffer I/O|lost async page|EXT4-fs error'
NVME_COMPLAINTS="$IO_COMPLAINTS|nvme.*(fail|error|invalid|timeout|timed out|mismatch|bad|unexpected|not ready|cannot|unable)"
