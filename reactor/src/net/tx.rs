//! The send queue of one stream.
//!
//! Entries (PDUs) wait in order. Their head and tail bytes are copied into a ring of bytes, their
//! payload stays where it is, kept by its hold. A send takes entries from the front, as many as fit
//! one `sendmsg`; pushes go on behind it meanwhile. An entry is over when its last byte was sent
//! (or sealed): then its memory is released and its token reported.

// UNSAFETY: the kernel reads the prepared message and the arena while entries are added behind it.
#![expect(unsafe_code)]

use std::cell::{RefCell, UnsafeCell};
use std::collections::VecDeque;
use std::io;
use std::mem;
use std::rc::Rc;

use iobuf::{Gather, Hold, Segment, SgList};

use crate::error::Full;
use crate::net::layer::{Layer, LayerError};
use crate::sys::Mapping;

/// Longest header that [`Stream::push`](crate::net::Stream::push) takes, in bytes: the longest
/// header of NVMe/TCP (a termination request with 128 bytes of the offending PDU) and slack.
pub const HEAD_BYTES_MAX: usize = 192;

/// Length of a tail (data digest).
const TAIL_BYTES: usize = 4;
/// Arena bytes per entry.
const ENTRY_BYTES: usize = HEAD_BYTES_MAX + TAIL_BYTES;
/// Segments in one `sendmsg`: the kernel's `UIO_MAXIOV`.
const IOVECS_MAX: usize = 1024;
/// Bytes that a layer is given at once: what a full record holds.
const SEAL_BYTES: usize = 16 << 10;
/// Sealed bytes of large payloads after which the first message of several leaves: the other end is at
/// work on it while the rest is sealed. Three records and a header: they fit in one buffer of the
/// loopback socket, so that the other end finds whole records.
const SEALED_BYTES_FIRST: usize = 64_000;

/// How a layer is given what waits: pieces of up to [`SEAL_BYTES`], and a large payload begins one.
#[derive(Default)]
struct Unsealed {
    /// Taken from the queue; kept by the holds of their entries.
    segments: Vec<Segment>,
    /// Pieces in order: bytes, and whether all of them are of one payload.
    pieces: Vec<(usize, bool)>,
    /// The next piece, and where it begins: a segment, and bytes of it that are sealed.
    next: usize,
    at: usize,
    skip: usize,
}

impl Unsealed {
    fn is_over(&self) -> bool {
        self.next == self.pieces.len()
    }

    fn clear(&mut self) {
        self.segments.clear();
        self.pieces.clear();
        (self.next, self.at, self.skip) = (0, 0, 0);
    }

    /// The next `len` bytes are taken.
    fn advance(&mut self, len: usize) {
        self.skip += len;
        while let Some(segment) = self.segments.get(self.at)
            && self.skip >= segment.len()
        {
            self.skip -= segment.len();
            self.at += 1;
        }
    }
}

/// Cuts what is taken into the pieces that a layer is given.
struct Cutter<'a> {
    pieces: &'a mut Vec<(usize, bool)>,
    /// Bytes of the piece that is being made, and whether a large payload began it.
    len: usize,
    is_payload: bool,
}

impl Cutter<'_> {
    fn end(&mut self) {
        if self.len > 0 {
            self.pieces.push((self.len, self.is_payload));
        }
        (self.len, self.is_payload) = (0, false);
    }

    fn add(&mut self, mut len: usize) {
        while len > 0 {
            let part = len.min(SEAL_BYTES - self.len);
            (self.len, len) = (self.len + part, len - part);
            if self.len == SEAL_BYTES {
                let is_payload = self.is_payload;
                self.end();
                self.is_payload = is_payload;
            }
        }
    }
}

struct Entry {
    /// In `Queue::segments`.
    segments: usize,
    /// The payload's, among the segments: all but the head before and the tail behind.
    payload: std::ops::Range<usize>,
    bytes: u64,
    /// The payload fills a record or more.
    is_large: bool,
    hold: Option<Rc<dyn Hold>>,
    token: Option<u32>,
}

