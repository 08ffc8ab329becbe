//! The discovery log page of both sides: a target renders one, a host parses one.
//!
//! ```text
//! 0     GENCTR  NUMREC  RECFMT=0 ..          header, 1024 bytes
//! 1024  record 0, 1024 bytes
//! 2048  record 1 ..
//! ```
//!
//! A host may ask for extended entries: each is the record above, its total length and number of
//! attributes (8 bytes), and the attributes.

use std::borrow::Cow;
use std::net::SocketAddr;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::spec::discovery::{
    ASQSZ_MIN, AddressFamily, DiscoveryHeader, DiscoveryRecord, EFLAGS_DUPRETINFO, EFLAGS_EPCSD,
    EFLAGS_NCC, ExtendedAttribute, ExtendedTail, LSP_EXTENDED, LSP_PORT_LOCAL, SECTYPE_TLS13,
    SubsystemType, TREQ_SECURE_MASK, TREQ_SECURE_NOT_REQUIRED, TREQ_SECURE_REQUIRED,
    TREQ_SQ_FLOW_DISABLE, TransportType,
};
use crate::spec::fabrics::CNTLID_DYNAMIC;
use crate::spec::{InvalidNqn, Nqn};

/// Length of the header, and offset of the first record, in bytes.
pub const HEADER_LEN: usize = 1024;
/// Length of a record in bytes.
pub const RECORD_LEN: usize = 1024;

/// One entry of the log, parsed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiscoveryEntry {
    /// Transport.
    pub trtype: TransportType,
    /// Address family.
    pub adrfam: AddressFamily,
    /// Kind of subsystem.
    pub subtype: SubsystemType,
    /// Transport requirements (raw TREQ).
    pub treq: u8,
    /// Port ID: one per listening address, stable over restarts.
    pub portid: u16,
    /// Controller ID; FFFFh for dynamic controllers.
    pub cntlid: u16,
    /// Admin Max SQ Size.
    pub asqsz: u16,
    /// Entry flags.
    pub eflags: u16,
    /// Service: the TCP port in decimal.
    pub trsvcid: String,
    /// Subsystem.
    pub subnqn: Nqn,
    /// Address.
    pub traddr: String,
    /// First byte of TSAS: for TCP the SECTYPE (0 none, 2 TLS 1.3).
    pub sectype: u8,
}

