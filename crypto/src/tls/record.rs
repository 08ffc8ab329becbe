//! The record layer after the handshake (RFC 8446, section 5).
//!
//! Nothing is allocated per record, and no byte is moved but by the cipher: [`Session::seal`] takes
//! it from where it is to the buffer that is sent, [`Session::open_to`] from the buffer that was
//! received to where it belongs, [`Session::open`] opens in that buffer. Only a record that is cut by
//! the end of the buffer is copied. What is not exactly as the peer sealed it ends the session, and
//! nothing of it is reported.

use std::ops::Range;

use iobuf::{Gather, SgList};

use super::aead::{Cipher, Source, TAG_LEN, Use};
use super::alert::AlertCode;
use super::handshake::Established;
use crate::psk::Suite;

/// Longest plaintext of a record (RFC 8446, section 5.1).
pub const RECORD_PLAIN_MAX: usize = 1 << 14;
/// Full records that AES-GCM may seal with one key: RFC 8446, section 5.5, allows 2^24.5. Smaller ones
/// count for their blocks.
pub const KEY_RECORDS_MAX: u64 = 1 << 24;
/// Full records after which [`KeyUpdates::Auto`] takes a new key.
const KEY_RECORDS_AUTO: u64 = 1 << 23;
/// Full records of the peer after which [`KeyUpdates::Auto`] asks it for a new key of its own: a peer
/// that never takes one by itself goes on then. One that does has done so before.
const KEY_RECORDS_ASK: u64 = 3 << 22;
/// The control records that a full key has room for yet: an alert.
const KEY_RECORDS_SPARE: u64 = 2;

const HEADER_LEN: usize = 5;
/// What sealing adds to a record: header, inner type, tag.
const OVERHEAD: usize = HEADER_LEN + 1 + TAG_LEN;
/// "The length MUST NOT exceed 2^14 + 256 bytes."
const CIPHERTEXT_MAX: usize = RECORD_PLAIN_MAX + 256;

const CHANGE_CIPHER_SPEC: u8 = 20;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;

const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// Records without application data that a peer may send between records with it: some tickets
/// after the handshake, now and then a new key.
const IDLE_RECORDS_MAX: u32 = 32;
/// Longest session ticket message that is skipped: more than its fields can hold.
const TICKET_MAX: usize = 1 << 17;

/// Which end of a connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The target.
    Server,
    /// The host.
    Client,
}

/// When this end takes a new key for what it sends. A peer's own change of keys, and its request
/// that we change ours, are always followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyUpdates {
    /// In time before the present key is worn out (after 2^23 records), and in time before the peer's
    /// is, asks the peer for a new one (after 3 * 2^22). For peers that can follow.
    Auto,
    /// Never: the connection ends when its key is worn out (after 2^24 records, 256 GiB of full
    /// ones), unless the peer asks for a new one before. For Linux hosts, which could not follow when
    /// this was written.
    Never,
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A record is not what the peer sealed: changed, lost, repeated or out of order.
    #[error("a TLS record is not authentic")]
    Forged,
    /// A record outside the encryption.
    #[error("a TLS record of type {0} is not encrypted")]
    Plaintext(u8),
    /// A record is too long, or decrypts to too much.
    #[error("a TLS record is too long")]
    Overflow,
    /// A record is too short, or has nothing in it.
    #[error("a TLS record is too short or empty")]
    Empty,
    /// A message that may not come now.
    #[error("unexpected TLS message (type {0})")]
    Unexpected(u8),
    /// A message that does not parse.
    #[error("malformed TLS message (type {0})")]
    Malformed(u8),
    /// Too many records without data.
    #[error("too many TLS records without data")]
    Idle,
    /// The peer gave up.
    #[error("the peer ended TLS with the alert {0}")]
    Alert(AlertCode),
    /// The key for sending is worn out and may not be replaced.
    #[error(
        "the TLS key has sealed as much as {KEY_RECORDS_MAX} full records: the connection has to be made anew"
    )]
    KeyWornOut,
    /// This end has already said that it ends.
    #[error("TLS has already been ended by this side")]
    Closed,
}

