//! The fault matrix: what a host may get wrong in its PDUs, in every state of a connection, and
//! what a controller has to say to it (NVMe/TCP 1.0, section 3.5, and the tables of each PDU; NVMe
//! Base 2.0, "SGL" and "Status Code").
//!
//! Offsets of the header fields are numbers here, as in the figures of the specification.

use crate::wire::{self, Digests, Pdu};

/// State of a connection, as its controller sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Nothing received.
    Fresh,
    /// ICReq answered, no Connect yet.
    Initialized,
    /// An admin queue.
    Admin,
    /// An I/O queue without commands.
    Io,
    /// An I/O queue with one write outstanding, whose [`ASKED`] bytes an R2T has asked for.
    Asked,
}

/// All of them, in the order of [`Row::verdicts`].
pub const STATES: [State; 5] =
    [State::Fresh, State::Initialized, State::Admin, State::Io, State::Asked];

/// Bytes asked for in [`State::Asked`].
pub const ASKED: u32 = 8192;
/// MAXH2CDATA of the controller under test.
pub const MAX_H2C_DATA: u32 = 4096;
/// In-capsule bytes of its I/O queues.
pub const IO_IN_CAPSULE: u32 = 16384;
/// Bytes that one H2CData PDU of the rows has.
const PIECE: usize = 4096;

/// What has to come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// C2HTermReq with this FES, and the FEI.
    Ends(u16, Fei),
    /// The connection ends without a word.
    Silent,
    /// The command completes with this status (DNR in bit 14), and the connection goes on.
    Status(u16),
    /// ICResp.
    Answer,
    /// Nothing yet: the host has more to send.
    Waits,
}

/// Fatal Error Information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fei {
    /// Not used with this FES: 0.
    None,
    /// Offset of the field in error.
    At(u32),
    /// The header digest received.
    Digest,
}

/// Where a row's PDUs are to be sent.
#[derive(Clone, Copy, Debug)]
pub struct Ground {
    /// State of the connection.
    pub state: State,
    /// Digests in use, or to be asked for.
    pub digests: Digests,
    /// CPDA in bytes.
    pub align: usize,
    /// cid and transfer tag of the R2T outstanding, or any.
    pub tags: (u16, u16),
}

/// Digests that a row needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// None.
    Nothing,
    /// The header digest.
    HeaderDigest,
    /// The data digest.
    DataDigest,
    /// No data digest.
    NoDataDigest,
}

impl Needs {
    /// Whether `digests` are what is needed.
    #[must_use]
    pub fn met(self, digests: Digests) -> bool {
        match self {
            Needs::Nothing => true,
            Needs::HeaderDigest => digests.header,
            Needs::DataDigest => digests.data,
            Needs::NoDataDigest => !digests.data,
        }
    }
}

/// One row of the matrix.
#[derive(Debug)]
pub struct Row {
    /// What is wrong.
    pub name: &'static str,
    /// What the connection must have for it.
    pub needs: Needs,
    /// The PDUs; the last is the one in error.
    pub pdus: fn(&Ground) -> Vec<Pdu>,
    /// What has to come of it in each of [`STATES`].
    pub verdicts: [Verdict; 5],
}

/// PDU Sequence Error.
const SEQUENCE: Verdict = Verdict::Ends(2, Fei::None);
/// Header Digest Error.
const DIGEST: Verdict = Verdict::Ends(3, Fei::Digest);
/// Data Transfer Out of Range.
const RANGE: Verdict = Verdict::Ends(4, Fei::None);
/// Data Transfer Limit Exceeded.
const LIMIT: Verdict = Verdict::Ends(5, Fei::None);
/// Success.
const OK: Verdict = Verdict::Status(0);

const DNR: u16 = 0x4000;
/// Invalid Field in Command.
const FIELD: Verdict = Verdict::Status(0x02 | DNR);
/// Command Sequence Error.
const ORDER: Verdict = Verdict::Status(0x0c | DNR);
/// Data SGL Length Invalid.
const SGL_LENGTH: Verdict = Verdict::Status(0x0f | DNR);
/// SGL Descriptor Type Invalid.
const SGL_TYPE: Verdict = Verdict::Status(0x11 | DNR);
/// SGL Offset Invalid.
const SGL_OFFSET: Verdict = Verdict::Status(0x16 | DNR);
/// Transient Transport Error: a data digest concerns one command, which may be retried.
const DAMAGED: Verdict = Verdict::Status(0x22);

