//! The remote namespace as a [`block::Volume`].

use std::io;
use std::sync::Arc;
use std::time::Duration;

use block::{Channel, Geometry, Identity, Volume, Wear};
use nvme::spec::Nqn;
use reactor::{Local, Task};

use crate::admin::AdminTask;
use crate::channel::RemoteChannel;
use crate::config::{ConfigError, PathConfig, RemoteConfig};
use crate::security::Security;
use crate::shared::{Counters, PathCounters, Phase, RemoteState, Shared};

/// The remote namespace did not become ready in time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("namespace {nsid} of {subnqn} at {} is not ready: {reason}", list(.addrs))]
pub struct NotReady {
    /// The listeners.
    pub addrs: Vec<std::net::SocketAddr>,
    /// The subsystem.
    pub subnqn: Nqn,
    /// The namespace.
    pub nsid: u32,
    /// Why the last attempt failed.
    pub reason: String,
}

/// A namespace of a subsystem elsewhere, reached over NVMe/TCP.
///
/// Dropping it ends the association: channels still open fail their I/O with
/// [`block::IoError::Gone`].
pub struct RemoteVolume {
    shared: Arc<Shared>,
}

impl RemoteVolume {
    /// Begins to set up the association. The task drives the admin queue and belongs on the core of
    /// `local`; it ends after [`RemoteVolume::shutdown`], or when the core stops.
    pub fn start(
        config: RemoteConfig,
        local: &Local,
    ) -> Result<(Arc<RemoteVolume>, Box<dyn Task>), ConfigError> {
        config.check()?;
        let state = RemoteState::unknown(&config);
        let offers = config.offers(&config.security)?;
        let shared = Shared::new(config, local.handle(), state, offers);
        let task = Box::new(AdminTask::new(Arc::clone(&shared), local));
        Ok((Arc::new(RemoteVolume { shared }), task))
    }

    /// The last published state of association and namespace.
    pub fn state(&self) -> Arc<RemoteState> {
        self.shared.state()
    }

    /// Blocks the calling thread until the namespace is ready. For the control plane, never on a
    /// core.
    pub fn wait_ready(&self, timeout: Duration) -> Result<Arc<RemoteState>, NotReady> {
        let is_over =
            |state: &RemoteState| matches!(state.phase, Phase::Live | Phase::Stopped { .. });
        let state = self.shared.wait(timeout, is_over);
        if state.phase == Phase::Live {
            return Ok(state);
        }
        let config = &self.shared.config;
        Err(NotReady {
            addrs: state
                .paths
                .iter()
                .filter(|path| !path.is_vacant)
                .map(|path| path.addr)
                .collect(),
            subnqn: config.subnqn.clone(),
            nsid: config.nsid,
            reason: match &state.last_error {
                Some(reason) => reason.clone(),
                None if matches!(state.phase, Phase::Stopped { .. }) => "shut down".to_owned(),
                None => format!("no answer within {timeout:?}"),
            },
        })
    }

    /// Shuts the controller down and ends the association for good; I/O still held fails. Returns
    /// at once: [`RemoteVolume::wait_stopped`] waits.
    pub fn shutdown(&self) {
        self.shared.request_stop();
    }

    /// Blocks the calling thread until the association is over after [`RemoteVolume::shutdown`].
    /// `false`: not in time.
    pub fn wait_stopped(&self, timeout: Duration) -> bool {
        let over = Phase::Stopped { is_over: true };
        self.shared.wait(timeout, |state| state.phase == over).phase == over
    }

    /// Has every queue authenticate again, while I/O goes on, where the host has a secret and the
    /// controller asked for it at first. A queue that fails ends its association.
    pub fn reauthenticate(&self) {
        self.shared.ask_reauthentication();
    }

    /// Uses other keys from now on: with the next connection, and the next authentication, of each
    /// queue. Connections that exist stay, and with them what is in flight.
    ///
    /// # Errors
    /// Security that cannot work, or that would switch TLS on or off.
    pub fn set_security(&self, security: Security) -> Result<(), ConfigError> {
        self.shared.renew_security(security)
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }

    /// Uses these paths from now on, of a volume whose paths change. One that is not among them any
    /// more is used until another one works; then no new I/O is sent on it, and what it has when it
    /// is closed is treated as that of a lost path.
    ///
    /// # Errors
    /// More than 16 paths, one of them twice, or a volume whose paths do not change.
    pub fn set_paths(&self, paths: &[PathConfig]) -> Result<(), ConfigError> {
        self.shared.set_paths(paths)
    }

    /// What is going on on each path, in the order of [`RemoteState::paths`].
    pub fn path_counters(&self) -> Vec<PathCounters> {
        self.shared.path_counters()
    }

    /// What has been done so far, over all channels.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }
}

fn list(addrs: &[std::net::SocketAddr]) -> String {
    if addrs.is_empty() {
        return "no address yet".to_owned();
    }
    let addrs: Vec<String> = addrs.iter().map(ToString::to_string).collect();
    addrs.join(", ")
}

impl Drop for RemoteVolume {
    fn drop(&mut self) {
        self.shared.request_stop();
    }
}

impl Volume for RemoteVolume {
    fn geometry(&self) -> Geometry {
        self.shared.state().geometry
    }

    fn identity(&self) -> Identity {
        self.shared.state().identity
    }

    fn wear(&self) -> Option<Wear> {
        self.shared.state().wear.map(|wear| Wear {
            percentage_used: wear.percentage_used,
            spare_percent: wear.spare_percent,
            spare_threshold_percent: wear.spare_threshold_percent,
            critical_warning: wear.critical_warning,
        })
    }

    fn generation(&self) -> u64 {
        self.shared.geometry_generation()
    }

    /// Takes one of the `queues` of the configuration. Ready for I/O at once, which is held until
    /// there is an association.
    fn open(&self, local: &Local, depth: u32) -> io::Result<Box<dyn Channel>> {
        Ok(Box::new(RemoteChannel::open(Arc::clone(&self.shared), local, depth)?))
    }
}
