//! Volumes that become namespaces, and what becomes of one that a core cannot open.
//!
//! A target may grant fewer queues than there are cores, or be gone. A namespace is there for the
//! guest when it can be reached from every core that has queues, and queues are placed only on
//! cores that reach all of them.

use std::collections::BTreeSet;

use super::*;

impl Device {
    pub(super) fn set_namespaces(&mut self, attached: Vec<Attached>) -> Result<(), AttachError> {
        let subsys = Arc::new(crate::namespaces(&self.subsys, &attached)?);
        self.attached = attached;
        self.subsys = Arc::clone(&subsys);
        let (attached, all) = (self.attached.clone(), self.all());
        let (failed, told) = (Vec::new(), Vec::new());
        let taking = Taking { subsys: Arc::clone(&subsys), failed, told };
        self.begin(Purpose::Namespaces(taking), all, || Action::SetNamespaces {
            subsys: Arc::clone(&subsys),
            attached: attached.clone(),
        });
        Ok(())
    }

    /// Cores are opening volumes.
    pub(super) fn is_taking(&self) -> bool {
        self.outstanding.values().any(|one| matches!(one.purpose, Purpose::Namespaces(_)))
    }

    /// The cores have taken up other namespaces, as far as they could.
    pub(super) fn namespaces_taken(&mut self, taking: Taking) {
        let Taking { subsys, failed, told } = taking;
        for (at, core) in self.cores.iter_mut().enumerate() {
            let mine = failed.iter().filter(|(core, ..)| *core == at);
            for (_, nsid, error) in mine.clone().filter(|(_, nsid, _)| !core.missing.contains(nsid))
            {
                tracing::warn!(device = %self.name, core = at, nsid, %error, "cannot open a volume");
            }
            core.missing = mine.map(|(_, nsid, _)| *nsid).collect();
        }
        let has_place = self.cores.iter().any(Core::can_have_queues);
        let is_refused =
            |(core, ..): &&(usize, u32, String)| !has_place || self.cores[*core].queues > 0;
        let refused: BTreeSet<u32> =
            failed.iter().filter(is_refused).map(|(_, nsid, _)| *nsid).collect();
        let mut outcome = Ok(());
        if let Some((core, nsid, reason)) = failed.iter().find(is_refused) {
            let reason = reason.clone();
            outcome = Err(AttachError::Open { nsid: *nsid, core: *core, reason });
            tracing::error!(device = %self.name, ?refused, "these namespaces are not served");
            let mut rest = self.attached.clone();
            rest.retain(|one| !refused.contains(&one.nsid));
            if let Err(error) = self.set_namespaces(rest) {
                tracing::warn!(device = %self.name, %error, "a volume has become impossible");
            }
        } else {
            self.controller.update_subsys(subsys);
            let warning = self.wear().map_or(0, |wear| wear.critical_warning);
            self.controller.health_warning(warning);
        }
        for sender in told {
            let _ = sender.send(outcome.clone());
        }
        self.rebuild();
        self.run_admin();
    }

    /// Tells `sender` when the cores have taken up all they have been told, in the order of that:
    /// what became of the namespaces that were changed last.
    pub(crate) fn tell_when_done(&mut self, sender: mpsc::Sender<Result<(), AttachError>>) {
        let taking = self.outstanding.values_mut().rev().find_map(|one| match &mut one.purpose {
            Purpose::Namespaces(taking) => Some(taking),
            _ => None,
        });
        if let Some(taking) = taking {
            taking.told.push(sender);
            return;
        }
        let all = self.all();
        self.begin(Purpose::Told(sender), all, || Action::Snapshot);
    }

    /// What the device is doing, to `sender` when the cores have answered.
    pub(crate) fn ask_state(&mut self, client: ClientState, sender: mpsc::Sender<DeviceState>) {
        let (all, is_connected) = (self.all(), client.is_connected);
        self.begin(Purpose::State { sender, is_connected }, all, || Action::Snapshot);
    }

    pub(crate) fn attach_namespace(
        &mut self,
        nsid: u32,
        volume: Arc<dyn Volume>,
    ) -> Result<(), AttachError> {
        if self.attached.iter().any(|one| one.nsid == nsid) {
            return Err(AttachError::InUse(nsid));
        }
        let mut attached = self.attached.clone();
        attached.push(Attached { nsid, volume });
        self.set_namespaces(attached)
    }

    pub(crate) fn detach_namespace(&mut self, nsid: u32) -> Result<(), AttachError> {
        let mut attached = self.attached.clone();
        attached.retain(|one| one.nsid != nsid);
        if attached.len() == self.attached.len() {
            return Err(AttachError::NotAttached(nsid));
        }
        self.set_namespaces(attached)
    }

    pub(crate) fn refresh(&mut self) -> Result<(), AttachError> {
        self.set_namespaces(self.attached.clone())
    }
}