/// Invalid PDU Header Field.
const fn at(offset: u32) -> Verdict {
    Verdict::Ends(1, Fei::At(offset))
}

/// ICReq: once, and first.
const fn ic(fresh: Verdict) -> [Verdict; 5] {
    [fresh, SEQUENCE, SEQUENCE, SEQUENCE, SEQUENCE]
}

/// A capsule: the same wherever capsules may come.
const fn capsule(always: Verdict) -> [Verdict; 5] {
    [SEQUENCE, always, always, always, always]
}

/// H2CData: without an R2T, and with one.
const fn data(idle: Verdict, asked: Verdict) -> [Verdict; 5] {
    [SEQUENCE, idle, idle, idle, asked]
}

/// A command without data that is sound in this state, or refused politely.
fn command(ground: &Ground) -> Pdu {
    let mut sqe = match ground.state {
        State::Fresh | State::Initialized | State::Admin => {
            // Property Get of VS.
            let mut sqe = wire::sqe(0x7f);
            (sqe[4], sqe[44]) = (4, 8);
            sqe
        }
        State::Io | State::Asked => {
            // Flush of namespace 1.
            let mut sqe = wire::sqe(0);
            sqe[4] = 1;
            sqe
        }
    };
    sqe[2] = 0x77;
    Pdu::capsule(&sqe, &[], ground.digests, ground.align)
}

/// A sound command with in-capsule data. The SGL descriptor is at 32 of the header.
fn command_with_data(ground: &Ground) -> Pdu {
    let (mut sqe, data) = match ground.state {
        State::Fresh | State::Initialized => {
            let connect = wire::Connect::new(crate::rig::SUBNQN, &host("connecting"));
            (connect.sqe(0), connect.data(0xffff))
        }
        State::Admin => {
            // Set Features, Host Behavior Support.
            let mut sqe = wire::sqe(9);
            sqe[40] = 0x16;
            (sqe, vec![0; 512])
        }
        State::Io | State::Asked => (wire::io_sqe(1, 1, 0, 8, 4096), vec![0x3c; 4096]),
    };
    wire::sgl(&mut sqe, 0x01, 0, data.len() as u32);
    sqe[2] = 0x77;
    Pdu::capsule(&sqe, &data, ground.digests, ground.align)
}

/// The first half of what the R2T asked for.
fn half(ground: &Ground) -> Pdu {
    piece(ground, 0, PIECE, false)
}

fn piece(ground: &Ground, offset: u32, len: usize, last: bool) -> Pdu {
    let data = vec![0xc3; len];
    Pdu::h2c_data(ground.tags, offset, &data, last, ground.digests, ground.align)
}

/// NQN of a host of the matrix.
#[must_use]
pub fn host(name: &str) -> String {
    format!("nqn.2014-08.org.example:{name}")
}

/// `pdu` after `edit`.
fn with(mut pdu: Pdu, edit: impl FnOnce(&mut Pdu)) -> Vec<Pdu> {
    edit(&mut pdu);
    vec![pdu]
}

/// The header alone: what a length that is a lie would announce does not follow.
fn lie(mut pdu: Pdu, edit: impl FnOnce(&mut Pdu)) -> Vec<Pdu> {
    pdu.data.clear();
    with(pdu, edit)
}

/// The SGL descriptor of a capsule with data.
fn sgl(ground: &Ground, identifier: u8, edit: impl FnOnce(u32) -> (u64, u32)) -> Vec<Pdu> {
    with(command_with_data(ground), |pdu| {
        let (address, len) = edit(pdu.data.len() as u32);
        wire::put(&mut pdu.header, 32, &address.to_le_bytes());
        wire::put(&mut pdu.header, 40, &len.to_le_bytes());
        pdu.header[47] = identifier;
    })
}

/// Bytes of in-capsule data that the queue takes.
fn in_capsule_max(ground: &Ground) -> u32 {
    match ground.state {
        State::Io | State::Asked => IO_IN_CAPSULE,
        _ => 8192,
    }
}