struct Queue {
    entries: VecDeque<Entry>,
    /// Of all entries, in order.
    segments: VecDeque<Segment>,
    /// Entries at the front that sends have taken completely, and segments that they have taken.
    taken_entries: usize,
    taken_segments: usize,
    /// Bytes sent of the front entry.
    front_bytes: u64,
    /// Of the taken segments, those that a layer has to seal yet.
    unsealed: Unsealed,
    /// Where the next head goes in the arena, if it has room for it there.
    arena_end: usize,
    /// Tokens to report.
    sent: VecDeque<u32>,
}

/// The message that the kernel works on.
struct Message {
    header: libc::msghdr,
    iovecs: Vec<Segment>,
    /// First of `iovecs` that is not sent.
    at: usize,
    sealed: Vec<u8>,
}

/// Shared by the stream and by the operation slot of a send: what the kernel reads stays in place
/// although the stream is dropped.
pub(crate) struct Tx {
    /// Bytes outside those of entries are written by `push`, those of entries by nobody.
    arena: Mapping,
    arena_len: usize,
    entries_max: usize,
    batch_bytes: u64,
    queue: RefCell<Queue>,
    /// Touched only while no send is in flight, which the stream upholds.
    message: UnsafeCell<Message>,
}

impl Tx {
    pub(crate) fn new(entries_max: usize, batch_bytes: usize) -> io::Result<Rc<Tx>> {
        let entries_max = entries_max.max(1);
        // One more entry's worth, as none is split at the end of the arena. Memory comes with the
        // first use of each page, so a stream that never queues much has the first page alone; and
        // all of it goes with the stream.
        let arena_len = (entries_max + 1) * ENTRY_BYTES;
        let arena = Mapping::anonymous(arena_len)?;
        // SAFETY: a `msghdr` is plain old data, and all zero is an empty message.
        let header = unsafe { mem::zeroed() };
        Ok(Rc::new(Tx {
            arena,
            arena_len,
            entries_max,
            batch_bytes: batch_bytes as u64,
            queue: RefCell::new(Queue {
                // Both grow to what the stream's user needs, and stay.
                entries: VecDeque::new(),
                segments: VecDeque::new(),
                taken_entries: 0,
                taken_segments: 0,
                front_bytes: 0,
                unsealed: Unsealed::default(),
                arena_end: 0,
                sent: VecDeque::new(),
            }),
            message: UnsafeCell::new(Message {
                header,
                iovecs: Vec::new(),
                at: 0,
                sealed: Vec::new(),
            }),
        }))
    }

    /// The message for the kernel, stable while a send is in flight.
    pub(crate) fn message(&self) -> *const libc::msghdr {
        // SAFETY: forms the address of a field inside a live allocation, no reference.
        unsafe { &raw const (*self.message.get()).header }
    }

    pub(crate) fn room(&self) -> usize {
        let queue = self.queue.borrow();
        // Tokens that nobody takes count, too: that bounds them.
        self.entries_max.saturating_sub(queue.entries.len() + queue.sent.len())
    }

    /// Whether no entry waits to be taken by a send.
    pub(crate) fn is_idle(&self) -> bool {
        let queue = self.queue.borrow();
        queue.taken_segments == queue.segments.len() && queue.unsealed.is_over()
    }

    /// Whether [`Tx::pop_sent`] has one.
    pub(crate) fn has_sent(&self) -> bool {
        !self.queue.borrow().sent.is_empty()
    }

    pub(crate) fn pop_sent(&self) -> Option<u32> {
        self.queue.borrow_mut().sent.pop_front()
    }

