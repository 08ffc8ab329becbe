//! Provisioning, and the promise of `penstock up`: a second start finds the data again.

use super::*;
use crate::bench::{Access, Load, Report, Workload};

#[test]
fn commas_in_the_path_survive() {
    let spec = file_spec(Path::new("/srv/a,b/vol0.img"), Some(1 << 30)).unwrap();
    assert_eq!(spec.path(), Some(Path::new("/srv/a,b/vol0.img")));
}

#[test]
fn a_volume_file_is_sparse_and_keeps_what_it_has() {
    use std::os::unix::fs::MetadataExt;
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("vol0.img");
    make_volume(&path, 1 << 30).unwrap();
    let metadata = std::fs::metadata(&path).unwrap();
    assert_eq!((metadata.len(), metadata.blocks()), (1 << 30, 0));
}

#[test]
fn wildcards_are_reached_by_loopback() {
    for (listen, expected) in [
        ("0.0.0.0:4420", "127.0.0.1:4420"),
        ("[::]:4420", "[::1]:4420"),
        ("192.0.2.7:4420", "192.0.2.7:4420"),
    ] {
        assert_eq!(reachable(listen.parse().unwrap()), expected.parse().unwrap());
    }
}

fn config(data: &Path) -> UpConfig {
    UpConfig {
        data: data.to_owned(),
        listen: vec!["127.0.0.1:0".to_owned()],
        discovery: vec!["127.0.0.1:0".to_owned()],
        size: "64MiB".to_owned(),
        self_check: true,
    }
}

