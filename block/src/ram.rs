//! A volume in memory, shared by all cores. Contents are gone when it is dropped.
//!
//! Data is copied in `submit`, while a received payload is still in the cache, and the I/O comes
//! back at the next `poll`. Making a long range zero, or copying one, is cut into slices, one per poll, so that
//! other work of the core goes on. Pages take memory when first written; the size is the only
//! bound, so a volume larger than the machine's free memory can run the machine out of it.
//! A block is read and written whole, also where several cores meet ([`SharedBytes`]).
//!
//! Where compare and write was asked for ([`RamVolume::with_compare_and_write`]) each channel has a
//! turn, which it takes while it changes something, and a compare and write takes those of all
//! channels. Nobody waits for a turn: what does not get it tries again at the next poll.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use iobuf::{OutOfBounds, SgList, SharedBytes};
use reactor::Local;

use crate::io::{Io, IoError, Op, check};
use crate::volume::{Busy, Channel, CopyLimits, Geometry, IO_BYTES_MAX, Identity, Volume};

/// Zeroed at a time; about 50 microseconds of writing.
const SLICE_BYTES: u64 = 512 << 10;

/// See the module.
#[derive(Debug)]
pub struct RamVolume {
    memory: Arc<SharedBytes>,
    geometry: Geometry,
    identity: Identity,
    turns: Option<Arc<Turns>>,
}

/// The turns of all channels.
#[derive(Debug, Default)]
struct Turns(Mutex<Vec<Turn>>);

type Turn = Arc<Mutex<()>>;

/// Takes a turn, or whatever it is; `None`: somebody else has it.
fn take<T>(turn: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    match turn.try_lock() {
        Ok(guard) => Some(guard),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Does it with all turns taken. `None`: somebody else has one.
fn with_all<R>(turns: &[Turn], act: impl FnOnce() -> R) -> Option<R> {
    match turns.split_first() {
        None => Some(act()),
        Some((first, others)) => {
            let _turn = take(first)?;
            with_all(others, act)
        }
    }
}

impl RamVolume {
    /// A volume of `bytes`, rounded down to whole blocks of `block_bytes` (a power of two), full of
    /// zeros.
    pub fn new(identity: Identity, bytes: u64, block_bytes: u32) -> io::Result<RamVolume> {
        let blocks = bytes / u64::from(block_bytes);
        let geometry = Geometry {
            physical_block_bytes: block_bytes.max(4096),
            io_bytes_max: IO_BYTES_MAX,
            deallocate: true,
            write_zeroes: true,
            deallocate_granularity_bytes: 4096,
            deallocated_reads_zero: true,
            compare: true,
            verify: true,
            copy: CopyLimits {
                ranges_max: 128,
                range_bytes_max: IO_BYTES_MAX.into(),
                bytes_max: IO_BYTES_MAX.into(),
            },
            ..Geometry::new(block_bytes, blocks)
        };
        let len = usize::try_from(geometry.bytes())
            .map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        let memory = Arc::new(SharedBytes::new(len)?);
        Ok(RamVolume { memory, geometry, identity, turns: None })
    }

    /// The same volume, and one that can compare and write: for a device that leaves that to its
    /// volume. It makes every change take an uncontended lock.
    #[must_use]
    pub fn with_compare_and_write(mut self) -> RamVolume {
        self.geometry.compare_and_write = true;
        self.turns = Some(Arc::default());
        self
    }

    fn channel(&self, depth: usize) -> RamChannel {
        let turns = self.turns.as_ref().map(|all| {
            let own = Turn::default();
            all.0.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&own));
            (Arc::clone(all), own)
        });
        RamChannel {
            memory: Arc::clone(&self.memory),
            geometry: self.geometry,
            depth,
            done: VecDeque::with_capacity(depth),
            long: VecDeque::with_capacity(depth),
            deferred: VecDeque::with_capacity(if turns.is_some() { depth } else { 0 }),
            turns,
            half: SgList::default(),
        }
    }
}

impl Volume for RamVolume {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn identity(&self) -> Identity {
        self.identity
    }

    fn open(&self, _: &Local, depth: u32) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(self.channel(depth as usize)))
    }
}

