//! Somebody on the way between host and target: what of it reaches a volume (nothing), and who else
//! suffers (nobody).
//!
//! Host 1 is the one who is meddled with, host 2 looks on: before and after each attempt it writes,
//! and reads what is there. A connection that was meddled with has to end; what was sent on it at
//! or behind the place must neither land nor be answered.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use crypto::tls::Client;
use nvmf_target::Tls;
use reactor::net::{HEAD_BYTES_MAX, Rx, Stream, StreamConfig};
use reactor::{Progress, Task};

use crate::host::{Data, Meddler, Sent};
use crate::rig::{BLOCK, Host, Rig, hostnqn, pattern, rw, write};
use crate::tls::{entry, key, rig, tls_keys, usual};

/// Header of a record: type, version, length.
const HEADER: usize = 5;
/// Where the meddled writes go, and how long the longest is.
const AT: u64 = 100;
const SPAN: usize = 128 * BLOCK;
/// Where the writes behind them go.
const BEHIND: u64 = 1000;
const BEHIND_SPAN: usize = 4 * 8192;
/// Where host 2 writes.
const ELSEWHERE: u64 = 5000;
/// Connections of host 2: its admin queue and its I/O queue.
const OF_HOST_2: usize = 2;

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

/// A target with both hosts' keys, and host 2.
struct Scene {
    rig: Rig,
    witness: Host,
    /// What the ranges have that nobody may change, and what host 2 wrote last.
    before: Vec<u8>,
    behind: Vec<u8>,
    round: u64,
    /// Whether the meddler meddles yet, and how often it did.
    is_armed: Rc<Cell<bool>>,
    meddled: Rc<Cell<u32>>,
}

impl Scene {
    fn new() -> Scene {
        let (mut rig, keys) = rig(Tls::Required);
        keys.set(&hostnqn(2), tls_keys(vec![entry(key(2, 48))]));
        rig.psk = Some(usual(&key(2, 48), 2));
        let witness = rig.host(2, 1);
        rig.psk = Some(usual(&key(1, 32), 1));
        let (before, behind) = (pattern(1, SPAN), pattern(2, BEHIND_SPAN));
        rig.write(&witness.io[0], AT, &before);
        rig.write(&witness.io[0], BEHIND, &behind);
        let (is_armed, meddled) = Default::default();
        Scene { rig, witness, before, behind, round: 0, is_armed, meddled }
    }

    /// From now on `meddle` sees what host 1 sends of a kind, once armed, until it says that it has
    /// done its work.
    fn meddle(&mut self, of: Sent, mut meddle: impl FnMut(&mut Vec<u8>) -> bool + 'static) {
        let (is_armed, meddled) = (Rc::clone(&self.is_armed), Rc::clone(&self.meddled));
        let meddler: Meddler = Rc::new(RefCell::new(move |sent: Sent, bytes: &mut Vec<u8>| {
            if sent == of && is_armed.get() && meddle(bytes) {
                is_armed.set(false);
                meddled.set(meddled.get() + 1);
            }
        }));
        self.rig.meddler = Some(meddler);
    }

    /// Host 2 does I/O, and nothing has changed that it did not change.
    #[track_caller]
    fn look(&mut self) {
        self.round += 1;
        let queue = &self.witness.io[0];
        let bytes = pattern(self.round, BLOCK);
        self.rig.write(queue, ELSEWHERE + self.round % 64, &bytes);
        assert!(self.rig.read(queue, ELSEWHERE + self.round % 64, BLOCK) == bytes);
        assert!(self.rig.read(queue, AT, SPAN) == self.before, "a meddled write has landed");
        assert!(
            self.rig.read(queue, BEHIND, BEHIND_SPAN) == self.behind,
            "what follows has landed"
        );
    }

