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
use nvme::spec::discovery::SubsystemType;
use nvme::subsys::ana::{AnaGroup, AnaState};
use nvme::subsys::discovery::{DiscoveryEntry, DiscoveryLog};
use nvme::subsys::{NamespaceInfo, SubsystemInfo};

use crate::busy::BusyClock;
use crate::config::{ListenerKind, Port, Tls};
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
    /// Those that not every host sees.
    masked: Vec<Arc<NamespaceState>>,
    views: Mutex<Views>,
}

/// Views in use.
#[derive(Debug, Default)]
struct Views {
    /// By port and the masked namespaces that are seen: hosts with the same rights share one.
    by_rights: BTreeMap<(u16, Vec<u32>), Weak<View>>,
    /// By host and port, where anything is masked: rights are looked up once per change.
    by_host: BTreeMap<String, BTreeMap<u16, Weak<View>>>,
}

/// Hosts whose views are remembered before those that are gone are forgotten.
const HOSTS_REMEMBERED: usize = 4096;

impl Views {
    fn of_host(&self, port: u16, hostnqn: &str) -> Option<Arc<View>> {
        self.by_host.get(hostnqn)?.get(&port)?.upgrade()
    }

    fn remember(&mut self, port: u16, hostnqn: &str, view: &Arc<View>) {
        if self.by_host.len() >= HOSTS_REMEMBERED {
            let is_used = |view: &Weak<View>| view.strong_count() > 0;
            self.by_host.retain(|_, ports| ports.values().any(is_used));
        }
        let ports = self.by_host.entry(hostnqn.to_owned()).or_default();
        ports.insert(port, Arc::downgrade(view));
    }
}

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
        let masked = namespaces.iter().filter(|ns| !ns.hosts.is_open()).cloned().collect();
        Ok(SubsystemState {
            fixed,
            base,
            namespaces,
            hosts,
            hidden,
            ana,
            generation,
            masked,
            views: Mutex::default(),
        })
    }

    pub(crate) fn namespace(&self, nsid: u32) -> Option<&Arc<NamespaceState>> {
        let found = self.namespaces.binary_search_by_key(&nsid, |ns| ns.info.nsid);
        found.ok().map(|at| &self.namespaces[at])
    }

    /// What controllers of `port` show `hostnqn`.
    pub(crate) fn view(&self, port: u16, hostnqn: &str) -> Arc<View> {
        // Two cores may want the same view at the same time: whoever is first with the lock makes
        // it. Those of connected hosts are made before a change is put in force.
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.masked.is_empty()
            && let Some(view) = views.of_host(port, hostnqn)
        {
            return view;
        }
        let admitting = self.masked.iter().filter(|ns| ns.hosts.admits(hostnqn));
        let seen: Vec<u32> = admitting.map(|ns| ns.info.nsid).collect();
        let key = (port, seen);
        let view = match views.by_rights.get(&key).and_then(Weak::upgrade) {
            Some(view) => view,
            None => {
                let view = Arc::new(self.make_view(port, &key.1));
                views.by_rights.retain(|_, view| view.strong_count() > 0);
                views.by_rights.insert(key, Arc::downgrade(&view));
                view
            }
        };
        if !self.masked.is_empty() {
            views.remember(port, hostnqn, &view);
        }
        view
    }

    /// The view of a port, with these of the masked namespaces.
    fn make_view(&self, port: u16, seen: &[u32]) -> View {
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
        View {
            info: Arc::new(info),
            volumes: visible.iter().map(|ns| Arc::clone(&ns.volume)).collect(),
            generation: self.generation,
            subsystem: Arc::clone(&self.fixed),
        }
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
        let own_nqn = self.directory.info.nqn().clone();
        let own = DiscoveryEntry::own(port.addr, port.id, own_nqn, true);
        let mut entries = vec![with_tls(own, port.tls)];
        let told = self.subsystems.values().filter(|s| !s.hidden && s.hosts.admits(hostnqn));
        for subsystem in told {
            for port in self.ports.iter().filter(|p| p.kind == ListenerKind::Io && !p.hidden) {
                let nqn = subsystem.fixed.nqn.clone();
                let entry = DiscoveryEntry::tcp(SubsystemType::NVM, port.addr, port.id, nqn);
                entries.push(with_tls(entry, port.tls));
            }
        }
        entries.extend(self.directory.referrals.iter().cloned());
        DiscoveryLog::new(self.directory.generation, &entries)
    }
}

