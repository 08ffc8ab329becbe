//! Run-time changes: one at a time, kept before they are made, answered when they are fenced.
//!
//! ```text
//!  api server ─┐                ┌─► state.toml   (kept first: what was answered survives kill -9)
//!  caretaker ──┴─► Manager ─────┼─► Target       (returns when no I/O of the old state can land)
//!                               └─► Book         (what is served, for the next question)
//! ```
//!
//! A change that the target refuses is taken out of the state again. One that is in force and still
//! draining stays: it cannot be taken back, and after a restart there is nothing left to drain.
//!
//! Every call blocks; none may be made on a core or on the thread of the control runtime.

pub(crate) mod plan;
mod report;
mod volumes;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use api::{Code, Done, Problem};
use block::Volume;
use nvme::spec::Nqn;
use nvme::spec::discovery::SubsystemType;
use nvme::subsys::discovery::DiscoveryEntry;
use nvmf_target::{AnaState, ChangeError, Limits, NamespaceConfig, SubsystemConfig, Target, Tls};

use crate::config::{
    ANA_GROUP_MAX, AnaConfig, AnaSetting, ReferralConfig, SUBSYSTEMS_MAX, hosts_of, is_name,
    parse_nqn, parse_referral,
};
use crate::keys::KeyBook;
use crate::state::{Change, Hosts, State, Stored, StoredAna};
use plan::{Plan, SubsystemRecord, VolumeRecord, stored_referrals};

/// Volumes of one target.
const VOLUMES_MAX: usize = 4096;
/// Referrals of one target.
const REFERRALS_MAX: usize = 64;

/// A listener, as it was started.
#[derive(Debug, Clone)]
pub(crate) struct PortRecord {
    pub(crate) id: u16,
    pub(crate) is_io: bool,
    pub(crate) listen: String,
    pub(crate) advertise: String,
    pub(crate) tls: Tls,
}

/// A volume of the book.
pub(crate) struct Entry {
    pub(crate) record: VolumeRecord,
    /// Open and served.
    pub(crate) volume: Option<Arc<dyn Volume>>,
}

/// What is served, and what the configuration says of it.
pub(crate) struct Book {
    pub(crate) state: State,
    pub(crate) subsystems: Vec<SubsystemRecord>,
    pub(crate) volumes: Vec<Entry>,
    referrals: Vec<ReferralConfig>,
    configured_referrals: Vec<ReferralConfig>,
    configured_ana: Vec<AnaConfig>,
}

/// Power as of this start: starts, time in service before it, unsafe shutdowns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PowerUp {
    pub(crate) cycles: u64,
    pub(crate) before: Duration,
    pub(crate) unsafe_shutdowns: u64,
}

/// A subsystem NQN as the target takes it.
type Subnqn = String;

/// Told to the caller of a change that may not wait for its end.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    in_force: AtomicBool,
}

impl Gate {
    /// Whether the target has been given the change.
    pub(crate) fn is_in_force(&self) -> bool {
        self.in_force.load(Ordering::Acquire)
    }
}

/// The one place where a running target is changed.
pub(crate) struct Manager {
    target: Arc<Target>,
    limits: Limits,
    ports: Vec<PortRecord>,
    discovery_nqn: Nqn,
    started: Instant,
    power: PowerUp,
    /// Held during a change.
    changing: Mutex<()>,
    /// Held briefly.
    book: Mutex<Book>,
    /// Held while keys are changed and kept.
    keys: Mutex<KeyBook>,
}

/// What a manager begins with.
pub(crate) struct Beginning {
    pub(crate) target: Arc<Target>,
    pub(crate) limits: Limits,
    pub(crate) ports: Vec<PortRecord>,
    pub(crate) plan: Plan,
    /// In the order of the plan's volumes.
    pub(crate) volumes: Vec<Option<Arc<dyn Volume>>>,
    pub(crate) discovery_nqn: Nqn,
    pub(crate) configured_referrals: Vec<ReferralConfig>,
    pub(crate) configured_ana: Vec<AnaConfig>,
    pub(crate) power: PowerUp,
    pub(crate) state: State,
    pub(crate) keys: KeyBook,
}

fn problem(error: Code, what: impl Into<String>, allowed: impl Into<String>) -> Problem {
    Problem { error, what: what.into(), allowed: allowed.into() }
}

fn failed(error: impl std::fmt::Display) -> Problem {
    problem(Code::Failed, error.to_string(), "")
}

