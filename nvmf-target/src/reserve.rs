//! Reservation commands: applied, made durable and binding; then those that lost access have no
//! I/O left; then the answer (NVMe Base 2.0, "Reservations").

use std::sync::Arc;

use nvme::ctrl::io::IoCommand;
use nvme::spec::{NSID_ALL, Status};
use nvme::subsys::reservation::{ReservationEffect, ReservationRequest};

use crate::conn::Conn;
use crate::core::Env;
use crate::home::Home;
use crate::registry::Served;
use crate::turn::Answer;

/// Longest data of a reservation command that means something.
const DATA_BYTES: usize = 16;

impl Conn {
    /// A Reservation Register, Acquire or Release with its data.
    pub(crate) fn reserve(&mut self, slot: u16, command: IoCommand, env: &mut Env<'_>) {
        let mut data = [0; DATA_BYTES];
        let len = self.slot_data(slot, &mut data);
        let request = match ReservationRequest::parse(&command, &data[..len]) {
            Ok(request) => request,
            Err(status) => return self.respond(slot, status, 0, env),
        };
        let (Some(home), Some(association)) = (self.home(command.nsid()), &self.association) else {
            return self.respond(slot, Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), 0, env);
        };
        let (host, answer) = (association.host.hostid, Arc::new(Answer::default()));
        if home.has_store() {
            let (to, core) = (Arc::clone(&answer), env.local.handle());
            let taken = env.shared.jobs.run(move || {
                to.set(home.apply(&host, &request));
                core.wake();
            });
            if !taken {
                return self.respond(slot, Status::COMMAND_INTERRUPTED, 0, env);
            }
        } else {
            // Nothing to be written, nothing to wait for.
            answer.set(home.apply(&host, &request));
        }
        self.wait_for_job(slot, answer, env);
    }

    /// The Reservation Persistence feature: `set` of one namespace or of all, or asked for.
    pub(crate) fn persistence(
        &mut self,
        slot: u16,
        nsid: u32,
        set: Option<bool>,
        env: &mut Env<'_>,
    ) {
        let homes: Vec<Arc<Home>> = match &self.view {
            Some(view) if nsid == NSID_ALL => {
                view.volumes.iter().map(|volume| Arc::clone(&volume.home)).collect()
            }
            _ => self.home(nsid).into_iter().collect(),
        };
        let Some(is_kept) = set else {
            let is_kept = homes.first().is_some_and(|home| home.reservations().state().ptpl);
            return self.respond(slot, Status::SUCCESS, is_kept.into(), env);
        };
        let answer = Arc::new(Answer::default());
        let (to, core) = (Arc::clone(&answer), env.local.handle());
        let taken = env.shared.jobs.run(move || {
            let result = homes.iter().try_for_each(|home| home.persist(is_kept));
            to.set(result.map(|()| ReservationEffect::default()));
            core.wake();
        });
        if !taken {
            return self.respond(slot, Status::COMMAND_INTERRUPTED, 0, env);
        }
        self.wait_for_job(slot, answer, env);
    }

    /// What all namespaces that are this volume share.
    fn home(&self, nsid: u32) -> Option<Arc<Home>> {
        let view = self.view.as_ref()?;
        Some(Arc::clone(&view.volumes[self.volume(nsid, 0)?].home))
    }

    /// The command is in force: hosts are told, and I/O of before is waited for.
    pub(crate) fn reserved(&mut self, slot: u16, effect: &ReservationEffect, env: &mut Env<'_>) {
        if !effect.changed {
            return self.respond(slot, Status::SUCCESS, 0, env);
        }
        let nsid = self.slot_sqe(slot).nsid.get();
        let Some(home) = self.home(nsid) else {
            return self.respond(slot, Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), 0, env);
        };
        if !effect.notices.is_empty() {
            notify(&home, effect, env);
        }
        // Where nothing is held nobody has lost anything, but a preempted host's commands are
        // over when the command is that preempted it.
        if home.word() != 0 || !effect.preempted.is_empty() {
            self.wait_for_volume(slot, &home, env);
        } else {
            self.respond(slot, Status::SUCCESS, 0, env);
        }
    }

    /// A Reservation Report.
    pub(crate) fn report(&mut self, slot: u16, nsid: u32, len: u32, env: &mut Env<'_>) {
        let (Some(home), Some(association)) = (self.home(nsid), &self.association) else {
            return self.respond(slot, Status::INVALID_NAMESPACE_OR_FORMAT.dnr(), 0, env);
        };
        let controllers: Vec<_> = env
            .shared
            .registry
            .list(Some(association.served))
            .iter()
            .filter(|association| !association.is_dead())
            .map(|association| (association.cntlid, association.host.hostid))
            .collect();
        let mut bytes = home.reservations().report(true, &controllers);
        bytes.resize(len as usize, 0);
        self.respond_bytes(slot, &bytes, 0, env);
    }
}

/// Posts the notices to every controller of the hosts, of all subsystems that have the volume.
fn notify(home: &Arc<Home>, effect: &ReservationEffect, env: &Env<'_>) {
    for (id, subsystem) in &env.table.subsystems {
        let of_volume = subsystem.namespaces.iter().filter(|ns| Arc::ptr_eq(&ns.volume.home, home));
        for ns in of_volume {
            for association in env.shared.registry.list(Some(Served::Subsystem(*id))) {
                for (host, kind) in &effect.notices {
                    if association.host.hostid == *host
                        && ns.hosts.admits(&association.host.hostnqn)
                    {
                        association.letters.post_notice(ns.info.nsid, *kind);
                    }
                }
            }
        }
    }
    env.shared.wake_all();
}
