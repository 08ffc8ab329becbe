//! Each refusal names the place, the key, the value and what is allowed.

use super::*;

const NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:6f5b8d2e-5a0c-4f0e-9d3b-0d5cbb6a4f11";

fn toml(text: &str) -> Result<Config, ConfigError> {
    Draft::from_toml(Path::new("penstock.toml"), text)?.check()
}

fn refusal(text: &str) -> String {
    let message = toml(text).unwrap_err().to_string();
    assert!(!message.contains('\n'), "one line: {message}");
    message
}

const WHOLE: &str = r#"
[data]
dir = "/var/lib/penstock"

[[volume]]
name = "db0"
spec = "ram:64MiB"
nsid = 3

[[volume]]
name = "db1"
spec = "null:1TiB"

[target]
listen = ["0.0.0.0:4420,advertise=192.0.2.7:4420", "[::1]:4420"]
discovery = ["127.0.0.1:8009"]
subnqn = "nqn.2014-08.org.nvmexpress:uuid:6f5b8d2e-5a0c-4f0e-9d3b-0d5cbb6a4f11"
cores = 2
busy_poll_us = 100
queue_entries_max = 128
io_queues_max = 8

[emulator]
cores = 1
busy_poll_us = 0

[[device]]
name = "disk0"
type = "virtio-blk"
socket = "/run/disk0.sock"
connect = "192.0.2.7:4420"
subnqn = "nqn.2014-08.org.nvmexpress:uuid:6f5b8d2e-5a0c-4f0e-9d3b-0d5cbb6a4f11"
nsid = 3
queues = 4
read_only = true
"#;

fn way(addr: &str) -> PathConfig {
    addr.parse::<SocketAddr>().unwrap().into()
}

#[test]
fn a_whole_file() {
    let config = toml(WHOLE).unwrap();
    assert_eq!(config.data_dir.as_deref(), Some(Path::new("/var/lib/penstock")));
    let names: Vec<_> = config.volumes.iter().map(|v| (v.name.as_str(), v.nsid)).collect();
    assert_eq!(names, [("db0", Some(3)), ("db1", None)]);
    let target = config.target.unwrap();
    assert_eq!(target.listen[0].to_string(), "0.0.0.0:4420,advertise=192.0.2.7:4420");
    assert_eq!(target.listen[1].addr, "[::1]:4420".parse().unwrap());
    assert_eq!(target.discovery[0].to_string(), "127.0.0.1:8009");
    assert_eq!(target.subnqn().map(Nqn::as_str), Some(NQN));
    assert_eq!((target.cores, target.queue_entries_max), (Some(2), Some(128)));
    assert_eq!((target.io_queues_max, config.emulator_cores), (Some(8), Some(1)));
    assert_eq!((target.busy_poll_us, config.emulator_busy_poll_us), (Some(100), Some(0)));
    let device = &config.devices[0];
    assert_eq!((device.name.as_str(), device.kind), ("disk0", DeviceKind::VirtioBlk));
    assert_eq!(device.socket, Path::new("/run/disk0.sock"));
    assert_eq!(device.connect, [way("192.0.2.7:4420")]);
    assert_eq!((device.nsids.as_slice(), device.queues, device.read_only), (&[3][..], 4, true));
}

#[test]
fn flags_give_the_same() {
    let mut draft = Draft::new();
    draft.set_data_dir("/var/lib/penstock");
    draft.add_volume("db0=ram:64MiB").unwrap();
    draft.add_volume("db1=null:1TiB").unwrap();
    draft
        .set_listen(&["0.0.0.0:4420,advertise=192.0.2.7:4420".to_owned(), "[::1]:4420".to_owned()]);
    draft.set_discovery(&["127.0.0.1:8009".to_owned()]);
    draft.set_subnqn(NQN);
    draft.set_target_cores("2");
    draft.set_target_busy_poll_us("100");
    draft.set_queue_entries_max("128");
    draft.set_io_queues_max("8");
    draft.set_emulator_cores("1");
    draft.set_emulator_busy_poll_us("0");
    draft
        .add_device(&format!(
            "disk0=virtio-blk,socket=/run/disk0.sock,connect=192.0.2.7:4420,subnqn={NQN},nsid=3,\
             queues=4,read_only=true"
        ))
        .unwrap();
    let flags = draft.check().unwrap();
    let file = toml(&WHOLE.replace("nsid = 3\n\n[[volume]]", "\n[[volume]]")).unwrap();
    assert_eq!(format!("{flags:?}"), format!("{file:?}"));
}