struct RamChannel {
    memory: Arc<SharedBytes>,
    geometry: Geometry,
    depth: usize,
    done: VecDeque<Box<Io>>,
    /// Ranges to be made zero, or copied, in slices; `scratch` counts the bytes done. Taken in turn.
    long: VecDeque<Box<Io>>,
    /// Changes whose turn it was not.
    deferred: VecDeque<Box<Io>>,
    /// Those of all channels, and this one's.
    turns: Option<(Arc<Turns>, Turn)>,
    /// Half of the data of a compare and write.
    half: SgList,
}

impl RamChannel {
    /// Does the part of `io` from `at`, if it is its turn.
    #[inline]
    fn try_work(&mut self, io: &Io, at: u64, len: u64) -> Option<Result<(), IoError>> {
        let Some((all, own)) = &self.turns else { return Some(self.work(io, at, len)) };
        if io.op == Op::CompareAndWrite {
            let all = Arc::clone(all);
            let channels = take(&all.0)?;
            return with_all(&channels, || self.compare_and_write(io));
        }
        let _turn = if io.op.is_change() { Some(take(own)?) } else { None };
        Some(self.work(io, at, len))
    }

    /// With all turns taken.
    fn compare_and_write(&mut self, io: &Io) -> Result<(), IoError> {
        // Both fit: the range lies in the mapping, and is one block.
        let (offset, len) = (io.offset as usize, io.len as usize);
        let RamChannel { memory, half, .. } = self;
        let mut go = || {
            half.append_range(&io.data, 0, len)?;
            if !memory.is_equal(offset, half)? {
                return Ok(false);
            }
            half.clear();
            half.append_range(&io.data, len, len)?;
            memory.write(offset, half).map(|()| true)
        };
        let result = go();
        half.clear();
        match result {
            Ok(true) => Ok(()),
            Ok(false) => Err(IoError::CompareFailed),
            Err(OutOfBounds) => Err(IoError::OutOfRange),
        }
    }

    /// Does all of `io`, now or later.
    #[inline]
    fn begin(&mut self, mut io: Box<Io>) {
        match self.try_work(&io, 0, io.len) {
            Some(result) => {
                io.result = result;
                self.done.push_back(io);
            }
            None => self.deferred.push_back(io),
        }
    }

    /// Does the part of `io` from `at`, at most `len` bytes of it. The range was checked.
    fn work(&self, io: &Io, at: u64, len: u64) -> Result<(), IoError> {
        // Both fit: the range lies in the mapping.
        let (offset, len) = ((io.offset + at) as usize, len as usize);
        let result = match io.op {
            Op::Read => self.memory.read(offset, &io.data),
            Op::Write => self.memory.write(offset, &io.data),
            Op::Flush => Ok(()),
            Op::WriteZeroes if io.no_unmap => self.memory.zero(offset, len),
            Op::WriteZeroes | Op::Deallocate => self.memory.discard(offset, len),
            Op::Compare => match self.memory.is_equal(offset, &io.data) {
                Ok(true) => Ok(()),
                Ok(false) => return Err(IoError::CompareFailed),
                Err(error) => Err(error),
            },
            // Memory can be read.
            Op::Verify => Ok(()),
            Op::Copy => self.copy(io, at, len),
            Op::Reserve | Op::ReservationReport | Op::CompareAndWrite => {
                return Err(IoError::NotSupported);
            }
        };
        result.map_err(|OutOfBounds| IoError::OutOfRange)
    }

    /// Copies `len` bytes of the sources from byte `at` of all of them.
    fn copy(&self, io: &Io, mut at: u64, len: usize) -> Result<(), OutOfBounds> {
        let mut to = (io.offset + at) as usize;
        let end = to + len;
        for source in &io.sources {
            if at >= source.len {
                at -= source.len;
                continue;
            }
            let part = ((source.len - at) as usize).min(end - to);
            self.memory.copy_within((source.offset + at) as usize, to, part)?;
            (to, at) = (to + part, 0);
        }
        Ok(())
    }
}