/// The matrix.
#[must_use]
pub fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |name, needs, pdus: fn(&Ground) -> Vec<Pdu>, verdicts| {
        rows.push(Row { name, needs, pdus, verdicts });
    };
    let any = Needs::Nothing;

    // PDU types that a host does not send, and such as nobody sends.
    let foreign = [at(0); 5];
    row("ICResp from a host", any, |g| vec![Pdu::bare(1, g.digests)], foreign);
    row("C2HTermReq from a host", any, |g| vec![Pdu::bare(3, g.digests)], foreign);
    row("response capsule from a host", any, |g| vec![Pdu::bare(5, g.digests)], foreign);
    row("C2HData from a host", any, |g| vec![Pdu::bare(7, g.digests)], foreign);
    row("R2T from a host", any, |g| vec![Pdu::bare(9, g.digests)], foreign);
    row("PDU type 08h", any, |g| vec![Pdu::bare(8, g.digests)], foreign);
    row("PDU type 0Ah", any, |g| vec![Pdu::bare(10, g.digests)], foreign);
    row("PDU type FFh", any, |g| vec![Pdu::bare(255, g.digests)], foreign);

    // ICReq.
    fn icreq(g: &Ground) -> Pdu {
        Pdu::icreq(g.digests, 0, 0)
    }
    row("ICReq", any, |g| vec![icreq(g)], ic(Verdict::Answer));
    row("ICReq, HLEN 0", any, |g| with(icreq(g), |p| p.header[2] = 0), ic(at(2)));
    row("ICReq, HLEN 127", any, |g| with(icreq(g), |p| p.header[2] = 127), ic(at(2)));
    row("ICReq, HLEN 129", any, |g| with(icreq(g), |p| p.header[2] = 129), ic(at(2)));
    row("ICReq, PLEN 0", any, |g| with(icreq(g), |p| p.set_plen(0)), ic(at(4)));
    row("ICReq, PLEN 127", any, |g| with(icreq(g), |p| p.set_plen(127)), ic(at(4)));
    row("ICReq, PLEN 129", any, |g| with(icreq(g), |p| p.set_plen(129)), ic(at(4)));
    row("ICReq, PLEN 4 GiB", any, |g| with(icreq(g), |p| p.set_plen(u32::MAX)), ic(at(4)));
    let unsupported = Verdict::Ends(6, Fei::At(8));
    row("ICReq, PFV 1", any, |g| with(icreq(g), |p| p.header[8] = 1), ic(unsupported));
    row("ICReq, PFV 100h", any, |g| with(icreq(g), |p| p.header[9] = 1), ic(unsupported));
    row("ICReq, HPDA 31", any, |g| with(icreq(g), |p| p.header[10] = 31), ic(Verdict::Answer));
    row("ICReq, HPDA 32", any, |g| with(icreq(g), |p| p.header[10] = 32), ic(at(10)));
    row("ICReq, HPDA 255", any, |g| with(icreq(g), |p| p.header[10] = 255), ic(at(10)));
    // Several fields wrong: the first is reported.
    row(
        "ICReq, PLEN and HPDA",
        any,
        |g| {
            with(icreq(g), |p| {
                p.header[10] = 32;
                p.set_plen(130);
            })
        },
        ic(at(4)),
    );
    row(
        "ICReq, reserved bits and MAXR2T",
        any,
        |g| {
            with(icreq(g), |p| {
                (p.header[1], p.header[3]) = (0xff, 7);
                p.header[11] |= 0xfc;
                p.header[12..].fill(0xff);
            })
        },
        ic(Verdict::Answer),
    );

    // Capsules without data.
    let sound = [SEQUENCE, ORDER, OK, OK, OK];
    row("capsule", any, |g| vec![command(g)], sound);
    row("capsule, HDGSTF", any, |g| with(command(g), |p| p.header[1] ^= 1), capsule(at(1)));
    row("capsule, HLEN 0", any, |g| with(command(g), |p| p.header[2] = 0), capsule(at(2)));
    row("capsule, HLEN 24", any, |g| with(command(g), |p| p.header[2] = 24), capsule(at(2)));
    row("capsule, HLEN 73", any, |g| with(command(g), |p| p.header[2] = 73), capsule(at(2)));
    row("capsule, HLEN 255", any, |g| with(command(g), |p| p.header[2] = 255), capsule(at(2)));
    row("capsule, PLEN 0", any, |g| with(command(g), |p| p.set_plen(0)), capsule(at(4)));
    row("capsule, PLEN 8", any, |g| with(command(g), |p| p.set_plen(8)), capsule(at(4)));
    row(
        "capsule, PLEN one short",
        any,
        |g| with(command(g), |p| p.set_plen(p.plen() - 1)),
        capsule(at(4)),
    );
    row(
        "capsule, PLEN with data and PDO without",
        Needs::NoDataDigest,
        |g| with(command(g), |p| p.set_plen(p.plen() + 64)),
        capsule(at(3)),
    );
    row(
        "capsule, PLEN with data and DDGSTF without",
        Needs::DataDigest,
        |g| with(command(g), |p| p.set_plen(p.plen() + 64)),
        capsule(at(1)),
    );
    row(
        "capsule, reserved flags, PDO and DDGSTF without data",
        any,
        |g| with(command(g), |p| (p.header[1], p.header[3]) = (p.header[1] | 0xfe, 9)),
        sound,
    );
    row(
        "capsule, header digest",
        Needs::HeaderDigest,
        |g| with(command(g), |p| p.spoil_header_digest = true),
        capsule(DIGEST),
    );
    // What tells where the digest is, is judged before it.
    row(
        "capsule, header digest and HLEN",
        Needs::HeaderDigest,
        |g| {
            with(command(g), |p| {
                p.spoil_header_digest = true;
                p.header[2] = 24;
            })
        },
        capsule(at(2)),
    );

    // Capsules with data.
    row("capsule with data", any, |g| vec![command_with_data(g)], capsule(OK));
    row(
        "capsule with data, DDGSTF",
        any,
        |g| lie(command_with_data(g), |p| p.header[1] ^= 2),
        capsule(at(1)),
    );
    row(
        "capsule with data, PDO 0",
        any,
        |g| lie(command_with_data(g), |p| p.header[3] = 0),
        capsule(at(3)),
    );
    row(
        "capsule with data, PDO in the header",
        any,
        |g| lie(command_with_data(g), |p| p.header[3] = 68),
        capsule(at(3)),
    );
    row(
        "capsule with data, PDO not aligned",
        any,
        |g| lie(command_with_data(g), |p| p.header[3] += 2),
        capsule(at(3)),
    );
    row(
        "capsule with data, PDO behind the start of it",
        Needs::NoDataDigest,
        // Legal in itself, but the SGL descriptor says more than is left.
        |g| with(command_with_data(g), |p| p.header[3] += 4),
        capsule(SGL_LENGTH),
    );
    row(
        "capsule with data, PLEN before PDO",
        any,
        |g| lie(command_with_data(g), |p| p.set_plen(u32::from(p.header[3]) - 1)),
        [SEQUENCE, at(4), at(4), at(4), at(4)],
    );
    row(
        "capsule with data, PLEN without it",
        any,
        |g| {
            let tail = if g.digests.data { 4 } else { 0 };
            lie(command_with_data(g), |p| {
                p.header[3] += 4;
                p.set_plen(u32::from(p.header[3]) + tail);
            })
        },
        capsule(at(4)),
    );
    row(
        "capsule with more data than the queue takes",
        any,
        |g| {
            let tail = if g.digests.data { 4 } else { 0 };
            lie(command_with_data(g), |p| {
                p.set_plen(u32::from(p.header[3]) + in_capsule_max(g) + 1 + tail);
            })
        },
        capsule(at(4)),
    );
    row(
        "capsule with data, PLEN 4 GiB",
        any,
        |g| lie(command_with_data(g), |p| p.set_plen(u32::MAX)),
        capsule(at(4)),
    );
    row(
        "capsule with data, header digest",
        Needs::HeaderDigest,
        |g| lie(command_with_data(g), |p| p.spoil_header_digest = true),
        capsule(DIGEST),
    );
    row(
        "capsule with data, data digest",
        Needs::DataDigest,
        |g| with(command_with_data(g), |p| p.spoil_data_digest = true),
        capsule(DAMAGED),
    );
    let mut sgl_row = |name, pdus, verdict| row(name, any, pdus, capsule(verdict));
    sgl_row("SGL data block by address", |g| sgl(g, 0x00, |len| (0, len)), SGL_TYPE);
    sgl_row("SGL bit bucket", |g| sgl(g, 0x10, |len| (0, len)), SGL_TYPE);
    sgl_row("SGL segment", |g| sgl(g, 0x20, |len| (0, len)), SGL_TYPE);
    sgl_row("SGL segment in the capsule", |g| sgl(g, 0x21, |_| (0, 16)), SGL_TYPE);
    sgl_row("SGL last segment", |g| sgl(g, 0x30, |len| (0, len)), SGL_TYPE);
    sgl_row("SGL last segment in the capsule", |g| sgl(g, 0x31, |_| (0, 16)), SGL_TYPE);
    sgl_row("SGL keyed data block", |g| sgl(g, 0x40, |len| (0, len)), SGL_TYPE);
    sgl_row("SGL keyed, invalidating", |g| sgl(g, 0x4f, |len| (0, len)), SGL_TYPE);
    sgl_row("SGL transport, another subtype", |g| sgl(g, 0x5b, |len| (0, len)), SGL_TYPE);
    sgl_row("SGL vendor specific", |g| sgl(g, 0xf0, |len| (0, len)), SGL_TYPE);
    sgl_row("SGL keyed, no length", |g| sgl(g, 0x40, |_| (0, 0)), SGL_TYPE);
    sgl_row("SGL offset at the end", |g| sgl(g, 0x01, |len| (len.into(), len)), SGL_OFFSET);
    sgl_row("SGL offset far away", |g| sgl(g, 0x01, |len| (u64::MAX, len)), SGL_OFFSET);
    sgl_row("SGL offset and length", |g| sgl(g, 0x01, |len| (4, len)), SGL_LENGTH);
    sgl_row("SGL longer than the capsule", |g| sgl(g, 0x01, |len| (0, len + 4)), SGL_LENGTH);
    sgl_row("SGL length 4 GiB", |g| sgl(g, 0x01, |_| (0, u32::MAX)), SGL_LENGTH);
    sgl_row("SGL shorter than the command", |g| sgl(g, 0x01, |len| (0, len - 4)), SGL_LENGTH);
    sgl_row("SGL of no length", |g| sgl(g, 0x01, |_| (0, 0)), SGL_LENGTH);
    sgl_row("SGL transport with in-capsule data", |g| sgl(g, 0x5a, |len| (0, len)), FIELD);
    let psdt = |name, pdus, verdict| Row { name, needs: any, pdus, verdicts: capsule(verdict) };
    rows.push(psdt("PSDT 00b", |g| with(command_with_data(g), |p| p.header[9] = 0), FIELD));
    rows.push(psdt("PSDT 11b", |g| with(command_with_data(g), |p| p.header[9] = 0xc0), FIELD));

    rows.extend(data_rows());
    rows.extend(term_rows());
    rows
}

