//! Namespaces of a device that come and go while it is served: as its target has them, or as an
//! operator says.
//!
//! ```text
//!  RemoteSubsystem ─ list ─► follow ──┐
//!  management API ─ attach, detach ───┴─► open or close a RemoteVolume ─► DeviceHandle ─► guest
//! ```
//!
//! One change at a time is made; the device goes on meanwhile.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context;
use api::{Code, Done, Problem};
use block::Volume;
use nvme_pci::{AttachError, NAMESPACES_MAX};
use nvmf_initiator::{Phase, RemoteConfig, RemoteSubsystem, RemoteVolume, Security};
use reactor::CoreHandle;

use super::{Book, Entry, Handle, LOOK, lock};
use crate::config::DeviceKind;
use crate::cores;

/// How long the namespaces that the target has named may take until the device is served without
/// those that are not ready.
pub(super) const READY: Duration = Duration::from_secs(10);
/// How often a device that follows its target looks although nothing was told.
const FOLLOW: Duration = Duration::from_secs(3600);

/// Opens namespaces of a device's target.
pub(super) struct Opener {
    /// For any of them.
    pub(super) config: RemoteConfig,
    /// Where the associations are driven.
    pub(super) core: CoreHandle,
}

impl Opener {
    /// Begins to reach a namespace, with the keys that the device has now.
    pub(super) fn open(&self, nsid: u32, security: &Security) -> anyhow::Result<Arc<RemoteVolume>> {
        let config = RemoteConfig { nsid, security: security.clone(), ..self.config.clone() };
        config.check()?;
        let volume = cores::on(&self.core, move |spawner| {
            let (volume, task) = RemoteVolume::start(config, spawner.local())?;
            spawner.spawn(task);
            Ok::<_, nvmf_initiator::ConfigError>(volume)
        })?;
        Ok(volume?)
    }

    /// Begins to ask which namespaces there are.
    pub(super) fn list(&self) -> anyhow::Result<Arc<RemoteSubsystem>> {
        let config = self.config.clone();
        let subsystem = cores::on(&self.core, move |spawner| {
            let (subsystem, task) = RemoteSubsystem::start(config, spawner.local())?;
            spawner.spawn(task);
            Ok::<_, nvmf_initiator::ConfigError>(subsystem)
        })?;
        Ok(subsystem?)
    }
}

/// What is open of a device's target, and what of that the machine has been shown.
#[derive(Default)]
pub(super) struct Spaces {
    pub(super) remotes: Vec<(u32, Arc<RemoteVolume>)>,
    pub(super) shown: BTreeSet<u32>,
}

impl Spaces {
    fn get(&self, nsid: u32) -> Option<Arc<RemoteVolume>> {
        self.remotes.iter().find(|(other, _)| *other == nsid).map(|(_, remote)| Arc::clone(remote))
    }
}

fn is_live(remote: &RemoteVolume) -> bool {
    remote.state().phase == Phase::Live
}

