//! Changes of a running target: publish the new state, then wait until nothing of the old one is on
//! its way to a volume any more.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nvme::spec::Nqn;
use nvme::subsys::ana::{ANA_GROUPS_MAX, AnaState};
use nvme::subsys::discovery::DiscoveryEntry;
use nvme::subsys::{NamespaceInfo, SubsystemInfo};

use crate::admin::{namespace_info, subsystem_info};
use crate::busy::BusyClock;
use crate::config::{ChangeError, ListenerKind, NamespaceConfig, SetupError, SubsystemConfig};
use crate::counters::Counters;
use crate::fence::{Fence, Scope};
use crate::registry::{Association, Served};
use crate::table::{Ana, Mask, NamespaceState, Subsystem, SubsystemState, Table, View};
use crate::target::{Shared, Target};
use crate::volume::VolumeState;

/// A change of what is served; see the methods of [`Target`] of the same meaning.
#[derive(Clone)]
pub enum Request {
    /// [`Target::add_subsystem`].
    AddSubsystem(SubsystemConfig),
    /// [`Target::remove_subsystem`].
    RemoveSubsystem {
        /// Subsystem NQN.
        nqn: String,
    },
    /// [`Target::attach`].
    Attach {
        /// Subsystem NQN.
        nqn: String,
        /// The namespace to come.
        namespace: NamespaceConfig,
    },
    /// [`Target::detach`].
    Detach {
        /// Subsystem NQN.
        nqn: String,
        /// Namespace identifier.
        nsid: u32,
    },
    /// [`Target::refresh`].
    Refresh {
        /// Subsystem NQN.
        nqn: String,
        /// Namespace identifier.
        nsid: u32,
    },
    /// [`Target::set_namespace_hosts`].
    NamespaceHosts {
        /// Subsystem NQN.
        nqn: String,
        /// Namespace identifier.
        nsid: u32,
        /// The hosts that see it; `None`: all.
        hosts: Option<Vec<Nqn>>,
    },
    /// [`Target::set_subsystem_hosts`].
    SubsystemHosts {
        /// Subsystem NQN.
        nqn: String,
        /// The hosts that may connect; `None`: all.
        hosts: Option<Vec<Nqn>>,
    },
    /// [`Target::set_ana`].
    Ana {
        /// Subsystem NQN; `None`: all.
        nqn: Option<String>,
        /// Port identifier.
        port: u16,
        /// ANA group.
        group: u32,
        /// Its state from now on.
        state: AnaState,
    },
    /// [`Target::move_namespace`].
    MoveNamespace {
        /// Subsystem NQN.
        nqn: String,
        /// Namespace identifier.
        nsid: u32,
        /// Its ANA group from now on.
        group: u32,
    },
    /// [`Target::set_write_protect`].
    WriteProtect {
        /// Subsystem NQN.
        nqn: String,
        /// Namespace identifier.
        nsid: u32,
        /// Whether writes are refused from now on.
        protect: bool,
    },
    /// [`Target::disconnect_host`].
    DisconnectHost {
        /// Subsystem NQN; `None`: all.
        nqn: Option<String>,
        /// The host.
        hostnqn: Nqn,
    },
    /// [`Target::set_referrals`].
    Referrals(Vec<DiscoveryEntry>),
}

/// Associations that a change ends.
#[derive(Debug)]
enum Ending {
    Nobody,
    These(Vec<Arc<Association>>),
    /// Those of a subsystem whose host the mask does not admit; `None`: all of them.
    Of(u32, Option<Mask>),
}

/// A change that is in force. It is finished when no I/O of the state before can land any more.
#[must_use = "the change is in force, but I/O of before may still land"]
pub struct Change {
    shared: Arc<Shared>,
    fences: Vec<Arc<Fence>>,
    ending: Ending,
    /// Views that cores are about to take up, and volumes that they are about to drop: made and
    /// closed where time does not matter.
    _views: Vec<Arc<View>>,
    _volumes: Vec<Arc<VolumeState>>,
}

impl fmt::Debug for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Change")
            .field("fences", &self.fences)
            .field("ending", &self.ending)
            .finish_non_exhaustive()
    }
}

