//! What a discovery controller offers, for people and for programs.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use nvme::spec::Nqn;
use nvme::spec::discovery::{AddressFamily, SubsystemType, TransportType};
use nvme::subsys::discovery::DiscoveryEntry;
use nvmf_initiator::DiscoverConfig;
use serde::Serialize;

use crate::credentials::CredentialsConfig;
use crate::identity;

/// A discovery log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Discovery {
    /// Whom we asked.
    pub address: SocketAddr,
    /// Generation counter of the log.
    pub genctr: u64,
    /// Its records.
    pub records: Vec<Record>,
    /// Records that make no sense, and why.
    pub problems: Vec<String>,
}

/// One record. The names are those of the specification and of `nvme discover -o json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Record {
    /// Transport type.
    pub trtype: String,
    /// Address family.
    pub adrfam: String,
    /// Kind of subsystem.
    pub subtype: String,
    /// Transport requirements, as in the log.
    pub treq: u8,
    /// Port ID.
    pub portid: u16,
    /// Controller ID; 65535 for controllers that are made on demand.
    pub cntlid: u16,
    /// Largest admin queue, in entries.
    pub asqsz: u16,
    /// Transport service identifier: the port.
    pub trsvcid: String,
    /// Subsystem NQN.
    pub subnqn: String,
    /// Transport address.
    pub traddr: String,
    /// Entry flags, as in the log.
    pub eflags: u16,
    /// Security type of the transport: 0 none, 1 TLS 1.2, 2 TLS 1.3.
    pub sectype: u8,
}

/// Asks discovery subsystem `subnqn` (the well-known one if `None`) at `address`, as host `hostnqn`
/// (this machine's own if `None`) with its keys: a target may tell each host something else. Blocks for at most
/// `timeout`.
pub fn discover(
    address: SocketAddr,
    subnqn: Option<&str>,
    hostnqn: Option<&str>,
    credentials: &CredentialsConfig,
    timeout: Duration,
) -> anyhow::Result<Discovery> {
    let parse = |flag: &str, text: &str| {
        text.parse::<Nqn>().with_context(|| format!("{flag} {text:?} is no NQN"))
    };
    let subnqn = subnqn.map(|text| parse("--subnqn", text)).transpose()?;
    let hostnqn = hostnqn.map(|text| parse("--hostnqn", text)).transpose()?;
    let host = identity::derive_host();
    let subnqn = subnqn.unwrap_or_else(Nqn::discovery);
    let hostnqn = hostnqn.unwrap_or(host.nqn);
    let found = nvmf_initiator::discover(&DiscoverConfig {
        security: credentials.load(&hostnqn, &subnqn, None)?,
        addr: address,
        subnqn,
        hostnqn,
        hostid: host.id,
        timeout,
    })?;
    let mut records = Vec::new();
    let mut problems = Vec::new();
    for (index, entry) in found.entries.iter().enumerate() {
        match entry {
            Ok(entry) => records.push(Record::from(entry)),
            Err(error) => problems.push(format!("record {index}: {error}")),
        }
    }
    Ok(Discovery { address, genctr: found.genctr, records, problems })
}

impl From<&DiscoveryEntry> for Record {
    fn from(entry: &DiscoveryEntry) -> Record {
        Record {
            trtype: match entry.trtype {
                TransportType::RDMA => "rdma".to_owned(),
                TransportType::FC => "fc".to_owned(),
                TransportType::TCP => "tcp".to_owned(),
                TransportType::LOOP => "loop".to_owned(),
                TransportType(other) => format!("unknown ({other})"),
            },
            adrfam: match entry.adrfam {
                AddressFamily::IPV4 => "ipv4".to_owned(),
                AddressFamily::IPV6 => "ipv6".to_owned(),
                AddressFamily::IB => "infiniband".to_owned(),
                AddressFamily::FC => "fibre channel".to_owned(),
                AddressFamily::LOOP => "loop".to_owned(),
                AddressFamily(other) => format!("unknown ({other})"),
            },
            subtype: match entry.subtype {
                SubsystemType::REFERRAL => "discovery subsystem referral".to_owned(),
                SubsystemType::NVM => "nvme subsystem".to_owned(),
                SubsystemType::CURRENT_DISCOVERY => "current discovery subsystem".to_owned(),
                SubsystemType(other) => format!("unknown ({other})"),
            },
            treq: entry.treq,
            portid: entry.portid,
            cntlid: entry.cntlid,
            asqsz: entry.asqsz,
            trsvcid: entry.trsvcid.clone(),
            subnqn: entry.subnqn.to_string(),
            traddr: entry.traddr.clone(),
            eflags: entry.eflags,
            sectype: entry.sectype,
        }
    }
}

/// Entry flags in words (NVMe Base 2.0, "Discovery Log Page", EFLAGS).
fn flags(eflags: u16) -> String {
    const NAMES: [&str; 3] = [
        "duplicate returned information",
        "explicit persistent connection supported",
        "no CDC connectivity",
    ];
    let known = NAMES.iter().enumerate().filter(|(bit, _)| eflags & 1 << bit != 0);
    let mut words: Vec<String> = known.map(|(_, name)| (*name).to_owned()).collect();
    if eflags >> NAMES.len() != 0 {
        words.push(format!("other flags {:#x}", eflags >> NAMES.len() << NAMES.len()));
    }
    words.join(", ")
}

impl fmt::Display for Discovery {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} record{} at {}, generation {}",
            self.records.len(),
            if self.records.len() == 1 { "" } else { "s" },
            self.address,
            self.genctr
        )?;
        for record in &self.records {
            write!(
                f,
                "\n{}\n  {} {} {} port {}, port ID {}{}",
                record.subnqn,
                record.trtype,
                record.adrfam,
                record.traddr,
                record.trsvcid,
                record.portid,
                if record.sectype == 0 { "" } else { ", TLS" }
            )?;
            if record.eflags != 0 {
                write!(f, ", {}", flags(record.eflags))?;
            }
            if record.subtype != "nvme subsystem" {
                write!(f, ", {}", record.subtype)?;
            }
        }
        for problem in &self.problems {
            write!(f, "\n{problem}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_in_words() {
        let addr = "[fd00::1]:4420".parse().unwrap();
        let nqn: Nqn = "nqn.2014-08.com.example:a".parse().unwrap();
        let entry = DiscoveryEntry::tcp(SubsystemType::NVM, addr, 3, nqn);
        let record = Record::from(&entry);
        let discovery = Discovery {
            address: "127.0.0.1:8009".parse().unwrap(),
            genctr: 7,
            records: vec![record],
            problems: vec!["record 1: subsystem NQN: bad".to_owned()],
        };
        assert_eq!(
            discovery.to_string(),
            "1 record at 127.0.0.1:8009, generation 7\nnqn.2014-08.com.example:a\n  tcp ipv6 \
             fd00::1 port 4420, port ID 3\nrecord 1: subsystem NQN: bad"
        );
        let json = serde_json::to_value(&discovery).unwrap();
        assert_eq!(json["records"][0]["traddr"], "fd00::1");
        assert_eq!(json["records"][0]["subtype"], "nvme subsystem");
        assert_eq!(json["records"][0]["cntlid"], 0xffff);
        assert_eq!(json["records"][0]["asqsz"], 32);
    }

    #[test]
    fn entry_flags_in_words() {
        assert_eq!(flags(1), "duplicate returned information");
        assert_eq!(flags(0x82), "explicit persistent connection supported, other flags 0x80");
    }
}
