//! What is served, as immutable snapshots: a change makes a new table, every core takes it up at the
//! begin of its next turn, and what each controller sees of it is a [`View`].
//!
//! ```text
//!   Table ─► SubsystemState (one per subsystem) ─► NamespaceState ─► VolumeState
//!                 └─► View: what the controllers of one port see, masked for their host; shared by
//!                     all that see the same
//! ```

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nvme::spec::Nqn;
use nvme::spec::discovery::{EFLAGS_DUPRETINFO, EFLAGS_EPCSD, SubsystemType};
use nvme::subsys::ana::{AnaGroup, AnaState};
use nvme::subsys::discovery::{DiscoveryEntry, DiscoveryLog};
use nvme::subsys::{NamespaceInfo, SubsystemInfo};

use crate::busy::BusyClock;
use crate::config::{ListenerKind, Port};
use crate::counters::{Counters, Totals};
use crate::volume::VolumeState;

/// What stays of a subsystem through all its changes.
#[derive(Debug)]
pub(crate) struct Subsystem {
    /// Never used again.
    pub(crate) id: u32,
    pub(crate) nqn: Nqn,
    /// One per core.
    pub(crate) counters: Vec<Counters>,
    /// Time with I/O outstanding.
    pub(crate) busy: BusyClock,
    /// A host has reset it: CSTS.NSSRO of controllers to come.
    pub(crate) was_reset: AtomicBool,
}

impl Subsystem {
    pub(crate) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for counters in &self.counters {
            counters.add_to(&mut totals);
        }
        totals
    }
}

/// Hosts that may do something, sorted; `None`: all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mask(Option<Arc<[Nqn]>>);

impl Mask {
    pub(crate) fn new(hosts: Option<Vec<Nqn>>) -> Mask {
        Mask(hosts.map(|mut hosts| {
            hosts.sort();
            hosts.dedup();
            hosts.into()
        }))
    }

    pub(crate) fn is_open(&self) -> bool {
        self.0.is_none()
    }

    pub(crate) fn admits(&self, hostnqn: &str) -> bool {
        match &self.0 {
            None => true,
            Some(hosts) => hosts.binary_search_by(|host| host.as_str().cmp(hostnqn)).is_ok(),
        }
    }

    pub(crate) fn to_vec(&self) -> Option<Vec<Nqn>> {
        self.0.as_ref().map(|hosts| hosts.to_vec())
    }
}

/// A namespace between two changes.
#[derive(Clone, Debug)]
pub(crate) struct NamespaceState {
    pub(crate) info: NamespaceInfo,
    pub(crate) volume: Arc<VolumeState>,
    pub(crate) hosts: Mask,
}

/// A subsystem between two changes.
#[derive(Debug)]
pub(crate) struct SubsystemState {
    pub(crate) fixed: Arc<Subsystem>,
    /// Everything, in no state: what views are made from.
    pub(crate) base: SubsystemInfo,
    /// By identifier, as in `base`.
    pub(crate) namespaces: Vec<Arc<NamespaceState>>,
    pub(crate) hosts: Mask,
    pub(crate) hidden: bool,
    pub(crate) ana: Ana,
    /// The table's when this came to be.
    pub(crate) generation: u64,
    views: Mutex<BTreeMap<ViewKey, Weak<View>>>,
}

/// A port, and which of the masked namespaces are seen.
type ViewKey = (u16, Vec<u32>);

/// ANA states of a subsystem.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ana {
    /// States that were ever set, by port and group, and how often they changed.
    states: BTreeMap<(u16, u32), (AnaState, u64)>,
    /// How often the namespaces of a group changed; the groups there are.
    members: BTreeMap<u32, u64>,
}

impl Ana {
    /// Returns whether the state is another now.
    pub(crate) fn set(&mut self, port: u16, group: u32, state: AnaState) -> bool {
        self.members.entry(group).or_insert(0);
        let entry = self.states.entry((port, group)).or_insert((AnaState::Optimized, 0));
        if entry.0 == state {
            return false;
        }
        *entry = (state, entry.1 + 1);
        true
    }

    /// A namespace joins or leaves a group.
    pub(crate) fn member_changed(&mut self, group: u32) {
        *self.members.entry(group).or_insert(0) += 1;
    }

    /// The groups as controllers of `port` see them; group 1 is always there.
    pub(crate) fn groups(&self, port: u16) -> Vec<AnaGroup> {
        let of = |id, members: u64| {
            let (state, changes) =
                self.states.get(&(port, id)).copied().unwrap_or((AnaState::Optimized, 0));
            AnaGroup { id, state, change_count: 1 + members + changes }
        };
        let mut groups: Vec<_> = self.members.iter().map(|(id, n)| of(*id, *n)).collect();
        if !self.members.contains_key(&1) {
            groups.insert(0, of(1, 0));
        }
        groups
    }

    pub(crate) fn to_vec(&self, ports: &[Port]) -> Vec<(u16, u32, AnaState)> {
        let io = ports.iter().filter(|port| port.kind == ListenerKind::Io);
        io.flat_map(|port| {
            self.groups(port.id).into_iter().map(|group| (port.id, group.id, group.state))
        })
        .collect()
    }
}

