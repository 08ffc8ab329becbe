//! Somebody on the way between host and target, or a hostile target, who meddles with what the target
//! sends: what of it reaches a completion (nothing), and what becomes of the I/O (it is done all the
//! same, on another path or when the path is back).

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use nvmf_initiator::RemoteConfig;

use crate::fake::{Script, Sealed, Tls};
use crate::rig::{Disk, Rig, TARGET, bytes_of, pattern};
use crate::secure::with_tls;

/// Header of a record: type, version, length.
const HEADER: usize = 5;
/// Bytes of a read whose answer is several records.
const SPAN: usize = 64 << 10;
const BLOCK: usize = 512;
/// A record that says that it is longer waits for more: until then.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(2);
/// A write goes elsewhere when the controller that it was sent to has certainly ended.
const FENCE: Duration = Duration::from_secs(20);

fn second() -> SocketAddr {
    ([10, 0, 0, 2], 4420).into()
}

/// The records that bytes consist of.
fn records(bytes: &[u8]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    let mut rest = bytes;
    while let Some(len) = rest.get(3..HEADER).map(|len| u16::from_be_bytes([len[0], len[1]])) {
        let (record, more) = rest.split_at(HEADER + usize::from(len));
        found.push(record.to_vec());
        rest = more;
    }
    assert!(rest.is_empty(), "a message is whole records");
    found
}

/// A volume with two paths, one of which somebody meddles with when told to.
struct Scene {
    rig: Rig,
    disk: Disk,
    tls: Rc<Tls>,
    is_armed: Rc<Cell<bool>>,
    meddled: Rc<Cell<u32>>,
    losses: u64,
}

impl Scene {
    fn new() -> Scene {
        let change = |mut config: RemoteConfig| {
            config.paths.push(second().into());
            RemoteConfig { command_timeout: COMMAND_TIMEOUT, ..config }
        };
        let mut setup = with_tls(change);
        // The two paths do not end each other.
        setup.script = Script { fences: false, ..Script::default() };
        let tls = Rc::clone(setup.tls.as_ref().unwrap());
        let mut rig = setup.start();
        rig.fake.listen_at(second(), &rig.cores[TARGET]);
        let disk = rig.disk(1, 8);
        let (is_armed, meddled) = Default::default();
        let mut scene = Scene { rig, disk, tls, is_armed, meddled, losses: 0 };
        scene.until_whole();
        scene.disk.write(0, 0, &pattern(1, SPAN));
        scene.rig.wait_ok(&scene.disk, 1);
        scene
    }

    fn until_whole(&mut self) {
        self.rig.until("both paths", |volume| {
            let state = volume.state();
            state.paths.len() == 2 && state.paths.iter().all(|path| path.is_live)
        });
    }

    /// `meddle` sees what the target sends of a kind, once armed, until it says that it has done its
    /// work.
    fn meddle(&mut self, of: Sealed, mut meddle: impl FnMut(&mut Vec<u8>) -> bool + 'static) {
        let (is_armed, meddled) = (Rc::clone(&self.is_armed), Rc::clone(&self.meddled));
        *self.tls.meddler.borrow_mut() = Some(Box::new(move |what, _session, bytes| {
            if what == of && is_armed.get() && meddle(bytes) {
                is_armed.set(false);
                meddled.set(meddled.get() + 1);
            }
        }));
        self.is_armed.set(true);
    }

    /// The I/O that was submitted before ends well, within a time; the path that was meddled with has
    /// been lost, and comes back.
    #[track_caller]
    fn survive(&mut self, what: &str, within: Duration) -> Box<block::Io> {
        let (begin, meddled) = (self.rig.world.now(), self.meddled.get());
        let io = self.rig.wait_ok(&self.disk, 1).remove(0);
        let took = self.rig.world.now() - begin;
        assert_eq!(self.meddled.get(), meddled + 1, "{what}: nobody has meddled");
        self.losses += 1;
        let losses = self.losses;
        self.rig.until(what, |volume| volume.state().losses == losses);
        assert!(took < within, "{what}: {took:?}");
        self.until_whole();
        assert_eq!(self.rig.state().losses, losses, "{what}: more was lost");
        io
    }

    /// The answer to a read is meddled with: the read brings what is on the disk.
    #[track_caller]
    fn read(&mut self, what: &str, len: usize, meddle: impl FnMut(&mut Vec<u8>) -> bool + 'static) {
        self.read_within(what, len, COMMAND_TIMEOUT * 2, meddle);
    }

    #[track_caller]
    fn read_within(
        &mut self,
        what: &str,
        len: usize,
        within: Duration,
        meddle: impl FnMut(&mut Vec<u8>) -> bool + 'static,
    ) {
        self.meddle(Sealed::Io, meddle);
        self.disk.read(0, 0, len);
        let io = self.survive(what, within);
        assert!(bytes_of(&io) == pattern(1, SPAN)[..len], "{what}: read other bytes");
    }
}