/// H2CData. Fields before TTAG are judged with and without an R2T, the others need one.
fn data_rows() -> Vec<Row> {
    let mut rows = Vec::new();
    let mut row = |name, needs, pdus: fn(&Ground) -> Vec<Pdu>, verdicts| {
        rows.push(Row { name, needs, pdus, verdicts });
    };
    let any = Needs::Nothing;
    let both = |verdict| data(verdict, verdict);
    // Without an R2T there is no such transfer tag.
    let asked = |verdict| data(at(10), verdict);
    fn datal(pdu: &mut Pdu, len: u32) {
        let tail = if pdu.data_digest { 4 } else { 0 };
        pdu.set_plen(u32::from(pdu.header[3]) + len + tail);
        wire::put(&mut pdu.header, 16, &len.to_le_bytes());
    }
    fn datao(pdu: &mut Pdu, offset: u32) {
        wire::put(&mut pdu.header, 12, &offset.to_le_bytes());
    }

    row("data", any, |g| vec![half(g)], asked(Verdict::Waits));
    row(
        "data in two PDUs",
        any,
        |g| vec![half(g), piece(g, 4096, PIECE, true)],
        asked(Verdict::Status(0)),
    );
    row("data, HDGSTF", any, |g| lie(half(g), |p| p.header[1] ^= 1), both(at(1)));
    row("data, DDGSTF", any, |g| lie(half(g), |p| p.header[1] ^= 2), both(at(1)));
    row("data, HLEN 0", any, |g| lie(half(g), |p| p.header[2] = 0), both(at(2)));
    row("data, HLEN 23", any, |g| lie(half(g), |p| p.header[2] = 23), both(at(2)));
    row("data, HLEN 72", any, |g| lie(half(g), |p| p.header[2] = 72), both(at(2)));
    row("data, HLEN 255", any, |g| lie(half(g), |p| p.header[2] = 255), both(at(2)));
    row("data, PDO 0", any, |g| lie(half(g), |p| p.header[3] = 0), both(at(3)));
    row("data, PDO in the header", any, |g| lie(half(g), |p| p.header[3] = 20), both(at(3)));
    row("data, PDO not aligned", any, |g| lie(half(g), |p| p.header[3] += 1), both(at(3)));
    row("data, PDO and PLEN", any, |g| lie(half(g), |p| p.header[3] += 4), both(at(4)));
    row("data, PLEN 0", any, |g| lie(half(g), |p| p.set_plen(0)), both(at(4)));
    row("data, PLEN one more", any, |g| lie(half(g), |p| p.set_plen(p.plen() + 1)), both(at(4)));
    row("data, PLEN one less", any, |g| lie(half(g), |p| p.set_plen(p.plen() - 1)), both(at(4)));
    row("data, PLEN 4 GiB", any, |g| lie(half(g), |p| p.set_plen(u32::MAX)), both(at(4)));
    row("data, CCCID", any, |g| lie(half(g), |p| p.header[8] ^= 1), asked(at(8)));
    row("data, TTAG of no R2T", any, |g| lie(half(g), |p| p.header[10] ^= 1), both(at(10)));
    row("data, TTAG FFFFh", any, |g| lie(half(g), |p| p.header[10..12].fill(0xff)), both(at(10)));
    row("data, DATAL 0", any, |g| lie(half(g), |p| datal(p, 0)), asked(at(16)));
    row("data, DATAL 4094", any, |g| lie(half(g), |p| datal(p, 4094)), asked(at(16)));
    row(
        "data, DATAL and PLEN",
        any,
        |g| lie(half(g), |p| wire::put(&mut p.header, 16, &4092u32.to_le_bytes())),
        both(at(4)),
    );
    row(
        "data, more than MAXH2CDATA",
        any,
        |g| lie(half(g), |p| datal(p, MAX_H2C_DATA + 4)),
        asked(LIMIT),
    );
    row("data behind the R2T", any, |g| lie(half(g), |p| datao(p, ASKED)), asked(RANGE));
    row("data over its end", any, |g| lie(half(g), |p| datao(p, ASKED - 4092)), asked(RANGE));
    row("data around 4 GiB", any, |g| lie(half(g), |p| datao(p, u32::MAX - 3)), asked(RANGE));
    row("data with a gap", any, |g| lie(half(g), |p| datao(p, 4)), asked(SEQUENCE));
    row("data twice", any, |g| vec![half(g), half(g).clone()], data(at(10), SEQUENCE));
    row("LAST_PDU too early", any, |g| lie(half(g), |p| p.header[1] |= 4), asked(SEQUENCE));
    row(
        "no LAST_PDU at the end",
        any,
        |g| vec![half(g), piece(g, 4096, PIECE, false)],
        asked(SEQUENCE),
    );
    row(
        "data, header digest",
        Needs::HeaderDigest,
        |g| lie(half(g), |p| p.spoil_header_digest = true),
        both(DIGEST),
    );
    row(
        "data, data digest of the last PDU",
        Needs::DataDigest,
        |g| {
            let last = with(piece(g, 4096, PIECE, true), |p| p.spoil_data_digest = true);
            [vec![half(g)], last].concat()
        },
        asked(DAMAGED),
    );
    row(
        "data, data digest of the first PDU",
        Needs::DataDigest,
        |g| {
            let first = with(half(g), |p| p.spoil_data_digest = true);
            [first, vec![piece(g, 4096, PIECE, true)]].concat()
        },
        asked(DAMAGED),
    );
    rows
}