#[test]
fn flags_add_to_a_file_and_replace_single_values() {
    let mut draft = Draft::from_toml(Path::new("penstock.toml"), WHOLE).unwrap();
    draft.add_volume("db2=ram:1MiB").unwrap();
    draft.set_listen(&["127.0.0.1:5000".to_owned()]);
    draft.set_discovery(&[]);
    draft.set_data_dir("/tmp/other");
    let config = draft.check().unwrap();
    assert_eq!(config.volumes.len(), 3);
    assert_eq!(config.data_dir.as_deref(), Some(Path::new("/tmp/other")));
    let target = config.target.unwrap();
    assert_eq!(target.listen.len(), 1);
    assert_eq!(target.listen[0].addr.port(), 5000);
    assert_eq!(target.discovery[0].addr.port(), 8009);
}

#[test]
fn each_command_takes_its_part() {
    let draft = || Draft::from_toml(Path::new("penstock.toml"), WHOLE).unwrap();
    let mut target = draft();
    assert_eq!(target.keep_target(), 1);
    let target = target.check().unwrap();
    assert!(target.devices.is_empty() && target.target.is_some());
    let mut devices = draft();
    assert_eq!(devices.keep_devices(), 2);
    let devices = devices.check().unwrap();
    assert!(devices.volumes.is_empty() && devices.target.is_none());
    assert_eq!((devices.devices.len(), devices.emulator_cores), (1, Some(1)));
    assert_eq!(devices.emulator_busy_poll_us, Some(0));
    assert!(devices.data_dir.is_some());
}

/// A target with one change: `(what to replace, by what, the whole message)`.
#[test]
fn values_in_the_file() {
    let cases = [
        (
            "name = \"db0\"",
            "name = \"-db0\"",
            "penstock.toml:6: volume.name = \"-db0\": is no name; allowed: 1 to 64 of A-Z a-z 0-9 \
             . _ -, not beginning with a dot or a dash",
        ),
        (
            "name = \"db1\"",
            "name = \"db0\"",
            "penstock.toml:11: volume.name = \"db0\": is the name of another volume; allowed: \
             unique names",
        ),
        (
            "nsid = 3",
            "nsid = 0",
            "penstock.toml:8: volume.nsid = \"0\": allowed: a whole number from 1 to 65536",
        ),
        (
            "[\"127.0.0.1:8009\"]",
            "[\"localhost:8009\"]",
            "penstock.toml:16: target.discovery = \"localhost:8009\": is no ADDR:PORT; allowed: an \
             IP address and a port, such as 127.0.0.1:4420 or [::1]:4420",
        ),
        (
            "[\"127.0.0.1:8009\"]",
            "[\"[::1]:4420\"]",
            "penstock.toml:16: target.discovery = \"[::1]:4420\": is also an I/O listener \
             (penstock.toml:15: target.listen); allowed: another port, such as 8009, for discovery",
        ),
        (
            "\"[::1]:4420\"",
            "\"[::1]:4420,announce=1\"",
            "penstock.toml:15: target.listen = \"[::1]:4420,announce=1\": \"announce=1\" is no \
             option of a listener; allowed: ADDR:PORT[,advertise=ADDR:PORT][,portid=N]\
             [,tls=off|allowed|required][,auth=registered|required], such as 0.0.0.0:4420,advertise=192.0.2.7:4420",
        ),
        (
            "\"[::1]:4420\"",
            "\"[::1]:4420,tls=on\"",
            "penstock.toml:15: target.listen = \"[::1]:4420,tls=on\": tls: allowed: off, allowed or \
             required",
        ),
        (
            "\"[::1]:4420\"",
            "\"[::1]:4420,auth=all\"",
            "penstock.toml:15: target.listen = \"[::1]:4420,auth=all\": auth: allowed: registered \
             or required",
        ),
        (
            "advertise=192.0.2.7:4420",
            "advertise=0.0.0.0:4420",
            "penstock.toml:15: target.listen = \"0.0.0.0:4420,advertise=0.0.0.0:4420\": hosts \
             cannot connect to the advertised address; allowed: a real ADDR:PORT",
        ),
        (
            ",advertise=192.0.2.7:4420",
            "",
            "penstock.toml:15: target.listen = \"0.0.0.0:4420\": listens everywhere, and the \
             discovery log needs one address that hosts can reach; add ,advertise=ADDR:PORT",
        ),
        (
            "cores = 2",
            "cores = -1",
            "penstock.toml:18: target.cores = \"-1\": allowed: a whole number from 1 to 256",
        ),
        (
            "busy_poll_us = 100",
            "busy_poll_us = 10001",
            "penstock.toml:19: target.busy_poll_us = \"10001\": allowed: a whole number from 0 to 10000",
        ),
        (
            "queue_entries_max = 128",
            "queue_entries_max = 1",
            "penstock.toml:20: target.queue_entries_max = \"1\": allowed: a whole number from 2 to \
             4096",
        ),
        (
            "io_queues_max = 8",
            "io_queues_max = 129",
            "penstock.toml:21: target.io_queues_max = \"129\": allowed: a whole number from 1 to \
             128",
        ),
        (
            "type = \"virtio-blk\"",
            "type = \"scsi\"",
            "penstock.toml:29: device.type = \"scsi\": is no device type; allowed: virtio-blk, nvme",
        ),
        (
            "connect = \"192.0.2.7:4420\"",
            "connect = \"0.0.0.0:4420\"",
            "penstock.toml:31: device.connect = \"0.0.0.0:4420\": is no address to connect to; \
             allowed: ADDR:PORT of a target, such as 192.0.2.7:4420",
        ),
        (
            "queues = 4",
            "queues = 0",
            "penstock.toml:34: device.queues = \"0\": allowed: a whole number from 1 to 64",
        ),
        (
            "socket = \"/run/disk0.sock\"\n",
            "",
            "penstock.toml:28: device.name = \"disk0\": this device has no socket; needed: \
             socket=PATH",
        ),
    ];
    for (from, to, expected) in cases {
        assert!(WHOLE.contains(from), "{from}");
        assert_eq!(refusal(&WHOLE.replacen(from, to, 1)), expected);
    }
}

