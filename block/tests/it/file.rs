//! Files on the file systems of this machine, through its kernel.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use block::uring::{FileOptions, FileVolume};
use block::{IoError, Op, OpenError, Volume, VolumeSpec};
use tempfile::TempDir;

use crate::harness::{Bench, identity};
use crate::model::{self, Options};

fn options(size: u64) -> FileOptions {
    FileOptions {
        size_bytes: Some(size),
        lock_wait: Duration::from_millis(1),
        ..FileOptions::default()
    }
}

fn open(path: &Path, options: &FileOptions) -> Result<FileVolume, OpenError> {
    FileVolume::open(path, identity(), options)
}

fn reason(result: Result<FileVolume, OpenError>) -> String {
    match result {
        Ok(_) => panic!("should be refused"),
        Err(e) => e.reason,
    }
}

/// Random I/O on a file in `dir`, compared with what the file contains afterwards.
fn model_in(dir: &TempDir, seed: u64, block: u32, ios: usize) {
    const BYTES: usize = 4 << 20;
    let path = dir.path().join("disk");
    let options = FileOptions { block_bytes: Some(block), ..options(BYTES as u64) };
    let volume = open(&path, &options).unwrap();
    assert_eq!(volume.geometry().bytes(), BYTES as u64);
    let mut bench = Bench::real(&volume, 16);
    let run = Options { len_max: 2_000_000, ..Options::new(seed, ios) };
    let contents = model::run(&mut bench, &volume, vec![0; BYTES], &run);
    assert!(fs::read(&path).unwrap() == contents, "the file does not hold what was written");
}

#[test]
fn a_file_on_disk_is_an_array_of_bytes() {
    model_in(&TempDir::new().unwrap(), 1, 512, 1500);
}

#[test]
fn a_file_of_large_blocks_is_an_array_of_bytes() {
    model_in(&TempDir::new().unwrap(), 2, 4096, 700);
}

/// tmpfs has no `ZERO_RANGE`: zeros that must stay allocated are written.
#[test]
fn a_file_in_memory_is_an_array_of_bytes() {
    let dir = TempDir::new_in("/dev/shm").expect("every Linux has /dev/shm");
    model_in(&dir, 3, 512, 1500);
}

#[test]
fn a_new_file_has_its_size_and_an_old_one_keeps_it() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    assert!(reason(open(&path, &FileOptions::default())).contains("add size=SIZE"));
    let read_only = FileOptions { read_only: true, ..options(8192) };
    assert!(reason(open(&path, &read_only)).contains("a read-only one is not made"));
    assert!(!path.exists());

    let volume = open(&path, &options(1 << 20)).unwrap();
    assert_eq!((volume.geometry().blocks, volume.geometry().block_bytes), (2048, 512));
    assert_eq!(volume.notices(), Vec::<String>::new());
    let meta = fs::metadata(&path).unwrap();
    assert_eq!((meta.len(), meta.mode() & 0o777), (1 << 20, 0o600));
    drop(volume);

    let volume = open(&path, &options(2 << 20)).unwrap();
    assert_eq!(volume.geometry().bytes(), 1 << 20);
    assert!(volume.notices()[0].contains("1048576 bytes and keeps them, although 2097152"));
    drop(volume);
    // Growing is a step of its own, and is noticed by whoever has the volume open.
    let volume = open(&path, &FileOptions::default()).unwrap();
    for bad in [0, 1 << 20, (2 << 20) + 1] {
        let message = volume.grow(bad).unwrap_err().to_string();
        assert!(message.contains("can grow from 1048576 bytes"), "{message}");
    }
    assert_eq!(volume.grow(2 << 20).unwrap().bytes(), 2 << 20);
    File::options().write(true).open(&path).unwrap().set_len(3 << 20).unwrap();
    assert_eq!(volume.geometry().bytes(), 2 << 20);
    assert_eq!(volume.refresh().unwrap().bytes(), 3 << 20);
    assert_eq!(volume.geometry().bytes(), 3 << 20);
}

#[test]
fn growth_is_seen_by_open_channels_and_shrinking_is_no_data() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    let volume = open(&path, &options(1 << 20)).unwrap();
    let mut bench = Bench::real(&volume, 4);
    assert_eq!(bench.write(1 << 20, &[1; 4096], false), Err(IoError::OutOfRange));
    volume.grow(2 << 20).unwrap();
    assert_eq!(bench.write(1 << 20, &[1; 4096], false), Ok(()));
    assert_eq!(bench.read(1 << 20, 4096), Ok(vec![1; 4096]));
    // Cut off behind our back: an error, never stale or invented data.
    File::options().write(true).open(&path).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(bench.read(1 << 20, 4096), Err(IoError::Medium));
    assert_eq!(bench.read((1 << 20) - 4096, 8192), Err(IoError::Medium));
    assert_eq!(volume.refresh().unwrap().bytes(), 1 << 20);
    assert_eq!(bench.read(1 << 20, 4096), Err(IoError::OutOfRange));
}