impl Change {
    /// Whether no I/O of the state before can land any more.
    #[must_use]
    pub fn is_done(&self) -> bool {
        // The cores first: one that has not taken the change up may yet let a host in.
        self.fences.iter().all(|fence| fence.is_done())
            && match &self.ending {
                Ending::Nobody => true,
                Ending::These(list) => list.iter().all(|association| association.is_gone()),
                Ending::Of(id, mask) => {
                    let admits = |a: &Arc<Association>| {
                        mask.as_ref().is_some_and(|mask| mask.admits(&a.host.hostnqn))
                    };
                    let served = Served::Subsystem(*id);
                    self.shared.registry.list(Some(served)).iter().all(admits)
                }
            }
    }

    /// Waits until [`Change::is_done`]. For threads that are no core.
    ///
    /// # Errors
    /// [`ChangeError::StillDraining`] after `limit`; the change stays in force.
    pub fn wait(self, limit: Duration) -> Result<(), ChangeError> {
        if self.shared.board.wait(limit, &|| self.is_done()) {
            Ok(())
        } else {
            Err(ChangeError::StillDraining { waited: limit })
        }
    }
}

fn invalid(reason: impl Into<String>) -> ChangeError {
    ChangeError::Invalid(reason.into())
}

/// What a namespace's volume says of itself, and what was asked for.
fn describe(config: &NamespaceConfig) -> Result<NamespaceInfo, ChangeError> {
    if config.nsid == 0 || config.nsid == u32::MAX {
        return Err(invalid(format!("namespace identifier {} is not allowed", config.nsid)));
    }
    if !(1..=ANA_GROUPS_MAX).contains(&config.ana_group) {
        return Err(invalid(format!(
            "ANA group {} is not in 1..={ANA_GROUPS_MAX}",
            config.ana_group
        )));
    }
    let volume = &config.volume;
    let info = namespace_info(config.nsid, &volume.geometry(), &volume.identity());
    Ok(NamespaceInfo { ana_group: config.ana_group, ..info })
}

fn same_volume(a: &Arc<VolumeState>, b: &Arc<dyn block::Volume>) -> bool {
    std::ptr::addr_eq(Arc::as_ptr(&a.volume), Arc::as_ptr(b))
}

/// A new table in the making.
struct Draft<'a> {
    shared: &'a Arc<Shared>,
    table: Table,
    fences: Vec<Scope>,
    retire: Vec<Arc<VolumeState>>,
    ending: Ending,
    /// Subsystems that are not what they were.
    changed: Vec<u32>,
    /// Numbers of volumes that come.
    numbers: Vec<u32>,
}

/// What may be other in a subsystem.
struct Parts {
    namespaces: Vec<Arc<NamespaceState>>,
    hosts: Mask,
    hidden: bool,
    ana: Ana,
}