/// A refused value, in the words the configuration uses.
fn refused(error: crate::config::ConfigError) -> Problem {
    let text = error.to_string();
    match text.split_once("; allowed: ").or_else(|| text.split_once(": allowed: ")) {
        Some((what, allowed)) => problem(Code::Invalid, what, allowed),
        None => problem(Code::Invalid, text, ""),
    }
}

/// A panic in a change has undone nothing and broken no invariant that a reader relies on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Book {
    pub(crate) fn entry(&self, name: &str) -> Result<&Entry, Problem> {
        self.volumes.iter().find(|entry| entry.record.name == name).ok_or_else(|| {
            let names: Vec<_> = self.volumes.iter().map(|e| e.record.name.as_str()).collect();
            problem(Code::NotFound, format!("there is no volume {name:?}"), few(&names))
        })
    }

    /// By name or NQN.
    pub(crate) fn subsystem(&self, name: &str) -> Result<&SubsystemRecord, Problem> {
        let is =
            |subsystem: &&SubsystemRecord| subsystem.name == name || subsystem.nqn.as_str() == name;
        self.subsystems.iter().find(is).ok_or_else(|| {
            let names: Vec<_> = self.subsystems.iter().map(|s| s.name.as_str()).collect();
            problem(Code::NotFound, format!("there is no subsystem {name:?}"), few(&names))
        })
    }

    fn nqn_of(&self, subsystem: &str) -> Result<String, Problem> {
        self.subsystem(subsystem).map(|subsystem| subsystem.nqn.to_string())
    }

    /// What the configuration says of a group seen through a port.
    fn configured_state(&self, port: u16, group: u32) -> AnaSetting {
        // The last entry that fits is the most particular one.
        let fits = |ana: &&AnaConfig| ana.group == group && ana.port.is_none_or(|p| p == port);
        let found = self.configured_ana.iter().rev().find(fits);
        found.map_or(AnaSetting::Optimized, |ana| ana.state)
    }
}

/// Names to choose from, as long as they fit in a message.
fn few(names: &[&str]) -> String {
    match names {
        [] => "there is none".to_owned(),
        names if names.len() <= 16 => names.join(", "),
        names => format!("one of {} that the list shows", names.len()),
    }
}

impl Manager {
    pub(crate) fn new(beginning: Beginning) -> Manager {
        let Plan { subsystems, volumes, referrals, .. } = beginning.plan;
        let volumes = std::iter::zip(volumes, beginning.volumes)
            .map(|(record, volume)| Entry { record, volume })
            .collect();
        Manager {
            target: beginning.target,
            limits: beginning.limits,
            ports: beginning.ports,
            discovery_nqn: beginning.discovery_nqn,
            started: Instant::now(),
            power: beginning.power,
            changing: Mutex::new(()),
            book: Mutex::new(Book {
                state: beginning.state,
                subsystems,
                volumes,
                referrals,
                configured_referrals: beginning.configured_referrals,
                configured_ana: beginning.configured_ana,
            }),
            keys: Mutex::new(beginning.keys),
        }
    }