/// What the controllers of one port and of hosts with the same rights see of a subsystem.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) info: Arc<SubsystemInfo>,
    /// Volume of `info.namespaces()[i]`.
    pub(crate) volumes: Vec<Arc<VolumeState>>,
    /// That of the subsystem's state.
    pub(crate) generation: u64,
    pub(crate) subsystem: Arc<Subsystem>,
}

impl SubsystemState {
    /// Checks that all of it can be said to hosts.
    pub(crate) fn new(
        fixed: Arc<Subsystem>,
        empty: &SubsystemInfo,
        mut namespaces: Vec<Arc<NamespaceState>>,
        hosts: Mask,
        hidden: bool,
        ana: Ana,
        generation: u64,
    ) -> Result<SubsystemState, String> {
        namespaces.sort_by_key(|ns| ns.info.nsid);
        let infos = namespaces.iter().map(|ns| ns.info.clone()).collect();
        let base = empty
            .clone()
            .with_ana_groups(Vec::new())
            .and_then(|info| info.with_namespaces(infos))
            .and_then(|info| info.with_ana_groups(ana.groups(0)))
            .map_err(|e| e.to_string())?;
        Ok(SubsystemState {
            fixed,
            base,
            namespaces,
            hosts,
            hidden,
            ana,
            generation,
            views: Mutex::default(),
        })
    }

    pub(crate) fn namespace(&self, nsid: u32) -> Option<&Arc<NamespaceState>> {
        let found = self.namespaces.binary_search_by_key(&nsid, |ns| ns.info.nsid);
        found.ok().map(|at| &self.namespaces[at])
    }

    /// What controllers of `port` show `hostnqn`.
    pub(crate) fn view(&self, port: u16, hostnqn: &str) -> Arc<View> {
        let masked = |ns: &&Arc<NamespaceState>| !ns.hosts.is_open();
        let seen: Vec<u32> = self
            .namespaces
            .iter()
            .filter(masked)
            .filter(|ns| ns.hosts.admits(hostnqn))
            .map(|ns| ns.info.nsid)
            .collect();
        // Two cores may make the same view at the same time: whoever is first with the lock wins,
        // and nobody waits for the making of it more than once.
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(view) = views.get(&(port, seen.clone())).and_then(Weak::upgrade) {
            return view;
        }
        let sees =
            |ns: &NamespaceState| ns.hosts.is_open() || seen.binary_search(&ns.info.nsid).is_ok();
        let visible: Vec<_> = self.namespaces.iter().filter(|ns| sees(ns)).collect();
        let info = self
            .base
            .clone()
            .with_ana_groups(self.ana.groups(port))
            .unwrap_or_else(|_| self.base.clone());
        let info = if visible.len() == self.namespaces.len() {
            info
        } else {
            info.restricted(|ns| visible.binary_search_by_key(&ns.nsid, |v| v.info.nsid).is_ok())
        };
        let view = Arc::new(View {
            info: Arc::new(info),
            volumes: visible.iter().map(|ns| Arc::clone(&ns.volume)).collect(),
            generation: self.generation,
            subsystem: Arc::clone(&self.fixed),
        });
        views.retain(|_, view| view.strong_count() > 0);
        views.insert((port, seen), Arc::downgrade(&view));
        view
    }
}

/// What the discovery log is made from.
#[derive(Clone, Debug)]
pub(crate) struct Directory {
    /// Generation counter: grows with every change of what any host may be told.
    pub(crate) generation: u64,
    pub(crate) referrals: Arc<[DiscoveryEntry]>,
    /// The discovery subsystem's description, under its own NQN if it has one.
    pub(crate) info: Arc<SubsystemInfo>,
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(crate) generation: u64,
    /// By identifier: in the order they came.
    pub(crate) subsystems: BTreeMap<u32, Arc<SubsystemState>>,
    pub(crate) ids: BTreeMap<Nqn, u32>,
    pub(crate) ports: Arc<[Port]>,
    pub(crate) directory: Directory,
}

impl Table {
    pub(crate) fn by_nqn(&self, nqn: &str) -> Option<&Arc<SubsystemState>> {
        let nqn = Nqn::new(nqn).ok()?;
        self.subsystems.get(self.ids.get(&nqn)?)
    }

    pub(crate) fn port(&self, id: u16) -> Option<&Port> {
        self.ports.iter().find(|port| port.id == id)
    }

    /// The discovery log that a host gets through a port. Each subsystem that it may connect to is
    /// there once per I/O port; this discovery subsystem once, for the port that it is read
    /// through: another of its addresses would tell the same again.
    pub(crate) fn discovery_log(&self, port: &Port, hostnqn: &str) -> DiscoveryLog {
        let mut entries = vec![DiscoveryEntry {
            eflags: EFLAGS_DUPRETINFO | EFLAGS_EPCSD,
            ..DiscoveryEntry::tcp(
                SubsystemType::CURRENT_DISCOVERY,
                port.addr,
                port.id,
                self.directory.info.nqn().clone(),
            )
        }];
        let told = self.subsystems.values().filter(|s| !s.hidden && s.hosts.admits(hostnqn));
        for subsystem in told {
            for port in self.ports.iter().filter(|p| p.kind == ListenerKind::Io) {
                let nqn = subsystem.fixed.nqn.clone();
                entries.push(DiscoveryEntry::tcp(SubsystemType::NVM, port.addr, port.id, nqn));
            }
        }
        entries.extend(self.directory.referrals.iter().cloned());
        DiscoveryLog::new(self.directory.generation, &entries)
    }
}