    /// See [`Stream::push`](crate::net::Stream::push).
    pub(crate) fn push(
        &self,
        head: &[u8],
        payload: Option<(&SgList, usize, usize)>,
        tail: Option<[u8; TAIL_BYTES]>,
        token: Option<u32>,
    ) -> Result<(), Full> {
        assert!(head.len() <= HEAD_BYTES_MAX, "a head of {} bytes", head.len());
        if self.room() == 0 {
            return Err(Full);
        }
        let mut queue = self.queue.borrow_mut();
        let queue = &mut *queue;
        let first = queue.segments.len();
        let tail = tail.as_ref().map_or(&[][..], |tail| &tail[..]);
        // In one piece: what has no room at the end of the arena goes to its start.
        let fits = queue.arena_end + head.len() + tail.len() <= self.arena_len;
        let at = if fits { queue.arena_end } else { 0 };
        if !head.is_empty() {
            queue.segments.push_back(self.store(at, head));
        }
        let payload_first = queue.segments.len();
        let mut hold = None;
        let mut payload_bytes = 0;
        if let Some((sg, offset, len)) = payload {
            let inside = offset.checked_add(len).is_some_and(|end| end <= sg.len());
            assert!(inside, "payload of {len} bytes at {offset} in a list of {}", sg.len());
            queue.segments.extend(sg.range(offset, len));
            payload_bytes = len;
            hold = sg.hold();
        }
        let payload_end = queue.segments.len();
        if !tail.is_empty() {
            queue.segments.push_back(self.store(at + head.len(), tail));
        }
        queue.arena_end = at + head.len() + tail.len();
        if let Some(hold) = &hold {
            for segment in queue.segments.range(payload_first..payload_end) {
                hold.retain(std::slice::from_ref(segment));
            }
        }
        queue.entries.push_back(Entry {
            segments: queue.segments.len() - first,
            payload: payload_first - first..payload_end - first,
            bytes: (head.len() + payload_bytes + tail.len()) as u64,
            is_large: payload_bytes >= SEAL_BYTES,
            hold,
            token,
        });
        Ok(())
    }

    /// Copies bytes to a free part of the arena.
    fn store(&self, at: usize, bytes: &[u8]) -> Segment {
        assert!(at + bytes.len() <= self.arena_len, "`push` looks for room");
        let to = self.arena.base().wrapping_add(at);
        // SAFETY: the bytes are in the arena (just checked), memory that only raw pointers lead to.
        // No entry has them: each has at most ENTRY_BYTES, there are at most `entries_max`, one more is set
        // aside for what is left out at the end, and places are taken in turn. So the kernel does not
        // read them now.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        Segment::new(to, bytes.len())
    }

    /// Prepares the next message. `false`: nothing waits. `is_first`: the other end has nothing to do
    /// while this one is made, so that it had better be short.
    ///
    /// # Safety
    ///
    /// No send of this queue is in flight.
    pub(crate) unsafe fn prepare(
        &self,
        layer: Option<&mut dyn Layer>,
        is_first: bool,
    ) -> Result<bool, LayerError> {
        // SAFETY: no send is in flight (the caller's promise), so the kernel does not read the
        // message, and no other reference to it lives: each is local to a function of this type,
        // none of which calls another that makes one.
        let message = unsafe { &mut *self.message.get() };
        message.iovecs.clear();
        message.at = 0;
        match layer {
            None => {
                self.take(&mut message.iovecs, None);
            }
            Some(layer) => {
                message.sealed.clear();
                let limit = if is_first { SEALED_BYTES_FIRST } else { usize::MAX };
                let bytes = self.seal(layer, limit, &mut message.sealed)?;
                let sealed = &mut message.sealed;
                if !sealed.is_empty() {
                    message.iovecs.push(Segment::new(sealed.as_mut_ptr(), sealed.len()));
                }
                self.complete(bytes);
            }
        }
        if message.iovecs.is_empty() {
            self.complete(0); // entries without a byte
            return Ok(false);
        }
        message.aim();
        Ok(true)
    }

