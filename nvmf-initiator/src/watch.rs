//! Paths by discovery: asks discovery controllers, stays connected to be told of changes, and gives
//! volumes the paths that the logs name.
//!
//! ```text
//!  configured ─► Node ── log ─┬─ entries of the subsystem ─► union ─► Shared::want_paths
//!  addresses     Link,        └─ referrals ─► more Nodes
//!                nvme::host::discovery::Client
//! ```
//!
//! A *node* is a discovery controller. What it said last counts until it says something else: one
//! that is away takes no path with it. Controllers are known by their address, so that referrals
//! in a circle end; there are at most [`NODES_MAX`], at most [`DEPTH_MAX`] referrals from a
//! configured one.
//!
//! Whatever a log holds, what is kept of it is bounded: addresses of paths and referrals, and the
//! first few reasons for leaving entries out.
//!
//! Connections are encrypted and authenticated as [`WatchConfig::security`] says, those to referrals
//! as well, whatever the log says of these: with TLS nobody on the way can name a path. A
//! TLS key is used under the NQN of the discovery subsystem that is asked, so it is another key on the
//! wire than that of the volumes although it is made from the same one.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crypto::dhchap::Outcome;
use crypto::psk::IdentityVersion;
use nvme::host::discovery::{Client, ClientConfig, ClientState, Discovered};
use nvme::host::{AdminCommand, Authenticate, Backoff, ConnectNames, TAGS};
use nvme::spec::discovery::{SubsystemType, TREQ_SECURE_MASK, TREQ_SECURE_REQUIRED, TransportType};
use nvme::spec::{Cqe, Nqn};
use nvme::subsys::discovery::{DiscoveryEntry, InvalidEntry};
use nvme::tcp::{HostConfig, HostEvent};
use reactor::{CoreHandle, Local, Progress, Task};

use crate::auth::{self, Auth, Computing, RECEIVE_BYTES, Worker};
use crate::config::{ConfigError, PATHS_MAX, PathConfig};
use crate::link::{Link, Loss};
use crate::security::{Offers, Security, Tls};
use crate::shared::{Phase, Shared};
use crate::slots::Slots;
use crate::subsystem::RemoteSubsystem;
use crate::volume::RemoteVolume;

/// Most discovery controllers that are asked, referrals included.
const NODES_MAX: usize = 8;
/// Longest chain of referrals.
const DEPTH_MAX: u8 = 3;
/// Reasons for leaving entries out that are kept of each log.
const REFUSED_MAX: usize = 4;
/// The commands of an authentication go under this cid, behind those of the client.
const AUTH_TAG: u16 = TAGS;

/// Where to look for the paths of volumes.
#[derive(Clone, Debug)]
pub struct WatchConfig {
    /// Discovery controllers to ask, 1 to 8, each once.
    pub discover: Vec<SocketAddr>,
    /// The subsystem whose paths are wanted.
    pub subnqn: Nqn,
    /// Paths that are used whatever the logs say.
    pub always: Vec<PathConfig>,
    /// TCP ports that may be connected to: entries with others are left out.
    pub ports: BTreeSet<u16>,
    /// The volumes use TLS, so that entries which require it are theirs as well.
    pub has_tls: bool,
    /// TLS and authentication of the connections to discovery controllers, until
    /// [`Watch::set_security`] says otherwise. One that does not do what it says is not listened to.
    pub security: Security,
    /// NQN this host goes by.
    pub hostnqn: Nqn,
    /// Host Identifier that belongs to `hostnqn`; not zero.
    pub hostid: [u8; 16],
    /// Keep Alive Time-out of the persistent connections; not zero.
    pub kato: Duration,
    /// How long a TCP connect may take, and the ICResp after it.
    pub connect_timeout: Duration,
    /// How long a controller may take to answer a command.
    pub command_timeout: Duration,
    /// First delay before another attempt; grows to `reconnect_delay_max`, with jitter.
    pub reconnect_delay: Duration,
    /// Longest delay between attempts.
    pub reconnect_delay_max: Duration,
}

impl WatchConfig {
    /// The defaults: keep alive 5 s, commands 10 s, attempts between 0.5 and 10 s apart, ports 4420
    /// and 8009. `host` is the host's NQN and identifier.
    pub fn new(discover: Vec<SocketAddr>, subnqn: Nqn, host: (Nqn, [u8; 16])) -> WatchConfig {
        WatchConfig {
            discover,
            subnqn,
            always: Vec::new(),
            ports: BTreeSet::from([4420, 8009]),
            has_tls: false,
            security: Security::default(),
            hostnqn: host.0,
            hostid: host.1,
            kato: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(3),
            command_timeout: Duration::from_secs(10),
            reconnect_delay: Duration::from_millis(500),
            reconnect_delay_max: Duration::from_secs(10),
        }
    }
}