/// H2CTermReq: right or wrong, it is the end, and nothing is owed to it.
fn term_rows() -> Vec<Row> {
    let row = |name, pdus: fn(&Ground) -> Vec<Pdu>| Row {
        name,
        needs: Needs::Nothing,
        pdus,
        verdicts: [Verdict::Silent; 5],
    };
    fn term(_: &Ground) -> Pdu {
        Pdu::term_req(2, 0, &[4, 0, 72, 0, 72, 0, 0, 0])
    }
    vec![
        row("H2CTermReq", |g| vec![term(g)]),
        row("H2CTermReq, longest", |_| vec![Pdu::term_req(1, 2, &[9; 128])]),
        row("H2CTermReq, too long", |_| vec![Pdu::term_req(1, 2, &[9; 129])]),
        row("H2CTermReq, PLEN 0", |g| lie(term(g), |p| p.set_plen(0))),
        row("H2CTermReq, PLEN 4 GiB", |g| lie(term(g), |p| p.set_plen(u32::MAX))),
        row("H2CTermReq, HLEN 25", |g| with(term(g), |p| p.header[2] = 25)),
        row("H2CTermReq, FES 0", |_| vec![Pdu::term_req(0, 0, &[])]),
        row("H2CTermReq, FES FFFFh", |_| vec![Pdu::term_req(0xffff, u32::MAX, &[])]),
        row("H2CTermReq, flags", |g| with(term(g), |p| p.header[1] = 0xff)),
    ]
}