    /// Has `layer` seal what is taken for a message, or `limit` sealed bytes if there are large payloads
    /// among it. Returns how many bytes it was.
    fn seal(
        &self,
        layer: &mut dyn Layer,
        limit: usize,
        sealed: &mut Vec<u8>,
    ) -> Result<u64, LayerError> {
        let mut unsealed = mem::take(&mut self.queue.borrow_mut().unsealed);
        if unsealed.is_over() {
            unsealed.clear();
            self.take(&mut unsealed.segments, Some(&mut unsealed.pieces));
        }
        let mut bytes = 0;
        while let Some(&(len, is_payload)) = unsealed.pieces.get(unsealed.next) {
            // SAFETY: arena bytes live as long as `self`, payload is kept by the holds of entries,
            // which are released only by `complete`, for what is sealed, and by `abandon`, which
            // forgets what is not.
            let left = unsafe { Gather::new(&unsealed.segments[unsealed.at..]) };
            let piece = left.slice(unsealed.skip, len).expect("pieces are cut from the segments");
            layer.seal(&piece, sealed)?;
            unsealed.advance(len);
            unsealed.next += 1;
            bytes += len as u64;
            if is_payload && sealed.len() + SEAL_BYTES > limit {
                break;
            }
        }
        self.queue.borrow_mut().unsealed = unsealed;
        Ok(bytes)
    }

    /// Prepares the layer's last words; nothing else is sent any more. `false`: it has none.
    ///
    /// # Safety
    ///
    /// No send of this queue is in flight.
    pub(crate) unsafe fn prepare_last(&self, words: &mut dyn FnMut(&mut Vec<u8>)) -> bool {
        // SAFETY: as in `prepare`.
        let message = unsafe { &mut *self.message.get() };
        message.iovecs.clear();
        message.at = 0;
        message.sealed.clear();
        words(&mut message.sealed);
        if message.sealed.is_empty() {
            return false;
        }
        let sealed = &mut message.sealed;
        message.iovecs.push(Segment::new(sealed.as_mut_ptr(), sealed.len()));
        message.aim();
        true
    }

    /// Moves entries into a message: at least one (or as much of it as the kernel takes at once),
    /// then while they fit. `pieces`: how a layer is given it.
    fn take(&self, iovecs: &mut Vec<Segment>, pieces: Option<&mut Vec<(usize, bool)>>) {
        let mut queue = self.queue.borrow_mut();
        let queue = &mut *queue;
        let mut bytes = 0;
        let mut cutter = pieces.map(|pieces| Cutter { pieces, len: 0, is_payload: false });
        // Segments of the first untaken entry that an earlier message took.
        let before: usize =
            queue.entries.range(..queue.taken_entries).map(|entry| entry.segments).sum();
        let mut skip = queue.taken_segments - before;
        while let Some(entry) = queue.entries.get(queue.taken_entries) {
            let is_first = iovecs.is_empty();
            let wanted = entry.segments - skip;
            if !is_first
                && (bytes + entry.bytes > self.batch_bytes || iovecs.len() + wanted > IOVECS_MAX)
            {
                break;
            }
            let count = wanted.min(IOVECS_MAX);
            let from = queue.taken_segments;
            for (index, segment) in queue.segments.range(from..from + count).enumerate() {
                bytes += segment.len() as u64;
                self.append(iovecs, *segment);
                if let Some(cutter) = &mut cutter {
                    if entry.is_large && skip + index == entry.payload.start {
                        cutter.end();
                        cutter.is_payload = true;
                    }
                    cutter.add(segment.len());
                }
            }
            queue.taken_segments += count;
            if count < wanted {
                break;
            }
            queue.taken_entries += 1;
            skip = 0;
        }
        if let Some(cutter) = &mut cutter {
            cutter.end();
        }
    }

    /// Adds a segment. Neighbours in the arena (heads of entries without payload) become one.
    fn append(&self, iovecs: &mut Vec<Segment>, segment: Segment) {
        let arena = self.arena.base()..self.arena.base().wrapping_add(self.arena_len);
        if let Some(last) = iovecs.last_mut()
            && arena.contains(&last.as_ptr())
            && arena.contains(&segment.as_ptr())
            && last.as_ptr().wrapping_add(last.len()) == segment.as_ptr()
        {
            *last = Segment::new(last.as_ptr(), last.len() + segment.len());
            return;
        }
        iovecs.push(segment);
    }

