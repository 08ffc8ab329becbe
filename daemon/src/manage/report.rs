//! What there is, for the API.

use api::{AnaEntry, Limit, Origin, PortKind, Problem};
use nvme::spec::Nqn;
use nvmf_target::{AnaState, NamespaceStatus, Stage, SubsystemStatus, Taken, TargetStatus};
use std::time::UNIX_EPOCH;
use uuid::Uuid;

use super::plan::SubsystemRecord;
use super::{Book, Entry, Manager, serial_text};

fn texts(hosts: &Option<Vec<Nqn>>) -> Option<Vec<String>> {
    hosts.as_ref().map(|hosts| hosts.iter().map(Nqn::to_string).collect())
}

fn origin(runtime: bool) -> Origin {
    if runtime { Origin::Runtime } else { Origin::Configuration }
}

fn ana(state: AnaState) -> api::AnaState {
    match state {
        AnaState::Optimized => api::AnaState::Optimized,
        AnaState::NonOptimized => api::AnaState::NonOptimized,
        AnaState::Inaccessible => api::AnaState::Inaccessible,
        AnaState::PersistentLoss => api::AnaState::PersistentLoss,
        AnaState::Change => api::AnaState::Change,
    }
}

fn breakdown(found: &nvmf_target::Breakdown) -> api::Breakdown {
    let times = |taken: &Taken| api::StageTimes {
        requests: taken.requests,
        stages: Stage::ALL
            .into_iter()
            .zip(taken.ns)
            .map(|(stage, total_ns)| api::StageTime { stage: stage.name().to_owned(), total_ns })
            .collect(),
    };
    api::Breakdown { every: found.every, reads: times(&found.reads), others: times(&found.writes) }
}

fn subsystem_of<'a>(status: &'a TargetStatus, nqn: &str) -> Option<&'a SubsystemStatus> {
    status.subsystems.iter().find(|subsystem| subsystem.nqn == nqn)
}

fn volume(book: &Book, entry: &Entry, status: &TargetStatus) -> api::Volume {
    let record = &entry.record;
    let geometry = entry.volume.as_ref().map(|volume| volume.geometry());
    let nqn = book.nqn_of(&record.subsystem).unwrap_or_default();
    let namespace: Option<&NamespaceStatus> = subsystem_of(status, &nqn)
        .and_then(|subsystem| subsystem.namespaces.iter().find(|ns| ns.nsid == record.nsid));
    api::Volume {
        name: record.name.clone(),
        spec: record.spec.to_string(),
        origin: origin(record.runtime),
        attached: entry.volume.is_some(),
        subsystem: record.subsystem.clone(),
        nsid: record.nsid,
        uuid: Uuid::from_bytes(record.identity.uuid).to_string(),
        nguid: Uuid::from_bytes(record.identity.nguid).simple().to_string(),
        // What hosts are told, where the target has told it.
        size_bytes: match (namespace, &geometry) {
            (Some(ns), Some(_)) => ns.blocks.saturating_mul(u64::from(ns.block_bytes)),
            (None, Some(geometry)) => geometry.bytes(),
            (_, None) => 0,
        },
        block_bytes: geometry.map_or(0, |geometry| geometry.block_bytes),
        ana_group: record.ana_group,
        hosts: texts(&record.hosts),
        read_only: geometry.is_some_and(|geometry| geometry.read_only),
        write_protected: namespace.map_or(record.write_protect, |ns| ns.write_protect),
    }
}

fn subsystem(record: &SubsystemRecord, status: &TargetStatus) -> api::Subsystem {
    let found = subsystem_of(status, record.nqn.as_str());
    let totals = found.map(|subsystem| subsystem.totals).unwrap_or_default();
    let states = found.map(|subsystem| subsystem.ana.as_slice()).unwrap_or_default();
    api::Subsystem {
        name: record.name.clone(),
        nqn: record.nqn.to_string(),
        serial: serial_text(&record.serial),
        origin: origin(record.runtime),
        hosts: texts(&record.hosts),
        ana: states
            .iter()
            .map(|(port, group, state)| AnaEntry { port: *port, group: *group, state: ana(*state) })
            .collect(),
        counters: api::Counters {
            reads_total: totals.reads,
            writes_total: totals.writes,
            read_bytes_total: totals.read_bytes,
            written_bytes_total: totals.written_bytes,
            media_errors_total: totals.media_errors,
        },
    }
}

impl Manager {
    /// Everything there is.
    /// Where the time of commands that were followed went.
    pub(crate) fn breakdown(&self) -> api::Breakdown {
        breakdown(&self.target.breakdown())
    }

    /// Follows one command in so many from now on.
    pub(crate) fn set_sampling(&self, request: &api::SetSampling) -> api::Breakdown {
        self.target.set_sampling(request.every);
        self.breakdown()
    }

