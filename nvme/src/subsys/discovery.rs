//! The discovery log page of both sides: a target renders one, a host parses one.
//!
//! ```text
//! 0     GENCTR  NUMREC  RECFMT=0 ..          header, 1024 bytes
//! 1024  record 0, 1024 bytes
//! 2048  record 1 ..
//! ```

use std::net::SocketAddr;

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use crate::spec::discovery::{
    ASQSZ_MIN, AddressFamily, DiscoveryHeader, DiscoveryRecord, SubsystemType,
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

/// The log page a discovery controller serves: rendered once, read at any offset.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiscoveryLog {
    genctr: u64,
    bytes: Vec<u8>,
}

impl DiscoveryLog {
    /// Renders the page. `genctr` must differ from that of every earlier page that differs.
    #[must_use]
    pub fn new(genctr: u64, entries: &[DiscoveryEntry]) -> DiscoveryLog {
        let mut header = DiscoveryHeader::new_zeroed();
        header.genctr = U64::new(genctr);
        header.numrec = U64::new(entries.len() as u64);
        let mut bytes = Vec::with_capacity(HEADER_LEN + entries.len() * RECORD_LEN);
        bytes.extend_from_slice(header.as_bytes());
        for entry in entries {
            bytes.extend_from_slice(entry.encode().as_bytes());
        }
        DiscoveryLog { genctr, bytes }
    }

    /// Generation counter.
    #[must_use]
    pub fn genctr(&self) -> u64 {
        self.genctr
    }

    /// Number of records.
    #[must_use]
    pub fn records(&self) -> usize {
        self.bytes.len() / RECORD_LEN - 1
    }

    /// The whole page.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// What the header of a peer's log page says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HeaderInfo {
    /// Generation counter.
    pub genctr: u64,
    /// Number of records.
    pub records: u64,
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
    let Some((head, _)) = bytes.split_first_chunk::<18>() else {
        return Err(InvalidHeader::Short(HEADER_READ_LEN - bytes.len()));
    };
    let (genctr, rest) = U64::read_from_prefix(head).expect("18 bytes hold the first u64");
    let (records, rest) = U64::read_from_prefix(rest).expect("18 bytes hold the second u64");
    let recfmt = U16::read_from_bytes(rest).expect("2 bytes are left");
    if recfmt.get() != 0 {
        return Err(InvalidHeader::Format(recfmt.get()));
    }
    if records.get() > records_max {
        return Err(InvalidHeader::TooMany { records: records.get(), max: records_max });
    }
    Ok(HeaderInfo { genctr: genctr.get(), records: records.get() })
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
        assert_eq!(header, HeaderInfo { genctr: 0x0102, records: 2 });
        let parsed: Result<Vec<_>, _> = parse_records(&bytes[HEADER_LEN..]).collect();
        assert_eq!(parsed.unwrap(), entries());
        assert_eq!(entries()[1].socket_addr(), Some("[fd00::1]:4420".parse().unwrap()));
        assert_eq!((log.records(), log.genctr()), (2, 0x0102));
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
}