/// A record of a peer that makes no sense.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidEntry {
    /// SUBNQN.
    #[error("subsystem NQN: {0}")]
    Subnqn(#[from] InvalidNqn),
    /// TRADDR or TRSVCID.
    #[error("{0} is not printable ASCII")]
    Text(&'static str),
}

impl DiscoveryEntry {
    /// An entry for a TCP listener with dynamic controllers and no TLS.
    #[must_use]
    pub fn tcp(subtype: SubsystemType, addr: SocketAddr, portid: u16, subnqn: Nqn) -> Self {
        DiscoveryEntry {
            trtype: TransportType::TCP,
            adrfam: if addr.is_ipv4() { AddressFamily::IPV4 } else { AddressFamily::IPV6 },
            subtype,
            treq: TREQ_SQ_FLOW_DISABLE,
            portid,
            cntlid: CNTLID_DYNAMIC,
            asqsz: ASQSZ_MIN,
            eflags: 0,
            trsvcid: addr.port().to_string(),
            subnqn,
            traddr: addr.ip().to_string(),
            sectype: 0,
        }
    }

    /// The entry of a discovery subsystem for itself, at one of its own listeners. `subnqn` is its
    /// unique NQN if it has one. `is_one_of_many`: other listeners give the same information.
    /// Persistent connections are supported; no centralized discovery controller is known.
    #[must_use]
    pub fn own(addr: SocketAddr, portid: u16, subnqn: Nqn, is_one_of_many: bool) -> Self {
        let duplicate = if is_one_of_many { EFLAGS_DUPRETINFO } else { 0 };
        DiscoveryEntry {
            eflags: EFLAGS_EPCSD | EFLAGS_NCC | duplicate,
            ..Self::tcp(SubsystemType::CURRENT_DISCOVERY, addr, portid, subnqn)
        }
    }

    /// A referral to another discovery subsystem. Whether persistent connections are supported
    /// there is not known here.
    #[must_use]
    pub fn referral(addr: SocketAddr, portid: u16, subnqn: Nqn) -> Self {
        Self::tcp(SubsystemType::REFERRAL, addr, portid, subnqn)
    }

    /// The same entry of a listener that speaks TLS 1.3, and nothing else if that `is_required`.
    #[must_use]
    pub fn with_tls(self, is_required: bool) -> Self {
        let treq = if is_required { TREQ_SECURE_REQUIRED } else { TREQ_SECURE_NOT_REQUIRED };
        DiscoveryEntry {
            treq: self.treq & !TREQ_SECURE_MASK | treq,
            sectype: SECTYPE_TLS13,
            ..self
        }
    }

    /// The socket address, when the entry is TCP and both parts parse.
    #[must_use]
    pub fn socket_addr(&self) -> Option<SocketAddr> {
        if self.trtype != TransportType::TCP {
            return None;
        }
        Some(SocketAddr::new(self.traddr.parse().ok()?, self.trsvcid.parse().ok()?))
    }

    /// As a wire record. Text longer than its field (an entry built by hand could have that) is cut.
    #[must_use]
    pub fn encode(&self) -> DiscoveryRecord {
        let mut record = DiscoveryRecord::new_zeroed();
        record.trtype = self.trtype;
        record.adrfam = self.adrfam;
        record.subtype = self.subtype;
        record.treq = self.treq;
        record.portid = U16::new(self.portid);
        record.cntlid = U16::new(self.cntlid);
        record.asqsz = U16::new(self.asqsz.max(ASQSZ_MIN));
        record.eflags = U16::new(self.eflags);
        put_text(&mut record.trsvcid, &self.trsvcid);
        record.subnqn = self.subnqn.to_field();
        put_text(&mut record.traddr, &self.traddr);
        record.tsas[0] = self.sectype;
        record
    }

    /// Parses a record of a peer.
    ///
    /// # Errors
    /// [`InvalidEntry`] names the field.
    pub fn parse(record: &DiscoveryRecord) -> Result<DiscoveryEntry, InvalidEntry> {
        Ok(DiscoveryEntry {
            trtype: record.trtype,
            adrfam: record.adrfam,
            subtype: record.subtype,
            treq: record.treq,
            portid: record.portid.get(),
            cntlid: record.cntlid.get(),
            asqsz: record.asqsz.get(),
            eflags: record.eflags.get(),
            trsvcid: text(&record.trsvcid, "transport service identifier")?,
            subnqn: Nqn::from_field(&record.subnqn)?,
            traddr: text(&record.traddr, "transport address")?,
            sectype: record.tsas[0],
        })
    }
}

/// ASCII fields are left justified and padded with spaces (NVMe Base 2.0, "Discovery Log Page").
/// Hosts in the field cut at a NUL as well; spaces are what all of them cope with.
fn put_text(field: &mut [u8], text: &str) {
    field.fill(b' ');
    let len = text.len().min(field.len());
    field[..len].copy_from_slice(&text.as_bytes()[..len]);
}

fn text(field: &[u8], name: &'static str) -> Result<String, InvalidEntry> {
    let len = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    let trimmed = field[..len].trim_ascii();
    if !trimmed.iter().all(u8::is_ascii_graphic) {
        return Err(InvalidEntry::Text(name));
    }
    Ok(trimmed.iter().copied().map(char::from).collect())
}

/// The log page a discovery controller serves: rendered once for hosts that ask for nothing in
/// particular, on demand for the others.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiscoveryLog {
    genctr: u64,
    entries: Vec<DiscoveryEntry>,
    /// The page of all entries in the basic format.
    bytes: Vec<u8>,
}

impl DiscoveryLog {
    /// Renders the page. `genctr` must differ from that of every earlier page that differs.
    #[must_use]
    pub fn new(genctr: u64, entries: &[DiscoveryEntry]) -> DiscoveryLog {
        let bytes = render(genctr, entries.iter(), 0);
        DiscoveryLog { genctr, entries: entries.to_vec(), bytes }
    }