impl RecordError {
    /// What the peer is told of it.
    fn alert(self) -> Option<AlertCode> {
        match self {
            RecordError::Forged => Some(AlertCode::BAD_RECORD_MAC),
            RecordError::Plaintext(_) | RecordError::Unexpected(_) | RecordError::Idle => {
                Some(AlertCode::UNEXPECTED_MESSAGE)
            }
            RecordError::Overflow => Some(AlertCode::RECORD_OVERFLOW),
            RecordError::Empty => Some(AlertCode::UNEXPECTED_MESSAGE),
            RecordError::Malformed(_) => Some(AlertCode::DECODE_ERROR),
            RecordError::KeyWornOut => Some(AlertCode::CLOSE_NOTIFY),
            RecordError::Alert(_) | RecordError::Closed => None,
        }
    }
}

/// Where plaintext came out of [`Session::open`].
#[derive(Debug, PartialEq, Eq)]
pub enum Plain<'a> {
    /// In place: this range of the bytes just given. Ranges ascend and do not overlap.
    InPlace(Range<usize>, &'a [u8]),
    /// Of a record that was spread over several pieces: to be copied.
    Copied(&'a [u8]),
}

impl<'a> Plain<'a> {
    /// The bytes.
    pub fn bytes(&self) -> &'a [u8] {
        match self {
            Plain::InPlace(_, bytes) | Plain::Copied(bytes) => bytes,
        }
    }
}

/// What a session did. All counts only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records sealed.
    pub sealed_records: u64,
    /// Application data sealed.
    pub sealed_bytes: u64,
    /// Records opened.
    pub opened_records: u64,
    /// Application data opened.
    pub opened_bytes: u64,
    /// Application data that came in cut records and was copied for that.
    pub copied_bytes: u64,
    /// Application data that was opened straight to where it belongs.
    pub placed_bytes: u64,
    /// New keys taken for sending.
    pub tx_key_updates: u64,
    /// New keys of the peer.
    pub rx_key_updates: u64,
    /// Session tickets skipped.
    pub tickets: u64,
}

/// Both directions of a connection after its handshake.
///
/// ```text
///   seal(bytes)   ──► [key update, if due] records ──► out
///   open(wire)    ──► plaintext to the sink; key updates, tickets and alerts are dealt with inside
///   open_to(wire) ──► plaintext to its place, as long as records hold nothing else
/// ```
pub struct Session {
    role: Role,
    suite: Suite,
    tx: Tx,
    rx: Rx,
    counters: Counters,
}

struct Tx {
    cipher: Cipher,
    updates: KeyUpdates,
    /// The peer asked us to take a new key before our next data.
    is_update_due: bool,
    /// We asked the peer for a new key of its own, and it has not come.
    is_asked: bool,
    is_closed: bool,
}

struct Rx {
    cipher: Cipher,
    /// A record that has not come in full. Never grows.
    cut: Vec<u8>,
    /// A handshake message that has not come in full.
    message: Message,
    idle_records: u32,
    /// The peer has said that nothing follows.
    is_closed: bool,
    error: Option<RecordError>,
}

/// Handshake messages across records.
#[derive(Default)]
struct Message {
    /// Type and length, and the value of a key update.
    head: [u8; 5],
    head_len: usize,
    /// Bytes of a ticket to be skipped yet.
    skip: usize,
}

impl Message {
    fn is_between(&self) -> bool {
        self.head_len == 0 && self.skip == 0
    }
}

impl Session {
    /// Goes on where a handshake ended. `established.leftover` is the first thing to
    /// [`open`](Session::open).
    pub fn new(established: &Established, updates: KeyUpdates) -> Session {
        let Established { role, suite, tx, rx, .. } = established;
        Session {
            role: *role,
            suite: *suite,
            tx: Tx {
                cipher: Cipher::new(Use::Seal, *suite, tx.secret.clone(), tx.seq),
                updates,
                is_update_due: false,
                is_asked: false,
                is_closed: false,
            },
            rx: Rx {
                cipher: Cipher::new(Use::Open, *suite, rx.secret.clone(), rx.seq),
                cut: Vec::with_capacity(HEADER_LEN + CIPHERTEXT_MAX),
                message: Message::default(),
                idle_records: 0,
                is_closed: false,
                error: None,
            },
            counters: Counters::default(),
        }
    }

    /// The cipher suite.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// What it did so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Whether the peer has ended its direction in an orderly way. What comes after is ignored.
    pub fn is_peer_closed(&self) -> bool {
        self.rx.is_closed
    }

