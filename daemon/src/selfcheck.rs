//! The self-check of `penstock up`: a pattern through device, fabric and volume, and back.
//!
//! ```text
//!  this thread            emulator core              target core
//!  Disk (vhost-user) ──► virtio-blk ─► initiator ──TCP──► nvmf-target ─► uring file
//!   front end of its own                                    (scratch volume)
//! ```
//!
//! It runs on the same cores, listener and code as the user's volumes, on a scratch volume in a
//! subsystem the discovery log does not tell; it never opens the user's data for writing. What it
//! wrote stays, so that the next start proves that data outlives a restart.

mod disk;
mod vhost;

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;

use crate::bench::pattern::{self, Expect};
use disk::{Direction, Disk, SLOT_BYTES};

/// Size of the scratch volume.
pub(crate) const SCRATCH_BYTES: u64 = 64 << 20;
/// No answer for so long is a failure.
const PATIENCE: Duration = Duration::from_secs(30);
const SEED: u64 = 0x7065_6e73_746f_636b;
const CHUNK: u64 = SLOT_BYTES as u64;
const CHUNKS: u64 = SCRATCH_BYTES / CHUNK;
/// Requests in flight: large ones to fill the pipe, small ones as a busy file system would.
const LARGE_DEPTH: u16 = 8;
const SMALL_DEPTH: u16 = 32;
const SMALL_BYTES: u64 = 4096;
const SMALL_READS: u64 = 16_384;

/// What is being done, for the progress bar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Reading what an earlier start wrote.
    ReadingOld,
    /// Writing the pattern.
    Writing,
    /// Reading it back.
    Reading,
    /// Reading small pieces in random order.
    RandomReads,
}

/// The figures.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Bytes written and read back.
    pub bytes: u64,
    /// Whether a pattern of an earlier start was found, whole.
    pub found_earlier: bool,
    /// Writes of 128 KiB at depth 8, the last flush included: bytes a second.
    pub write_bytes_per_s: f64,
    /// Reads of 128 KiB at depth 8: bytes a second.
    pub read_bytes_per_s: f64,
    /// Random reads of 4 KiB at depth 32: I/Os a second.
    pub random_read_iops: f64,
}

/// Runs the check on the device behind `socket`. `progress` gets the step and its bytes done and
/// planned.
pub(crate) fn run(
    socket: &Path,
    generation: u64,
    progress: &mut dyn FnMut(Step, u64, u64),
) -> anyhow::Result<Figures> {
    let mut disk = Disk::attach(socket, PATIENCE)
        .with_context(|| format!("attaching the device at {}", socket.display()))?;
    let capacity = disk.capacity_bytes().context("asking the device for its size")?;
    anyhow::ensure!(
        capacity >= SCRATCH_BYTES,
        "the scratch volume has {capacity} bytes instead of {SCRATCH_BYTES}"
    );

    let found_earlier =
        read_old(&mut disk, progress).context("reading what an earlier start wrote")?;

    // The first chunk is written last: a pattern with a first chunk is a whole one.
    let begun = Instant::now();
    let mut write = |disk: &mut Disk, chunks: std::ops::Range<u64>, zero: bool| {
        let mut done = 0;
        let mut offsets = chunks.map(|chunk| chunk * CHUNK);
        let transferred = disk.transfer(
            Direction::Write,
            &mut offsets,
            SLOT_BYTES,
            LARGE_DEPTH,
            &mut |offset, buffer| {
                if zero {
                    buffer.fill(0);
                } else {
                    pattern::fill(SEED, offset, generation, buffer);
                }
                done += CHUNK;
                progress(Step::Writing, done.min(SCRATCH_BYTES), SCRATCH_BYTES);
                Ok(())
            },
        );
        transferred.and_then(|_| disk.flush())
    };
    write(&mut disk, 0..1, true)
        .and_then(|()| write(&mut disk, 1..CHUNKS, false))
        .and_then(|()| write(&mut disk, 0..1, false))
        .context("writing the pattern")?;
    let write_s = begun.elapsed().as_secs_f64();

    let begun = Instant::now();
    read_all(&mut disk, Expect::Generation(generation), Step::Reading, progress)
        .context("reading the pattern back")?;
    let read_s = begun.elapsed().as_secs_f64();

    let begun = Instant::now();
    let places = SCRATCH_BYTES / SMALL_BYTES;
    let mut offsets =
        (0..SMALL_READS).map(|index| pattern::mix(generation ^ index) % places * SMALL_BYTES);
    let mut done = 0;
    disk.transfer(
        Direction::Read,
        &mut offsets,
        SMALL_BYTES as usize,
        SMALL_DEPTH,
        &mut |offset, buffer| {
            done += SMALL_BYTES;
            if done % (1 << 20) == 0 {
                progress(Step::RandomReads, done, SMALL_READS * SMALL_BYTES);
            }
            judge(offset, Expect::Generation(generation), buffer)
        },
    )
    .context("reading in random order")?;
    let random_s = begun.elapsed().as_secs_f64();
    disk.detach().context("detaching the device")?;
    Ok(Figures {
        bytes: SCRATCH_BYTES,
        found_earlier,
        write_bytes_per_s: SCRATCH_BYTES as f64 / write_s,
        read_bytes_per_s: SCRATCH_BYTES as f64 / read_s,
        random_read_iops: SMALL_READS as f64 / random_s,
    })
}

/// Reads the first blocks of a device and its size, and lets go of it again. Changes nothing.
pub(crate) fn look(socket: &Path) -> anyhow::Result<u64> {
    let mut disk = Disk::attach(socket, PATIENCE)
        .with_context(|| format!("attaching the device at {}", socket.display()))?;
    let capacity = disk.capacity_bytes().context("asking the device for its size")?;
    disk.transfer(
        Direction::Read,
        &mut std::iter::once(0),
        SMALL_BYTES as usize,
        1,
        &mut |_, _| Ok(()),
    )
    .context("reading the first blocks")?;
    disk.detach().context("detaching the device")?;
    Ok(capacity)
}

/// If an earlier start wrote a whole pattern, all of it must be there. `false`: there was none.
fn read_old(disk: &mut Disk, progress: &mut dyn FnMut(Step, u64, u64)) -> io::Result<bool> {
    let mut generation = 0;
    disk.transfer(Direction::Read, &mut std::iter::once(0), SLOT_BYTES, 1, &mut |_, buffer| {
        generation = buffer.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        Ok(())
    })?;
    // Zeros: a new scratch volume, or a check that was interrupted.
    if generation == 0 {
        return Ok(false);
    }
    read_all(disk, Expect::Generation(generation), Step::ReadingOld, progress)?;
    Ok(true)
}

fn read_all(
    disk: &mut Disk,
    expect: Expect,
    step: Step,
    progress: &mut dyn FnMut(Step, u64, u64),
) -> io::Result<()> {
    let mut done = 0;
    let mut offsets = (0..CHUNKS).map(|chunk| chunk * CHUNK);
    disk.transfer(
        Direction::Read,
        &mut offsets,
        SLOT_BYTES,
        LARGE_DEPTH,
        &mut |offset, buffer| {
            done += CHUNK;
            progress(step, done, SCRATCH_BYTES);
            judge(offset, expect, buffer)
        },
    )?;
    Ok(())
}

fn judge(offset: u64, expect: Expect, buffer: &[u8]) -> io::Result<()> {
    pattern::check(SEED, offset, expect, buffer)
        .map_err(|wrong| io::Error::new(io::ErrorKind::InvalidData, wrong.to_string()))
}