#[test]
fn the_shape_of_the_file() {
    let cases = [
        ("cores = 2", "colour = 2", "penstock.toml:18: in `colour = 2`: unknown field `colour`"),
        (
            "cores = 2",
            "cores = \"2\"",
            "penstock.toml:18: in `cores = \"2\"`: invalid type: string",
        ),
        ("[emulator]", "[emulater]", "penstock.toml:23: in `[emulater]`: unknown field `emulater`"),
        ("[emulator]", "[emulator", "penstock.toml:23: "),
        ("spec = \"null:1TiB\"", "", "missing field `spec`"),
        ("read_only = true", "read_only = 1", "penstock.toml:35: in `read_only = 1`: invalid type"),
    ];
    for (from, to, expected) in cases {
        let message = refusal(&WHOLE.replacen(from, to, 1));
        assert!(message.contains(expected), "{expected:?} not in {message:?}");
        assert!(message.starts_with("penstock.toml:"), "{message}");
    }
}

#[test]
fn bad_volume_specs_are_named_with_their_line() {
    for spec in ["disk:/dev/sda", "ram:", "ram:12Q", "file:", ""] {
        let message = refusal(&WHOLE.replacen("ram:64MiB", spec, 1));
        let start = format!("penstock.toml:7: volume.spec = {spec:?}: ");
        assert!(message.starts_with(&start), "{message}");
    }
}

#[test]
fn bad_nqns_are_named_with_their_line() {
    for nqn in ["", "iqn.2014-08.org.nvmexpress:a", "nqn.", &format!("nqn.{}", "a".repeat(220))] {
        let message = refusal(&WHOLE.replacen(NQN, nqn, 1));
        let start = format!("penstock.toml:17: target.subnqn = {nqn:?}: ");
        assert!(message.starts_with(&start), "{message}");
    }
}

#[test]
fn the_discovery_subsystem_is_not_for_volumes() {
    let message = refusal(&WHOLE.replacen(NQN, "nqn.2014-08.org.nvmexpress.discovery", 1));
    assert!(message.contains("is the discovery subsystem's; allowed:"), "{message}");
}

#[test]
fn what_is_missing() {
    for (text, expected) in [
        ("", "nothing to run"),
        ("[target]\nlisten = [\"127.0.0.1:4420\"]", "no volume to serve"),
        ("[[volume]]\nname = \"a\"\nspec = \"ram:1MiB\"", "no address to listen on"),
    ] {
        let message = refusal(text);
        assert!(message.contains(expected), "{message}");
    }
    let error = Draft::from_file(Path::new("/nonexistent/penstock.toml")).unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/penstock.toml: cannot read"), "{error}");
}