#[test]
fn nobody_meddles_and_everything_arrives() {
    let mut scene = Scene::new();
    let seen = Rc::new(Cell::new(0));
    let counted = Rc::clone(&seen);
    scene.meddle(Sealed::Io, move |bytes| {
        counted.set(counted.get() + records(bytes).len());
        false
    });
    scene.disk.read(0, 0, SPAN);
    let done = scene.rig.wait_ok(&scene.disk, 1);
    assert!(bytes_of(&done[0]) == pattern(1, SPAN));
    assert!(seen.get() >= 5, "the meddler is on the way");
    assert_eq!(scene.rig.state().losses, 0);
}

#[test]
fn every_byte_of_an_answer_counts() {
    let mut scene = Scene::new();
    // Header, PDU, data, type and tag; the first attempt says how long that is.
    let len = Rc::new(Cell::new(HEADER));
    let mut at = 0;
    while at < len.get() {
        // All bits of the header, one of each other byte.
        let bits = if at < HEADER { 0..8 } else { at as u32 % 8..at as u32 % 8 + 1 };
        for bit in bits {
            let told = Rc::clone(&len);
            // Only a record that says that it is longer waits for more.
            let within = if at < HEADER { COMMAND_TIMEOUT * 2 } else { COMMAND_TIMEOUT / 2 };
            scene.read_within(&format!("byte {at}, bit {bit}"), BLOCK, within, move |sent| {
                told.set(sent.len());
                sent[at] ^= 1 << bit;
                true
            });
        }
        at += 1;
    }
    assert!(len.get() > HEADER + 24 + BLOCK + 16, "an answer with its data was seen");
}

/// What is done to records on their way.
type Change = Box<dyn FnMut(&mut Vec<Vec<u8>>)>;

/// Replaces the records of an answer with its data: that of the header and four of the payload, which
/// are held back until all are there.
fn with_records(mut change: Change) -> impl FnMut(&mut Vec<u8>) -> bool {
    // A header of 24 bytes, the type and the tag.
    const OF_HEADER: usize = HEADER + 24 + 1 + 16;
    const RECORDS: usize = 5;

    let mut held = Vec::new();
    move |bytes| {
        held.extend(records(bytes));
        if held[0].len() != OF_HEADER {
            held.clear();
            return false;
        }
        bytes.clear();
        if held.len() < RECORDS {
            return false;
        }
        assert_eq!(held.len(), RECORDS, "the payload has records of its own");
        change(&mut held);
        *bytes = held.concat();
        true
    }
}

/// A record outside the encryption.
fn plain(kind: u8, content: &[u8]) -> Vec<u8> {
    let mut record = vec![kind, 3, 3];
    record.extend((content.len() as u16).to_be_bytes());
    record.extend(content);
    record
}

#[test]
fn records_are_neither_lost_nor_repeated_nor_moved_nor_cut_nor_added() {
    let mut scene = Scene::new();
    let mut attempt = |what: &str, change: Change| {
        scene.read(what, SPAN, with_records(change));
    };
    for n in 0..4 {
        attempt(&format!("record {n} lost"), Box::new(move |r| drop(r.remove(n))));
        attempt(&format!("record {n} twice"), Box::new(move |r| r.insert(n, r[n].clone())));
        attempt(&format!("record {n} after its successor"), Box::new(move |r| r.swap(n, n + 1)));
        attempt(
            &format!("record {n} and nothing more"),
            Box::new(move |r| {
                let half = r[n].len() / 2;
                r[n].truncate(half);
                r.truncate(n + 1);
            }),
        );
        attempt(
            &format!("record {n} cut"),
            Box::new(move |r| {
                let half = r[n].len() / 2;
                r[n].truncate(half);
            }),
        );
        attempt(
            &format!("record {n} shorter, and says so"),
            Box::new(move |r| {
                let len = r[n].len() - 1;
                r[n].truncate(len);
                r[n][3..HEADER].copy_from_slice(&((len - HEADER) as u16).to_be_bytes());
            }),
        );
        attempt(
            &format!("record {n} longer, and says so"),
            Box::new(move |r| {
                r[n].push(0);
                let len = (r[n].len() - HEADER) as u16;
                r[n][3..HEADER].copy_from_slice(&len.to_be_bytes());
            }),
        );
        // 2^14 + 256 is the most (RFC 8446, section 5.2).
        for len in [(1u16 << 14) + 257, u16::MAX] {
            attempt(
                &format!("record {n} says {len}"),
                Box::new(move |r| r[n][3..HEADER].copy_from_slice(&len.to_be_bytes())),
            );
        }
        for kind in [0, 20, 21, 22, 24, 0x80, 255] {
            attempt(&format!("record {n} of type {kind}"), Box::new(move |r| r[n][0] = kind));
        }
        // Whole records in the clear: a close, a fatal alert, a change of the cipher, a key update,
        // a ticket and data; then an encrypted one that is too short to be one, and an empty one.
        for (kind, content) in [
            (21, vec![1, 0]),
            (21, vec![2, 40]),
            (20, vec![1]),
            (22, vec![24, 0, 0, 1, 0]),
            (22, vec![4, 0, 0, 1, 0]),
            (23, pattern(8, 200)),
            (23, vec![0; 16]),
            (23, vec![]),
        ] {
            attempt(
                &format!("before record {n} one of type {kind}, {} bytes", content.len()),
                Box::new(move |r| r.insert(n, plain(kind, &content))),
            );
        }
    }
}

