//! Associations: which controllers exist, who they belong to and which of their queues are alive.
//!
//! The registry is shared by all cores and locked only when a queue is connected or torn down. What
//! the data path needs of it is in [`Association`] and atomic.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use nvme::ctrl::Instance;

use crate::abort::{Abort, Aborts};
use crate::counters::QueueCounters;
use crate::letters::Letters;
use crate::limits::Account;
use crate::state::HostStatus;

/// Which subsystem an association is with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// Identifier of the subsystem in the table.
    Subsystem(u32),
    /// The discovery subsystem.
    Discovery,
}

/// Who connected: a host is its NQN and its identifier together (NVMe Base 2.0, Host Identifier).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HostKey {
    pub(crate) hostnqn: String,
    pub(crate) hostid: [u8; 16],
}

/// Why a queue cannot join.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// As many controllers as are allowed exist.
    Controllers,
    /// The host has as many controllers as it may.
    ControllersOfHost,
    /// The host has as many queues as it may.
    QueuesOfHost,
    /// No such controller, or it belongs to another host or subsystem.
    UnknownController,
    /// The controller is being reset or torn down, or was never enabled.
    NotReady,
    /// The queue exists, or was not granted by Set Features.
    QueueIdentifier,
}

/// One host's connection to one controller; all of its queues hold an `Arc` of it.
#[derive(Debug)]
pub(crate) struct Association {
    pub(crate) cntlid: u16,
    /// Which of the controllers that had this identifier it is.
    pub(crate) instance: Instance,
    pub(crate) served: Served,
    pub(crate) host: HostKey,
    /// The port that all of its queues come through.
    pub(crate) port: u16,
    /// Address of the host's end of the admin queue.
    pub(crate) peer: String,
    /// How the admin queue is encrypted, if it is. The other queues are, too, or they are not.
    pub(crate) tls: Option<String>,
    /// How the host has proven itself in band, if it has.
    authenticated: Mutex<Option<String>>,
    /// What the host uses; shared by all associations of its NQN. There is none before the host has
    /// proven to be who it says, where it has to.
    account: OnceLock<Arc<Account>>,
    /// Set once and for good: every queue closes when it sees this.
    dead: AtomicBool,
    /// CC.EN is 1 and CSTS.RDY is: I/O queues may connect.
    ready: AtomicBool,
    /// I/O queues of an older epoch close: a controller reset ends them, the admin queue stays.
    io_epoch: AtomicU32,
    /// I/O queues granted by Set Features.
    granted: AtomicU16,
    /// Some queue got a command since the admin queue last looked (traffic-based keep alive).
    touched: AtomicBool,
    /// Queues not yet torn down, the admin queue among them. I/O of the host can land while a
    /// queue is counted here: a queue leaves only when its last I/O is back.
    queues: AtomicUsize,
    io_queues: AtomicUsize,
    connected: Mutex<Vec<u16>>,
    /// What the host wants aborted on the I/O queues.
    pub(crate) aborts: Aborts,
    /// I/O of its queues.
    pub(crate) counters: QueueCounters,
    /// What is to be told to the controller.
    pub(crate) letters: Letters,
}

impl Association {
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub(crate) fn kill(&self) {
        self.dead.store(true, Ordering::Release);
    }

    /// Whether the host has proven to be who it says, or does not have to.
    pub(crate) fn is_proven(&self) -> bool {
        self.account.get().is_some()
    }

    /// What the host uses, once it is proven.
    pub(crate) fn account(&self) -> Option<&Arc<Account>> {
        self.account.get()
    }

    pub(crate) fn set_authenticated(&self, how: &str) {
        *self.authenticated.lock().unwrap_or_else(PoisonError::into_inner) = Some(how.to_owned());
    }