#[test]
fn flags_are_named_like_keys() {
    let flag = |add: fn(&mut Draft, &str) -> Result<(), ConfigError>, argument: &str| {
        let mut draft = Draft::new();
        match add(&mut draft, argument) {
            Err(error) => error.to_string(),
            Ok(()) => {
                draft.set_listen(&["127.0.0.1:4420".to_owned()]);
                draft.check().unwrap_err().to_string()
            }
        }
    };
    assert_eq!(
        flag(Draft::add_volume, "ram:1MiB"),
        "--volume \"ram:1MiB\": allowed: NAME=SPEC, such as db0=file:/var/lib/db0.img,size=10GiB"
    );
    assert!(flag(Draft::add_volume, "a b=ram:1MiB").starts_with("--volume \"a b\": is no name"));
    assert!(flag(Draft::add_volume, "a=tape:1").starts_with("--volume \"tape:1\": "));
    let device = flag(Draft::add_device, "d=virtio-blk,sockets=/a");
    assert!(device.contains("there is no key \"sockets\"; allowed: type, socket"), "{device}");
    let device = flag(Draft::add_device, "d=virtio-blk,socket=/a,socket=/b");
    assert!(device.contains("given twice"), "{device}");
    let device = flag(Draft::add_device, "d=virtio-blk,socket=/a,nsid=1,connect=x,subnqn=y");
    assert!(device.starts_with("--device \"x\": is no ADDR:PORT"), "{device}");
    let long = format!(
        "d=virtio-blk,tls=off,connect=192.0.2.7:1,nsid=1,subnqn={NQN},socket=/{}",
        "a".repeat(107)
    );
    let device = flag(Draft::add_device, &long);
    assert!(device.contains("is 108 bytes long; allowed: a path of 1 to 107 bytes"), "{device}");
}

#[test]
fn two_devices_do_not_share_a_socket_or_a_name() {
    let device = |name: &str, socket: &str| {
        format!("{name}=virtio-blk,tls=off,connect=192.0.2.7:1,nsid=1,subnqn={NQN},socket={socket}")
    };
    let mut draft = Draft::new();
    draft.add_device(&device("a", "/run/a")).unwrap();
    draft.add_device(&device("b", "/run/a")).unwrap();
    let message = draft.check().unwrap_err().to_string();
    assert!(message.contains("is the socket of device \"a\""), "{message}");
    let mut draft = Draft::new();
    draft.add_device(&device("a", "/run/a")).unwrap();
    draft.add_device(&device("a", "/run/b")).unwrap();
    let message = draft.check().unwrap_err().to_string();
    assert!(message.contains("is the name of another device"), "{message}");
}

#[test]
fn devices_have_hosts_of_their_own_and_a_process_of_devices_is_contained() {
    const DEVICE: &str = "d=virtio-blk,tls=off,connect=192.0.2.7:1,nsid=1,socket=/run/d";
    let check = |more: &str| {
        let mut draft = Draft::new();
        draft.add_device(&format!("{DEVICE},subnqn={NQN}{more}")).unwrap();
        draft.keep_devices();
        draft.check()
    };
    let plain = check("").unwrap();
    assert_eq!(plain.containment, Containment::On);
    assert!(!plain.is_supervised());
    assert_eq!((&plain.devices[0].host, plain.devices[0].ctrl_loss_timeout), (&None, None));

    let uuid = "6f5b8d2e-5a0c-4f0e-9d3b-0d5cbb6a4f11";
    let own = check(&format!(",hostnqn={NQN},ctrl_loss_tmo=30")).unwrap();
    let host = own.devices[0].host.as_ref().unwrap();
    assert_eq!(uuid::Uuid::from_bytes(host.id).to_string(), uuid);
    assert_eq!(own.devices[0].ctrl_loss_timeout, Some(Duration::from_secs(30)));
    let fast = check(",ctrl_loss_tmo=0").unwrap();
    assert_eq!(fast.devices[0].ctrl_loss_timeout, Some(Duration::ZERO));

    let named = format!(",hostnqn=nqn.2014-08.com.example:h,hostid={uuid}");
    assert!(check(&named).unwrap().devices[0].host.is_some());
    for (more, expected) in [
        (",hostnqn=nqn.2014-08.com.example:h", "holds no UUID to identify the host by"),
        (",hostid=00000000-0000-0000-0000-000000000001", "belongs to a host NQN"),
        (",ctrl_loss_tmo=86401", "allowed: a whole number from 0 to 86400"),
    ] {
        let message = check(more).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }

    let mut draft = Draft::from_toml(
        Path::new("penstock.toml"),
        &WHOLE.replace(
            "cores = 1",
            "cores = 1\ncontainment = \"require\"\nuser = \"disks\"\nsupervise = \"on\"\napi = \"/run/e\"",
        ),
    )
    .unwrap();
    draft.keep_devices();
    let config = draft.check().unwrap();
    assert_eq!(config.containment, Containment::Require);
    assert!(config.is_supervised());
    assert_eq!(config.user.as_deref(), Some("disks"));
    assert_eq!(config.api.as_deref(), Some(Path::new("/run/e")));
    let mut draft = Draft::new();
    draft.set_containment("perhaps");
    draft.add_device(&format!("{DEVICE},subnqn={NQN}")).unwrap();
    assert!(draft.check().unwrap_err().to_string().contains("allowed: off, on or require"));
}