/// PDUs in the clear, as if there were no TLS: data and success for the command that is out.
#[test]
fn answers_in_the_clear_complete_nothing() {
    let mut scene = Scene::new();
    for is_behind in [false, true] {
        for cid in 0..4u16 {
            let what = format!("cid {cid}, behind {is_behind}");
            scene.read(
                &what,
                SPAN,
                with_records(Box::new(move |r| {
                    // C2HData with LAST and SUCCESS: type, flags, HLEN, PDO, PLEN; CID, offset and length.
                    let mut pdu = vec![7, 0x0c, 24, 24];
                    pdu.extend((24 + SPAN as u32).to_le_bytes());
                    pdu.extend(cid.to_le_bytes());
                    pdu.extend([0; 2]);
                    pdu.extend(0u32.to_le_bytes());
                    pdu.extend((SPAN as u32).to_le_bytes());
                    pdu.extend([0; 4]);
                    pdu.extend(vec![0x5a; SPAN]);
                    if is_behind {
                        r.truncate(1);
                    } else {
                        r.clear();
                    }
                    r.push(pdu);
                })),
            );
        }
    }
}

/// The answer to a write does not arrive as it was sent: the write is done all the same, when the
/// controller that had it has ended.
#[test]
fn a_write_whose_answer_is_meddled_with_is_done() {
    let mut scene = Scene::new();
    for (n, at) in (0..).zip((0..HEADER + 41).step_by(5)) {
        scene.meddle(Sealed::Io, move |sent| {
            // An answer and nothing else: PDU, type and tag.
            let is_answer = sent.len() == HEADER + 24 + 1 + 16;
            if is_answer {
                sent[at] ^= 0x10;
            }
            is_answer
        });
        let bytes = pattern(100 + n, 4096);
        scene.disk.write(0, SPAN as u64, &bytes);
        scene.survive(&format!("byte {at}"), FENCE);
        assert!(scene.rig.fake.disk.borrow()[SPAN..][..4096] == bytes, "byte {at}");
    }
}

/// What the target says in a handshake is changed: that connection comes to nothing, and the next is
/// a good one.
#[test]
fn every_byte_of_a_handshake_counts() {
    let setup = with_tls(|config| config);
    let tls = Rc::clone(setup.tls.as_ref().unwrap());
    let len = Rc::new(Cell::new(0));
    let told = Rc::clone(&len);
    *tls.meddler.borrow_mut() = Some(Box::new(move |what, _session, bytes| {
        if what == Sealed::Handshake {
            told.set(bytes.len());
        }
    }));
    let mut rig = setup.start();
    let disk = rig.disk(1, 8);
    disk.write(0, 0, &pattern(1, 4096));
    rig.wait_ok(&disk, 1);
    let len = len.get();
    assert!(len > 200, "the target's flight was seen");
    // Every byte near the ends, some of the key share between.
    for at in (0..len).filter(|at| *at < 150 || at % 31 == 0 || at + 150 > len) {
        let meddled = Rc::new(Cell::new(false));
        let done = Rc::clone(&meddled);
        *tls.meddler.borrow_mut() = Some(Box::new(move |what, _session, bytes| {
            if what == Sealed::Handshake && !done.get() {
                done.set(true);
                // "MUST be ignored for all purposes": the version of a record (RFC 8446, 5.1).
                let mut start = 0;
                for record in records(bytes) {
                    if (start + 1..start + 3).contains(&at) {
                        bytes[start] ^= 1;
                        return;
                    }
                    start += record.len();
                }
                bytes[at] ^= 1 << (at % 8);
            }
        }));
        let associations = rig.fake.seen.get().associations;
        rig.fake.part(&rig.cores[TARGET]);
        rig.until("the loss", |volume| volume.state().paths.iter().all(|path| !path.is_live));
        rig.until_live();
        disk.read(1, 0, 4096);
        let read = rig.wait_ok(&disk, 1);
        assert!(bytes_of(&read[0]) == pattern(1, 4096), "byte {at}");
        assert!(meddled.get(), "byte {at}: nobody has meddled");
        assert_eq!(rig.fake.seen.get().associations, associations + 1, "byte {at}");
    }
    rig.finish();
}