    /// A write of host 1 is meddled with, and others follow it: the connection ends, nothing lands
    /// and nothing is answered.
    #[track_caller]
    fn attempt(
        &mut self,
        what: &str,
        data: Data,
        len: usize,
        meddle: impl FnMut(&mut Vec<u8>) -> bool + 'static,
    ) {
        self.meddle(Sent::Records, meddle);
        let host = self.rig.host(1, 1);
        let meddled = self.meddled.get();
        self.is_armed.set(true);
        let sqe = rw(nvme::spec::NvmOpcode::WRITE, AT, len);
        let mut sent = vec![host.io[0].send(sqe_for(sqe, &data), data)];
        let is_meddled = {
            let (now, meddled) = (Rc::clone(&self.meddled), meddled);
            move || now.get() > meddled
        };
        self.rig.until(what, || is_meddled() || host.io[0].is_over());
        assert_eq!(self.meddled.get(), meddled + 1, "{what}: nobody has meddled");
        // A record that says that it is longer takes these in.
        for n in 0..4 {
            let (at, bytes) = (BEHIND + n * 16, pattern(n + 50, 8192));
            let (sqe, _) = write(at, &bytes);
            let data = Data::Capsule(bytes);
            sent.push(host.io[0].send(sqe_for(sqe, &data), data));
        }
        self.rig.until(what, || host.io[0].is_over());
        for id in sent {
            assert!(host.io[0].take(id).is_none(), "{what}: a command was answered");
        }
        // A host gives up its controller when a queue is lost.
        host.admin.cut();
        self.rig.until("the end of the association", || host.admin.is_over());
        self.look();
        let target = self.rig.target.clone();
        self.rig.until("host 1 is gone", || target.connected() == (OF_HOST_2, 1));
    }
}

/// The command with the data pointer that goes with its data.
fn sqe_for(mut sqe: nvme::spec::Sqe, data: &Data) -> nvme::spec::Sqe {
    if let Data::Capsule(bytes) = data {
        sqe.dptr = nvme::spec::SglDescriptor::in_capsule(0, bytes.len() as u32);
    }
    sqe
}

#[test]
fn nobody_meddles_and_everything_lands() {
    let mut scene = Scene::new();
    let seen = Rc::new(Cell::new(0));
    let counted = Rc::clone(&seen);
    scene.meddle(Sent::Records, move |bytes| {
        counted.set(counted.get() + records(bytes).len());
        false
    });
    scene.is_armed.set(true);
    let host = scene.rig.host(1, 1);
    let new = pattern(9, SPAN);
    scene.rig.write(&host.io[0], AT, &new);
    assert!(scene.rig.read(&scene.witness.io[0], AT, SPAN) == new);
    let capsule = pattern(10, BLOCK);
    let data = Data::Capsule(capsule.clone());
    let sqe = sqe_for(rw(nvme::spec::NvmOpcode::WRITE, AT, BLOCK), &data);
    assert!(scene.rig.command(&host.io[0], sqe, data).cqe.status().is_success());
    assert!(scene.rig.read(&scene.witness.io[0], AT, BLOCK) == capsule);
    assert!(seen.get() > 5, "the meddler is on the way");
}

#[test]
fn every_byte_of_a_record_counts() {
    let mut scene = Scene::new();
    let bytes = pattern(3, BLOCK);
    // Header, command, data, type and tag; the first attempt says how long that is.
    let len = Rc::new(Cell::new(HEADER));
    let mut at = 0;
    while at < len.get() {
        // All bits of the header, one of each other byte.
        let bits = if at < HEADER { 0..8 } else { at as u32 % 8..at as u32 % 8 + 1 };
        for bit in bits {
            let told = Rc::clone(&len);
            let data = Data::Capsule(bytes.clone());
            scene.attempt(&format!("byte {at}, bit {bit}"), data, BLOCK, move |sent| {
                told.set(sent.len());
                sent[at] ^= 1 << bit;
                true
            });
        }
        at += 1;
    }
    assert!(len.get() > HEADER + 8 + 64 + BLOCK + 16, "a write with its data was seen");
}

/// What is done to records on their way.
type Change = Box<dyn FnMut(&mut Vec<Vec<u8>>)>;

/// Replaces the records of the data that follows an R2T: that of its header and four of its payload,
/// which are held back until all are there.
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