    /// Generation counter.
    #[must_use]
    pub fn genctr(&self) -> u64 {
        self.genctr
    }

    /// Number of records.
    #[must_use]
    pub fn records(&self) -> usize {
        self.entries.len()
    }

    /// The entries.
    #[must_use]
    pub fn entries(&self) -> &[DiscoveryEntry] {
        &self.entries
    }

    /// The whole page in the basic format.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The page as the Log Specific Parameter asks for it: extended entries, entries of the port
    /// the host asks on (`portid`). Other bits are ignored, All NVM Subsystem Entries too: the log
    /// has what its host may know of, and the flags in the header do not say otherwise.
    ///
    /// A port is an address: hosts that want the entries of their own network only (nvme-stas does)
    /// mean the I/O listeners next to the discovery listener, too. Referrals are of every port.
    #[must_use]
    pub fn page(&self, lsp: u8, portid: Option<u16>) -> Cow<'_, [u8]> {
        let flags = lsp & (LSP_EXTENDED | LSP_PORT_LOCAL);
        if flags == 0 {
            return Cow::Borrowed(&self.bytes);
        }
        let mut own = self.entries.iter().filter(|entry| Some(entry.portid) == portid);
        let traddr = own
            .find(|entry| entry.subtype == SubsystemType::CURRENT_DISCOVERY)
            .map(|entry| &entry.traddr);
        let is_asked_for = |entry: &&DiscoveryEntry| {
            flags & LSP_PORT_LOCAL == 0
                || entry.subtype == SubsystemType::REFERRAL
                || Some(entry.portid) == portid
                || Some(&entry.traddr) == traddr
        };
        Cow::Owned(render(self.genctr, self.entries.iter().filter(is_asked_for), flags))
    }
}

/// The page of these entries; `flags` are the LSP bits honoured.
fn render<'a>(
    genctr: u64,
    entries: impl Iterator<Item = &'a DiscoveryEntry>,
    flags: u8,
) -> Vec<u8> {
    let is_extended = flags & LSP_EXTENDED != 0;
    let tail = ExtendedTail {
        tel: U32::new((RECORD_LEN + size_of::<ExtendedTail>()) as u32),
        numexat: U16::ZERO,
        reserved: U16::ZERO,
    };
    let mut bytes = vec![0; HEADER_LEN];
    let mut count = 0;
    for entry in entries {
        count += 1;
        bytes.extend_from_slice(entry.encode().as_bytes());
        if is_extended {
            bytes.extend_from_slice(tail.as_bytes());
        }
    }
    let mut header = DiscoveryHeader::new_zeroed();
    header.genctr = U64::new(genctr);
    header.numrec = U64::new(count);
    header.dlpf = flags;
    if is_extended {
        header.tdlpl = U32::new(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
    }
    bytes[..HEADER_LEN].copy_from_slice(header.as_bytes());
    bytes
}

/// What the header of a peer's log page says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeaderInfo {
    /// Generation counter.
    pub genctr: u64,
    /// Number of records.
    pub records: u64,
    /// The entries are extended: [`parse_extended`] takes them apart.
    pub is_extended: bool,
}

/// A discovery log page header that cannot be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidHeader {
    /// Fewer bytes than asked for.
    #[error("the discovery log header is {0} bytes short")]
    Short(usize),
    /// RECFMT.
    #[error("the discovery log has record format {0}, only 0 is known")]
    Format(u16),
    /// NUMREC.
    #[error("the discovery log claims {records} records, more than {max}")]
    TooMany {
        /// Claimed.
        records: u64,
        /// Most a host takes.
        max: u64,
    },
}

/// Bytes of the header that carry anything: what hosts read first.
pub const HEADER_READ_LEN: usize = 20;