/// What is known of a discovery controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiscoveryState {
    /// Its listener.
    pub addr: SocketAddr,
    /// The controller whose log refers to it; `None`: it is configured.
    pub referred_by: Option<SocketAddr>,
    /// There is a connection, and its log has been read by it.
    pub is_connected: bool,
    /// Generation counter of the log that was read last; `None`: none yet.
    pub genctr: Option<u64>,
    /// Entries in that log, whatever they are of.
    pub entries: usize,
    /// Paths that it names.
    pub paths: Vec<SocketAddr>,
    /// Entries of the subsystem, and referrals, that are not used, and why; the first few.
    pub left_out: Vec<String>,
    /// Why the last attempt or connection ended.
    pub last_error: Option<String>,
}

struct Common {
    config: WatchConfig,
    stop: AtomicBool,
    followers: Mutex<Followers>,
    /// Of each node, in the order in which they were found.
    states: Mutex<Arc<Vec<DiscoveryState>>>,
    /// For authentication.
    worker: Worker,
    /// What the next connection is made with. Whether it is encrypted never changes.
    security: Mutex<Arc<Security>>,
}

impl Common {
    fn security(&self) -> Arc<Security> {
        Arc::clone(&self.security.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Who is given the paths.
#[derive(Default)]
struct Followers {
    of: Vec<Arc<Shared>>,
    /// What they have been given; nothing before a log has been read.
    paths: Option<Vec<PathConfig>>,
}

impl Common {
    fn followers(&self) -> MutexGuard<'_, Followers> {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, shared: Arc<Shared>) -> Result<(), ConfigError> {
        let mut followers = self.followers();
        let paths = followers.paths.as_ref().unwrap_or(&self.config.always);
        shared.set_paths(paths)?;
        followers.of.retain(|one| !matches!(one.state().phase, Phase::Stopped { .. }));
        followers.of.push(shared);
        Ok(())
    }
}

/// A running look-out for paths. Ends when it is dropped; the paths stay as they are then.
pub struct Watch {
    common: Arc<Common>,
    core: CoreHandle,
}

impl Watch {
    /// Begins to ask. The task belongs on the core of `local`, where the volumes' own tasks are,
    /// and sets the paths of all `volumes`, which must be ones whose paths change.
    ///
    /// # Errors
    /// No controller to ask, too many, one of them twice, security that cannot work, or a volume whose
    /// paths do not change.
    pub fn start(
        config: WatchConfig,
        volumes: &[Arc<RemoteVolume>],
        local: &Local,
    ) -> Result<(Watch, Box<dyn Task>), ConfigError> {
        let addrs = &config.discover;
        let wrong = |value: &dyn std::fmt::Display, allowed| {
            Err(ConfigError { key: "discover", value: value.to_string(), allowed })
        };
        if !(1..=NODES_MAX).contains(&addrs.len()) {
            return wrong(&addrs.len(), "1 to 8");
        }
        if let Some(at) = (1..addrs.len()).find(|at| addrs[..*at].contains(&addrs[*at])) {
            return wrong(&addrs[at], "each address once");
        }
        if let Err((key, value, allowed)) = config.security.check() {
            return Err(ConfigError { key, value, allowed });
        }
        let common = Arc::new(Common {
            security: Mutex::new(Arc::new(config.security.clone())),
            config,
            stop: AtomicBool::new(false),
            followers: Mutex::default(),
            states: Mutex::default(),
            worker: Worker::default(),
        });
        for volume in volumes {
            common.add(volume.shared())?;
        }
        let mut task = WatchTask {
            local: local.clone(),
            nodes: Vec::new(),
            gone: Vec::new(),
            common: Arc::clone(&common),
        };
        for addr in &common.config.discover {
            task.add(Referral { addr: *addr, nqn: Nqn::discovery() }, None, 0);
        }
        task.publish();
        Ok((Watch { common, core: local.handle() }, Box::new(task)))
    }

    /// Uses other keys from the next connections on; those that exist stay.
    ///
    /// # Errors
    /// Security that cannot work, or that would switch TLS on or off.
    pub fn set_security(&self, security: Security) -> Result<(), ConfigError> {
        security
            .replaces(&self.common.config.security)
            .map_err(|(key, value, allowed)| ConfigError { key, value, allowed })?;
        let mut place = self.common.security.lock().unwrap_or_else(PoisonError::into_inner);
        *place = Arc::new(security);
        Ok(())
    }

    /// Sets the paths of another volume as well, whose paths must be ones that change. One that is shut down
    /// is forgotten.
    ///
    /// # Errors
    /// A volume whose paths do not change.
    pub fn add(&self, volume: &RemoteVolume) -> Result<(), ConfigError> {
        self.common.add(volume.shared())
    }

    /// Sets the paths of a subsystem, as [`Watch::add`] does.
    ///
    /// # Errors
    /// See [`Watch::add`].
    pub fn add_subsystem(&self, subsystem: &RemoteSubsystem) -> Result<(), ConfigError> {
        self.common.add(subsystem.shared())
    }

    /// The discovery controllers that are asked.
    pub fn state(&self) -> Arc<Vec<DiscoveryState>> {
        Arc::clone(&self.common.states.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Relaxed: the task takes nothing else from here, and the wake-up orders it.
        self.common.stop.store(true, Ordering::Relaxed);
        self.core.wake();
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Referral {
    addr: SocketAddr,
    nqn: Nqn,
}

/// What a log says, as far as it matters here.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
struct Found {
    entries: usize,
    paths: Vec<SocketAddr>,
    referrals: Vec<Referral>,
    left_out: Vec<String>,
}

/// Takes out of a log what `config` wants, within bounds.
fn sift(log: &[Result<DiscoveryEntry, InvalidEntry>], config: &WatchConfig) -> Found {
    let mut found = Found { entries: log.len(), ..Found::default() };
    for (index, entry) in log.iter().enumerate() {
        let entry = match entry {
            Ok(entry) => entry,
            // Whose it is cannot be told.
            Err(_) => continue,
        };
        let is_ours = entry.subtype == SubsystemType::NVM && entry.subnqn == config.subnqn;
        let is_referral = entry.subtype == SubsystemType::REFERRAL;
        if !is_ours && !is_referral {
            continue;
        }
        let addr = match usable(entry, config, is_ours) {
            Ok(addr) => addr,
            Err(why) => {
                if found.left_out.len() < REFUSED_MAX {
                    found.left_out.push(format!("entry {index}: {why}"));
                }
                continue;
            }
        };
        if is_ours && !found.paths.contains(&addr) && found.paths.len() < PATHS_MAX {
            found.paths.push(addr);
        }
        let referral = Referral { addr, nqn: entry.subnqn.clone() };
        if is_referral
            && found.referrals.len() < NODES_MAX
            && !found.referrals.iter().any(|other| other.addr == addr)
        {
            found.referrals.push(referral);
        }
    }
    found
}

/// Where an entry leads, if it can be used.
fn usable(
    entry: &DiscoveryEntry,
    config: &WatchConfig,
    is_ours: bool,
) -> Result<SocketAddr, String> {
    if entry.trtype != TransportType::TCP {
        return Err("is not for TCP".to_owned());
    }
    let (host, service) = (&entry.traddr, &entry.trsvcid);
    let Some(addr) = entry.socket_addr() else {
        return Err(format!("{host:?} port {service:?} is no address and port"));
    };
    if addr.port() == 0 || addr.ip().is_unspecified() || addr.ip().is_multicast() {
        return Err(format!("{addr} cannot be connected to"));
    }
    if !config.ports.contains(&addr.port()) {
        return Err(format!(
            "{addr} has port {}, which is not among those that may be connected to (ports=)",
            addr.port()
        ));
    }
    let needs_tls = entry.treq & TREQ_SECURE_MASK == TREQ_SECURE_REQUIRED;
    let has_tls = match is_ours {
        true => config.has_tls,
        false => !matches!(config.security.tls, Tls::Off),
    };
    if needs_tls && !has_tls {
        return Err(format!("{addr} requires TLS"));
    }
    Ok(addr)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// No connection. Moved on by `until`.
    Waiting { until: Duration },
    /// The link is opening. Moved on by ICResp.
    Opening,
    /// The client connects, authenticates as far as that is asked for, reads the log, and stays to be told of changes.
    Up,
    /// The link is closing. Moved on when it is quiet.
    Leaving,
}

/// A discovery controller.
struct Node {
    referral: Referral,
    referred_by: Option<SocketAddr>,
    depth: u8,
    stage: Stage,
    link: Link,
    client: Option<Client>,
    slots: Slots,
    /// What the connection is made with.
    security: Arc<Security>,
    /// What is offered for TLS under the controller's NQN; made with the first connection.
    offers: Option<Arc<Offers>>,
    /// An authentication under way, and an exponentiation of it.
    auth: Option<(Auth, Option<Computing>)>,
    /// The connection ended as its only purpose was to make the key for the next.
    is_renewed: bool,
    backoff: Backoff,
    is_connected: bool,
    genctr: Option<u64>,
    found: Found,
    last_error: Option<String>,
}

impl Node {
    fn new(
        local: &Local,
        common: &Common,
        referral: Referral,
        referred_by: Option<SocketAddr>,
        depth: u8,
    ) -> Node {
        let config = &common.config;
        let host_config = HostConfig { queue_depth: TAGS + 1, ..HostConfig::default() };
        let tx_entries_max = usize::from(TAGS) + 3;
        let timeout = config.connect_timeout;
        Node {
            link: Link::new(local, referral.addr, host_config, tx_entries_max, timeout),
            referral,
            referred_by,
            depth,
            stage: Stage::Waiting { until: local.now() },
            client: None,
            slots: Slots::new(TAGS + 1),
            security: common.security(),
            offers: None,
            auth: None,
            is_renewed: false,
            backoff: Backoff::new(config.reconnect_delay, config.reconnect_delay_max),
            is_connected: false,
            genctr: None,
            found: Found::default(),
            last_error: None,
        }
    }

    fn state(&self) -> DiscoveryState {
        DiscoveryState {
            addr: self.referral.addr,
            referred_by: self.referred_by,
            is_connected: self.is_connected,
            genctr: self.genctr,
            entries: self.found.entries,
            paths: self.found.paths.clone(),
            left_out: self.found.left_out.clone(),
            last_error: self.last_error.clone(),
        }
    }

    /// Moves the connection on. `Ok(true)`: something has changed that others should know.
    fn step(
        &mut self,
        now: Duration,
        local: &Local,
        common: &Common,
        progressed: &mut bool,
    ) -> Result<bool, Loss> {
        let config = &common.config;
        *progressed |= self.link.poll(now)?;
        match self.stage {
            Stage::Waiting { until } if now >= until => {
                self.stage = Stage::Opening;
                let offers = self.offers(common)?;
                self.link.open(offers)?;
                *progressed = true;
            }
            Stage::Leaving if self.link.is_closed() => {
                let delay = match std::mem::take(&mut self.is_renewed) {
                    true => Duration::ZERO,
                    false => self.backoff.next_delay(local.random_u64()),
                };
                self.stage = Stage::Waiting { until: now + delay };
                *progressed = true;
            }
            _ => {}
        }
        while self.link.sent().is_some() {}
        while let Some(chunk) = self.link.recv()? {
            *progressed = true;
            let mut input: &[u8] = &chunk;
            while let Some(event) = self.link.next(&mut input)? {
                self.on_event(event, now, local, common)?;
            }
        }
        *progressed |= self.run_auth(now, local, config)?;
        let mut is_changed = false;
        if let Some(client) = &mut self.client {
            while self.link.room() > 0 {
                let Some(command) = client.next_command(now) else { break };
                self.slots.send(&command, &mut self.link, local)?;
                *progressed = true;
            }
            let is_read = client.take_read();
            match client.state() {
                ClientState::Failed(error) => return Err(Loss::Session(error.clone())),
                ClientState::Done(log) if is_read => {
                    let log = log.clone();
                    is_changed = self.on_read(&log, config);
                }
                _ => {}
            }
        }
        self.link.flush();
        Ok(is_changed)
    }

    fn names(&self, config: &WatchConfig) -> ConnectNames {
        ConnectNames {
            hostnqn: config.hostnqn.clone(),
            hostid: config.hostid,
            subnqn: self.referral.nqn.clone(),
        }
    }

    /// What the next connection offers; `None`: plaintext, if only until it has made a key.
    fn offers(&mut self, common: &Common) -> Result<Option<Arc<Offers>>, Loss> {
        let security = common.security();
        if !Arc::ptr_eq(&self.security, &security) {
            if matches!(security.tls, Tls::Keys(_)) {
                self.offers = None;
            }
            self.security = security;
        }
        if let (None, Tls::Keys(tls)) = (&self.offers, &self.security.tls) {
            let subnqn = self.referral.nqn.as_str();
            let offers = Offers::new(tls, common.config.hostnqn.as_str(), subnqn);
            self.offers = Some(offers.map_err(|error| Loss::Tls(error.to_string()))?);
        }
        Ok(self.offers.clone())
    }

    fn on_event(
        &mut self,
        event: HostEvent<'_>,
        now: Duration,
        local: &Local,
        common: &Common,
    ) -> Result<(), Loss> {
        let config = &common.config;
        match event {
            HostEvent::Initialized => {
                self.client = Some(Client::new(ClientConfig {
                    names: self.names(config),
                    command_timeout: config.command_timeout,
                    kato: config.kato,
                    // What the controller asks for is judged here.
                    authenticate: Authenticate::Always,
                }));
                self.stage = Stage::Up;
            }
            HostEvent::Data { cid, offset, bytes } => self.slots.on_data(cid, offset, bytes)?,
            HostEvent::Complete { cid: AUTH_TAG, cqe } => {
                let data = self.slots.data(AUTH_TAG);
                if let Some((auth, computing)) = &mut self.auth {
                    let status = Cqe::from_bytes(&cqe).status();
                    if let Some(task) = auth.on_completion(status, data)? {
                        *computing = Some(Computing::start(task, &common.worker, local)?);
                    }
                }
            }
            HostEvent::Complete { cid, cqe } => {
                let Some(client) = &mut self.client else { return Ok(()) };
                let data = self.slots.data(cid);
                client.on_completion(cid, &cqe, data, now).map_err(Loss::Session)?;
            }
            HostEvent::R2t { .. } => {
                return Err(Loss::Command("R2T on the admin queue".to_owned()));
            }
            HostEvent::Terminated { fes } => return Err(Loss::Terminated { fes }),
        }
        Ok(())
    }

    /// Authenticates after Connect, as far as the controller or the configuration wants.
    fn run_auth(
        &mut self,
        now: Duration,
        local: &Local,
        config: &WatchConfig,
    ) -> Result<bool, Loss> {
        let mut progressed = false;
        let asked = self.client.as_ref().and_then(Client::authentication);
        if let Some(asked) = asked
            && self.auth.is_none()
        {
            let wanted = auth::wanted(&self.security, asked, self.link.is_tls())?;
            match (wanted, &self.security.dhchap) {
                (Some(concatenation), Some(dhchap)) => {
                    let (names, until) = (self.names(config), now + config.command_timeout);
                    let random = &mut || local.random_u64();
                    let auth = Auth::new(dhchap, &names, concatenation, random, until);
                    self.auth = Some((auth, None));
                }
                _ => self.client.iter_mut().for_each(Client::authenticated),
            }
            progressed = true;
        }
        let Some((auth, computing)) = &mut self.auth else { return Ok(progressed) };
        auth.is_late(now)?;
        if let Some(done) = computing.as_ref().and_then(Computing::take) {
            *computing = None;
            auth.on_computed(done);
            progressed = true;
        }
        if self.link.room() == 0 {
            return Ok(progressed);
        }
        if let Some(command) = auth.next_command() {
            let read_len = if command.message.is_some() { 0 } else { RECEIVE_BYTES as u32 };
            let command =
                AdminCommand { tag: AUTH_TAG, sqe: command.sqe, write: command.message, read_len };
            self.slots.send(&command, &mut self.link, local)?;
            return Ok(true);
        }
        let Some(outcome) = auth.outcome()?.cloned() else { return Ok(progressed) };
        self.auth = None;
        self.on_authenticated(&outcome, now, config)?;
        Ok(true)
    }

    fn on_authenticated(
        &mut self,
        outcome: &Outcome,
        now: Duration,
        config: &WatchConfig,
    ) -> Result<(), Loss> {
        tracing::debug!(
            addr = %self.referral.addr,
            hash = ?outcome.hash,
            group = ?outcome.group,
            mutual = outcome.is_mutual,
            "authenticated"
        );
        if !matches!(config.security.tls, Tls::Concatenate) || self.link.is_tls() {
            self.client.iter_mut().for_each(Client::authenticated);
            return Ok(());
        }
        let no_key = |text: String| Loss::Authentication(text);
        let generated = outcome.generated.as_ref();
        let generated = generated.ok_or_else(|| no_key("it made no key for TLS".to_owned()))?;
        let (hostnqn, subnqn) = (config.hostnqn.as_str(), self.referral.nqn.as_str());
        let psk = generated.psk(IdentityVersion::V1, hostnqn, subnqn);
        self.offers = Some(Offers::generated(psk.map_err(|error| no_key(error.to_string()))?));
        // "The host shall then disconnect and connect again with TLS" (TP8018).
        self.is_renewed = true;
        self.close(now, None, config);
        Ok(())
    }

    /// The log has been read. Whether it is another one than before.
    fn on_read(&mut self, log: &Discovered, config: &WatchConfig) -> bool {
        self.backoff.reset();
        let found = sift(&log.entries, config);
        let is_changed = self.genctr.is_none() || found != self.found;
        if is_changed {
            tracing::info!(
                addr = %self.referral.addr,
                genctr = log.genctr,
                entries = found.entries,
                paths = found.paths.len(),
                referrals = found.referrals.len(),
                left_out = found.left_out.first(),
                "discovery log"
            );
        }
        let is_new = is_changed || !self.is_connected || self.genctr != Some(log.genctr);
        (self.genctr, self.found, self.is_connected) = (Some(log.genctr), found, true);
        is_new
    }

    /// The connection, or the attempt at one, is over. Whether that is news.
    #[cold]
    fn lose(&mut self, now: Duration, loss: &Loss, config: &WatchConfig) -> bool {
        let text = loss.to_string();
        let is_new = self.is_connected || self.last_error.as_deref() != Some(&*text);
        if is_new {
            tracing::warn!(addr = %self.referral.addr, cause = text, "no discovery; paths stay");
        }
        (self.is_connected, self.last_error) = (false, Some(text));
        self.close(now, Some(loss), config);
        is_new
    }

    fn close(&mut self, now: Duration, loss: Option<&Loss>, config: &WatchConfig) {
        (self.client, self.auth) = (None, None);
        if !self.is_renewed && matches!(config.security.tls, Tls::Concatenate) {
            // Each association makes its own key.
            self.offers = None;
        }
        self.stage = Stage::Leaving;
        self.link.close(now, loss.and_then(Loss::fault));
    }

    fn deadline(&self) -> Option<Duration> {
        let stage = match self.stage {
            Stage::Waiting { until } => Some(until),
            _ => None,
        };
        let client = self.client.as_ref().and_then(Client::deadline);
        let auth = self.auth.as_ref().map(|(auth, _)| auth.until);
        [stage, client, auth, self.link.deadline()].into_iter().flatten().min()
    }
}

/// See the [module](self).
struct WatchTask {
    common: Arc<Common>,
    local: Local,
    /// Configured ones first, then as they were found.
    nodes: Vec<Node>,
    /// Nobody refers to these any more: they go when their links are closed.
    gone: Vec<Node>,
}

impl WatchTask {
    fn add(&mut self, referral: Referral, by: Option<SocketAddr>, depth: u8) {
        self.nodes.push(Node::new(&self.local, &self.common, referral, by, depth));
    }

    /// Makes the nodes those that the configuration and the logs name.
    fn follow(&mut self, now: Duration) {
        // In the order of their distance, so that a shorter way to a node counts.
        let configured = self.common.config.discover.len();
        let mut wanted: Vec<(Referral, Option<SocketAddr>, u8)> =
            self.nodes[..configured].iter().map(|node| (node.referral.clone(), None, 0)).collect();
        let mut at = 0;
        while let Some((Referral { addr, .. }, _, depth)) = wanted.get(at).cloned() {
            at += 1;
            let Some(node) = self.nodes.iter().find(|node| node.referral.addr == addr) else {
                continue;
            };
            for referral in &node.found.referrals {
                let is_known = wanted.iter().any(|(other, ..)| other.addr == referral.addr);
                if !is_known && depth < DEPTH_MAX && wanted.len() < NODES_MAX {
                    wanted.push((referral.clone(), Some(addr), depth + 1));
                }
            }
        }
        let is_wanted =
            |node: &mut Node| wanted.iter().find(|(referral, ..)| *referral == node.referral);
        let mut kept = Vec::with_capacity(wanted.len());
        for mut node in std::mem::take(&mut self.nodes) {
            match is_wanted(&mut node) {
                Some((_, by, depth)) => {
                    (node.referred_by, node.depth) = (*by, *depth);
                    kept.push(node);
                }
                None => {
                    tracing::info!(addr = %node.referral.addr, "no referral to it any more");
                    node.close(now, None, &self.common.config);
                    self.gone.push(node);
                }
            }
        }
        self.nodes = kept;
        for (referral, by, depth) in wanted {
            if !self.nodes.iter().any(|node| node.referral == referral) {
                tracing::info!(addr = %referral.addr, ?by, "referral to another discovery controller");
                self.add(referral, by, depth);
            }
        }
    }

    /// Gives the volumes the paths that all logs name together.
    fn apply(&mut self) {
        let config = &self.common.config;
        let mut paths = config.always.clone();
        let mut left = 0;
        for addr in self.nodes.iter().flat_map(|node| &node.found.paths) {
            if paths.iter().any(|path| path.addr == *addr) {
                continue;
            }
            if paths.len() == PATHS_MAX {
                left += 1;
                continue;
            }
            paths.push((*addr).into());
        }
        // Before any log has been read, what is configured is all there is.
        let is_known = self.nodes.iter().any(|node| node.genctr.is_some());
        let mut followers = self.common.followers();
        if !is_known || followers.paths.as_ref() == Some(&paths) {
            return;
        }
        if left > 0 {
            tracing::warn!(subnqn = %config.subnqn, left, "more paths than are used at a time");
        }
        if paths.is_empty() {
            tracing::warn!(subnqn = %config.subnqn, "no discovery log names the subsystem");
        }
        for follower in &followers.of {
            follower.want_paths(paths.clone());
        }
        followers.paths = Some(paths);
    }

    fn publish(&self) {
        let states = Arc::new(self.nodes.iter().map(Node::state).collect());
        *self.common.states.lock().unwrap_or_else(PoisonError::into_inner) = states;
    }
}

impl Task for WatchTask {
    fn poll(&mut self, now: Duration) -> Progress {
        if self.local.is_stopping() || self.common.stop.load(Ordering::Relaxed) {
            // The links' streams reset their connections as they go.
            return Progress::Done;
        }
        let common = Arc::clone(&self.common);
        let (mut progressed, mut is_changed) = (false, false);
        for node in &mut self.nodes {
            is_changed |= match node.step(now, &self.local, &common, &mut progressed) {
                Ok(is_changed) => is_changed,
                Err(loss) => {
                    progressed = true;
                    node.lose(now, &loss, &common.config)
                }
            };
        }
        for node in &mut self.gone {
            // Nobody wants to know any more what is wrong with it.
            progressed |= node.link.poll(now).unwrap_or(true);
        }
        self.gone.retain(|node| !node.link.is_closed());
        if is_changed {
            self.follow(now);
            self.apply();
            self.publish();
        }
        if progressed || is_changed { Progress::Worked } else { Progress::Idle }
    }

    fn deadline(&self) -> Option<Duration> {
        let gone = self.gone.iter().filter_map(|node| node.link.deadline());
        self.nodes.iter().filter_map(Node::deadline).chain(gone).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nvme::spec::discovery::AddressFamily;

    fn nqn(text: &str) -> Nqn {
        Nqn::new(text).unwrap()
    }

    fn config() -> WatchConfig {
        let host = (nqn("nqn.2025-01.io.example:host"), [1; 16]);
        let discover = vec![([192, 0, 2, 9], 8009).into()];
        WatchConfig::new(discover, nqn("nqn.2025-01.io.example:a"), host)
    }

    fn entry(addr: &str) -> DiscoveryEntry {
        let subnqn = config().subnqn;
        DiscoveryEntry::tcp(SubsystemType::NVM, addr.parse().unwrap(), 1, subnqn)
    }

    #[test]
    fn only_what_can_be_used_is_taken_and_the_rest_is_told() {
        let other =
            DiscoveryEntry { subnqn: nqn("nqn.2025-01.io.example:b"), ..entry("192.0.2.1:1") };
        let rdma = DiscoveryEntry { trtype: TransportType::RDMA, ..entry("192.0.2.2:4420") };
        let name = DiscoveryEntry { traddr: "host.example".to_owned(), ..entry("192.0.2.2:4420") };
        let nowhere = entry("0.0.0.0:4420");
        let secret = entry("192.0.2.4:4420").with_tls(true);
        let own = DiscoveryEntry::own("192.0.2.9:8009".parse().unwrap(), 1, Nqn::discovery(), true);
        let damaged = Err(InvalidEntry::Text("transport address"));
        let log = [
            Ok(entry("192.0.2.1:4420")),
            damaged,
            Ok(other),
            Ok(entry("[2001:db8::1]:4420")),
            Ok(entry("192.0.2.1:4420")),
            Ok(entry("192.0.2.3:4420").with_tls(false)),
            Ok(own),
            Ok(rdma),
            Ok(name),
            Ok(nowhere),
            Ok(secret),
            Ok(entry("192.0.2.1:22")),
        ];
        let found = sift(&log, &config());
        assert_eq!(found.entries, 12);
        let paths: Vec<_> = found.paths.iter().map(ToString::to_string).collect();
        assert_eq!(paths, ["192.0.2.1:4420", "[2001:db8::1]:4420", "192.0.2.3:4420"]);
        let expected =
            ["entry 7: is not for TCP", "entry 8: \"host.example\"", "entry 9", "entry 10"];
        assert_eq!(found.left_out.len(), REFUSED_MAX);
        for (told, expected) in found.left_out.iter().zip(expected) {
            assert!(told.starts_with(expected), "{told}");
        }
        assert!(found.left_out[3].contains("requires TLS"), "{found:?}");
        let secure = WatchConfig { has_tls: true, ..config() };
        assert_eq!(sift(&log[10..11], &secure).paths, ["192.0.2.4:4420".parse().unwrap()]);
        // Of referrals it matters how discovery controllers are asked.
        let referral =
            [Ok(DiscoveryEntry { subtype: SubsystemType::REFERRAL, ..entry("192.0.2.4:4420") }
                .with_tls(true))];
        assert!(sift(&referral, &secure).left_out[0].contains("requires TLS"));
        let keys = crate::TlsKeys::new(vec![
            crypto::TlsKey::new(crypto::KeyHash::Sha256, &[7; 32]).unwrap(),
        ]);
        let security = Security { tls: Tls::Keys(keys), dhchap: None };
        let secure = WatchConfig { security, ..config() };
        assert_eq!(sift(&referral, &secure).referrals.len(), 1);
        let found = sift(&log[11..], &config());
        assert!(found.left_out[0].contains("port 22, which is not among"), "{found:?}");
    }

    #[test]
    fn what_is_kept_of_a_log_is_bounded() {
        let addr = |n: u32| format!("10.{}.{}.1:4420", n >> 8, n & 0xff);
        let referral = |n| DiscoveryEntry { subtype: SubsystemType::REFERRAL, ..entry(&addr(n)) };
        let bad = |n| DiscoveryEntry { trtype: TransportType::LOOP, ..entry(&addr(n)) };
        let log: Vec<_> =
            (0..1500).flat_map(|n| [Ok(entry(&addr(n))), Ok(referral(n)), Ok(bad(n))]).collect();
        let found = sift(&log, &config());
        assert_eq!((found.paths.len(), found.referrals.len()), (PATHS_MAX, NODES_MAX));
        assert_eq!((found.left_out.len(), found.entries), (REFUSED_MAX, 4500));
    }

    /// Fields of any value, chosen by a small generator: what is taken can be connected to.
    #[test]
    fn entries_of_any_kind_lead_nowhere_but_where_allowed() {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = move |n: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 20) % n
        };
        let hosts =
            ["192.0.2.1", "", "::", "fe80::1%eth0", "ff02::1", "256.0.0.1", "224.0.0.1", "::1"];
        let services = ["4420", "8009", "0", "", "65536", "-1", "22", "4420 "];
        let (mut taken, config) = (0, config());
        for _ in 0..4000 {
            let entry = DiscoveryEntry {
                trtype: TransportType([3, 3, 3, 1, 254][next(5) as usize]),
                adrfam: AddressFamily(next(5) as u8),
                subtype: SubsystemType(next(5) as u8),
                treq: next(8) as u8,
                traddr: hosts[next(8) as usize].to_owned(),
                trsvcid: services[next(8) as usize].to_owned(),
                ..entry("192.0.2.1:1")
            };
            let found = sift(&[Ok(entry)], &config);
            assert!(found.paths.len() + found.referrals.len() + found.left_out.len() <= 1);
            let addrs = found.paths.iter().chain(found.referrals.iter().map(|r| &r.addr));
            for addr in addrs {
                taken += 1;
                assert!(config.ports.contains(&addr.port()));
                assert!(!addr.ip().is_unspecified() && !addr.ip().is_multicast());
            }
        }
        assert!(taken > 20, "{taken}");
    }
}