impl Channel for RamChannel {
    fn submit(&mut self, mut io: Box<Io>) -> Result<(), Busy> {
        if self.in_flight() == self.depth {
            return Err(Busy(io));
        }
        io.result = check(&self.geometry, &io);
        if io.result.is_ok() {
            if matches!(io.op, Op::WriteZeroes | Op::Deallocate | Op::Copy) && io.len > SLICE_BYTES
            {
                io.scratch = 0;
                self.long.push_back(io);
                return Ok(());
            }
            self.begin(io);
        } else {
            self.done.push_back(io);
        }
        Ok(())
    }

    fn poll(&mut self, done: &mut dyn FnMut(Box<Io>)) {
        for _ in 0..self.deferred.len() {
            if let Some(io) = self.deferred.pop_front() {
                self.begin(io);
            }
        }
        if let Some(mut io) = self.long.pop_front() {
            let slice = SLICE_BYTES.min(io.len - io.scratch);
            if let Some(result) = self.try_work(&io, io.scratch, slice) {
                io.result = result;
                io.scratch += slice;
            }
            if io.result.is_ok() && io.scratch < io.len {
                self.long.push_back(io);
            } else {
                self.done.push_back(io);
            }
        }
        while let Some(io) = self.done.pop_front() {
            done(io);
        }
    }

    fn in_flight(&self) -> usize {
        self.done.len() + self.long.len() + self.deferred.len()
    }

    fn deadline(&self) -> Option<Duration> {
        // More to do, right away.
        (self.in_flight() > 0).then_some(Duration::ZERO)
    }

    fn abort(&mut self) {
        let waiting = self.long.drain(..).chain(self.deferred.drain(..));
        for mut io in waiting {
            io.result = Err(IoError::Aborted);
            self.done.push_back(io);
        }
    }
}

impl Drop for RamChannel {
    fn drop(&mut self) {
        if let Some((all, own)) = &self.turns {
            let mut channels = all.0.lock().unwrap_or_else(PoisonError::into_inner);
            channels.retain(|turn| !Arc::ptr_eq(turn, own));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use iobuf::Pool;

    use super::*;

    const BLOCK: usize = 512;

    /// A channel as a core has it, and memory.
    struct Core {
        channel: RamChannel,
        pool: Pool,
    }

    impl Core {
        fn of(volume: &RamVolume) -> Core {
            Core { channel: volume.channel(1), pool: Pool::new(1 << 20).unwrap() }
        }

        /// Runs an I/O on the first block with this memory; returns what is in it then.
        fn run(&mut self, op: Op, bytes: &[u8]) -> (Result<(), IoError>, Vec<u8>) {
            let mut io = Box::new(Io::new(op, 0, BLOCK as u64));
            self.pool.alloc(bytes.len(), &mut io.data).unwrap();
            io.data.copy_from_slice(0, bytes).unwrap();
            self.channel.submit(io).unwrap();
            let mut back = None;
            while back.is_none() {
                self.channel.poll(&mut |io| back = Some(io));
            }
            let io = back.unwrap();
            let mut bytes = vec![0; bytes.len()];
            io.data.copy_to_slice(0, &mut bytes).unwrap();
            (io.result, bytes)
        }

        fn read(&mut self) -> [u64; 2] {
            let (result, bytes) = self.run(Op::Read, &[0; BLOCK]);
            assert_eq!(result, Ok(()));
            [0, 8].map(|at| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()))
        }
    }

    fn block(words: [u64; 2]) -> Vec<u8> {
        let mut bytes = vec![words[0] as u8 ^ words[1] as u8; BLOCK];
        bytes[..8].copy_from_slice(&words[0].to_le_bytes());
        bytes[8..16].copy_from_slice(&words[1].to_le_bytes());
        bytes
    }

    fn pair(old: [u64; 2], new: [u64; 2]) -> Vec<u8> {
        [block(old), block(new)].concat()
    }

    fn volume() -> RamVolume {
        let identity = Identity::from_uuid([1; 16]);
        RamVolume::new(identity, 1 << 20, 512).unwrap().with_compare_and_write()
    }

    #[test]
    fn compare_and_write_changes_what_was_equal_alone() {
        let volume = volume();
        let mut core = Core::of(&volume);
        assert_eq!(core.run(Op::Write, &block([1, 2])).0, Ok(()));
        let differs = Err(IoError::CompareFailed);
        assert_eq!(core.run(Op::CompareAndWrite, &pair([1, 3], [5, 6])).0, differs);
        assert_eq!(core.read(), [1, 2]);
        assert_eq!(core.run(Op::CompareAndWrite, &pair([1, 2], [5, 6])).0, Ok(()));
        assert_eq!(core.read(), [5, 6]);
        assert!(core.channel.half.is_empty(), "no memory is kept");
        let plain = RamVolume::new(Identity::from_uuid([1; 16]), 1 << 20, 512).unwrap();
        let result = Core::of(&plain).run(Op::CompareAndWrite, &pair([0; 2], [0; 2])).0;
        assert_eq!(result, Err(IoError::NotSupported));
    }

    #[test]
    fn what_is_not_its_turn_waits_and_a_channel_that_is_gone_has_none() {
        let volume = volume();
        let (mut core, other) = (Core::of(&volume), Core::of(&volume));
        let (_, turn) = other.channel.turns.clone().unwrap();
        let guard = take(&turn).unwrap();
        let mut io = Box::new(Io::new(Op::CompareAndWrite, 0, BLOCK as u64));
        core.pool.alloc(2 * BLOCK, &mut io.data).unwrap();
        io.data.fill(0, 2 * BLOCK, 0).unwrap();
        core.channel.submit(io).unwrap();
        let mut done = 0;
        core.channel.poll(&mut |_| done += 1);
        assert_eq!((done, core.channel.in_flight()), (0, 1), "the other is changing something");
        // Its own changes go on, as all turns were given back.
        assert!(take(&core.channel.turns.as_ref().unwrap().1).is_some());
        drop(other);
        core.channel.poll(&mut |io| {
            assert_eq!(io.result, Ok(()));
            done += 1;
        });
        assert_eq!((done, core.channel.in_flight()), (1, 0));
        drop(guard);
    }

    /// Ends what the threads do that the one with this has started: also if an assertion fails there, as
    /// they are waited for then.
    struct OnEnd<'a>(&'a AtomicBool);