#[test]
fn records_are_neither_lost_nor_repeated_nor_moved_nor_cut_nor_added() {
    let mut scene = Scene::new();
    let mut attempt = |what: &str, change: Change| {
        let data = Data::Fetched(pattern(4, SPAN));
        scene.attempt(what, data, SPAN, with_records(change));
    };
    for n in 0..4 {
        attempt(&format!("record {n} lost"), Box::new(move |r| drop(r.remove(n))));
        attempt(&format!("record {n} twice"), Box::new(move |r| r.insert(n, r[n].clone())));
        attempt(&format!("record {n} again at the end"), Box::new(move |r| r.push(r[n].clone())));
        attempt(&format!("record {n} after its successor"), Box::new(move |r| r.swap(n, n + 1)));
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
        // Whole records in the clear: a close, a fatal alert, a change of the cipher, a key update
        // and data; then an encrypted one that is too short to be one, and an empty one.
        for (kind, content) in [
            (21, vec![1, 0]),
            (21, vec![2, 40]),
            (20, vec![1]),
            (22, vec![24, 0, 0, 1, 0]),
            (23, pattern(8, 200)),
            (23, vec![0; 16]),
            (23, vec![]),
        ] {
            attempt(
                &format!("before record {n} one of type {kind}, {} bytes", content.len()),
                Box::new(move |r| {
                    let mut record = vec![kind, 3, 3];
                    record.extend((content.len() as u16).to_be_bytes());
                    record.extend(&content);
                    r.insert(n, record);
                }),
            );
        }
        // A write command in the clear, as if there were no TLS.
        attempt(
            &format!("before record {n} a capsule in the clear"),
            Box::new(move |r| {
                // Type, flags, HLEN, PDO, PLEN: the data follows the command.
                let mut capsule = vec![4, 0, 72, 72];
                capsule.extend((72 + BLOCK as u32).to_le_bytes());
                capsule.extend(rw(nvme::spec::NvmOpcode::WRITE, AT, BLOCK).to_bytes());
                capsule.extend([0x5a; BLOCK]);
                r.insert(n, capsule);
            }),
        );
    }
}

/// A whole command that was heard before: NVMe/TCP would take it for a new one.
#[test]
fn a_write_that_was_heard_does_not_land_again() {
    let mut scene = Scene::new();
    let heard = Rc::new(RefCell::new(Vec::<u8>::new()));
    let again = Rc::new(RefCell::new(Vec::<u8>::new()));
    let (hears, says) = (Rc::clone(&heard), Rc::clone(&again));
    scene.meddle(Sent::Records, move |bytes| {
        hears.borrow_mut().extend_from_slice(bytes);
        let mut before = std::mem::take(&mut *says.borrow_mut());
        let is_again = !before.is_empty();
        before.append(bytes);
        *bytes = before;
        is_again
    });
    scene.is_armed.set(true);
    let host = scene.rig.host(1, 1);
    let command = |bytes: &[u8]| {
        let data = Data::Capsule(bytes.to_vec());
        (sqe_for(rw(nvme::spec::NvmOpcode::WRITE, AT, BLOCK), &data), data)
    };
    heard.borrow_mut().clear();
    let (old, new) = (pattern(60, BLOCK), pattern(61, BLOCK));
    let (sqe, data) = command(&old);
    assert!(scene.rig.command(&host.io[0], sqe, data).cqe.status().is_success());
    let write = heard.borrow().clone();
    assert!(write.len() > BLOCK, "the write was heard");
    // The next write comes to rest, too; then the first is said again, before another command.
    let (sqe, data) = command(&new);
    assert!(scene.rig.command(&host.io[0], sqe, data).cqe.status().is_success());
    *again.borrow_mut() = write;
    let id = host.io[0].send(rw(nvme::spec::NvmOpcode::READ, AT, BLOCK), Data::Reply(BLOCK));
    scene.rig.until("the end of the queue", || host.io[0].is_over() || host.io[0].is_done(id));
    assert_eq!(scene.meddled.get(), 1, "nothing was said again");
    assert!(host.io[0].take(id).is_none(), "a command behind it was answered");
    assert!(scene.rig.read(&scene.witness.io[0], AT, BLOCK) == new, "the old write has landed");
}