#[test]
fn an_empty_file_is_finished() {
    // What a crash between making a file and giving it its size leaves.
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    File::create(&path).unwrap();
    assert!(reason(open(&path, &FileOptions::default())).contains("less than one block"));
    assert_eq!(open(&path, &options(8192)).unwrap().geometry().bytes(), 8192);
}

#[test]
fn a_torn_size_is_rounded_down_and_said() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, vec![1; 5000]).unwrap();
    let volume = open(&path, &FileOptions::default()).unwrap();
    assert_eq!(volume.geometry().bytes(), 4608);
    assert!(volume.notices().iter().any(|n| n.contains("the last 392 bytes are not used")));
}

#[test]
fn a_size_that_does_not_fit_leaves_nothing_behind() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    // Above the largest file of ext4, xfs and tmpfs alike.
    let why = reason(open(&path, &options(i64::MAX as u64 & !4095)));
    assert!(why.contains("cannot make it"), "{why}");
    assert!(!path.exists());
}

#[test]
fn what_is_no_file_is_refused() {
    let dir = TempDir::new().unwrap();
    assert!(reason(open(dir.path(), &options(8192))).contains("neither a file nor a block"));
    let missing = dir.path().join("no/such/dir/disk");
    assert!(reason(open(&missing, &options(8192))).contains("cannot make the file"));
    let link = dir.path().join("link");
    symlink(dir.path().join("target"), &link).unwrap();
    assert!(open(&link, &options(8192)).is_err(), "a dangling link is not followed to make a file");
    let file = dir.path().join("disk");
    fs::write(&file, [0; 4096]).unwrap();
    let device = FileVolume::open_device(&file, identity(), &FileOptions::default());
    assert!(reason(device).contains("not a block device; write file:"));
    let missing = FileVolume::open_device(&missing, identity(), &FileOptions::default());
    assert!(reason(missing).contains("cannot look at the path"));
}

#[test]
fn a_read_only_file_can_be_opened_read_only_and_shared() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    fs::write(&path, vec![7; 8192]).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    let read_only = FileOptions { read_only: true, ..FileOptions::default() };
    let one = open(&path, &read_only).unwrap();
    let two = open(&path, &read_only).unwrap();
    assert!(one.geometry().read_only && two.geometry().read_only);
    assert!(one.grow(16384).unwrap_err().to_string().contains("read-only"));
    let mut bench = Bench::real(&two, 4);
    assert_eq!(bench.read(4096, 4096), Ok(vec![7; 4096]));
    assert_eq!(bench.range(Op::WriteZeroes, 0, 512, false), Err(IoError::ReadOnly));
}

#[test]
fn one_process_at_a_time() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    let first = open(&path, &options(8192)).unwrap();
    let why = reason(open(&path, &options(8192)));
    assert!(why.contains("another process has it locked"), "{why}");
    // A successor waits until its predecessor has gone.
    let (waiting, is_waiting) = mpsc::channel();
    let successor = std::thread::spawn({
        let path = path.clone();
        move || {
            waiting.send(()).unwrap();
            open(&path, &FileOptions { lock_wait: Duration::from_secs(60), ..options(8192) })
        }
    });
    is_waiting.recv().unwrap();
    drop(first);
    assert!(successor.join().unwrap().is_ok());
}

#[test]
fn specifications_open_volumes() {
    let dir = TempDir::new().unwrap();
    let path: PathBuf = dir.path().join("a,b");
    let text =
        format!("file:{},size=64K,block=4096", path.display().to_string().replace(',', ",,"));
    let spec: VolumeSpec = text.parse().unwrap();
    assert_eq!((spec.path(), spec.is_persistent()), (Some(path.as_path()), true));
    let volume = spec.open(identity()).unwrap();
    assert_eq!((volume.geometry().block_bytes, volume.geometry().blocks), (4096, 16));
    assert!(path.exists());
    for (text, blocks) in [("ram:1M", 2048), ("null:1P,block=4096", 1 << 38)] {
        let spec: VolumeSpec = text.parse().unwrap();
        assert_eq!(spec.open(identity()).unwrap().geometry().blocks, blocks);
        assert!(!spec.is_persistent());
    }
    let missing = dir.path().join("missing");
    let spec: VolumeSpec = format!("file:{}", missing.display()).parse().unwrap();
    let Err(error) = spec.open(identity()) else { panic!("should be refused") };
    let want = format!("volume file:{}: there is no such file; add size=SIZE", missing.display());
    assert!(error.to_string().starts_with(&want), "{error}");
    let spec: VolumeSpec = format!("blockdev:{}", missing.display()).parse().unwrap();
    assert!(spec.open(identity()).is_err());
}