impl Draft<'_> {
    fn subsystem(&self, nqn: &str) -> Result<Arc<SubsystemState>, ChangeError> {
        self.table.by_nqn(nqn).cloned().ok_or(ChangeError::UnknownSubsystem)
    }

    fn namespace(
        &self,
        nqn: &str,
        nsid: u32,
    ) -> Result<(Arc<SubsystemState>, Arc<NamespaceState>), ChangeError> {
        let subsystem = self.subsystem(nqn)?;
        let ns = subsystem.namespace(nsid).cloned().ok_or(ChangeError::UnknownNamespace)?;
        Ok((subsystem, ns))
    }

    /// Changes a part of a subsystem.
    fn alter(
        &mut self,
        subsystem: &SubsystemState,
        alter: impl FnOnce(&mut Parts),
    ) -> Result<(), ChangeError> {
        let mut parts = Parts {
            namespaces: subsystem.namespaces.clone(),
            hosts: subsystem.hosts.clone(),
            hidden: subsystem.hidden,
            ana: subsystem.ana.clone(),
        };
        alter(&mut parts);
        self.put(Arc::clone(&subsystem.fixed), &subsystem.base, parts)
    }

    fn put(
        &mut self,
        fixed: Arc<Subsystem>,
        empty: &SubsystemInfo,
        parts: Parts,
    ) -> Result<(), ChangeError> {
        let Parts { namespaces, hosts, hidden, ana } = parts;
        let id = fixed.id;
        let generation = self.table.generation;
        let state = SubsystemState::new(fixed, empty, namespaces, hosts, hidden, ana, generation)
            .map_err(ChangeError::Invalid)?;
        self.table.subsystems.insert(id, Arc::new(state));
        self.changed.push(id);
        Ok(())
    }

    /// Changes one namespace.
    fn alter_namespace(
        &mut self,
        subsystem: &SubsystemState,
        changed: NamespaceState,
    ) -> Result<(), ChangeError> {
        self.alter(subsystem, |parts| {
            let nsid = changed.info.nsid;
            if let Some(place) = parts.namespaces.iter_mut().find(|ns| ns.info.nsid == nsid) {
                let (old, new) = (place.info.ana_group, changed.info.ana_group);
                if old != new {
                    parts.ana.member_changed(old);
                    parts.ana.member_changed(new);
                }
                *place = Arc::new(changed);
            }
        })
    }

    fn attached(&mut self, config: &NamespaceConfig) -> Result<Arc<NamespaceState>, ChangeError> {
        let info = describe(config)?;
        let home = self.shared.homes.home(info.uuid).map_err(ChangeError::Reservations)?;
        let info = NamespaceInfo { reservations: true, ptpl: home.has_store(), ..info };
        let index = self.shared.volume_number();
        self.numbers.push(index);
        home.join(index);
        let volume = VolumeState {
            home,
            index,
            serial: self.shared.next_serial.fetch_add(1, Ordering::Relaxed),
            attached: self.table.generation,
            volume: Arc::clone(&config.volume),
        };
        let hosts = Mask::new(config.hosts.clone());
        Ok(Arc::new(NamespaceState { info, volume: Arc::new(volume), hosts }))
    }

    fn add_subsystem(&mut self, config: SubsystemConfig, ana: Ana) -> Result<(), ChangeError> {
        let limits = &self.shared.limits;
        let empty = subsystem_info(&config, Vec::new(), limits).map_err(ChangeError::Invalid)?;
        let nqn = empty.nqn().clone();
        let is_own = nqn.is_discovery() || nqn == *self.table.directory.info.nqn();
        if is_own || self.table.ids.contains_key(&nqn) {
            return Err(ChangeError::InUse);
        }
        let mut parts = Parts {
            namespaces: Vec::new(),
            hosts: Mask::new(config.hosts),
            hidden: config.hidden,
            ana,
        };
        for ns in &config.namespaces {
            if parts
                .namespaces
                .iter()
                .any(|other| other.info.nsid == ns.nsid || same_volume(&other.volume, &ns.volume))
            {
                return Err(ChangeError::InUse);
            }
            parts.ana.member_changed(ns.ana_group);
            parts.namespaces.push(self.attached(ns)?);
        }
        let fixed = Arc::new(Subsystem {
            id: self.shared.next_subsystem.fetch_add(1, Ordering::Relaxed),
            nqn: nqn.clone(),
            counters: self.shared.cores.iter().map(|_| Counters::default()).collect(),
            busy: BusyClock::default(),
            was_reset: AtomicBool::new(false),
        });
        self.table.ids.insert(nqn, fixed.id);
        self.put(fixed, &empty, parts)?;
        self.table.directory.generation += u64::from(!config.hidden);
        Ok(())
    }

    fn remove_subsystem(&mut self, nqn: &str) -> Result<(), ChangeError> {
        let subsystem = self.subsystem(nqn)?;
        let id = subsystem.fixed.id;
        self.table.subsystems.remove(&id);
        self.table.ids.remove(&subsystem.fixed.nqn);
        self.table.directory.generation += u64::from(!subsystem.hidden);
        self.retire = subsystem.namespaces.iter().map(|ns| Arc::clone(&ns.volume)).collect();
        self.ending = Ending::Of(id, None);
        Ok(())
    }

    fn attach(&mut self, nqn: &str, config: &NamespaceConfig) -> Result<(), ChangeError> {
        let subsystem = self.subsystem(nqn)?;
        let is_there = |ns: &Arc<NamespaceState>| same_volume(&ns.volume, &config.volume);
        if subsystem.namespace(config.nsid).is_some() || subsystem.namespaces.iter().any(is_there) {
            return Err(ChangeError::InUse);
        }
        let ns = self.attached(config)?;
        self.alter(&subsystem, |parts| {
            parts.ana.member_changed(ns.info.ana_group);
            parts.namespaces.push(ns);
        })
    }

    fn detach(&mut self, nqn: &str, nsid: u32) -> Result<(), ChangeError> {
        let (subsystem, ns) = self.namespace(nqn, nsid)?;
        self.alter(&subsystem, |parts| {
            parts.namespaces.retain(|other| other.info.nsid != nsid);
            parts.ana.member_changed(ns.info.ana_group);
        })?;
        self.retire.push(Arc::clone(&ns.volume));
        Ok(())
    }

    /// The volume was looked at again before.
    fn refresh(&mut self, nqn: &str, nsid: u32) -> Result<(), ChangeError> {
        let (subsystem, ns) = self.namespace(nqn, nsid)?;
        let volume = &ns.volume.volume;
        let found = namespace_info(nsid, &volume.geometry(), &volume.identity());
        if found.block_bytes != ns.info.block_bytes || found.blocks < ns.info.blocks {
            return Err(invalid(format!(
                "a namespace of {} blocks of {} bytes cannot become one of {} blocks of {} bytes",
                ns.info.blocks, ns.info.block_bytes, found.blocks, found.block_bytes
            )));
        }
        let info =
            NamespaceInfo { blocks: found.blocks, used_bytes: found.used_bytes, ..ns.info.clone() };
        self.alter_namespace(&subsystem, NamespaceState { info, ..NamespaceState::clone(&ns) })
    }

    fn set_namespace_hosts(
        &mut self,
        nqn: &str,
        nsid: u32,
        hosts: Option<Vec<Nqn>>,
    ) -> Result<(), ChangeError> {
        let (subsystem, ns) = self.namespace(nqn, nsid)?;
        self.fences.push(Scope::Volume(ns.volume.index));
        let hosts = Mask::new(hosts);
        self.alter_namespace(&subsystem, NamespaceState { hosts, ..NamespaceState::clone(&ns) })
    }

    fn set_subsystem_hosts(
        &mut self,
        nqn: &str,
        hosts: Option<Vec<Nqn>>,
    ) -> Result<(), ChangeError> {
        let subsystem = self.subsystem(nqn)?;
        let hosts = Mask::new(hosts);
        self.ending = Ending::Of(subsystem.fixed.id, Some(hosts.clone()));
        self.table.directory.generation += u64::from(!subsystem.hidden);
        self.alter(&subsystem, |parts| parts.hosts = hosts)
    }

    fn set_ana(
        &mut self,
        nqn: Option<&str>,
        port: u16,
        group: u32,
        state: AnaState,
    ) -> Result<(), ChangeError> {
        let found = self.table.port(port);
        if found.is_none_or(|port| port.kind != ListenerKind::Io) {
            return Err(invalid(format!("there is no I/O port {port}")));
        }
        if !(1..=ANA_GROUPS_MAX).contains(&group) {
            return Err(invalid(format!("ANA group {group} is not in 1..={ANA_GROUPS_MAX}")));
        }
        let subsystems: Vec<_> = match nqn {
            Some(nqn) => vec![self.subsystem(nqn)?],
            None => self.table.subsystems.values().cloned().collect(),
        };
        let mut volumes = Vec::new();
        for subsystem in subsystems {
            self.alter(&subsystem, |parts| {
                parts.ana.set(port, group, state);
            })?;
            let of_group = subsystem.namespaces.iter().filter(|ns| ns.info.ana_group == group);
            volumes.extend(of_group.map(|ns| ns.volume.index));
        }
        if state.refusal().is_some() {
            volumes.sort_unstable();
            self.fences.push(Scope::Path { port, volumes });
        }
        Ok(())
    }

    fn move_namespace(&mut self, nqn: &str, nsid: u32, group: u32) -> Result<(), ChangeError> {
        let (subsystem, ns) = self.namespace(nqn, nsid)?;
        if !(1..=ANA_GROUPS_MAX).contains(&group) {
            return Err(invalid(format!("ANA group {group} is not in 1..={ANA_GROUPS_MAX}")));
        }
        self.fences.push(Scope::Volume(ns.volume.index));
        let info = NamespaceInfo { ana_group: group, ..ns.info.clone() };
        self.alter_namespace(&subsystem, NamespaceState { info, ..NamespaceState::clone(&ns) })
    }

    fn set_write_protect(
        &mut self,
        nqn: &str,
        nsid: u32,
        protect: bool,
    ) -> Result<(), ChangeError> {
        let (subsystem, ns) = self.namespace(nqn, nsid)?;
        self.fences.push(Scope::Volume(ns.volume.index));
        let info = NamespaceInfo { write_protect: protect, ..ns.info.clone() };
        self.alter_namespace(&subsystem, NamespaceState { info, ..NamespaceState::clone(&ns) })
    }

    fn disconnect_host(&mut self, nqn: Option<&str>, hostnqn: &Nqn) -> Result<(), ChangeError> {
        let served = match nqn {
            Some(nqn) => Some(Served::Subsystem(self.subsystem(nqn)?.fixed.id)),
            None => None,
        };
        let mut list = self.shared.registry.list(served);
        list.retain(|association| association.host.hostnqn == hostnqn.as_str());
        for association in &list {
            association.kill();
        }
        self.ending = Ending::These(list);
        Ok(())
    }

    fn apply(&mut self, request: Request) -> Result<(), ChangeError> {
        match request {
            Request::AddSubsystem(config) => self.add_subsystem(config, Ana::default()),
            Request::RemoveSubsystem { nqn } => self.remove_subsystem(&nqn),
            Request::Attach { nqn, namespace } => self.attach(&nqn, &namespace),
            Request::Detach { nqn, nsid } => self.detach(&nqn, nsid),
            Request::Refresh { nqn, nsid } => self.refresh(&nqn, nsid),
            Request::NamespaceHosts { nqn, nsid, hosts } => {
                self.set_namespace_hosts(&nqn, nsid, hosts)
            }
            Request::SubsystemHosts { nqn, hosts } => self.set_subsystem_hosts(&nqn, hosts),
            Request::Ana { nqn, port, group, state } => {
                self.set_ana(nqn.as_deref(), port, group, state)
            }
            Request::MoveNamespace { nqn, nsid, group } => self.move_namespace(&nqn, nsid, group),
            Request::WriteProtect { nqn, nsid, protect } => {
                self.set_write_protect(&nqn, nsid, protect)
            }
            Request::DisconnectHost { nqn, hostnqn } => {
                self.disconnect_host(nqn.as_deref(), &hostnqn)
            }
            Request::Referrals(referrals) => {
                self.table.directory.referrals = referrals.into();
                self.table.directory.generation += 1;
                Ok(())
            }
        }
    }

    /// Puts it in force.
    fn publish(self) -> Change {
        let Draft { shared, table, fences, retire, ending, changed, .. } = self;
        let mut views = Vec::new();
        for subsystem in changed.iter().filter_map(|id| table.subsystems.get(id)) {
            for association in shared.registry.list(Some(Served::Subsystem(subsystem.fixed.id))) {
                views.push(subsystem.view(association.port, &association.host.hostnqn));
            }
        }
        shared.publish(table);
        if let Ending::Of(id, mask) = &ending {
            // Cores end those that they find, too, and those that they let in by the table before.
            // But a core may see only the next table, in which a host has its rights back.
            for association in shared.registry.list(Some(Served::Subsystem(*id))) {
                if mask.as_ref().is_none_or(|mask| !mask.admits(&association.host.hostnqn)) {
                    association.kill();
                }
            }
        }
        // At least one: a change is finished when every core has taken it up.
        let mut fences: Vec<_> = fences.into_iter().map(|scope| shared.fence(scope)).collect();
        if !retire.is_empty() {
            fences.push(shared.retire(retire.iter().map(|volume| volume.index).collect()));
        }
        if fences.is_empty() {
            fences.push(shared.fence(Scope::Table));
        }
        let shared = Arc::clone(shared);
        Change { shared, fences, ending, _views: views, _volumes: retire }
    }
}

