//! Which namespaces a subsystem has for this host, and when that changes.

use std::sync::Arc;
use std::time::Duration;

use nvme::spec::NSID_ALL;
use reactor::{Local, Task};

use crate::admin::AdminTask;
use crate::config::{ConfigError, RemoteConfig};
use crate::security::Security;
use crate::shared::{Phase, RemoteState, Shared};

/// A subsystem elsewhere, without a namespace of it: an association on each path that says which
/// namespaces are attached to the controllers of this host ([`RemoteState::attached`]).
///
/// Dropping it ends the associations.
pub struct RemoteSubsystem {
    shared: Arc<Shared>,
}

impl RemoteSubsystem {
    /// Begins to set up the associations. Of `config`, what is about a namespace and its I/O does not
    /// matter. The task belongs on the core of `local`; it ends after
    /// [`RemoteSubsystem::shutdown`], or when the core stops.
    ///
    /// # Errors
    /// See [`RemoteConfig::check`].
    pub fn start(
        config: RemoteConfig,
        local: &Local,
    ) -> Result<(Arc<RemoteSubsystem>, Box<dyn Task>), ConfigError> {
        let config = RemoteConfig { nsid: 1, ctrl_loss_timeout: None, ..config };
        config.check()?;
        let config = RemoteConfig { nsid: NSID_ALL, ..config };
        let state = RemoteState::unknown(&config);
        let offers = config.offers(&config.security)?;
        let shared = Shared::new(config, local.handle(), state, offers);
        let task = Box::new(AdminTask::new(Arc::clone(&shared), local));
        Ok((Arc::new(RemoteSubsystem { shared }), task))
    }

    /// The last published state.
    pub fn state(&self) -> Arc<RemoteState> {
        self.shared.state()
    }

    /// Blocks the calling thread until the namespaces are others than `known`, or the time is over; gives
    /// the last state. For the control plane, never on a core.
    pub fn wait_changed(&self, known: Option<&[u32]>, timeout: Duration) -> Arc<RemoteState> {
        self.shared.wait(timeout, |state| {
            state.attached.as_deref() != known || matches!(state.phase, Phase::Stopped { .. })
        })
    }

    /// Ends the associations. Returns at once: [`RemoteSubsystem::wait_stopped`] waits.
    pub fn shutdown(&self) {
        self.shared.request_stop();
    }

    /// Blocks the calling thread until the associations are over after
    /// [`RemoteSubsystem::shutdown`]. `false`: not in time.
    pub fn wait_stopped(&self, timeout: Duration) -> bool {
        let over = Phase::Stopped { is_over: true };
        self.shared.wait(timeout, |state| state.phase == over).phase == over
    }

    /// Uses other keys from now on, as [`RemoteVolume::set_security`](crate::RemoteVolume::set_security)
    /// does.
    ///
    /// # Errors
    /// Security that cannot work, or that would switch TLS on or off.
    pub fn set_security(&self, security: Security) -> Result<(), ConfigError> {
        self.shared.renew_security(security)
    }

    /// Has every admin queue authenticate again, as
    /// [`RemoteVolume::reauthenticate`](crate::RemoteVolume::reauthenticate) does.
    pub fn reauthenticate(&self) {
        self.shared.ask_reauthentication();
    }

    pub(crate) fn shared(&self) -> Arc<Shared> {
        Arc::clone(&self.shared)
    }
}

impl Drop for RemoteSubsystem {
    fn drop(&mut self) {
        self.shared.request_stop();
    }
}