    impl Drop for OnEnd<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }

    /// Counts within the generation of the block, until the last.
    fn count(volume: &RamVolume, last: u64, over: &AtomicBool) -> u64 {
        let mut core = Core::of(volume);
        let mut counted = 0;
        loop {
            let [generation, count] = core.read();
            if generation == last || over.load(Ordering::Relaxed) {
                return counted;
            }
            let both = pair([generation, count], [generation, count + 1]);
            match core.run(Op::CompareAndWrite, &both).0 {
                Ok(()) => counted += 1,
                Err(error) => assert_eq!(error, IoError::CompareFailed),
            }
        }
    }

    #[test]
    fn cores_that_count_in_one_block_lose_and_double_nothing() {
        const LAST: u64 = 100;
        let (volume, over) = (&volume(), &AtomicBool::new(false));
        let mut seen = 0;
        let counted: u64 = std::thread::scope(|scope| {
            let counters: Vec<_> =
                (0..3).map(|_| scope.spawn(move || count(volume, LAST, over))).collect();
            let _over = OnEnd(over);
            let mut core = Core::of(volume);
            let mut generation = 0;
            while generation < LAST {
                let [found, count] = core.read();
                assert_eq!(found, generation, "nobody else ends a generation");
                let both = pair([found, count], [found + 1, 0]);
                // Its last count is what the pair says it is.
                if count > 0 && core.run(Op::CompareAndWrite, &both).0.is_ok() {
                    (seen, generation) = (seen + count, generation + 1);
                }
            }
            counters.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert!(seen == counted && counted >= LAST, "{seen} in the block, {counted} counted");
    }

    #[test]
    fn no_pair_undoes_a_write_of_another_core() {
        const LAST: u64 = 2000;
        let (volume, over) = (&volume(), &AtomicBool::new(false));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(move || count(volume, LAST, over));
            }
            let _over = OnEnd(over);
            let mut core = Core::of(volume);
            for generation in 1..=LAST {
                assert_eq!(core.run(Op::Write, &block([generation, 0])).0, Ok(()));
                for _ in 0..3 {
                    assert_eq!(core.read()[0], generation, "the write was undone");
                }
            }
        });
    }
}