fn draft(shared: &Arc<Shared>) -> Draft<'_> {
    let mut table = Table::clone(&shared.table());
    table.generation += 1;
    Draft {
        shared,
        table,
        fences: Vec::new(),
        retire: Vec::new(),
        ending: Ending::Nobody,
        changed: Vec::new(),
        numbers: Vec::new(),
    }
}

/// Makes a change from any thread, also from a core: nothing is waited for but other changes in the
/// making.
pub(crate) fn begin(shared: &Arc<Shared>, request: Request) -> Result<Change, ChangeError> {
    let _one = shared.changing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut draft = draft(shared);
    if let Err(error) = draft.apply(request) {
        shared.free_numbers(&draft.numbers);
        return Err(error);
    }
    Ok(draft.publish())
}

/// Adds a subsystem before there are cores.
pub(crate) fn set_up(
    shared: &Arc<Shared>,
    config: SubsystemConfig,
    ana: Ana,
) -> Result<(), SetupError> {
    let mut seen: Vec<u32> = config.namespaces.iter().map(|ns| ns.nsid).collect();
    seen.sort_unstable();
    let twice = seen.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
    if let Some(nsid) = twice.or(seen.into_iter().find(|nsid| *nsid == 0 || *nsid == u32::MAX)) {
        return Err(SetupError::Nsid { nqn: config.nqn, nsid });
    }
    let nqn = config.nqn.clone();
    let mut draft = draft(shared);
    draft
        .add_subsystem(config, ana)
        .map_err(|error| SetupError::Subsystem { nqn, reason: error.to_string() })?;
    // No core runs yet: nothing is to be waited for.
    let _ = draft.publish();
    Ok(())
}