    pub(crate) fn status(&self) -> api::Status {
        let status = self.target.status();
        let book = self.book();
        let ports = self.ports.iter().map(|port| api::Port {
            portid: port.id,
            kind: if port.is_io { PortKind::Io } else { PortKind::Discovery },
            listen: port.listen.clone(),
            advertise: port.advertise.clone(),
            tls: match port.tls {
                nvmf_target::Tls::Off => "off",
                nvmf_target::Tls::Allowed => "allowed",
                nvmf_target::Tls::Required => "required",
            }
            .to_owned(),
        });
        let associations = status.controllers.iter().map(|controller| api::Association {
            subnqn: controller.subnqn.clone(),
            hostnqn: controller.hostnqn.clone(),
            hostid: Uuid::from_bytes(controller.hostid).to_string(),
            cntlid: controller.cntlid,
            port: controller.port,
            peer: Some(controller.peer.clone()).filter(|peer| !peer.is_empty()),
            io_queues: u16::try_from(controller.io_queues).unwrap_or(u16::MAX),
            tls: controller.tls.clone(),
            authenticated: controller.authenticated.clone(),
            draining: controller.draining,
        });
        let refusals = status.refusals.iter().map(|refusal| api::Refusal {
            at_s: refusal.at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            peer: refusal.peer.clone(),
            port: refusal.port,
            why: refusal.why.clone(),
        });
        api::Status {
            program: env!("CARGO_PKG_VERSION").to_owned(),
            api: api::VERSION,
            uptime_s: self.started.elapsed().as_secs(),
            kept: book.state.is_kept(),
            discovery_nqn: self.discovery_nqn.to_string(),
            ports: ports.collect(),
            subsystems: book.subsystems.iter().map(|record| subsystem(record, &status)).collect(),
            volumes: book.volumes.iter().map(|entry| volume(&book, entry, &status)).collect(),
            associations: associations.collect(),
            referrals: referrals(&book),
            limits: self.limits(&status),
            power: api::Power {
                power_cycles: self.power.cycles,
                power_on_s: (self.power.before + self.started.elapsed()).as_secs(),
                unsafe_shutdowns: self.power.unsafe_shutdowns,
            },
            refusals: refusals.collect(),
            refusals_total: status.refusals_total,
        }
    }

    fn limits(&self, status: &TargetStatus) -> Vec<Limit> {
        let (limits, hits) = (&self.limits, &status.limits);
        let limit = |name: &str, limit: usize, used: Option<usize>, hit_total: u64| Limit {
            name: name.to_owned(),
            limit: limit as u64,
            used: used.map(|used| used as u64),
            hit_total,
        };
        vec![
            limit("connections", limits.connections, Some(status.connections), hits.connections),
            limit(
                "connections_per_host",
                limits.connections_per_host,
                None,
                hits.connections_of_host,
            ),
            limit("handshakes_per_peer", limits.handshakes_per_peer, None, hits.handshakes),
            limit(
                "controllers",
                limits.controllers,
                Some(status.controllers.len()),
                hits.controllers,
            ),
            limit(
                "controllers_per_host",
                limits.controllers_per_host,
                None,
                hits.controllers_of_host,
            ),
            limit(
                "admin_commands_per_second",
                limits.admin_commands_per_second as usize,
                None,
                hits.admin_commands,
            ),
            limit(
                "queue_entries_max",
                usize::from(limits.queue_entries),
                None,
                hits.queue_overruns,
            ),
            limit(
                "buffer_bytes_per_connection",
                limits.buffer_bytes_per_connection,
                None,
                hits.buffers,
            ),
        ]
    }

    /// Every volume.
    pub(crate) fn volumes(&self) -> Vec<api::Volume> {
        let status = self.target.status();
        let book = self.book();
        book.volumes.iter().map(|entry| volume(&book, entry, &status)).collect()
    }

    /// One volume.
    pub(crate) fn volume(&self, name: &str) -> Result<api::Volume, Problem> {
        let status = self.target.status();
        let book = self.book();
        Ok(volume(&book, book.entry(name)?, &status))
    }

    /// Every subsystem.
    pub(crate) fn subsystems(&self) -> Vec<api::Subsystem> {
        let status = self.target.status();
        self.book().subsystems.iter().map(|record| subsystem(record, &status)).collect()
    }

    /// One subsystem.
    pub(crate) fn subsystem(&self, name: &str) -> Result<api::Subsystem, Problem> {
        let status = self.target.status();
        Ok(subsystem(self.book().subsystem(name)?, &status))
    }

    /// Every referral.
    pub(crate) fn referrals(&self) -> Vec<api::Referral> {
        referrals(&self.book())
    }
}

fn referrals(book: &Book) -> Vec<api::Referral> {
    let referral = |referral: &crate::config::ReferralConfig| api::Referral {
        addr: referral.addr.to_string(),
        nqn: referral.nqn.to_string(),
    };
    book.referrals.iter().map(referral).collect()
}