#[test]
fn every_byte_of_a_handshake_counts() {
    let mut scene = Scene::new();
    let flights = Rc::new(RefCell::new(Vec::<Vec<u8>>::new()));
    let seen = Rc::clone(&flights);
    scene.meddle(Sent::Handshake, move |bytes| {
        seen.borrow_mut().push(bytes.clone());
        false
    });
    scene.is_armed.set(true);
    let queue = scene.rig.connection();
    scene.rig.run_for(Duration::from_secs(1));
    assert!(queue.refused().is_none() && !queue.is_over());
    queue.cut();
    scene.rig.until("the end", || queue.is_over());
    let flights = flights.borrow().clone();
    assert_eq!(flights.len(), 2, "a first flight, and the end of the handshake");
    for (n, flight) in flights.iter().enumerate() {
        let mut start = 0;
        for record in records(flight) {
            for at in 0..record.len() {
                // "MUST be ignored for all purposes" (RFC 8446, section 5.1).
                let is_version = (1..3).contains(&at);
                if is_version {
                    continue;
                }
                let (at, mut left) = (start + at, n);
                scene.meddle(Sent::Handshake, move |bytes| {
                    if left > 0 {
                        left -= 1;
                        return false;
                    }
                    bytes[at] ^= 1 << (at % 8);
                    true
                });
                scene.is_armed.set(true);
                let before = scene.meddled.get();
                let queue = scene.rig.connection();
                scene.rig.until("the end of the connection", || queue.is_over());
                assert_eq!(scene.meddled.get(), before + 1, "byte {at} of flight {n}: untouched");
                if at % 16 == 0 {
                    scene.look();
                }
            }
            start += record.len();
        }
    }
    scene.rig.meddler = None;
    let target = scene.rig.target.clone();
    scene.rig.until("all are gone", || target.connected() == (OF_HOST_2, 1));
    scene.rig.host(1, 1);
}

/// A host that has its say until so many bytes are out, and then says nothing more.
struct Cut {
    stream: Stream,
    client: Client,
    left: usize,
    told: Rc<Cell<usize>>,
    is_over: Rc<Cell<bool>>,
}

impl Task for Cut {
    fn poll(&mut self, _now: Duration) -> Progress {
        let mut worked = self.stream.poll();
        loop {
            let flight = self.client.take();
            let part = &flight[..flight.len().min(self.left)];
            self.left -= part.len();
            self.told.set(self.told.get() + part.len());
            for piece in part.chunks(HEAD_BYTES_MAX) {
                self.stream.push(piece, None, None, None).expect("room");
            }
            self.stream.flush();
            match self.stream.recv() {
                // What it makes of it does not matter.
                Rx::Data(chunk) => drop(self.client.feed(&chunk)),
                Rx::Empty => return if worked { Progress::Worked } else { Progress::Idle },
                Rx::Eof | Rx::Failed(_) => {
                    self.is_over.set(true);
                    self.stream.shutdown();
                    return Progress::Done;
                }
            }
            worked = true;
        }
    }
}

#[test]
fn a_handshake_that_is_cut_at_any_byte_ends_in_time() {
    // One address may have 512 under way.
    const AT_ONCE: usize = 450;

    let mut scene = Scene::new();
    let open = |scene: &mut Scene, left: usize| {
        let socket = scene.rig.socket();
        let core = scene.rig.host_core();
        let (told, is_over) = (Rc::default(), Rc::new(Cell::new(false)));
        let cut = Cut {
            stream: Stream::new(&core.local(), socket, StreamConfig::default()).expect("a stream"),
            client: Client::new(&usual(&key(1, 32), 1)).expect("a sound key"),
            left,
            told: Rc::clone(&told),
            is_over: Rc::clone(&is_over),
        };
        core.spawn(Box::new(cut));
        (told, is_over)
    };
    let (told, is_over) = open(&mut scene, usize::MAX);
    // The last one has a whole handshake, and nothing behind it.
    scene.rig.until("the end of the first", || is_over.get());
    let len = told.get();
    assert!(len > 500, "two flights: {len}");
    for first in (0..=len).step_by(AT_ONCE) {
        let cuts: Vec<_> = (first..(first + AT_ONCE).min(len + 1))
            .map(|left| (left, open(&mut scene, left)))
            .collect();
        for _ in 0..20 {
            scene.look();
        }
        let all = || cuts.iter().all(|(left, (told, _))| told.get() == *left);
        scene.rig.until("all have had their say", all);
        scene.look();
        assert!(cuts.iter().all(|(_, (_, is_over))| !is_over.get()), "there is time for it");
        scene.rig.until("the time for a handshake", || {
            cuts.iter().all(|(_, (_, is_over))| is_over.get())
        });
        scene.look();
    }
    let target = scene.rig.target.clone();
    scene.rig.until("all are gone", || target.connected() == (OF_HOST_2, 1));
    assert_eq!(scene.rig.target.status().limits.handshakes, 0);
    scene.rig.host(1, 1);
}