/// Parses the first [`HEADER_READ_LEN`] bytes or more of a peer's log page.
///
/// # Errors
/// [`InvalidHeader`]; more than `records_max` records are refused so that a peer cannot make a
/// host read for ever.
pub fn parse_header(bytes: &[u8], records_max: u64) -> Result<HeaderInfo, InvalidHeader> {
    let Some((head, rest)) = bytes.split_first_chunk::<18>() else {
        return Err(InvalidHeader::Short(HEADER_READ_LEN - bytes.len()));
    };
    // Reserved, and 0, before NVMe Base 2.1; a host that gets it without having asked for extended
    // entries has a peer that uses the byte for something else.
    let is_extended = rest.first().is_some_and(|dlpf| dlpf & LSP_EXTENDED != 0);
    let (genctr, rest) = U64::read_from_prefix(head).expect("18 bytes hold the first u64");
    let (records, rest) = U64::read_from_prefix(rest).expect("18 bytes hold the second u64");
    let recfmt = U16::read_from_bytes(rest).expect("2 bytes are left");
    if recfmt.get() != 0 {
        return Err(InvalidHeader::Format(recfmt.get()));
    }
    if records.get() > records_max {
        return Err(InvalidHeader::TooMany { records: records.get(), max: records_max });
    }
    Ok(HeaderInfo { genctr: genctr.get(), records: records.get(), is_extended })
}

/// An extended entry whose lengths make no sense, or that is not one.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidExtended {
    /// The record in it.
    #[error(transparent)]
    Entry(#[from] InvalidEntry),
    /// Total Entry Length.
    #[error("an extended entry says it has {tel} bytes, {left} are left")]
    Length {
        /// Claimed.
        tel: u32,
        /// There.
        left: usize,
    },
    /// Extended Attributes.
    #[error("the attributes of an extended entry do not fit in its {tel} bytes")]
    Attributes {
        /// Total Entry Length.
        tel: u32,
    },
}

/// Parses one extended entry at the head of `bytes` and gives the rest. The attributes are walked
/// over, so that a length that lies is found out, and not returned: none of them helps to connect.
///
/// # Errors
/// [`InvalidExtended`] says what makes no sense; the rest of the page cannot be parsed then.
pub fn parse_extended(bytes: &[u8]) -> Result<(DiscoveryEntry, &[u8]), InvalidExtended> {
    const HEAD_LEN: usize = RECORD_LEN + size_of::<ExtendedTail>();
    let short = |tel| InvalidExtended::Length { tel, left: bytes.len() };
    let (record, rest) = DiscoveryRecord::ref_from_prefix(bytes).map_err(|_| short(0))?;
    let (tail, _) = ExtendedTail::ref_from_prefix(rest).map_err(|_| short(0))?;
    let tel = tail.tel.get();
    let len = tel as usize;
    if len < HEAD_LEN || len > bytes.len() || !len.is_multiple_of(4) {
        return Err(short(tel));
    }
    let (entry, rest) = bytes.split_at(len);
    let mut attributes = &entry[HEAD_LEN..];
    for _ in 0..tail.numexat.get() {
        let (head, value) = ExtendedAttribute::ref_from_prefix(attributes)
            .map_err(|_| InvalidExtended::Attributes { tel })?;
        let len = usize::from(head.exatlen.get());
        attributes = value.get(len..).ok_or(InvalidExtended::Attributes { tel })?;
    }
    Ok((DiscoveryEntry::parse(record)?, rest))
}