    /// Full records that the key for sending is good for yet. With [`KeyUpdates::Never`] the connection
    /// has to be made anew before this is 0.
    pub fn key_records_left(&self) -> u64 {
        (KEY_RECORDS_MAX - KEY_RECORDS_SPARE).saturating_sub(self.tx.cipher.wear())
    }

    /// How many bytes sealing `len` bytes gives at most.
    pub fn sealed_len_max(len: usize) -> usize {
        // One more record for a change of keys.
        len + (len.div_ceil(RECORD_PLAIN_MAX) + 1) * OVERHEAD + 5
    }

    /// Appends to `out` the records that carry `plain`: full ones, and one of what is left. Others may
    /// change the bytes meanwhile: each is read once, by the cipher.
    pub fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), RecordError> {
        self.seal_source(plain.len(), &mut Source::of_gather(plain), out)
    }

    /// As [`seal`](Session::seal), for bytes in slices. They are one stream: a slice does not begin a
    /// record.
    pub fn seal_slices(&mut self, parts: &[&[u8]], out: &mut Vec<u8>) -> Result<(), RecordError> {
        let len = parts.iter().map(|part| part.len()).sum();
        self.seal_source(len, &mut Source::of_slices(parts), out)
    }

    fn seal_source(
        &mut self,
        len: usize,
        plain: &mut Source<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), RecordError> {
        // Nothing of what the key does not suffice for: what has been sealed has to be sent, or the
        // peer cannot open the alert that follows.
        let more = (len.div_ceil(RECORD_PLAIN_MAX) as u64).saturating_sub(1);
        let is_kept = self.tx.updates == KeyUpdates::Never && !self.tx.is_update_due;
        if is_kept && self.tx.cipher.wear() + more >= KEY_RECORDS_MAX - KEY_RECORDS_SPARE {
            return Err(if self.tx.is_closed {
                RecordError::Closed
            } else {
                RecordError::KeyWornOut
            });
        }
        out.reserve(Self::sealed_len_max(len));
        let mut left = len;
        while left > 0 {
            let part = left.min(RECORD_PLAIN_MAX);
            self.before_data(out)?;
            self.tx.cipher.seal(header(part), plain, part, APPLICATION_DATA, out);
            self.counters.sealed_records += 1;
            self.counters.sealed_bytes += part as u64;
            left -= part;
        }
        Ok(())
    }

    /// Appends the orderly end of this direction, once. Nothing can be sealed afterwards.
    pub fn close(&mut self, out: &mut Vec<u8>) {
        self.alert(AlertCode::CLOSE_NOTIFY, out);
    }

    /// Appends the alert that says why `error` ended the session, where there is one, once.
    pub fn farewell(&mut self, error: RecordError, out: &mut Vec<u8>) {
        if let Some(code) = error.alert() {
            self.alert(code, out);
        }
    }

    fn alert(&mut self, code: AlertCode, out: &mut Vec<u8>) {
        const WARNING: u8 = 1;
        const FATAL: u8 = 2;

        if self.tx.is_closed {
            return;
        }
        self.tx.is_closed = true;
        let level = if code == AlertCode::CLOSE_NOTIFY { WARNING } else { FATAL };
        if self.tx.cipher.wear() < KEY_RECORDS_MAX {
            self.control(ALERT, &[level, code.0], out);
        }
    }

    /// What has to come before application data: a change of keys that is due, or the end.
    fn before_data(&mut self, out: &mut Vec<u8>) -> Result<(), RecordError> {
        if self.tx.is_closed {
            return Err(RecordError::Closed);
        }
        let records = self.tx.cipher.wear();
        let is_auto = self.tx.updates == KeyUpdates::Auto;
        let is_worn = is_auto && records >= KEY_RECORDS_AUTO;
        let asks = is_auto && !self.tx.is_asked && self.rx.cipher.wear() >= KEY_RECORDS_ASK;
        if self.tx.is_update_due || is_worn || asks {
            self.update_key(asks, out);
        } else if records >= KEY_RECORDS_MAX - KEY_RECORDS_SPARE {
            return Err(RecordError::KeyWornOut);
        }
        Ok(())
    }

    /// Takes a new key for sending now. With `both`, asks the peer to do so too.
    pub fn update_key(&mut self, both: bool, out: &mut Vec<u8>) {
        self.control(HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, u8::from(both)], out);
        self.tx.cipher.update();
        self.tx.is_update_due = false;
        self.tx.is_asked |= both;
        self.counters.tx_key_updates += 1;
    }

    fn control(&mut self, kind: u8, content: &[u8], out: &mut Vec<u8>) {
        let (header, slices) = (header(content.len()), [content]);
        let mut source = Source::of_slices(&slices);
        self.tx.cipher.seal(header, &mut source, content.len(), kind, out);
        self.counters.sealed_records += 1;
    }

    /// Takes all of `wire`, which may be cut anywhere, and reports plaintext to `sink` in order.
    ///
    /// Bytes of `wire` that are not reported are of no use afterwards. After an error, which is
    /// repeated on further calls, what was reported before is good.
    pub fn open(
        &mut self,
        wire: &mut [u8],
        sink: &mut dyn FnMut(Plain<'_>),
    ) -> Result<(), RecordError> {
        if let Some(error) = self.rx.error {
            return Err(error);
        }
        let result = self.open_records(wire, sink);
        if let Err(error) = result {
            self.rx.error = Some(error);
            self.rx.cut = Vec::new();
        }
        result
    }

    /// Length of what the next [`open`](Session::open) can make plaintext of without the bytes behind
    /// it: the rest of a cut record, or one record. All of `wire` where that is not there in full.
    pub fn first_len(&self, wire: &[u8]) -> usize {
        let Some(head) = self.next_header(wire) else { return wire.len() };
        // A header that is wrong is for `open` to refuse.
        let Ok(len) = ciphertext_len(&head) else { return wire.len() };
        (HEADER_LEN + len).saturating_sub(self.rx.cut.len()).min(wire.len())
    }

    /// The header of the record that the cut one and `wire` begin with.
    fn next_header(&self, wire: &[u8]) -> Option<[u8; HEADER_LEN]> {
        let cut = &self.rx.cut;
        let (mut head, have) = ([0; HEADER_LEN], cut.len().min(HEADER_LEN));
        head[..have].copy_from_slice(&cut[..have]);
        head[have..].copy_from_slice(wire.get(..HEADER_LEN - have)?);
        Some(head)
    }

    /// Opens records at the front of `wire` straight into up to `len` bytes of `to` from `offset`, and
    /// goes on as long as a record is there in full, cannot hold more than there is room for, and
    /// holds application data without padding. Returns the wire bytes taken and the bytes placed,
    /// which are authentic. Everything else is left for [`open`](Session::open), which is also to be
    /// given bytes that this takes no more of.
    ///
    /// Bytes of `to` beyond those placed may have been overwritten by anything, and after an error all
    /// of them.
    pub fn open_to(
        &mut self,
        wire: &[u8],
        to: &SgList,
        offset: usize,
        len: usize,
    ) -> Result<(usize, usize), RecordError> {
        if let Some(error) = self.rx.error {
            return Err(error);
        }
        if offset.checked_add(len).is_none_or(|end| end > to.len()) {
            debug_assert!(false, "{len} bytes at {offset} of a list of {}", to.len());
            return Ok((0, 0));
        }
        let (mut taken, mut placed) = (0, 0);
        while placed < len && !self.rx.is_closed && self.rx.message.is_between() {
            match self.open_one_to(&wire[taken..], to, offset + placed, len - placed) {
                Ok(None) => break,
                Ok(Some((more_taken, more_placed))) => {
                    (taken, placed) = (taken + more_taken, placed + more_placed);
                }
                Err(error) => {
                    self.rx.error = Some(error);
                    self.rx.cut = Vec::new();
                    return Err(error);
                }
            }
        }
        Ok((taken, placed))
    }

    fn open_one_to(
        &mut self,
        wire: &[u8],
        to: &SgList,
        offset: usize,
        room: usize,
    ) -> Result<Option<(usize, usize)>, RecordError> {
        let Some(head) = self.next_header(wire) else { return Ok(None) };
        let before = self.rx.cut.len();
        let total = HEADER_LEN + ciphertext_len(&head)?;
        let plain = total - HEADER_LEN - 1 - TAG_LEN;
        let Some(rest) = wire.get(..total.saturating_sub(before)) else { return Ok(None) };
        if !(1..=room.min(RECORD_PLAIN_MAX)).contains(&plain) {
            return Ok(None);
        }
        let record = if before == 0 {
            &rest[HEADER_LEN..]
        } else {
            self.rx.cut.extend_from_slice(rest);
            &self.rx.cut[HEADER_LEN..]
        };
        let kind = self.rx.cipher.open_to(head, record, to, offset);
        let kind = kind.map_err(|_| RecordError::Forged)?;
        if kind != APPLICATION_DATA {
            // Padding, or a message: for `open`, which sees the record as it came.
            self.rx.cut.truncate(before);
            return Ok(None);
        }
        self.rx.cipher.accept(plain);
        self.rx.cut.clear();
        self.rx.idle_records = 0;
        self.counters.opened_records += 1;
        self.counters.opened_bytes += plain as u64;
        self.counters.placed_bytes += plain as u64;
        Ok(Some((rest.len(), plain)))
    }

    fn open_records(
        &mut self,
        wire: &mut [u8],
        sink: &mut dyn FnMut(Plain<'_>),
    ) -> Result<(), RecordError> {
        let mut at = self.complete_cut(wire, sink)?;
        while !self.rx.is_closed {
            let Some(head) = wire[at..].first_chunk::<HEADER_LEN>() else { break };
            let (header, len) = (*head, ciphertext_len(head)?);
            let start = at + HEADER_LEN;
            let Some(record) = wire.get_mut(start..start + len) else { break };
            if let Some(plain) = self.open_record(header, record)? {
                let bytes = &record[..plain];
                sink(Plain::InPlace(start..start + plain, bytes));
            }
            at = start + len;
        }
        if self.rx.is_closed {
            return Ok(());
        }
        debug_assert!(self.rx.cut.is_empty() || at == wire.len(), "a cut record takes all");
        self.rx.cut.extend_from_slice(&wire[at..]);
        Ok(())
    }

    /// Goes on with the record that the last piece cut. Returns how much of `wire` it took.
    fn complete_cut(
        &mut self,
        wire: &[u8],
        sink: &mut dyn FnMut(Plain<'_>),
    ) -> Result<usize, RecordError> {
        if self.rx.cut.is_empty() || self.rx.is_closed {
            return Ok(0);
        }
        let mut at = 0;
        let mut extend_to = |cut: &mut Vec<u8>, len: usize| {
            let part = (len.saturating_sub(cut.len())).min(wire.len() - at);
            cut.extend_from_slice(&wire[at..at + part]);
            at += part;
            cut.len() >= len
        };
        if !extend_to(&mut self.rx.cut, HEADER_LEN) {
            return Ok(wire.len());
        }
        let header = *self.rx.cut.first_chunk().expect("just completed");
        let len = ciphertext_len(&header)?;
        if !extend_to(&mut self.rx.cut, HEADER_LEN + len) {
            return Ok(wire.len());
        }
        let mut cut = std::mem::take(&mut self.rx.cut);
        if let Some(plain) = self.open_record(header, &mut cut[HEADER_LEN..])? {
            self.counters.copied_bytes += plain as u64;
            sink(Plain::Copied(&cut[HEADER_LEN..HEADER_LEN + plain]));
        }
        cut.clear();
        self.rx.cut = cut;
        Ok(at)
    }

    /// Opens one record. Returns the length of its application data, if it has any.
    fn open_record(
        &mut self,
        header: [u8; HEADER_LEN],
        record: &mut [u8],
    ) -> Result<Option<usize>, RecordError> {
        let len = self.rx.cipher.open_in_place(header, record).map_err(|_| RecordError::Forged)?;
        self.counters.opened_records += 1;
        // The inner type is the last byte that is not padding.
        let inner = &record[..len];
        let end = inner.iter().rposition(|b| *b != 0).ok_or(RecordError::Empty)?;
        if end > RECORD_PLAIN_MAX {
            return Err(RecordError::Overflow);
        }
        let (content, kind) = (&inner[..end], inner[end]);
        if kind != HANDSHAKE && !self.rx.message.is_between() {
            // "Handshake messages MUST NOT be interleaved with other record types."
            return Err(RecordError::Unexpected(kind));
        }
        if kind != APPLICATION_DATA || content.is_empty() {
            self.rx.idle_records += 1;
            if self.rx.idle_records > IDLE_RECORDS_MAX {
                return Err(RecordError::Idle);
            }
        }
        match kind {
            APPLICATION_DATA if content.is_empty() => Ok(None),
            APPLICATION_DATA => {
                self.rx.idle_records = 0;
                self.counters.opened_bytes += end as u64;
                Ok(Some(end))
            }
            HANDSHAKE => self.on_handshake(end, record).map(|()| None),
            ALERT => self.on_alert(content).map(|()| None),
            other => Err(RecordError::Unexpected(other)),
        }
    }

    fn on_alert(&mut self, content: &[u8]) -> Result<(), RecordError> {
        let &[_, code] = content else { return Err(RecordError::Malformed(ALERT)) };
        match AlertCode(code) {
            AlertCode::CLOSE_NOTIFY => self.rx.is_closed = true,
            AlertCode::USER_CANCELED => {}
            code => return Err(RecordError::Alert(code)),
        }
        Ok(())
    }

    /// The handshake messages in the first `len` bytes of `record`.
    fn on_handshake(&mut self, len: usize, record: &[u8]) -> Result<(), RecordError> {
        let mut rest = &record[..len];
        if rest.is_empty() {
            // "Implementations MUST NOT send zero-length fragments of Handshake types."
            return Err(RecordError::Malformed(HANDSHAKE));
        }
        while !rest.is_empty() {
            let message = &mut self.rx.message;
            if message.skip > 0 {
                let part = message.skip.min(rest.len());
                message.skip -= part;
                rest = &rest[part..];
                continue;
            }
            message.head[message.head_len] = rest[0];
            message.head_len += 1;
            rest = &rest[1..];
            let [kind, a, b, c, value] = message.head;
            let body_len = (usize::from(a) << 16) | (usize::from(b) << 8) | usize::from(c);
            match (kind, message.head_len) {
                (KEY_UPDATE, 1..4) => {}
                (NEW_SESSION_TICKET, 1..4) if self.role == Role::Client => {}
                (KEY_UPDATE, 4) if body_len == 1 => {}
                (KEY_UPDATE, 5) => {
                    // "MUST verify that all messages immediately preceding a key change align with
                    // a record boundary."
                    if value > 1 || !rest.is_empty() {
                        return Err(RecordError::Malformed(KEY_UPDATE));
                    }
                    *message = Message::default();
                    self.rx.cipher.update();
                    self.counters.rx_key_updates += 1;
                    self.tx.is_asked = false;
                    self.tx.is_update_due |= value == 1;
                }
                (NEW_SESSION_TICKET, 4) if self.role == Role::Client && body_len <= TICKET_MAX => {
                    *message = Message { skip: body_len, ..Message::default() };
                    self.counters.tickets += 1;
                }
                (KEY_UPDATE | NEW_SESSION_TICKET, 4) => return Err(RecordError::Malformed(kind)),
                _ => return Err(RecordError::Unexpected(kind)),
            }
        }
        Ok(())
    }
}

/// What no user of a session may do, and tests of the other end have to.
#[cfg(test)]
impl Session {
    /// As if this many records had been sealed.
    pub(super) fn tx_records_for_test(&mut self, records: u64) {
        self.tx.cipher.skip_to_for_test(records);
    }

    /// As if this many records had been opened.
    pub(super) fn rx_records_for_test(&mut self, records: u64) {
        self.rx.cipher.skip_to_for_test(records);
    }

    /// A record of any type.
    pub(super) fn control_for_test(&mut self, kind: u8, content: &[u8], out: &mut Vec<u8>) {
        self.control(kind, content, out);
    }
}

#[cfg(any(test, feature = "testing"))]
impl Session {
    /// Seals a record of any inner bytes, the last of which is its type or padding.
    pub fn seal_raw(&mut self, inner: &[u8], out: &mut Vec<u8>) {
        let (last, content) = inner.split_last().expect("a type");
        self.control(*last, content, out);
    }
}

fn header(plain: usize) -> [u8; HEADER_LEN] {
    let [high, low] = u16::try_from(plain + 1 + TAG_LEN).expect("a record's length").to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}

/// Judges a record by its header alone, before anything is kept of it.
fn ciphertext_len(header: &[u8; HEADER_LEN]) -> Result<usize, RecordError> {
    let [kind, _, _, high, low] = *header;
    let len = usize::from(u16::from_be_bytes([high, low]));
    match kind {
        APPLICATION_DATA if len > CIPHERTEXT_MAX => Err(RecordError::Overflow),
        APPLICATION_DATA if len <= TAG_LEN => Err(RecordError::Empty),
        APPLICATION_DATA => Ok(len),
        CHANGE_CIPHER_SPEC | ALERT | HANDSHAKE => Err(RecordError::Plaintext(kind)),
        other => Err(RecordError::Unexpected(other)),
    }
}
