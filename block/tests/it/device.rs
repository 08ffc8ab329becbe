//! Block devices, with a loop device as the disk. Needs root and a free loop device.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use block::uring::{FileOptions, FileVolume};
use block::{Io, IoError, Op, OpenError, Volume, VolumeSpec};
use tempfile::TempDir;

use crate::harness::{Bench, identity};
use crate::model::{self, Options};

const BYTES: usize = 4 << 20;

/// A loop device over a file; let go on drop.
struct Loop {
    dir: TempDir,
    device: PathBuf,
}

impl Loop {
    fn new() -> Loop {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("backing");
        fs::write(&file, vec![0; BYTES]).unwrap();
        let output = Command::new("losetup").args(["--find", "--show"]).arg(&file).output();
        let output = output.expect("losetup (package util-linux)");
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "no loop device: {}", why.trim());
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Loop { dir, device }
    }

    fn contents(&self) -> Vec<u8> {
        fs::read(self.dir.path().join("backing")).unwrap()
    }

    /// What the backing file takes.
    fn used(&self) -> u64 {
        fs::metadata(self.dir.path().join("backing")).unwrap().blocks() * 512
    }

    fn resize(&self, bytes: u64) {
        let file = fs::File::options().write(true).open(self.dir.path().join("backing"));
        file.unwrap().set_len(bytes).unwrap();
        let status = Command::new("losetup").arg("--set-capacity").arg(&self.device).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let status = Command::new("losetup").arg("--detach").arg(&self.device).status();
        assert!(status.is_ok_and(|s| s.success()), "{} stays attached", self.device.display());
    }
}

fn open(path: &Path, options: &FileOptions) -> Result<FileVolume, OpenError> {
    FileVolume::open_device(path, identity(), options)
}

fn options() -> FileOptions {
    FileOptions { lock_wait: Duration::from_millis(1), ..FileOptions::default() }
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_device_is_an_array_of_bytes() {
    let disk = Loop::new();
    let volume = open(&disk.device, &options()).unwrap();
    let geometry = volume.geometry();
    assert_eq!((geometry.bytes(), geometry.block_bytes), (BYTES as u64, 512));
    let mut bench = Bench::real(&volume, 16);
    let run = Options { len_max: 2_000_000, ..Options::new(7, 700) };
    let contents = model::run(&mut bench, &volume, vec![0; BYTES], &run);
    bench.range(block::Op::Flush, 0, 0, false).unwrap();
    drop((bench, volume));
    assert!(disk.contents() == contents, "the device does not hold what was written");
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_device_in_use_is_refused() {
    let disk = Loop::new();
    let first = open(&disk.device, &options()).unwrap();
    let Err(error) = open(&disk.device, &options()) else { panic!("should be refused") };
    assert!(error.reason.contains("it is in use: mounted"), "{error}");
    drop(first);
    assert!(open(&disk.device, &options()).is_ok());
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_device_is_not_a_file() {
    let disk = Loop::new();
    let spec: VolumeSpec = format!("file:{},size=1M", disk.device.display()).parse().unwrap();
    let Err(error) = spec.open(identity()) else { panic!("should be refused") };
    assert!(error.reason.contains("write blockdev: instead of file:"), "{error}");
    let sized = FileOptions { size_bytes: Some(1 << 20), ..options() };
    let Err(error) = open(&disk.device, &sized) else { panic!("should be refused") };
    assert!(error.reason.contains("leave size= out"), "{error}");
    let spec: VolumeSpec = format!("blockdev:{},ro", disk.device.display()).parse().unwrap();
    let volume = spec.open(identity()).unwrap();
    assert!(volume.geometry().read_only);
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_device_says_what_it_can_and_does_it() {
    let disk = Loop::new();
    let volume = open(&disk.device, &options()).unwrap();
    let geometry = volume.geometry();
    assert!(geometry.deallocate && geometry.write_zeroes && geometry.deallocated_reads_zero);
    assert!(geometry.deallocate_granularity_bytes >= 512);
    assert_eq!(volume.used_bytes(), None, "a device does not count");
    let mut bench = Bench::real(&volume, 4);
    bench.write(0, &[7; 1 << 20], false).unwrap();
    bench.range(Op::Flush, 0, 0, false).unwrap();
    let full = disk.used();
    bench.range(Op::Deallocate, 0, 512 << 10, true).unwrap();
    assert_eq!(bench.read(0, 512 << 10), Ok(vec![0; 512 << 10]));
    assert!(disk.used() < full, "deallocated blocks are given back");
    bench.write(0, &[7; 512 << 10], true).unwrap();
    let mut keep = Io::new(Op::WriteZeroes, 0, 1 << 20);
    keep.no_unmap = true;
    assert_eq!(bench.run(keep).result, Ok(()));
    bench.range(Op::Flush, 0, 0, false).unwrap();
    assert_eq!(bench.read(0, 1 << 20), Ok(vec![0; 1 << 20]));
    assert!(disk.used() >= full, "zeros that stay allocated");
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_device_that_changes_its_size_is_followed() {
    let disk = Loop::new();
    let volume = open(&disk.device, &options()).unwrap();
    let mut bench = Bench::real(&volume, 4);
    let at = BYTES as u64;
    assert_eq!(bench.write(at, &[1; 4096], true), Err(IoError::OutOfRange));
    disk.resize(2 * at);
    assert_eq!(volume.refresh().unwrap().bytes(), 2 * at);
    assert_eq!(bench.write(at, &[1; 4096], true), Ok(()));
    assert_eq!(bench.read(at, 4096), Ok(vec![1; 4096]));
    disk.resize(at);
    // Nobody has told us yet: the device itself refuses, or has no data there.
    assert!(bench.read(at, 4096).is_err());
    assert!(bench.write(at, &[2; 4096], true).is_err());
    assert_eq!(volume.refresh().unwrap().bytes(), at);
    assert_eq!(bench.read(at, 4096), Err(IoError::OutOfRange));
}

#[test]
#[ignore = "needs root and a loop device"]
fn a_device_without_polled_queues_is_not_polled() {
    let disk = Loop::new();
    let poll = FileOptions { poll: true, ..options() };
    let Err(error) = open(&disk.device, &poll) else { panic!("should be refused") };
    assert!(error.reason.contains("poll is not possible"), "{error}");
    assert!(error.reason.contains("queue/io_poll is not 1"), "{error}");
    assert!(open(&disk.device, &options()).is_ok(), "and nothing keeps it open");
}