    /// The kernel sent `bytes` of the message. `true`: all of it.
    ///
    /// # Safety
    ///
    /// No send of this queue is in flight any more.
    pub(crate) unsafe fn on_sent(&self, bytes: usize, is_sealed: bool) -> bool {
        // SAFETY: as in `prepare`.
        let message = unsafe { &mut *self.message.get() };
        let is_over = message.advance(bytes);
        message.aim();
        if !is_sealed {
            self.complete(bytes as u64);
        }
        is_over
    }

    /// The kernel or the cipher is done with `bytes` more: ends the entries that lie before.
    fn complete(&self, bytes: u64) {
        let mut queue = self.queue.borrow_mut();
        queue.front_bytes += bytes;
        while let Some(entry) = queue.entries.front()
            && queue.taken_entries > 0
            && queue.front_bytes >= entry.bytes
        {
            queue.front_bytes -= entry.bytes;
            queue.end_front();
        }
    }

    /// Ends entries although they were not sent: nothing will be sent any more, and nothing is in
    /// flight. Their tokens are reported.
    pub(crate) fn abandon(&self) {
        let mut queue = self.queue.borrow_mut();
        queue.unsealed.clear();
        while !queue.entries.is_empty() {
            queue.end_front();
        }
    }

    /// Ends the entries behind those that the kernel has.
    pub(crate) fn abandon_waiting(&self) {
        let mut queue = self.queue.borrow_mut();
        let queue = &mut *queue;
        // An entry of which some segments are taken stays.
        let kept: usize =
            queue.entries.range(..queue.taken_entries).map(|entry| entry.segments).sum();
        let keep = queue.taken_entries + usize::from(queue.taken_segments > kept);
        let kept: usize = queue.entries.range(..keep).map(|entry| entry.segments).sum();
        for entry in queue.entries.drain(keep..) {
            release(&entry, queue.segments.drain(kept..kept + entry.segments));
            queue.sent.extend(entry.token);
        }
    }
}

impl Drop for Tx {
    fn drop(&mut self) {
        // The last owner is gone, so nothing is in flight.
        self.abandon();
    }
}

impl Queue {
    fn end_front(&mut self) {
        let Some(entry) = self.entries.pop_front() else { return };
        let segments = &mut self.segments;
        release(&entry, (0..entry.segments).map_while(|_| segments.pop_front()));
        self.sent.extend(entry.token);
        self.taken_entries = self.taken_entries.saturating_sub(1);
        self.taken_segments = self.taken_segments.saturating_sub(entry.segments);
        if self.entries.is_empty() {
            // Start over at the same place, which is in the cache; the rest stays untouched memory.
            self.arena_end = 0;
            self.entries.clear();
            self.segments.clear();
            self.front_bytes = 0;
        }
    }
}

impl Message {
    /// Points the header to what is left.
    fn aim(&mut self) {
        let left = &mut self.iovecs[self.at..];
        self.header.msg_iov = left.as_mut_ptr().cast(); // a segment is laid out as an iovec
        self.header.msg_iovlen = left.len();
    }

    fn advance(&mut self, mut bytes: usize) -> bool {
        while let Some(segment) = self.iovecs.get_mut(self.at) {
            if bytes < segment.len() {
                let base = segment.as_ptr().wrapping_add(bytes);
                *segment = Segment::new(base, segment.len() - bytes);
                return false;
            }
            bytes -= segment.len();
            self.at += 1;
        }
        true
    }
}

/// Gives the payload of an entry back, segment by segment as it was retained.
fn release(entry: &Entry, segments: impl Iterator<Item = Segment>) {
    for (index, segment) in segments.enumerate() {
        if let Some(hold) = &entry.hold
            && entry.payload.contains(&index)
        {
            hold.release(&[segment]);
        }
    }
}

#[cfg(test)]
mod tests;