impl Target {
    /// Makes a change and returns at once: it is in force, and the [`Change`] tells when no I/O of
    /// before can land any more. The other methods make one and wait for that.
    ///
    /// # Errors
    /// Those of the method that the request is named after, but [`ChangeError::StillDraining`].
    pub fn begin(&self, request: Request) -> Result<Change, ChangeError> {
        if let Request::Refresh { nqn, nsid } = &request {
            let table = self.shared.table();
            let subsystem = table.by_nqn(nqn).ok_or(ChangeError::UnknownSubsystem)?;
            let ns = subsystem.namespace(*nsid).ok_or(ChangeError::UnknownNamespace)?;
            // This may take its time: other changes go on.
            ns.volume.volume.refresh().map_err(ChangeError::Volume)?;
        }
        begin(&self.shared, request)
    }

    fn change(&self, request: Request) -> Result<(), ChangeError> {
        self.begin(request)?.wait(self.shared.limits.change_wait)
    }

    /// Serves another subsystem from now on.
    ///
    /// # Errors
    /// The NQN or a volume is taken, or the subsystem is not possible.
    pub fn add_subsystem(&self, subsystem: SubsystemConfig) -> Result<(), ChangeError> {
        self.change(Request::AddSubsystem(subsystem))
    }

    /// Ends a subsystem and all associations with it.
    ///
    /// # Errors
    /// There is no such subsystem, or its I/O takes longer than
    /// [`Limits::change_wait`](crate::Limits::change_wait).
    pub fn remove_subsystem(&self, nqn: &str) -> Result<(), ChangeError> {
        self.change(Request::RemoveSubsystem { nqn: nqn.to_owned() })
    }