fn runtime() -> tokio::runtime::Runtime {
    // Two threads: the listeners accept on one while the test blocks on the other.
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

const BENCH_BYTES: u64 = 1 << 20;

/// Sequential I/O of 4 KiB over the first MiB of the first volume, through NVMe/TCP, checked.
fn bench(up: &Up, read_percent: u8) -> Report {
    let subsystem = up.daemon.subsystem().unwrap();
    let served = &up.daemon.served()[0];
    let load = Load::remote(
        up.connect_address(),
        subsystem.nqn.as_str(),
        served.nsid,
        true,
        None,
        &CredentialsConfig::none(),
    )
    .unwrap();
    let workload = Workload {
        access: Access { random: false, read_percent },
        io_bytes: 4096,
        depth: 8,
        jobs: 1,
        runtime: Duration::from_millis(200),
        size_bytes: Some(BENCH_BYTES),
        verify: true,
        seed: 42,
    };
    // A slow machine may not get around once in that time.
    loop {
        let report = load.run(&workload, &mut |_| true).unwrap();
        assert!(report.is_good(), "{report}");
        if report.read.bytes + report.write.bytes >= BENCH_BYTES {
            return report;
        }
    }
}

#[test]
fn a_second_start_finds_the_data_again() {
    let scratch = tempfile::tempdir().unwrap();
    let data = scratch.path().join("penstock-data");
    let runtime = runtime();
    let _inside = runtime.enter();

    let mut up = Up::start(&config(&data)).unwrap();
    assert_eq!(up.created.as_deref(), Some("vol0"));
    up.wait_ready().unwrap();
    let mut steps = Vec::new();
    let figures = up.self_check(&mut |step, done, planned| {
        assert!(done <= planned);
        if steps.last() != Some(&step) {
            steps.push(step);
        }
    });
    assert!(!figures.unwrap().unwrap().found_earlier);
    assert_eq!(steps, [Step::Writing, Step::Reading, Step::RandomReads]);
    let text = up.overview() + &up.next_steps();
    for part in ["vol0: 64 MiB, created", "nvme connect-all", "vol0.sock", "vol0.nvme", "libblkio"]
    {
        assert!(text.contains(part), "{part:?} not in\n{text}");
    }

    // The scratch volume is in nobody's discovery log.
    let discovery = up.daemon.discovery_addresses()[0];
    let plain = CredentialsConfig::none();
    let found =
        crate::discover::discover(discovery, None, None, &plain, Duration::from_secs(10)).unwrap();
    // Nor is the listener of the devices, which speaks TLS alone.
    assert!(found.records.iter().all(|record| record.sectype == 0), "{found}");
    assert_eq!(up.daemon.encrypted(), 2, "an association of each disk of the volume");
    let subsystem = up.daemon.subsystem().unwrap();
    assert_eq!(found.problems, [""; 0]);
    let of = |kind: &str| -> Vec<_> {
        let records = found.records.iter().filter(|r| r.subtype == kind);
        records.map(|r| (r.subnqn.as_str(), r.trsvcid.as_str())).collect()
    };
    let port = up.connect_address().port().to_string();
    assert_eq!(of("nvme subsystem"), [(subsystem.nqn.as_str(), port.as_str())]);
    let itself = of("current discovery subsystem");
    let known = itself.iter().any(|(_, port)| *port == discovery.port().to_string());
    assert!(known && itself.len() + 1 == found.records.len(), "{found}");

    // A second process is kept away.
    let second = Up::start(&config(&data)).err().unwrap().to_string();
    assert!(second.contains("in use by another penstock"), "{second}");

    bench(&up, 0);
    let served = up.daemon.served()[0].clone();
    let host = up.daemon.host().clone();
    up.daemon.stop().unwrap();
    for socket in ["vol0.sock", "vol0.nvme"] {
        assert!(!data.join(socket).exists(), "sockets go with the process");
    }

    let mut up = Up::start(&config(&data)).unwrap();
    assert_eq!(up.created, None);
    assert_eq!(up.daemon.subsystem(), Some(subsystem.clone()));
    assert_eq!(up.daemon.host(), &host);
    let again = &up.daemon.served()[0];
    assert_eq!((again.nsid, again.identity), (served.nsid, served.identity));
    up.wait_ready().unwrap();
    let figures = up.self_check(&mut |_, _, _| {}).unwrap().unwrap();
    assert!(figures.found_earlier, "the pattern of the first start is there");
    bench(&up, 100);
    assert!(up.overview().contains("vol0: 64 MiB, found again"));
    up.daemon.stop().unwrap();
}

#[test]
fn a_damaged_scratch_pattern_is_told_and_the_user_is_left_alone() {
    use std::os::unix::fs::FileExt;
    let scratch = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let _inside = runtime.enter();
    let mut up = Up::start(&config(scratch.path())).unwrap();
    up.self_check(&mut |_, _, _| {}).unwrap();
    up.daemon.stop().unwrap();

    let file =
        OpenOptions::new().read(true).write(true).open(scratch.path().join(SCRATCH_FILE)).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 40 << 20).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 40 << 20).unwrap();
    file.sync_all().unwrap();
    let mut up = Up::start(&config(scratch.path())).unwrap();
    let error = format!("{:#}", up.self_check(&mut |_, _, _| {}).unwrap_err());
    assert!(error.contains(&format!("at byte {}", 40 << 20)), "{error}");
    up.daemon.stop().unwrap();
}

#[test]
fn a_missing_volume_file_is_told() {
    let scratch = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let _inside = runtime.enter();
    let config = UpConfig { self_check: false, ..config(scratch.path()) };
    Up::start(&config).unwrap().daemon.stop().unwrap();
    std::fs::remove_file(scratch.path().join("volumes/vol0.img")).unwrap();
    let error = format!("{:#}", Up::start(&config).err().unwrap());
    assert!(error.contains("volumes/vol0.img is missing; put it back"), "{error}");
    assert!(!scratch.path().join("volumes/vol0.img").exists(), "nothing was made in its place");
}

#[test]
fn wrong_flags_make_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let data = scratch.path().join("data");
    let good = config(&data);
    for (wrong, expected) in [
        (UpConfig { size: "lots".to_owned(), ..good.clone() }, "--size \"lots\": allowed:"),
        (UpConfig { size: "1000".to_owned(), ..good.clone() }, "allowed: a multiple of 4096"),
        (UpConfig { listen: vec!["here".to_owned()], ..good.clone() }, "--listen \"here\": is no"),
    ] {
        let error = format!("{:#}", Up::start(&wrong).err().unwrap());
        assert!(error.contains(expected), "{error}");
        assert!(!data.exists());
    }
}