#[test]
fn a_device_has_several_ways_and_an_nvme_device_several_namespaces() {
    let check = |text: &str| {
        let mut draft = Draft::new();
        draft.add_device(&format!("d={text},subnqn={NQN},socket=/run/d"))?;
        draft.check()
    };
    let config =
        check("nvme,tls=off,connect=192.0.2.7:1+[::1]:2,nsid=1+3,iopolicy=queue-depth").unwrap();
    let device = &config.devices[0];
    assert_eq!((device.kind, device.nsids.as_slice()), (DeviceKind::Nvme, &[1, 3][..]));
    assert!(config.is_supervised());
    assert!(!Config { supervise: Supervise::Off, ..config.clone() }.is_supervised());
    assert_eq!(device.policy, PathPolicy::QueueDepth);
    assert_eq!(device.connect, [way("192.0.2.7:1"), way("[::1]:2")]);
    assert!(device.discover.is_empty());
    let config = check("nvme,tls=off,connect=192.0.2.7:1,nsid=all").unwrap();
    assert!(config.devices[0].follows && config.devices[0].nsids.is_empty());
    let config = check("nvme,tls=off,connect=192.0.2.7:1@1+[::1]:2,nsid=1").unwrap();
    assert!(!config.devices[0].follows);
    let nodes: Vec<_> = config.devices[0].connect.iter().map(|way| way.node).collect();
    assert_eq!(nodes, [Some(1), None]);

    // What discovery may lead to: the well-known ports, or those named; and what is configured.
    let config = check("nvme,psk=k,discover=192.0.2.7:1,discover_tls=off,nsid=1").unwrap();
    assert!(config.devices[0].discover_in_plaintext);
    let config = check("nvme,tls=off,discover=192.0.2.7:8010+[::1]:8009,nsid=1").unwrap();
    assert!(!config.devices[0].discover_in_plaintext);
    let device = &config.devices[0];
    assert_eq!(device.discover, ["192.0.2.7:8010".parse().unwrap(), "[::1]:8009".parse().unwrap()]);
    assert!(device.connect.is_empty());
    assert_eq!(device.ports, [4420, 8009, 8010].into());
    let config =
        check("nvme,tls=off,discover=192.0.2.7:8009,connect=192.0.2.8:1,ports=4421+4422,nsid=1")
            .unwrap();
    assert_eq!(config.devices[0].ports, [1, 4421, 4422, 8009].into());
    for (text, expected) in [
        ("virtio-blk,tls=off,connect=192.0.2.7:1,nsid=1+2", "a virtio-blk device is one disk"),
        ("virtio-blk,tls=off,connect=192.0.2.7:1,nsid=all", "a virtio-blk device is one disk"),
        ("nvme,tls=off,connect=192.0.2.7:1,nsid=1+all", "allowed: a whole number"),
        ("nvme,tls=off,connect=192.0.2.7:1,nsid=1+1", "names 1 twice"),
        ("nvme,tls=off,connect=192.0.2.7:1,nsid=257", "allowed: 1 to 256"),
        ("nvme,tls=off,connect=192.0.2.7:1+192.0.2.7:1,nsid=1", "names 192.0.2.7:1 twice"),
        ("nvme,tls=off,connect=192.0.2.7:1,nsid=1,iopolicy=best", "allowed: numa, round-robin"),
        ("nvme,tls=off,connect=192.0.2.7:1@x,nsid=1", "names \"x\" as a NUMA node"),
        ("nvme,tls=off,nsid=1", "needed: connect=ADDR:PORT or discover=ADDR:PORT"),
        ("nvme,tls=off,discover=192.0.2.7:1+192.0.2.7:1,nsid=1", "names 192.0.2.7:1 twice"),
        ("nvme,tls=off,discover=0.0.0.0:8009,nsid=1", "of a discovery controller"),
        ("nvme,tls=off,connect=192.0.2.7:1,ports=1,nsid=1", "add discover=ADDR:PORT"),
        ("nvme,tls=off,connect=192.0.2.7:1,discover_tls=off,nsid=1", "add discover=ADDR:PORT"),
        ("nvme,psk=k,discover=192.0.2.7:1,discover_tls=on,nsid=1", "allowed: off, for discovery"),
        ("nvme,tls=off,discover=192.0.2.7:1,ports=0,nsid=1", "allowed: TCP ports such as"),
        ("nvme,tls=off,discover=192.0.2.7:1,ports=1+70000,nsid=1", "allowed: TCP ports such as"),
    ] {
        let message = check(text).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn a_device_has_a_target_or_a_volume_of_its_own() {
    let check = |text: &str| {
        let mut draft = Draft::new();
        draft.add_device(&format!("d={text},socket=/run/d"))?;
        draft.keep_devices();
        draft.check()
    };
    let config = check("nvme,volume=null:1G,queues=4").unwrap();
    let device = &config.devices[0];
    assert_eq!(device.volume, Some("null:1GiB".parse().unwrap()));
    assert_eq!((device.connect.len(), &device.nsids[..], device.queues), (0, &[1][..], 4));
    assert_eq!(device.doorbells, Doorbells::Trapped);
    let mapped = check("nvme,volume=null:1G,doorbells=mapped").unwrap();
    assert_eq!(mapped.devices[0].doorbells, Doorbells::Mapped);
    // The name is what it is known by, after every restart.
    assert_eq!(device.subnqn, check("virtio-blk,volume=ram:1M").unwrap().devices[0].subnqn);
    for (text, expected) in [
        ("virtio-blk,volume=ram:1M,nsid=1", "nsid is about one at a target"),
        ("virtio-blk,volume=ram:1M,connect=192.0.2.7:1", "connect is about one at a target"),
        ("nvme,volume=file:/etc/passwd", "allowed: ram:SIZE or null:SIZE"),
        ("nvme,volume=ram:x", "is not a size"),
        ("nvme,volume=ram:1M,doorbells=both", "allowed: trapped or mapped"),
        ("virtio-blk,volume=ram:1M,doorbells=mapped", "is about nvme devices"),
    ] {
        let message = check(text).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn the_management_api_on_tcp_has_tls_or_is_refused() {
    let check = |api: &str| {
        let text = format!(
            "[[volume]]\nname = \"a\"\nspec = \"ram:1M\"\n[target]\nlisten = \
             [\"127.0.0.1:4420\"]\n[api]\n{api}"
        );
        Draft::from_toml(Path::new("penstock.toml"), &text)?.check()
    };
    let files = "cert = \"c\"\nkey = \"k\"\nclient_ca = \"a\"\n";
    let config = check(&format!("listen = \"[::1]:8443\"\n{files}")).unwrap();
    let tls = config.api_tls.unwrap();
    assert_eq!(tls.addr, "[::1]:8443".parse().unwrap());
    assert_eq!((tls.cert, tls.key, tls.client_ca), ("c".into(), "k".into(), "a".into()));
    assert_eq!((config.api, tls.client_crl), (None, None));
    let config = check(&format!("listen = \"[::1]:8443\"\n{files}client_crl = \"r\"\n")).unwrap();
    assert_eq!(config.api_tls.unwrap().client_crl, Some("r".into()));
    for (api, expected) in [
        ("listen = \"127.0.0.1:1\"", "not served on TCP without TLS and client certificates"),
        ("listen = \"127.0.0.1:1\"\ncert = \"c\"", "give --api-key FILE, or api.key in the file"),
        ("listen = \"127.0.0.1:1\"\ncert = \"\"", "api.cert = \"\": is empty"),
        ("cert = \"c\"", "give --api-listen ADDR:PORT"),
        ("client_crl = \"r\"", "give --api-listen ADDR:PORT"),
        (
            &format!("listen = \"127.0.0.1:1\"\n{files}client_crl = \"\"\n"),
            "api.client_crl = \"\": is empty",
        ),
        (&format!("listen = \"here\"\n{files}"), "is no ADDR:PORT"),
        (&format!("listen = \"0.0.0.0:4420\"\n{files}"), "is also a listener of the target"),
    ] {
        let message = check(api).unwrap_err().to_string();
        assert!(message.contains(expected) && message.contains("api."), "{message}");
    }
}