    pub(crate) fn keys(&self) -> MutexGuard<'_, KeyBook> {
        lock(&self.keys)
    }

    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        lock(&self.book)
    }

    /// Gives the target the ANA states that were set at run time and still hold. Before the first
    /// connection.
    pub(crate) fn restore_ana(&self) -> Result<(), ChangeError> {
        let mut due = Vec::new();
        {
            let mut book = self.book();
            let mut stored = std::mem::take(&mut book.state.stored_mut().ana);
            stored.retain(|ana| {
                let is_port = self.ports.iter().any(|port| port.is_io && port.id == ana.port);
                let holds = book.configured_state(ana.port, ana.group).name() == ana.from;
                // A port or subsystem that is gone for now may come back.
                if !is_port || book.nqn_of(&ana.subsystem).is_err() {
                    return true;
                }
                if holds && let Some(state) = AnaSetting::from_name(&ana.to) {
                    let nqn = book.nqn_of(&ana.subsystem).unwrap_or_default();
                    due.push((nqn, ana.port, ana.group, state));
                }
                holds
            });
            book.state.stored_mut().ana = stored;
        }
        for (nqn, port, group, state) in due {
            self.target.set_ana(Some(&nqn), port, group, ana_state(state))?;
        }
        Ok(())
    }

    /// Keeps `change`, makes it with `act`, and notes it with `note`.
    fn commit(
        &self,
        gate: &Gate,
        change: impl FnOnce(&mut Stored),
        act: impl FnOnce(&Target) -> Result<(), ChangeError>,
        note: impl FnOnce(&mut Book),
    ) -> Result<(), Problem> {
        let before = self.keep(change)?;
        gate.in_force.store(true, Ordering::Release);
        match act(&self.target) {
            Ok(()) => {
                note(&mut self.book());
                Ok(())
            }
            Err(ChangeError::StillDraining { waited }) => {
                note(&mut self.book());
                Err(draining(waited))
            }
            Err(error) => {
                gate.in_force.store(false, Ordering::Release);
                self.take_back(before);
                Err(self.target_refused(error))
            }
        }
    }

    /// Changes the state and makes that durable. Gives what was before.
    fn keep(&self, change: impl FnOnce(&mut Stored)) -> Result<Stored, Problem> {
        let mut book = self.book();
        let before = book.state.stored().clone();
        change(book.state.stored_mut());
        if let Err(error) = book.state.save() {
            *book.state.stored_mut() = before;
            return Err(failed(format_args!("the change cannot be kept: {}", chain(&error))));
        }
        Ok(before)
    }

    fn take_back(&self, before: Stored) {
        let mut book = self.book();
        let power = book.state.stored().power;
        let mut before = before;
        before.power = power;
        *book.state.stored_mut() = before;
        if let Err(error) = book.state.save() {
            let error = chain(&error);
            tracing::error!(%error, "a change that was refused cannot be taken out of the state");
        }
    }

    fn target_refused(&self, error: ChangeError) -> Problem {
        match error {
            ChangeError::UnknownSubsystem | ChangeError::UnknownNamespace => {
                problem(Code::NotFound, error.to_string(), "")
            }
            ChangeError::InUse => problem(Code::Conflict, error.to_string(), ""),
            ChangeError::Invalid(what) => problem(Code::Invalid, what, ""),
            ChangeError::Volume(_) | ChangeError::Reservations(_) => failed(chain(&error)),
            ChangeError::StillDraining { waited } => draining(waited),
        }
    }

    /// Makes a subsystem.
    pub(crate) fn add_subsystem(
        &self,
        gate: &Gate,
        request: &api::AddSubsystem,
    ) -> Result<Done, Problem> {
        let name = &request.name;
        if !is_name(name) {
            return Err(problem(
                Code::Invalid,
                format!("name {name:?} is no name"),
                "1 to 64 of A-Z a-z 0-9 . _ -, not beginning with a dot or a dash",
            ));
        }
        let nqn = request.nqn.as_deref().map(|nqn| parse_nqn("nqn", nqn)).transpose();
        let nqn = nqn.map_err(refused)?;
        let hosts = hosts_of(request.hosts.as_deref()).map_err(refused)?;
        let _changing = lock(&self.changing);
        let place = self.place();
        let (before, identity) = {
            let mut book = self.book();
            if book.subsystem(name).is_ok() {
                return Err(problem(
                    Code::Conflict,
                    format!("there is a subsystem {name:?} already"),
                    "another name",
                ));
            }
            if book.subsystems.len() >= SUBSYSTEMS_MAX {
                return Err(problem(
                    Code::Conflict,
                    format!("there are {SUBSYSTEMS_MAX} subsystems"),
                    "no more than that",
                ));
            }
            let before = book.state.stored().clone();
            let identity = book.state.named_subsystem(name, nqn.as_ref(), &place);
            let is_taken = book.subsystem(identity.nqn.as_str()).is_ok()
                || book
                    .state
                    .stored()
                    .subsystems
                    .iter()
                    .any(|other| other.name != *name && other.nqn == identity.nqn)
                || identity.nqn == self.discovery_nqn;
            if is_taken {
                *book.state.stored_mut() = before;
                return Err(problem(
                    Code::Conflict,
                    format!("the NQN {} belongs to another subsystem", identity.nqn),
                    "another NQN, or leave nqn out",
                ));
            }
            (before, identity)
        };
        let record = SubsystemRecord {
            name: name.clone(),
            nqn: identity.nqn,
            serial: identity.serial,
            runtime: true,
            hosts,
            configured_hosts: None,
        };
        let config = subsystem_config(&record, Vec::new());
        let made = self.commit(
            gate,
            |stored| {
                if let Some(kept) = stored.subsystems.iter_mut().find(|s| s.name == *name) {
                    kept.runtime = true;
                    let to = Hosts::of(record.hosts.as_deref());
                    Change::set(&mut kept.hosts, to, &Hosts::of(None));
                }
            },
            |target| target.add_subsystem(config),
            |book| book.subsystems.push(record.clone()),
        );
        if let Err(error) = made {
            if error.error != Code::Draining {
                self.take_back(before);
            }
            return Err(error);
        }
        for ana in self.book().configured_ana.clone() {
            let ports = self.ports.iter().filter(|port| port.is_io);
            for port in ports.filter(|port| ana.port.is_none_or(|id| id == port.id)) {
                let nqn = record.nqn.as_str();
                let set = self.target.set_ana(Some(nqn), port.id, ana.group, ana_state(ana.state));
                set.map_err(|error| self.target_refused(error))?;
            }
        }
        tracing::info!(subsystem = %name, subnqn = %record.nqn, "subsystem made");
        self.done_subsystem(name)
    }

    /// Takes a subsystem without volumes away.
    pub(crate) fn remove_subsystem(&self, gate: &Gate, name: &str) -> Result<Done, Problem> {
        let _changing = lock(&self.changing);
        let record = {
            let book = self.book();
            let record = book.subsystem(name)?.clone();
            if !record.runtime {
                return Err(problem(
                    Code::Conflict,
                    format!("subsystem {name:?} is in the configuration"),
                    "take it out there and start again",
                ));
            }
            let inside = book.volumes.iter().filter(|e| e.record.subsystem == record.name);
            let inside: Vec<_> = inside.map(|entry| entry.record.name.as_str()).collect();
            if !inside.is_empty() {
                return Err(problem(
                    Code::Conflict,
                    format!("subsystem {name:?} has volumes: {}", few(&inside)),
                    "detach them first",
                ));
            }
            record
        };
        let nqn = record.nqn.to_string();
        self.commit(
            gate,
            |stored| {
                // Its identity stays, for the day it comes back.
                if let Some(kept) = stored.subsystems.iter_mut().find(|s| s.name == record.name) {
                    (kept.runtime, kept.hosts) = (false, None);
                }
                stored.ana.retain(|ana| ana.subsystem != record.name);
            },
            |target| target.remove_subsystem(&nqn),
            |book| book.subsystems.retain(|subsystem| subsystem.name != record.name),
        )?;
        tracing::info!(subsystem = %record.name, "subsystem removed");
        Ok(Done { kept: self.is_kept(), ..Done::default() })
    }

    /// Sets which hosts may connect to a subsystem.
    pub(crate) fn set_subsystem_hosts(
        &self,
        gate: &Gate,
        name: &str,
        request: &api::SetHosts,
    ) -> Result<Done, Problem> {
        let hosts = hosts_of(request.hosts.as_deref()).map_err(refused)?;
        let _changing = lock(&self.changing);
        let record = self.book().subsystem(name)?.clone();
        let nqn = record.nqn.to_string();
        self.commit(
            gate,
            |stored| {
                if let Some(kept) = stored.subsystems.iter_mut().find(|s| s.name == record.name) {
                    let from = Hosts::of(record.configured_hosts.as_deref());
                    Change::set(&mut kept.hosts, Hosts::of(hosts.as_deref()), &from);
                }
            },
            |target| target.set_subsystem_hosts(&nqn, hosts.clone()),
            |book| {
                if let Some(found) = book.subsystems.iter_mut().find(|s| s.name == record.name) {
                    found.hosts = hosts.clone();
                }
            },
        )?;
        tracing::info!(subsystem = %record.name, hosts = %shown(&hosts), "hosts of the subsystem set");
        self.done_subsystem(&record.name)
    }

    /// Sets the ANA state of a group.
    pub(crate) fn set_ana(&self, gate: &Gate, request: &api::SetAna) -> Result<Done, Problem> {
        let group = request.group;
        check_group(group)?;
        let state = AnaSetting::from_name(&request.state.to_string()).ok_or_else(|| {
            problem(
                Code::Invalid,
                "state is no ANA state",
                "optimized, non-optimized, inaccessible, persistent-loss, change",
            )
        })?;
        let io_ports: Vec<u16> =
            self.ports.iter().filter(|port| port.is_io).map(|port| port.id).collect();
        let ports = match request.port {
            None => io_ports,
            Some(port) if io_ports.contains(&port) => vec![port],
            Some(port) => {
                let ids: Vec<_> = io_ports.iter().map(u16::to_string).collect();
                return Err(problem(
                    Code::NotFound,
                    format!("there is no I/O port {port}"),
                    ids.join(", "),
                ));
            }
        };
        let _changing = lock(&self.changing);
        let (subsystem, names, configured) = {
            let book = self.book();
            let (subsystem, names) = match &request.subsystem {
                Some(name) => {
                    let found = book.subsystem(name)?;
                    (Some(found.nqn.to_string()), vec![found.name.clone()])
                }
                None => (None, book.subsystems.iter().map(|s| s.name.clone()).collect()),
            };
            let configured: Vec<_> =
                ports.iter().map(|port| book.configured_state(*port, group)).collect();
            (subsystem, names, configured)
        };
        self.commit(
            gate,
            |stored| {
                for (port, from) in std::iter::zip(&ports, &configured) {
                    let is = |ana: &StoredAna| ana.port == *port && ana.group == group;
                    stored.ana.retain(|ana| !(is(ana) && names.contains(&ana.subsystem)));
                    if *from == state {
                        continue;
                    }
                    stored.ana.extend(names.iter().map(|name| StoredAna {
                        subsystem: name.clone(),
                        port: *port,
                        group,
                        to: state.name().to_owned(),
                        from: from.name().to_owned(),
                    }));
                }
            },
            |target| {
                // Every port is set, even if one of them drains for long.
                let mut late = Ok(());
                for port in &ports {
                    match target.set_ana(subsystem.as_deref(), *port, group, ana_state(state)) {
                        Err(error @ ChangeError::StillDraining { .. }) => late = Err(error),
                        Err(error) => return Err(error),
                        Ok(()) => {}
                    }
                }
                late
            },
            |_| {},
        )?;
        tracing::info!(group, state = state.name(), ?ports, "ANA state set");
        Ok(Done { kept: self.is_kept(), ..Done::default() })
    }

    /// Ends the associations of a host.
    pub(crate) fn disconnect(
        &self,
        gate: &Gate,
        request: &api::DisconnectHost,
    ) -> Result<Done, Problem> {
        let host = parse_nqn("hostnqn", &request.hostnqn).map_err(refused)?;
        let _changing = lock(&self.changing);
        let subsystem = match &request.subsystem {
            Some(name) => Some(self.book().nqn_of(name)?),
            None => None,
        };
        let is_meant = |controller: &nvmf_target::ControllerStatus| {
            controller.hostnqn == host.as_str()
                && subsystem.as_ref().is_none_or(|nqn| *nqn == controller.subnqn)
        };
        let ended = self.target.status().controllers.iter().filter(|c| is_meant(c)).count();
        gate.in_force.store(true, Ordering::Release);
        self.target
            .disconnect_host(subsystem.as_deref(), &host)
            .map_err(|error| self.target_refused(error))?;
        tracing::info!(hostnqn = %host, ended, "host disconnected");
        Ok(Done { kept: self.is_kept(), ended: Some(ended), ..Done::default() })
    }

    /// Replaces the referrals.
    pub(crate) fn set_referrals(
        &self,
        gate: &Gate,
        request: &api::SetReferrals,
    ) -> Result<Done, Problem> {
        let mut referrals: Vec<ReferralConfig> = Vec::new();
        for referral in &request.referrals {
            let parsed = parse_referral(&referral.addr, referral.nqn.as_deref());
            let parsed = parsed.map_err(refused)?;
            if referrals.iter().any(|other| other.addr == parsed.addr) {
                return Err(problem(
                    Code::Invalid,
                    format!("addr {} is given twice", parsed.addr),
                    "each address once",
                ));
            }
            referrals.push(parsed);
        }
        let _changing = lock(&self.changing);
        self.replace_referrals(gate, referrals)
    }

    /// Adds one referral.
    pub(crate) fn add_referral(
        &self,
        gate: &Gate,
        request: &api::AddReferral,
    ) -> Result<Done, Problem> {
        let parsed = parse_referral(&request.addr, request.nqn.as_deref()).map_err(refused)?;
        let _changing = lock(&self.changing);
        let mut referrals = self.book().referrals.clone();
        if referrals.iter().any(|other| other.addr == parsed.addr) {
            return Err(problem(
                Code::Conflict,
                format!("there is a referral to {} already", parsed.addr),
                "each address once",
            ));
        }
        referrals.push(parsed);
        self.replace_referrals(gate, referrals)
    }

    /// Takes one referral away.
    pub(crate) fn remove_referral(&self, gate: &Gate, addr: &str) -> Result<Done, Problem> {
        let _changing = lock(&self.changing);
        let mut referrals = self.book().referrals.clone();
        let there: Vec<_> = referrals.iter().map(|referral| referral.addr.to_string()).collect();
        referrals.retain(|referral| referral.addr.to_string() != addr);
        if referrals.len() == there.len() {
            let there: Vec<_> = there.iter().map(String::as_str).collect();
            return Err(problem(
                Code::NotFound,
                format!("there is no referral to {addr:?}"),
                few(&there),
            ));
        }
        self.replace_referrals(gate, referrals)
    }

    fn replace_referrals(
        &self,
        gate: &Gate,
        referrals: Vec<ReferralConfig>,
    ) -> Result<Done, Problem> {
        if referrals.len() > REFERRALS_MAX {
            return Err(problem(
                Code::Conflict,
                format!("{} referrals", referrals.len()),
                format!("at most {REFERRALS_MAX}"),
            ));
        }
        let configured = stored_referrals(&self.book().configured_referrals);
        self.commit(
            gate,
            |stored| {
                Change::set(&mut stored.referrals, stored_referrals(&referrals), &configured);
            },
            |target| target.set_referrals(referral_entries(&referrals)),
            |book| book.referrals = referrals.clone(),
        )?;
        tracing::info!(count = referrals.len(), "referrals set");
        Ok(Done { kept: self.is_kept(), ..Done::default() })
    }

    /// Notes the time in service.
    pub(crate) fn keep_power(&self, stopped: bool) -> Result<(), crate::state::StateError> {
        let total = self.power.before + self.started.elapsed();
        let mut book = self.book();
        book.state.power_on(total, stopped);
        book.state.save()
    }

    /// Volumes that are open, for the last flush.
    pub(crate) fn open_volumes(&self) -> Vec<(String, Arc<dyn Volume>)> {
        let book = self.book();
        let open = book.volumes.iter();
        open.filter_map(|entry| Some((entry.record.name.clone(), entry.volume.clone()?))).collect()
    }

    fn is_kept(&self) -> bool {
        self.book().state.is_kept()
    }

    /// What makes derived identities of two targets on one machine differ.
    fn place(&self) -> String {
        self.ports.first().map(|port| port.listen.clone()).unwrap_or_default()
    }

    fn done_subsystem(&self, name: &str) -> Result<Done, Problem> {
        let subsystem = Some(self.subsystem(name)?);
        Ok(Done { kept: self.is_kept(), subsystem, ..Done::default() })
    }
}