/// The entry with what it says of encryption.
fn with_tls(entry: DiscoveryEntry, tls: Tls) -> DiscoveryEntry {
    match tls {
        Tls::Off => entry,
        Tls::Allowed => entry.with_tls(false),
        Tls::Required => entry.with_tls(true),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use nvme::subsys::discovery::{HEADER_LEN, parse_records};

    use super::*;
    use crate::busy::BusyClock;
    use crate::config::AuthDemand;
    use crate::config::{Limits, SubsystemConfig};

    fn nqn(n: u32) -> Nqn {
        Nqn::new(format!("nqn.2014-08.org.example:{n}").as_str()).expect("well formed")
    }

    fn namespace(nsid: u32, hosts: Option<Vec<Nqn>>) -> Arc<NamespaceState> {
        Arc::new(NamespaceState {
            info: NamespaceInfo::new(nsid, 512, 2048),
            volume: Arc::new(VolumeState::sample(nsid)),
            hosts: Mask::new(hosts),
        })
    }

    fn subsystem(
        n: u32,
        namespaces: Vec<Arc<NamespaceState>>,
        hosts: Option<Vec<Nqn>>,
        ana: Ana,
    ) -> SubsystemState {
        let config = SubsystemConfig::new(nqn(n).as_str(), "S");
        let empty = crate::admin::subsystem_info(&config, Vec::new(), &Limits::default());
        let fixed = Subsystem {
            id: n,
            nqn: nqn(n),
            counters: Vec::new(),
            was_reset: AtomicBool::new(false),
            busy: BusyClock::default(),
        };
        let (hosts, empty) = (Mask::new(hosts), empty.expect("sound"));
        SubsystemState::new(Arc::new(fixed), &empty, namespaces, hosts, false, ana, 5)
            .expect("sound")
    }

    #[test]
    fn hosts_with_the_same_rights_share_a_view() {
        let mask = |hosts: &[u32]| Some(hosts.iter().copied().map(nqn).collect());
        let namespaces = vec![
            namespace(4, mask(&[11])),
            namespace(1, None),
            namespace(2, mask(&[11, 12])),
            namespace(3, mask(&[12, 11])),
        ];
        let subsystem = subsystem(1, namespaces, None, Ana::default());
        let nsids = |view: &View| view.info.namespaces().iter().map(|ns| ns.nsid).collect();
        let view = |port, host| subsystem.view(port, nqn(host).as_str());
        let seen: [Vec<u32>; 3] = [11, 12, 13].map(|host| nsids(&view(1, host)));
        assert_eq!(seen, [vec![1, 2, 3, 4], vec![1, 2, 3], vec![1]]);
        let (a, b) = (view(1, 13), view(1, 14));
        assert!(Arc::ptr_eq(&a, &b), "neither sees anything that is masked");
        assert!(Arc::ptr_eq(&a, &view(1, 13)));
        assert!(!Arc::ptr_eq(&a, &view(2, 13)), "ports may differ in their ANA states");
        for (index, ns) in view(1, 12).info.namespaces().iter().enumerate() {
            assert_eq!(view(1, 12).volumes[index].index, ns.nsid, "volumes lie beside");
        }
        // A view that nobody uses is not kept.
        let weak = Arc::downgrade(&a);
        drop((a, b));
        assert!(weak.upgrade().is_none());
    }

    #[test]
    fn ana_states_are_those_of_the_port_and_counts_grow() {
        let mut ana = Ana::default();
        ana.member_changed(1);
        assert!(ana.set(2, 3, AnaState::Inaccessible));
        assert!(!ana.set(2, 3, AnaState::Inaccessible), "nothing new");
        let states = |ana: &Ana, port| -> Vec<_> {
            ana.groups(port).iter().map(|g| (g.id, g.state, g.change_count)).collect()
        };
        assert_eq!(states(&ana, 1), [(1, AnaState::Optimized, 2), (3, AnaState::Optimized, 1)]);
        assert_eq!(states(&ana, 2), [(1, AnaState::Optimized, 2), (3, AnaState::Inaccessible, 2)]);
        ana.set(2, 3, AnaState::Optimized);
        ana.member_changed(3);
        assert_eq!(states(&ana, 2)[1], (3, AnaState::Optimized, 4), "never the same number again");
        assert_eq!(states(&Ana::default(), 1), [(1, AnaState::Optimized, 1)], "always group 1");
    }

    #[test]
    fn discovery_log_tells_each_host_what_it_may_use_and_itself_once() {
        let (tls, auth) = (Tls::Off, AuthDemand::default());
        let addr = |n: u8| SocketAddr::from(([10, 0, 0, n], 4420));
        let port = |id, kind| Port { id, kind, addr: addr(id as u8), tls, auth, hidden: id == 4 };
        let ports: Arc<[Port]> = Arc::new([
            port(1, ListenerKind::Io),
            port(2, ListenerKind::Io),
            port(3, ListenerKind::Discovery),
            port(4, ListenerKind::Io),
        ]);
        let info = crate::admin::discovery_info(Some(&nqn(99)), &Limits::default());
        let referral = DiscoveryEntry::tcp(SubsystemType::REFERRAL, addr(9), 0, nqn(98));
        let all = [
            subsystem(1, Vec::new(), None, Ana::default()),
            subsystem(2, Vec::new(), Some(vec![nqn(11)]), Ana::default()),
            SubsystemState { hidden: true, ..subsystem(3, Vec::new(), None, Ana::default()) },
        ];
        let table = Table {
            generation: 1,
            ids: all.iter().map(|s| (s.fixed.nqn.clone(), s.fixed.id)).collect(),
            subsystems: all.into_iter().map(|s| (s.fixed.id, Arc::new(s))).collect(),
            ports,
            directory: Directory {
                generation: 7,
                referrals: Arc::new([referral]),
                info: Arc::new(info.expect("sound")),
            },
        };
        let told = |port: u16, host: u32| -> Vec<(Nqn, u16)> {
            let port = table.port(port).expect("there");
            let log = table.discovery_log(port, nqn(host).as_str());
            assert_eq!(log.genctr(), 7);
            let records = parse_records(&log.bytes()[HEADER_LEN..]);
            records.map(|r| r.expect("sound")).map(|r| (r.subnqn, r.portid)).collect()
        };
        let (itself, one, two) = (nqn(99), nqn(1), nqn(2));
        let other = (nqn(98), 0);
        assert_eq!(
            told(3, 11),
            [
                (itself.clone(), 3),
                (one.clone(), 1),
                (one.clone(), 2),
                (two.clone(), 1),
                (two, 2),
                other.clone()
            ]
        );
        assert_eq!(told(1, 12), [(itself, 1), (one.clone(), 1), (one, 2), other]);
    }
}