impl Entry {
    fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits until the target has said which namespaces there are, and they are ready. `false`: nobody
    /// waits for it any more.
    pub(super) fn gather(&self, subsystem: &RemoteSubsystem) -> bool {
        let mut until = None;
        while !self.is_stopping() {
            let state = subsystem.wait_changed(None, LOOK);
            let Some(listed) = &state.attached else { continue };
            self.reconcile(listed);
            let until = *until.get_or_insert_with(|| Instant::now() + READY);
            let waiting = lock(&self.spaces).remotes.iter().find(|(_, one)| !is_live(one)).cloned();
            let Some((nsid, remote)) = waiting else { return true };
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let device = &self.config.name;
                tracing::warn!(%device, nsid, "the namespace is not ready; the device is served without");
                return true;
            }
            // What keeps it from the target is the initiator's to say.
            let _ = remote.wait_ready(left.min(LOOK));
        }
        false
    }

    /// Shows the machine what the target has, until the device stops.
    pub(super) fn follow(&self, subsystem: &RemoteSubsystem) {
        let mut known = None;
        let mut is_waiting = false;
        while !self.is_stopping() {
            let time = if is_waiting { LOOK } else { FOLLOW };
            let state = subsystem.wait_changed(known.as_deref(), time);
            let Some(listed) = &state.attached else { continue };
            if matches!(state.phase, Phase::Stopped { .. }) {
                return;
            }
            if known.as_ref() != Some(listed) {
                let beyond = listed.iter().filter(|nsid| **nsid > NAMESPACES_MAX).count();
                if beyond > 0 {
                    let device = &self.config.name;
                    tracing::warn!(
                        %device,
                        beyond,
                        "the target has namespaces with IDs above {NAMESPACES_MAX}; they are not shown"
                    );
                }
                known = Some(listed.clone());
            }
            is_waiting = self.reconcile(listed);
        }
    }

    /// Opens and closes namespaces so that they are those that the target has, and shows those that
    /// are ready. Whether some are not yet.
    fn reconcile(&self, listed: &[u32]) -> bool {
        let _turn = lock(&self.changing);
        let device = &self.config.name;
        let (wanted, open): (BTreeSet<u32>, BTreeSet<u32>) = {
            let spaces = lock(&self.spaces);
            let by_hand = lock(&self.by_hand);
            let is_wanted =
                |nsid: &u32| *nsid <= NAMESPACES_MAX && !by_hand.detached().contains(nsid);
            let wanted = listed.iter().copied().filter(is_wanted).collect();
            (wanted, spaces.remotes.iter().map(|(nsid, _)| *nsid).collect())
        };
        for nsid in open.difference(&wanted) {
            tracing::info!(%device, nsid, "the target has the namespace no more");
            self.close(*nsid);
        }
        for nsid in wanted.difference(&open) {
            if let Err(problem) = self.open(*nsid) {
                tracing::warn!(%device, nsid, "namespace: {problem:#}");
            }
        }
        let mut is_waiting = false;
        let remotes = lock(&self.spaces).remotes.clone();
        for (nsid, remote) in remotes {
            if lock(&self.spaces).shown.contains(&nsid) {
                continue;
            }
            if !is_live(&remote) {
                is_waiting = true;
            } else if let Err(error) = self.show(nsid, remote) {
                tracing::warn!(%device, nsid, %error, "the namespace cannot be shown");
            }
        }
        is_waiting
    }

    fn open(&self, nsid: u32) -> anyhow::Result<Arc<RemoteVolume>> {
        let opener = self.opener.as_ref().context("the device has no target")?;
        let security = lock(&self.security).target.clone();
        let remote = opener.open(nsid, &security)?;
        if let Some(watch) = &*lock(&self.watch) {
            watch.add(&remote)?;
        }
        lock(&self.spaces).remotes.push((nsid, Arc::clone(&remote)));
        Ok(remote)
    }

    /// Shows a namespace to the machine. Before the device is served there is nobody to show it to.
    fn show(&self, nsid: u32, remote: Arc<RemoteVolume>) -> Result<(), AttachError> {
        if let Some(Handle::Nvme(handle)) = &*lock(&self.handle) {
            handle.attach(nsid, remote as Arc<dyn Volume>)?;
            lock(&self.spaces).shown.insert(nsid);
            tracing::info!(device = %self.config.name, nsid, "namespace attached");
        }
        Ok(())
    }

    /// Takes a namespace from the machine, if it has it, and says goodbye to the target.
    fn close(&self, nsid: u32) {
        let device = &self.config.name;
        let was_shown = lock(&self.spaces).shown.remove(&nsid);
        if was_shown && let Some(Handle::Nvme(handle)) = &*lock(&self.handle) {
            match handle.detach(nsid) {
                Ok(()) => tracing::info!(%device, nsid, "namespace detached"),
                Err(error) => tracing::warn!(%device, nsid, %error, "detaching the namespace"),
            }
        }
        lock(&self.spaces).remotes.retain(|(other, remote)| {
            // What the machine had in flight ends with it.
            if *other == nsid {
                remote.shutdown();
            }
            *other != nsid
        });
    }

    fn refuse(&self, error: Code, what: &str, allowed: impl Into<String>) -> Problem {
        let what = format!("device {:?} {what}", self.config.name);
        Problem { error, what, allowed: allowed.into() }
    }

    fn check_changeable(&self) -> Result<(), Problem> {
        if self.config.kind != DeviceKind::Nvme || self.opener.is_none() {
            let allowed = "devices of type nvme with a target";
            return Err(self.refuse(Code::Invalid, "cannot have other namespaces", allowed));
        }
        if lock(&self.handle).is_none() {
            let allowed = "wait until it is ready";
            return Err(self.refuse(Code::Conflict, "is not served yet", allowed));
        }
        Ok(())
    }

    /// Whether a device without changes by hand would have the namespace.
    fn is_expected(&self, nsid: u32) -> bool {
        self.subsystem.is_some() || self.config.nsids.contains(&nsid)
    }

    /// A predecessor had the namespace, attached by hand, and the target does not give it now.
    #[cold]
    pub(super) fn leave_out(&self, nsid: u32) {
        let device = &self.config.name;
        tracing::warn!(
            %device,
            nsid,
            "the namespace, attached by hand, is not ready; the device is served without"
        );
        let _turn = lock(&self.changing);
        self.close(nsid);
    }

    /// Attaches a namespace of the device's target, when that has answered.
    fn attach(&self, nsid: u32, patience: Duration) -> Result<Done, Problem> {
        self.check_changeable()?;
        if !(1..=NAMESPACES_MAX).contains(&nsid) {
            let what = format!("cannot have namespace {nsid}");
            return Err(self.refuse(Code::Invalid, &what, format!("1 to {NAMESPACES_MAX}")));
        }
        let until = Instant::now() + patience;
        let _turn = lock(&self.changing);
        if lock(&self.spaces).shown.contains(&nsid) {
            let what = format!("has namespace {nsid}");
            return Err(self.refuse(Code::Conflict, &what, "another one"));
        }
        let found = lock(&self.spaces).get(nsid);
        let failed = |why: &str| {
            let what = format!("cannot attach namespace {nsid}: {why}");
            self.refuse(Code::Failed, &what, "a namespace that the target has for this host")
        };
        let remote = match found {
            Some(remote) => remote,
            None => self.open(nsid).map_err(|error| failed(&format!("{error:#}")))?,
        };
        let shown = loop {
            let left = until.saturating_duration_since(Instant::now());
            match remote.wait_ready(left.min(LOOK)) {
                Ok(_) => {
                    let shown = self.show(nsid, Arc::clone(&remote));
                    break shown.map_err(|error| error.to_string());
                }
                Err(error) if left.is_zero() || self.is_stopping() => break Err(error.reason),
                Err(_) => {}
            }
        };
        match shown {
            Ok(()) => {
                lock(&self.by_hand).on_attached(nsid, self.is_expected(nsid));
                Ok(Done::default())
            }
            Err(why) => {
                self.close(nsid);
                Err(failed(&why))
            }
        }
    }

    /// Detaches a namespace; one that follows its target leaves it so.
    fn detach(&self, nsid: u32) -> Result<Done, Problem> {
        self.check_changeable()?;
        let _turn = lock(&self.changing);
        if lock(&self.spaces).get(nsid).is_none() {
            let what = format!("has no namespace {nsid}");
            let allowed = "those that `penstock device show` lists";
            return Err(self.refuse(Code::NotFound, &what, allowed));
        }
        lock(&self.by_hand).on_detached(nsid, self.is_expected(nsid));
        self.close(nsid);
        Ok(Done::default())
    }
}

impl Book {
    /// Attaches a namespace of a device's target to the device. Blocks until the target has answered,
    /// for as long as `patience` at most.
    pub(crate) fn attach(
        &self,
        name: &str,
        nsid: u32,
        patience: Duration,
    ) -> Result<Done, Problem> {
        self.entry(name)?.attach(nsid, patience)
    }

    /// Takes a namespace from a device.
    pub(crate) fn detach(&self, name: &str, nsid: u32) -> Result<Done, Problem> {
        self.entry(name)?.detach(nsid)
    }
}