#[test]
fn waiting_for_a_lock_is_bounded() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    let _first = open(&path, &options(8192)).unwrap();
    let before = Instant::now();
    let wait = Duration::from_millis(50);
    assert!(open(&path, &FileOptions { lock_wait: wait, ..options(8192) }).is_err());
    assert!(before.elapsed() >= wait);
}

#[test]
fn what_a_sparse_file_takes_is_counted() {
    let dir = TempDir::new().unwrap();
    let volume = open(&dir.path().join("disk"), &options(64 << 20)).unwrap();
    let empty = volume.used_bytes().unwrap();
    assert!(empty < 1 << 20, "{empty} bytes of nothing");
    let mut bench = Bench::real(&volume, 4);
    bench.write(8 << 20, &[1; 1 << 20], true).unwrap();
    let used = volume.used_bytes().unwrap();
    assert!((1 << 20..2 << 20).contains(&(used - empty)), "{empty} {used}");
    if volume.geometry().deallocate {
        bench.range(Op::Deallocate, 8 << 20, 1 << 20, true).unwrap();
        assert!(volume.used_bytes().unwrap() < used);
        bench.range(Op::WriteZeroes, 0, 1 << 20, true).unwrap();
        assert!(volume.used_bytes().unwrap() < used, "zeros take nothing");
    }
    let whole = open(&dir.path().join("full"), &options(8192)).unwrap();
    Bench::real(&whole, 1).write(0, &[1; 8192], true).unwrap();
    assert_eq!(whole.used_bytes(), Some(8192), "never more than the size");
    let ram: VolumeSpec = "ram:1M".parse().unwrap();
    assert_eq!(ram.open(identity()).unwrap().used_bytes(), None);
}

#[test]
fn nothing_is_done_beyond_the_end_of_a_file_that_shrank() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    let volume = open(&path, &options(1 << 20)).unwrap();
    let mut bench = Bench::real(&volume, 4);
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    assert_eq!(volume.refresh().unwrap().blocks, 0);
    for offset in [0, 4096, (1 << 20) - 4096, u64::MAX - 4095] {
        assert_eq!(bench.read(offset, 4096), Err(IoError::OutOfRange));
        assert_eq!(bench.write(offset, &[1; 4096], true), Err(IoError::OutOfRange));
        for op in [Op::WriteZeroes, Op::Deallocate] {
            assert_eq!(bench.range(op, offset, 4096, false), Err(IoError::OutOfRange));
        }
    }
    assert_eq!(bench.range(Op::Flush, 0, 0, false), Ok(()));
    assert_eq!(fs::metadata(&path).unwrap().len(), 0);
    assert_eq!(volume.used_bytes(), Some(0));
}

/// A file system in memory has no device to poll. One on a disk has, if the disk does: then it
/// must work.
#[test]
fn what_cannot_be_polled_is_refused() {
    let poll = FileOptions { poll: true, ..options(1 << 20) };
    let dir = TempDir::new_in("/dev/shm").expect("every Linux has /dev/shm");
    let why = reason(open(&dir.path().join("disk"), &poll));
    assert!(why.contains("poll is not possible"), "{why}");
    assert!(!dir.path().join("disk").exists(), "nothing is left behind");

    let dir = TempDir::new().unwrap();
    match open(&dir.path().join("disk"), &poll) {
        Ok(volume) => {
            let mut bench = Bench::real(&volume, 16);
            let run = Options { len_max: 300_000, ..Options::new(4, 300) };
            model::run(&mut bench, &volume, vec![0; 1 << 20], &run);
        }
        Err(e) => assert!(e.reason.contains("poll is not possible"), "{e}"),
    }
}

/// The successor of a volume finds it free, although the kernel takes rings apart in its own time.
#[test]
fn a_file_is_let_go_with_its_last_channel() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("disk");
    let one = open(&path, &options(1 << 20)).unwrap();
    let other = open(&dir.path().join("other"), &options(1 << 20)).unwrap();
    let mut bench = Bench::real(&other, 4);
    for round in 1..300 {
        // More often than a core has places for files.
        drop(one.open(&bench.local(), 4).unwrap());
        if round % 100 == 0 {
            bench.write(0, &[1; 512], false).unwrap();
        }
    }
    drop(one);
    bench.write(0, &[1; 512], false).unwrap();
    let mut again = Bench::real(&open(&path, &options(1 << 20)).unwrap(), 4);
    again.write(0, &[1; 512], false).unwrap();
    drop(again);
    assert!(open(&path, &options(1 << 20)).is_ok(), "the core is gone, and so is the lock");
}