    /// Adds a namespace to a subsystem. Its hosts are told.
    ///
    /// # Errors
    /// There is no such subsystem, or the identifier or the volume is taken.
    pub fn attach(&self, nqn: &str, namespace: NamespaceConfig) -> Result<(), ChangeError> {
        self.change(Request::Attach { nqn: nqn.to_owned(), namespace })
    }

    /// Takes a namespace away. The target does not use its volume any more when this returns: it
    /// is closed as soon as the caller drops it, too.
    ///
    /// # Errors
    /// There is none, or its I/O takes longer than
    /// [`Limits::change_wait`](crate::Limits::change_wait).
    pub fn detach(&self, nqn: &str, nsid: u32) -> Result<(), ChangeError> {
        self.change(Request::Detach { nqn: nqn.to_owned(), nsid })
    }

    /// Looks at a namespace's volume again and tells hosts its new size.
    ///
    /// # Errors
    /// There is none, the volume cannot be read or has become smaller.
    pub fn refresh(&self, nqn: &str, nsid: u32) -> Result<(), ChangeError> {
        self.change(Request::Refresh { nqn: nqn.to_owned(), nsid })
    }

    /// Which hosts see a namespace from now on; `None`: all that may use the subsystem.
    ///
    /// # Errors
    /// There is none, or I/O to it takes longer than
    /// [`Limits::change_wait`](crate::Limits::change_wait).
    pub fn set_namespace_hosts(
        &self,
        nqn: &str,
        nsid: u32,
        hosts: Option<Vec<Nqn>>,
    ) -> Result<(), ChangeError> {
        self.change(Request::NamespaceHosts { nqn: nqn.to_owned(), nsid, hosts })
    }