/// A subsystem as the target takes it.
pub(crate) fn subsystem_config(
    record: &SubsystemRecord,
    namespaces: Vec<NamespaceConfig>,
) -> SubsystemConfig {
    SubsystemConfig {
        namespaces,
        hosts: record.hosts.clone(),
        ..SubsystemConfig::new(record.nqn.to_string(), serial_text(&record.serial))
    }
}

/// The text of a serial number.
pub(crate) fn serial_text(serial: &[u8; 20]) -> String {
    String::from_utf8_lossy(serial).trim_end().to_owned()
}

/// What the discovery log says of other discovery subsystems. Their ports are not ours to number.
pub(crate) fn referral_entries(referrals: &[ReferralConfig]) -> Vec<DiscoveryEntry> {
    let entry = |referral: &ReferralConfig| {
        DiscoveryEntry::tcp(SubsystemType::REFERRAL, referral.addr, 0, referral.nqn.clone())
    };
    referrals.iter().map(entry).collect()
}

/// The target's word for a state.
pub(crate) fn ana_state(state: AnaSetting) -> AnaState {
    match state {
        AnaSetting::Optimized => AnaState::Optimized,
        AnaSetting::NonOptimized => AnaState::NonOptimized,
        AnaSetting::Inaccessible => AnaState::Inaccessible,
        AnaSetting::PersistentLoss => AnaState::PersistentLoss,
        AnaSetting::Change => AnaState::Change,
    }
}

fn draining(waited: Duration) -> Problem {
    problem(
        Code::Draining,
        format!(
            "the change is in force, and I/O admitted before it has not ended after {} s",
            waited.as_secs()
        ),
        "wait, and look at the disk that does not answer",
    )
}

fn check_group(group: u32) -> Result<(), Problem> {
    if (1..=ANA_GROUP_MAX).contains(&u64::from(group)) {
        return Ok(());
    }
    Err(problem(
        Code::Invalid,
        format!("ANA group {group}"),
        format!("a whole number from 1 to {ANA_GROUP_MAX}"),
    ))
}

fn shown(hosts: &Option<Vec<Nqn>>) -> String {
    match hosts {
        None => "every host".to_owned(),
        Some(hosts) => format!("{} hosts", hosts.len()),
    }
}

/// The error and its sources in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}