/// Parses whole records; a partial one at the end is ignored.
pub fn parse_records(
    bytes: &[u8],
) -> impl Iterator<Item = Result<DiscoveryEntry, InvalidEntry>> + '_ {
    bytes.chunks_exact(RECORD_LEN).map(|chunk| {
        DiscoveryEntry::parse(
            DiscoveryRecord::ref_from_bytes(chunk).expect("a chunk has the size of a record"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::discovery::LSP_ALL_SUBSYSTEMS;

    fn entries() -> Vec<DiscoveryEntry> {
        let nqn = |s: &str| Nqn::new(s).unwrap();
        vec![
            DiscoveryEntry::tcp(
                SubsystemType::CURRENT_DISCOVERY,
                "127.0.0.1:8009".parse().unwrap(),
                0,
                Nqn::discovery(),
            ),
            DiscoveryEntry::tcp(
                SubsystemType::NVM,
                "[fd00::1]:4420".parse().unwrap(),
                1,
                nqn("nqn.2024-01.io.penstock:db0"),
            ),
        ]
    }

    #[test]
    fn page_matches_hand_built_bytes_and_parses_back() {
        let log = DiscoveryLog::new(0x0102, &entries());
        let bytes = log.bytes();
        assert_eq!(bytes.len(), 3072);
        assert_eq!(bytes[..20], [2, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[1024..1036], [3, 1, 3, 4, 0, 0, 0xff, 0xff, 32, 0, 0, 0]);
        assert_eq!(&bytes[1024 + 32..1024 + 38], b"8009  ");
        assert_eq!(&bytes[1024 + 256..1024 + 292], b"nqn.2014-08.org.nvmexpress.discovery");
        assert_eq!(bytes[1024 + 292], 0);
        assert_eq!(&bytes[1024 + 512..1024 + 523], b"127.0.0.1  ");
        assert_eq!(bytes[2048..2054], [3, 2, 2, 4, 1, 0]);

        let header = parse_header(bytes, 16).unwrap();
        assert_eq!(header, HeaderInfo { genctr: 0x0102, records: 2, is_extended: false });
        let parsed: Result<Vec<_>, _> = parse_records(&bytes[HEADER_LEN..]).collect();
        assert_eq!(parsed.unwrap(), entries());
        assert_eq!(entries()[1].socket_addr(), Some("[fd00::1]:4420".parse().unwrap()));
        assert_eq!((log.records(), log.genctr()), (2, 0x0102));
    }

    #[test]
    fn extended_page_matches_hand_built_bytes_and_parses_back() {
        let log = DiscoveryLog::new(0x0102, &entries());
        let page = log.page(LSP_EXTENDED | 1 << 6, None);
        assert_eq!(page.len(), 1024 + 2 * 1032);
        // RECFMT 0, DLPF 1, TDLPL 3088.
        assert_eq!(page[..8], [2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[8..24], [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x10, 0x0c, 0, 0]);
        assert_eq!(page[1024..2048], log.bytes()[1024..2048]);
        assert_eq!(page[2048..2056], [8, 4, 0, 0, 0, 0, 0, 0]);
        assert_eq!(page[2056..3080], log.bytes()[2048..]);
        assert!(parse_header(&page, 2).unwrap().is_extended);

        let (first, rest) = parse_extended(&page[1024..]).unwrap();
        let (second, rest) = parse_extended(rest).unwrap();
        assert_eq!(([first, second].to_vec(), rest.len()), (entries(), 0));
    }

    #[test]
    fn extended_entries_of_others_may_have_attributes() {
        let mut bytes = entries()[1].encode().as_bytes().to_vec();
        // TEL 1024 + 8 + (4 + 8) + (4 + 0), two attributes.
        bytes.extend_from_slice(&[0x18, 4, 0, 0, 2, 0, 0, 0]);
        bytes.extend_from_slice(&[2, 0, 8, 0, b'r', b'a', b'c', b'k', b' ', b'1', b' ', b' ']);
        bytes.extend_from_slice(&[9, 9, 0, 0]);
        bytes.push(0xaa);
        let (entry, rest) = parse_extended(&bytes).unwrap();
        assert_eq!((entry, rest), (entries().remove(1), &[0xaa][..]));

        let refused = |at: usize, value: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            parse_extended(&bytes).unwrap_err()
        };
        assert_eq!(refused(1028, 3), InvalidExtended::Attributes { tel: 1048 });
        assert_eq!(refused(1034, 13), InvalidExtended::Attributes { tel: 1048 });
        for tel in [0, 4, 0x1c, 0x19] {
            assert!(matches!(refused(1024, tel), InvalidExtended::Length { .. }), "{tel:x}");
        }
        assert!(matches!(refused(1027, 0xff), InvalidExtended::Length { .. }));
        assert!(matches!(refused(512, 1), InvalidExtended::Entry(_)));
        for len in [0, 1023, 1031, 1047] {
            assert!(parse_extended(&bytes[..len]).is_err(), "{len}");
        }
    }

    #[test]
    fn port_local_entries_and_flags() {
        let mut list = entries();
        let addr = "192.0.2.7:8009".parse().unwrap();
        list.push(DiscoveryEntry::referral(addr, 1, Nqn::discovery()));
        let log = DiscoveryLog::new(3, &list);
        let records = |lsp, portid| {
            let page = log.page(lsp, portid);
            let header = parse_header(&page, 9).unwrap();
            assert_eq!(page.len() as u64, 1024 * (header.records + 1));
            (header.records, page[18], page[1024])
        };
        assert_eq!(records(0, Some(1)), (3, 0, 3));
        assert_eq!(log.page(0, None), log.bytes());
        assert_eq!(records(LSP_ALL_SUBSYSTEMS, Some(0)), (3, 0, 3), "not supported");
        // The discovery listener and the referral; the I/O listener has another address.
        assert_eq!(records(LSP_PORT_LOCAL, Some(0)).0, 2);
        assert_eq!(records(LSP_PORT_LOCAL, Some(1)).0, 2, "the I/O listener and the referral");
        assert_eq!(records(LSP_PORT_LOCAL, None).0, 1, "on no port: the referral");

        list[1].traddr = list[0].traddr.clone();
        let log = DiscoveryLog::new(4, &list);
        let page = log.page(LSP_PORT_LOCAL, Some(0));
        assert_eq!(parse_header(&page, 9).unwrap().records, 3, "a listener next to this one");

        let own = DiscoveryEntry::own(addr, 4, Nqn::discovery(), true);
        assert_eq!((own.subtype, own.portid, own.eflags), (SubsystemType(3), 4, 0b111));
        let own = DiscoveryEntry::own(addr, 4, Nqn::discovery(), false);
        assert_eq!(own.eflags, 0b110);
        assert_eq!((list[2].subtype, list[2].eflags), (SubsystemType(1), 0));
    }

    #[test]
    fn hostile_pages_are_refused() {
        assert_eq!(parse_header(&[0; 17], 1), Err(InvalidHeader::Short(3)));
        let mut header = [0u8; 20];
        header[16] = 1;
        assert_eq!(parse_header(&header, 1), Err(InvalidHeader::Format(1)));
        header[16] = 0;
        header[8..16].fill(0xff);
        let error = InvalidHeader::TooMany { records: u64::MAX, max: 1 };
        assert_eq!(parse_header(&header, 1), Err(error));

        let mut record = entries()[1].encode();
        record.traddr[0] = 0x1b;
        assert_eq!(DiscoveryEntry::parse(&record), Err(InvalidEntry::Text("transport address")));
        record.subnqn.fill(b'n');
        assert!(matches!(DiscoveryEntry::parse(&record), Err(InvalidEntry::Subnqn(_))));
        record = entries()[1].encode();
        record.trsvcid.fill(0);
        assert_eq!(DiscoveryEntry::parse(&record).unwrap().socket_addr(), None);
        assert_eq!(parse_records(&[0; 1023]).count(), 0);
    }

    proptest::proptest! {
        /// Whatever a peer sends: entries that are inside the page, in order, and an end.
        #[test]
        fn any_extended_page(
            lengths in proptest::collection::vec(proptest::prelude::any::<[u8; 8]>(), 0..4),
            cut in 0usize..5000,
        ) {
            let mut page = Vec::new();
            for tail in lengths {
                page.extend_from_slice(entries()[0].encode().as_bytes());
                page.extend_from_slice(&[tail[0], 4 | tail[1] & 1, 0, tail[2] & tail[3]]);
                page.extend_from_slice(&[tail[4] & 3, 0, 0, 0, 2, 0, tail[5] & 12, tail[6] & tail[7] & 1]);
            }
            page.truncate(cut);
            let mut rest = &page[..];
            while let Ok((entry, left)) = parse_extended(rest) {
                proptest::prop_assert!(left.len() + RECORD_LEN < rest.len());
                proptest::prop_assert_eq!(entry.portid, 0);
                rest = left;
            }
        }
    }
}
