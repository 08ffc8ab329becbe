//! The exact lines for other people's tools.

use std::net::SocketAddr;

use crate::shell::word;

/// QEMU takes a comma in a value doubled.
fn qemu_value(text: &str) -> String {
    text.replace(',', ",,")
}

pub(super) fn kernel_host(discovery: Option<SocketAddr>, io: SocketAddr, nqn: &str) -> String {
    let mut text = String::from("\nLinux host (root, package nvme-cli):\n  modprobe nvme-tcp\n");
    if let Some(addr) = discovery {
        let to = format!("-t tcp -a {} -s {}", addr.ip(), addr.port());
        text.push_str(&format!("  nvme discover {to}\n  nvme connect-all {to}\n"));
        text.push_str("  # or one subsystem alone:\n");
    }
    text.push_str(&format!(
        "  nvme connect -t tcp -a {} -s {} -n {nqn}\n  nvme list\n  nvme disconnect -n {nqn}\n",
        io.ip(),
        io.port(),
        nqn = word(nqn),
    ));
    text
}

/// Lines for one volume by either kind of disk.
pub(super) fn qemu(name: &str, virtio: &str, nvme: &str, queues: u16) -> String {
    let machine = "qemu-system-x86_64 -machine q35,accel=kvm,memory-backend=mem -m 2G \\\n    \
         -object memory-backend-memfd,id=mem,size=2G,share=on \\\n    ";
    let chardev = format!("socket,id={name},path={},reconnect-ms=1000", qemu_value(virtio));
    let controller = serde_json::json!({
        "driver": "vfio-user-pci",
        "socket": {"type": "unix", "path": nvme},
    });
    format!(
        "\nQEMU (9.2 or later; guest memory has to be shared), and the same disk by NVMe (10.1 or \
         later):\n  {machine}\
         -chardev {} \\\n    \
         -device vhost-user-blk-pci,chardev={name},num-queues={queues} ...\n  {machine}\
         -device {} ...\n",
        word(&chardev),
        word(&controller.to_string())
    )
}

pub(super) fn fio(socket: &str) -> String {
    // fio splits file names at colons, not this option; it only reads here.
    format!(
        "\nfio on the kernel's disk, and through libblkio (fio built with libblkio):\n  \
         fio --name=host --filename=/dev/nvme0n1 --ioengine=io_uring --direct=1 \
         --rw=randread --bs=4k \\\n    --iodepth=32 --time_based --runtime=10\n  \
         fio --name=device --thread --ioengine=libblkio \\\n    \
         --libblkio_driver=virtio-blk-vhost-user --libblkio_path={} \\\n    \
         --rw=randread --bs=4k --iodepth=32 --time_based --runtime=10\n",
        word(socket)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(word("/srv/a-b/vol0.sock"), "/srv/a-b/vol0.sock");
        assert_eq!(word("/srv/a b"), "'/srv/a b'");
        assert_eq!(word("it's"), "'it'\\''s'");
        assert_eq!(word(""), "''");
    }

    #[test]
    fn the_lines_name_what_is_running() {
        let io = "127.0.0.1:4420".parse().unwrap();
        let text = kernel_host(Some("127.0.0.1:8009".parse().unwrap()), io, "nqn.a");
        for line in [
            "  nvme discover -t tcp -a 127.0.0.1 -s 8009",
            "  nvme connect-all -t tcp -a 127.0.0.1 -s 8009",
            "  nvme connect -t tcp -a 127.0.0.1 -s 4420 -n nqn.a",
            "  nvme disconnect -n nqn.a",
        ] {
            assert!(text.lines().any(|other| other == line), "{line:?} not in\n{text}");
        }
        assert!(!kernel_host(None, io, "nqn.a").contains("discover"));
        let text = qemu("vol0", "/srv/a,b/vol0.sock", "/srv/it's/vol0.nvme", 2);
        assert!(text.contains("path=/srv/a,,b/vol0.sock,reconnect-ms=1000"), "{text}");
        assert!(text.contains("chardev=vol0,num-queues=2"), "{text}");
        assert!(text.contains(r#""path":"/srv/it'\''s/vol0.nvme""#), "{text}");
        assert!(fio("/srv/vol0.sock").contains("--libblkio_path=/srv/vol0.sock"));
    }
}