    pub(crate) fn authenticated(&self) -> Option<String> {
        self.authenticated.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    pub(crate) fn grant(&self, queues: u16) {
        self.granted.store(queues, Ordering::Release);
    }

    pub(crate) fn io_epoch(&self) -> u32 {
        self.io_epoch.load(Ordering::Acquire)
    }

    /// Ends all I/O queues; [`Self::io_queues`] tells when the last has drained.
    pub(crate) fn end_io_queues(&self) {
        self.set_ready(false);
        self.io_epoch.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn io_queues(&self) -> usize {
        self.io_queues.load(Ordering::Acquire)
    }

    /// Notes traffic on a queue; a plain store when it is noted already.
    pub(crate) fn touch(&self) {
        if !self.touched.load(Ordering::Relaxed) {
            self.touched.store(true, Ordering::Relaxed);
        }
    }

    pub(crate) fn take_touched(&self) -> bool {
        self.touched.swap(false, Ordering::Relaxed)
    }

    /// Whether all its queues are torn down.
    pub(crate) fn is_gone(&self) -> bool {
        self.queues.load(Ordering::Acquire) == 0
    }

    /// Asks I/O queue `qid` to abort a command; the caller wakes the cores. `None`: there is no such
    /// queue.
    pub(crate) fn abort(&self, qid: u16, cid: u16) -> Option<Arc<Abort>> {
        // A queue that goes is taken off the list before it answers for its commands: either it is
        // off here, or it finds this one.
        let connected = self.connected();
        connected.contains(&qid).then(|| self.aborts.ask(qid, cid))
    }

    /// Whether I/O queue `qid` may be connected beside those that are.
    fn may_join(&self, connected: &[u16], qid: u16) -> Result<(), Refusal> {
        if self.is_dead() || !self.ready.load(Ordering::Acquire) {
            return Err(Refusal::NotReady);
        }
        if qid == 0 || qid > self.granted.load(Ordering::Acquire) || connected.contains(&qid) {
            return Err(Refusal::QueueIdentifier);
        }
        Ok(())
    }

    fn connected(&self) -> MutexGuard<'_, Vec<u16>> {
        self.connected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All associations of the target.
#[derive(Debug)]
pub(crate) struct Registry {
    associations: Mutex<Table>,
    bounds: Bounds,
    /// What queues use whose hosts have not proven to be who they say. It is not the named hosts':
    /// who knows a name could use up what they have.
    unproven: Arc<Account>,
}

/// How much there may be.
#[derive(Clone, Debug)]
pub(crate) struct Bounds {
    pub(crate) controllers: usize,
    pub(crate) controllers_per_host: usize,
    pub(crate) queues_per_host: usize,
    /// Cores of the target, which count a host's memory each by itself.
    pub(crate) cores: usize,
}

/// Who asks for a controller, and where.
pub(crate) struct Applicant<'a> {
    pub(crate) served: Served,
    pub(crate) host: HostKey,
    pub(crate) port: u16,
    pub(crate) peer: &'a str,
    /// How the connection is encrypted, if it is.
    pub(crate) tls: Option<&'a str>,
    /// The host has proven to be who it says, or does not have to. Nothing counts as that host's
    /// before: [`Registry::prove`].
    pub(crate) is_proven: bool,
}

/// A host NQN, whatever the host identifiers are that it is used with.
#[derive(Debug)]
struct Host {
    queues: usize,
    /// Its controllers.
    cntlids: Vec<u16>,
    account: Arc<Account>,
}

/// Hosts without any queue whose spent admin commands are still remembered.
const GONE_MAX: usize = 1024;

#[derive(Debug)]
struct Table {
    hosts: HashMap<String, Host>,
    /// Hosts that had no queue left, in that order; some may be back, or stand here twice.
    gone: VecDeque<String>,
    by_cntlid: BTreeMap<u16, Arc<Association>>,
    /// Those of them whose hosts are proven.
    proven: usize,
    next_cntlid: u16,
    next_ciu: u8,
}

impl Table {
    /// The controllers of a host.
    fn of_host<'a>(&'a self, host: &'a HostKey) -> impl Iterator<Item = &'a Arc<Association>> {
        let cntlids = self.hosts.get(&host.hostnqn).map_or(&[][..], |found| &found.cntlids[..]);
        cntlids
            .iter()
            .filter_map(|cntlid| self.by_cntlid.get(cntlid))
            .filter(move |a| a.host == *host)
    }

    /// Whether there is room for another controller of a host.
    fn room(&self, bounds: &Bounds, hostnqn: &str) -> Result<(), Refusal> {
        if self.proven >= bounds.controllers || self.by_cntlid.len() >= CNTLID_MAX as usize {
            return Err(Refusal::Controllers);
        }
        let known = self.hosts.get(hostnqn);
        let (queues, controllers) = known.map_or((0, 0), |h| (h.queues, h.cntlids.len()));
        if controllers >= bounds.controllers_per_host {
            return Err(Refusal::ControllersOfHost);
        }
        if queues >= bounds.queues_per_host {
            return Err(Refusal::QueuesOfHost);
        }
        Ok(())
    }

    /// A controller is its host's from now on, with its admin queue.
    fn count(&mut self, bounds: &Bounds, association: &Association) {
        let hostnqn = association.host.hostnqn.clone();
        let known = self.hosts.entry(hostnqn).or_insert_with(|| Host {
            queues: 0,
            cntlids: Vec::new(),
            account: Arc::new(Account::new(bounds.cores)),
        });
        known.queues += 1;
        known.cntlids.push(association.cntlid);
        let is_first = association.account.set(Arc::clone(&known.account)).is_ok();
        debug_assert!(is_first, "a controller is counted once");
        self.proven += 1;
    }

    /// An I/O queue is its host's from now on.
    fn count_queue(
        &mut self,
        bounds: &Bounds,
        association: &Association,
        connected: &mut Vec<u16>,
        qid: u16,
    ) -> Result<(), Refusal> {
        if let Some(known) = self.hosts.get_mut(&association.host.hostnqn) {
            if known.queues >= bounds.queues_per_host {
                return Err(Refusal::QueuesOfHost);
            }
            known.queues += 1;
        }
        connected.push(qid);
        association.queues.fetch_add(1, Ordering::AcqRel);
        association.io_queues.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// A host has no queue left; the one that is so for longest is forgotten if there are many.
    fn note_gone(&mut self, hostnqn: &str) {
        self.gone.push_back(hostnqn.to_owned());
        if self.gone.len() > GONE_MAX
            && let Some(oldest) = self.gone.pop_front()
            && self.hosts.get(&oldest).is_some_and(|host| host.queues == 0)
        {
            self.hosts.remove(&oldest);
        }
    }
}

/// Controller identifiers FFF0h and above are reserved (NVMe Base 2.0, Connect command).
const CNTLID_MAX: u16 = 0xffef;

impl Registry {
    pub(crate) fn new(bounds: Bounds) -> Registry {
        let associations = Mutex::new(Table {
            hosts: HashMap::new(),
            gone: VecDeque::new(),
            by_cntlid: BTreeMap::new(),
            proven: 0,
            next_cntlid: 1,
            next_ciu: 1,
        });
        let unproven = Arc::new(Account::new(bounds.cores));
        Registry { associations, bounds, unproven }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.associations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates an association; its one queue is the admin queue.
    ///
    /// `random` makes its instance number, which only its own host is told.
    pub(crate) fn create(
        &self,
        applicant: Applicant<'_>,
        random: u64,
    ) -> Result<Arc<Association>, Refusal> {
        let Applicant { served, host, port, peer, tls, is_proven } = applicant;
        let mut table = self.table();
        table.room(&self.bounds, &host.hostnqn)?;
        // Identifiers go round, so that a late queue of a dead controller finds no namesake.
        let mut cntlid = table.next_cntlid;
        while table.by_cntlid.contains_key(&cntlid) {
            cntlid = if cntlid >= CNTLID_MAX { 1 } else { cntlid + 1 };
        }
        table.next_cntlid = if cntlid >= CNTLID_MAX { 1 } else { cntlid + 1 };
        let instance = Instance { ciu: table.next_ciu, cirn: random.max(1) };
        table.next_ciu = if table.next_ciu == u8::MAX { 1 } else { table.next_ciu + 1 };
        let association = Arc::new(Association {
            cntlid,
            instance,
            served,
            host,
            port,
            peer: peer.to_owned(),
            tls: tls.map(str::to_owned),
            authenticated: Mutex::default(),
            account: OnceLock::new(),
            dead: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            io_epoch: AtomicU32::new(0),
            granted: AtomicU16::new(0),
            touched: AtomicBool::new(true),
            queues: AtomicUsize::new(1),
            io_queues: AtomicUsize::new(0),
            connected: Mutex::new(Vec::new()),
            aborts: Aborts::default(),
            counters: QueueCounters::default(),
            letters: Letters::default(),
        });
        if is_proven {
            table.count(&self.bounds, &association);
        }
        table.by_cntlid.insert(cntlid, Arc::clone(&association));
        Ok(association)
    }

    /// What queues use whose hosts have not proven to be who they say, all of them together.
    pub(crate) fn unproven(&self) -> Arc<Account> {
        Arc::clone(&self.unproven)
    }

    /// The host of a queue has proven to be who it says: the queue, with epoch `epoch` if it is one for
    /// I/O, counts among those of the host from now on.
    pub(crate) fn prove(
        &self,
        association: &Association,
        qid: u16,
        epoch: u32,
    ) -> Result<(), Refusal> {
        let mut table = self.table();
        if qid == 0 {
            table.room(&self.bounds, &association.host.hostnqn)?;
            table.count(&self.bounds, association);
            return Ok(());
        }
        let mut connected = association.connected();
        association.may_join(&connected, qid)?;
        if association.io_epoch() != epoch {
            return Err(Refusal::NotReady);
        }
        table.count_queue(&self.bounds, association, &mut connected, qid)
    }

    /// Joins I/O queue `qid` to controller `cntlid`; returns it with the epoch the queue lives in.
    pub(crate) fn join(
        &self,
        cntlid: u16,
        qid: u16,
        applicant: &Applicant<'_>,
    ) -> Result<(Arc<Association>, u32), Refusal> {
        let mut table = self.table();
        let found = table.by_cntlid.get(&cntlid).ok_or(Refusal::UnknownController)?;
        let association = Arc::clone(found);
        // A controller is of one port, and encrypted or not: what is decided about a path holds for
        // all its queues.
        if association.served != applicant.served
            || association.host != applicant.host
            || association.port != applicant.port
            || association.tls.is_some() != applicant.tls.is_some()
        {
            return Err(Refusal::UnknownController);
        }
        let mut connected = association.connected();
        association.may_join(&connected, qid)?;
        if applicant.is_proven {
            table.count_queue(&self.bounds, &association, &mut connected, qid)?;
        }
        let epoch = association.io_epoch();
        drop(connected);
        Ok((association, epoch))
    }

    /// A queue is torn down whose host has not proven to be who it says.
    pub(crate) fn leave_unproven(&self, association: &Arc<Association>, qid: u16) {
        if qid == 0 {
            let mut table = self.table();
            association.queues.fetch_sub(1, Ordering::AcqRel);
            table.by_cntlid.remove(&association.cntlid);
        }
    }

    /// A queue is torn down: none of its I/O can land any more.
    pub(crate) fn leave(&self, association: &Arc<Association>, qid: u16) {
        if qid != 0 {
            association.connected().retain(|q| *q != qid);
            association.aborts.give_up(Some(qid));
            association.io_queues.fetch_sub(1, Ordering::AcqRel);
        }
        let mut table = self.table();
        let is_last = association.queues.fetch_sub(1, Ordering::AcqRel) == 1;
        if is_last {
            table.by_cntlid.remove(&association.cntlid);
            table.proven -= 1;
        }
        let hostnqn = &association.host.hostnqn;
        if let Some(known) = table.hosts.get_mut(hostnqn) {
            known.queues -= 1;
            if is_last {
                known.cntlids.retain(|cntlid| *cntlid != association.cntlid);
            }
            if known.queues == 0 {
                table.note_gone(hostnqn);
            }
        }
    }

    /// All associations of a subsystem, or all there are.
    pub(crate) fn list(&self, served: Option<Served>) -> Vec<Arc<Association>> {
        let table = self.table();
        let is_meant = |a: &&Arc<Association>| served.is_none_or(|served| a.served == served);
        table.by_cntlid.values().filter(is_meant).cloned().collect()
    }

    /// Whether a dead controller of `host` still has I/O that can land. A new controller of that
    /// host waits for it: what the host sends there must not be overtaken by what it sent before.
    pub(crate) fn is_fenced(&self, served: Served, host: &HostKey) -> bool {
        let table = self.table();
        table.of_host(host).any(|a| a.served == served && a.is_dead())
    }

    /// Whether controller `cntlid` still is what a host means by `instance`: of that host, in that
    /// subsystem, and with I/O that can land. It is told to end.
    pub(crate) fn end_instance(
        &self,
        cntlid: u16,
        instance: Instance,
        served: Served,
        host: &HostKey,
    ) -> bool {
        let table = self.table();
        let Some(association) = table.by_cntlid.get(&cntlid) else { return false };
        let is_meant = association.instance == instance
            && association.served == served
            && association.host == *host;
        if is_meant {
            association.kill();
        }
        is_meant
    }

    /// NVM Subsystem Reset: every controller of the subsystem is told to end.
    pub(crate) fn end_subsystem(&self, served: Served) {
        self.table().by_cntlid.values().filter(|a| a.served == served).for_each(|a| a.kill());
    }

    /// What each host that has a queue uses, by NQN.
    pub(crate) fn hosts(&self) -> Vec<HostStatus> {
        let table = self.table();
        let connected = table.hosts.iter().filter(|(_, host)| host.queues > 0);
        let mut hosts: Vec<HostStatus> = connected
            .map(|(hostnqn, host)| HostStatus {
                hostnqn: hostnqn.clone(),
                controllers: host.cntlids.len(),
                connections: host.queues,
                queue_overruns: host.account.overruns.load(Ordering::Relaxed),
            })
            .collect();
        hosts.sort_by(|a, b| a.hostnqn.cmp(&b.hostnqn));
        hosts
    }

    /// Number of live or draining associations.
    pub(crate) fn len(&self) -> usize {
        self.table().by_cntlid.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(n: u8) -> HostKey {
        HostKey { hostnqn: format!("nqn.2014-08.org.example:{n}"), hostid: [n; 16] }
    }

    const SERVED: Served = Served::Subsystem(0);

    fn applicant(host: HostKey) -> Applicant<'static> {
        let peer = "10.0.0.1:2";
        Applicant { served: SERVED, host, port: 1, peer, tls: None, is_proven: true }
    }

    fn registry(controllers: usize, controllers_per_host: usize) -> Registry {
        Registry::new(Bounds { controllers, controllers_per_host, queues_per_host: 5, cores: 1 })
    }

    fn ready(registry: &Registry, host: HostKey) -> Arc<Association> {
        let association = registry.create(applicant(host), 7).expect("room");
        association.grant(4);
        association.set_ready(true);
        association
    }

    #[test]
    fn io_queue_joins_only_its_own_ready_controller() {
        let registry = registry(10, 10);
        let a = registry.create(applicant(host(1)), 7).expect("room");
        let join =
            |qid, h: HostKey| registry.join(a.cntlid, qid, &applicant(h)).map(|(_, epoch)| epoch);
        assert_eq!(join(1, host(1)), Err(Refusal::NotReady));
        a.grant(2);
        a.set_ready(true);
        assert_eq!(join(1, host(2)), Err(Refusal::UnknownController));
        assert_eq!(join(3, host(1)), Err(Refusal::QueueIdentifier));
        assert_eq!(join(0, host(1)), Err(Refusal::QueueIdentifier));
        assert_eq!(join(1, host(1)), Ok(0));
        assert_eq!(join(1, host(1)), Err(Refusal::QueueIdentifier), "twice the same queue");
        let discovery = Applicant { served: Served::Discovery, ..applicant(host(1)) };
        let other_port = Applicant { port: 2, ..applicant(host(1)) };
        assert_eq!(registry.join(a.cntlid, 2, &other_port).err(), Some(Refusal::UnknownController));
        assert_eq!(registry.join(a.cntlid, 2, &discovery).err(), Some(Refusal::UnknownController));
        assert_eq!(
            registry.join(77, 1, &applicant(host(1))).err(),
            Some(Refusal::UnknownController)
        );
    }

    #[test]
    fn dead_controller_fences_its_host_until_the_last_queue_left() {
        let registry = registry(10, 10);
        let a = ready(&registry, host(1));
        registry.join(a.cntlid, 1, &applicant(host(1))).expect("a queue");
        assert!(!registry.is_fenced(SERVED, &host(1)));
        a.kill();
        registry.leave(&a, 0);
        assert!(registry.is_fenced(SERVED, &host(1)));
        assert!(!registry.is_fenced(SERVED, &host(2)), "others feel nothing");
        registry.leave(&a, 1);
        assert!(!registry.is_fenced(SERVED, &host(1)));
        assert_eq!(registry.len(), 0);
    }

    #[test]
    fn only_its_own_host_ends_a_controller_and_only_the_instance_it_means() {
        let registry = registry(10, 10);
        let a = ready(&registry, host(1));
        let stale = Instance { cirn: a.instance.cirn ^ 1, ..a.instance };
        assert!(!registry.end_instance(a.cntlid, stale, SERVED, &host(1)));
        assert!(!registry.end_instance(a.cntlid, a.instance, SERVED, &host(2)));
        assert!(!registry.end_instance(a.cntlid, a.instance, Served::Discovery, &host(1)));
        assert!(!registry.end_instance(a.cntlid + 1, a.instance, SERVED, &host(1)));
        assert!(!a.is_dead());
        assert!(registry.end_instance(a.cntlid, a.instance, SERVED, &host(1)));
        assert!(a.is_dead());
        registry.leave(&a, 0);
        assert!(!registry.end_instance(a.cntlid, a.instance, SERVED, &host(1)), "it is gone");
    }

    #[test]
    fn reset_ends_io_queues_and_lets_them_come_back() {
        let registry = registry(10, 10);
        let a = ready(&registry, host(1));
        let (_, epoch) = registry.join(a.cntlid, 1, &applicant(host(1))).expect("a queue");
        a.end_io_queues();
        assert_ne!(a.io_epoch(), epoch);
        assert_eq!(a.io_queues(), 1);
        registry.leave(&a, 1);
        assert_eq!(a.io_queues(), 0);
        a.set_ready(true);
        let (_, epoch) = registry.join(a.cntlid, 1, &applicant(host(1))).expect("the same queue");
        assert_eq!(a.io_epoch(), epoch);
    }

    #[test]
    fn controllers_are_bounded_in_all_and_per_host_and_identifiers_go_round() {
        let registry = registry(3, 2);
        let a = ready(&registry, host(1));
        let b = ready(&registry, host(1));
        assert_eq!(registry.create(applicant(host(1)), 7).err(), Some(Refusal::ControllersOfHost));
        let _c = ready(&registry, host(2));
        assert_eq!(registry.create(applicant(host(3)), 7).err(), Some(Refusal::Controllers));
        registry.leave(&a, 0);
        let d = ready(&registry, host(3));
        assert!(d.cntlid != a.cntlid && d.cntlid != b.cntlid);
    }

    #[test]
    fn nothing_counts_as_a_hosts_before_its_proof() {
        let registry = registry(2, 1);
        let unproven = |host| Applicant { is_proven: false, ..applicant(host) };
        // Somebody who knows the name, as often as it takes, and more often than there is room.
        let strangers: Vec<_> =
            (0..9).map(|_| registry.create(unproven(host(1)), 7).expect("room")).collect();
        assert!(registry.hosts().is_empty() && strangers.iter().all(|a| !a.is_proven()));
        let real = registry.create(unproven(host(1)), 7).expect("room");
        registry.prove(&real, 0, 0).expect("the host's first");
        assert_eq!(registry.hosts().len(), 1);
        let refused = registry.prove(&strangers[0], 0, 0).err();
        assert_eq!(refused, Some(Refusal::ControllersOfHost));
        let refused = registry.create(unproven(host(1)), 7).err();
        assert_eq!(refused, Some(Refusal::ControllersOfHost), "which nobody has to prove to hear");
        real.grant(2);
        real.set_ready(true);
        // Nor does it take the place of a queue.
        let join = || registry.join(real.cntlid, 1, &unproven(host(1))).map(|(_, epoch)| epoch);
        let epoch = join().expect("a queue");
        assert_eq!((join(), real.io_queues()), (Ok(epoch), 0));
        registry.prove(&real, 1, epoch).expect("the first that proves itself");
        assert_eq!(registry.prove(&real, 1, epoch).err(), Some(Refusal::QueueIdentifier));
        assert_eq!(registry.prove(&real, 2, epoch + 1).err(), Some(Refusal::NotReady));
        strangers.iter().for_each(|a| registry.leave_unproven(a, 0));
        registry.leave_unproven(&real, 1);
        assert_eq!((real.io_queues(), registry.len()), (1, 1));
        registry.leave(&real, 1);
        registry.leave(&real, 0);
        assert_eq!((registry.len(), registry.hosts().len()), (0, 0));
        assert!(registry.create(applicant(host(2)), 7).is_ok(), "there is room again");
    }

    #[test]
    fn queues_of_a_host_are_bounded_over_all_its_controllers() {
        let registry = registry(10, 10);
        let (a, b) = (ready(&registry, host(1)), ready(&registry, host(1)));
        for qid in 1..=3 {
            registry.join(a.cntlid, qid, &applicant(host(1))).expect("a queue");
        }
        let refused = registry.join(b.cntlid, 1, &applicant(host(1))).err();
        assert_eq!(refused, Some(Refusal::QueuesOfHost));
        assert_eq!(registry.create(applicant(host(1)), 7).err(), Some(Refusal::QueuesOfHost));
        let c = ready(&registry, host(2));
        registry.join(c.cntlid, 1, &applicant(host(2))).expect("others feel nothing");
        registry.leave(&a, 2);
        registry.join(b.cntlid, 1, &applicant(host(1))).expect("room again");
    }

    #[test]
    fn accounts_outlive_a_reconnect_and_are_bounded() {
        let registry = registry(10, 10);
        let first = ready(&registry, host(1));
        let account = Arc::clone(first.account().expect("it is proven"));
        registry.leave(&first, 0);
        let again = ready(&registry, host(1));
        assert!(Arc::ptr_eq(&account, again.account().expect("it is proven")));
        for n in 0..3 * GONE_MAX {
            let hostnqn = format!("nqn.2014-08.org.example:churn{n}");
            registry.leave(&ready(&registry, HostKey { hostnqn, hostid: [1; 16] }), 0);
        }
        let table = registry.table();
        assert!(table.hosts.len() <= GONE_MAX + 1 && table.gone.len() <= GONE_MAX);
        assert!(Arc::ptr_eq(&account, &table.hosts[&host(1).hostnqn].account), "it is in use");
    }

    #[test]
    fn thousand_hosts_come_and_go() {
        let registry = registry(4096, 4);
        let name = |n: usize| HostKey { hostnqn: format!("nqn.org.example:{n}"), hostid: [1; 16] };
        let all: Vec<_> = (0..1000).map(|n| ready(&registry, name(n))).collect();
        for (n, association) in all.iter().enumerate() {
            for qid in 1..=4 {
                registry.join(association.cntlid, qid, &applicant(name(n))).expect("a queue");
            }
            assert!(!registry.is_fenced(SERVED, &name(n)));
        }
        let hosts = registry.hosts();
        assert!(hosts.iter().all(|h| (h.controllers, h.connections) == (1, 5)));
        assert_eq!(hosts.len(), 1000);
        for association in &all {
            (0..=4).rev().for_each(|qid| registry.leave(association, qid));
        }
        assert_eq!((registry.len(), registry.hosts().len()), (0, 0));
    }
}