    /// Which hosts may connect from now on; `None`: all. Associations of others end.
    ///
    /// # Errors
    /// There is no such subsystem, or their I/O takes longer than
    /// [`Limits::change_wait`](crate::Limits::change_wait).
    pub fn set_subsystem_hosts(
        &self,
        nqn: &str,
        hosts: Option<Vec<Nqn>>,
    ) -> Result<(), ChangeError> {
        self.change(Request::SubsystemHosts { nqn: nqn.to_owned(), hosts })
    }

    /// The state of an ANA group on a port, in one subsystem or in all of them. When a state that
    /// refuses I/O is set, what hosts have sent through the port before has ended on return.
    ///
    /// # Errors
    /// There is no such subsystem or I/O port, or I/O through it takes longer than
    /// [`Limits::change_wait`](crate::Limits::change_wait).
    pub fn set_ana(
        &self,
        nqn: Option<&str>,
        port: u16,
        group: u32,
        state: AnaState,
    ) -> Result<(), ChangeError> {
        self.change(Request::Ana { nqn: nqn.map(str::to_owned), port, group, state })
    }

    /// Moves a namespace to another ANA group.
    ///
    /// # Errors
    /// There is no such namespace, or the group is not possible.
    pub fn move_namespace(&self, nqn: &str, nsid: u32, group: u32) -> Result<(), ChangeError> {
        self.change(Request::MoveNamespace { nqn: nqn.to_owned(), nsid, group })
    }

    /// Refuses writes to a namespace from now on, or takes them again.
    ///
    /// # Errors
    /// There is no such namespace, or I/O to it takes longer than
    /// [`Limits::change_wait`](crate::Limits::change_wait).
    pub fn set_write_protect(
        &self,
        nqn: &str,
        nsid: u32,
        protect: bool,
    ) -> Result<(), ChangeError> {
        self.change(Request::WriteProtect { nqn: nqn.to_owned(), nsid, protect })
    }

    /// Ends the associations that a host has now, in one subsystem or everywhere. It may come back.
    ///
    /// # Errors
    /// There is no such subsystem, or the host's I/O takes longer than
    /// [`Limits::change_wait`](crate::Limits::change_wait).
    pub fn disconnect_host(&self, nqn: Option<&str>, hostnqn: &Nqn) -> Result<(), ChangeError> {
        let (nqn, hostnqn) = (nqn.map(str::to_owned), hostnqn.clone());
        self.change(Request::DisconnectHost { nqn, hostnqn })
    }

    /// Replaces the discovery log's entries of other discovery subsystems.
    ///
    /// # Errors
    /// A core does not answer for [`Limits::change_wait`](crate::Limits::change_wait).
    pub fn set_referrals(&self, referrals: Vec<DiscoveryEntry>) -> Result<(), ChangeError> {
        self.change(Request::Referrals(referrals))
    }
}
