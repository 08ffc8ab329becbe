//! What all namespaces that are one volume share, whatever subsystem or port they are served
//! through: reservations, and who may change which bytes now. A volume is known by its UUID.
//!
//! A home stays for as long as the target runs: reservations outlive a namespace that is taken away
//! and attached again. Their number is that of the volumes that an operator ever attached.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme::spec::Status;
use nvme::subsys::reservation::{
    HostId, ReservationEffect, ReservationRequest, Reservations, Rights,
};

use crate::config::ReservationStore;
use crate::locks::RangeLocks;

/// See the module's documentation.
pub(crate) struct Home {
    uuid: [u8; 16],
    /// Who may change which bytes now.
    pub(crate) locks: RangeLocks,
    /// 0: no reservation is held, everybody may do everything. Else another number whenever
    /// somebody's rights may be other than before. Written with Release after `reservations`.
    word: AtomicU64,
    /// The last `word` that was not 0 and the reservations it stands for.
    reservations: Mutex<(u64, Reservations)>,
    /// Held by who changes the reservations, through the wait for the store.
    change: Mutex<()>,
    store: Option<Arc<dyn ReservationStore>>,
    /// Volumes by [`VolumeState::index`](crate::volume::VolumeState::index) that are this one.
    volumes: Mutex<Vec<u32>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Home {
    fn new(uuid: [u8; 16], store: Option<Arc<dyn ReservationStore>>) -> io::Result<Home> {
        let kept = match &store {
            // What was not to be kept through power loss is not what a restart finds.
            Some(store) => store.load(&uuid)?.filter(|state| state.ptpl),
            None => None,
        };
        let reservations = match kept {
            Some(state) => Reservations::from_state(state)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?,
            None => Reservations::new(),
        };
        let word = u64::from(reservations.is_held());
        Ok(Home {
            uuid,
            locks: RangeLocks::default(),
            word: AtomicU64::new(word),
            reservations: Mutex::new((word, reservations)),
            change: Mutex::default(),
            store,
            volumes: Mutex::default(),
        })
    }

    /// 0 while no reservation is held: then there is nothing to ask.
    #[inline]
    pub(crate) fn word(&self) -> u64 {
        // Acquire: who sees the word of a change sees the reservations it stands for.
        self.word.load(Ordering::Acquire)
    }

    /// What a host may do, for as long as [`Home::word`] is the number returned.
    pub(crate) fn rights(&self, host: &HostId) -> (u64, Rights) {
        let reservations = lock(&self.reservations);
        (reservations.0, reservations.1.rights(host))
    }

    /// Whether reservations can be kept through power loss.
    pub(crate) fn has_store(&self) -> bool {
        self.store.is_some()
    }

    /// A copy of the present state.
    pub(crate) fn reservations(&self) -> Reservations {
        lock(&self.reservations).1.clone()
    }

    /// Carries a reservation command out. When it returns, the state is durable (if it is to be
    /// kept through power loss, or was before) and binding for everything submitted from now on;
    /// what is at the volume already is for the caller to wait for. Blocks for the store.
    ///
    /// # Errors
    /// What the command is to be completed with; Internal Error if the state cannot be stored.
    /// Nothing has changed then.
    pub(crate) fn apply(
        &self,
        host: &HostId,
        request: &ReservationRequest,
    ) -> Result<ReservationEffect, Status> {
        let _change = lock(&self.change);
        let before = self.reservations();
        let mut after = before.clone();
        let effect = after.apply(host, request)?;
        if effect.changed {
            self.replace(&before, after)?;
        }
        Ok(effect)
    }

    /// Makes a new state durable and binding; the caller holds `change`.
    fn replace(&self, before: &Reservations, after: Reservations) -> Result<(), Status> {
        if (before.state().ptpl || after.state().ptpl)
            && let Some(store) = &self.store
            && let Err(error) = store.save(&self.uuid, after.state())
        {
            tracing::error!(%error, "reservations cannot be stored: a command was refused");
            return Err(Status::INTERNAL_ERROR);
        }
        let mut reservations = lock(&self.reservations);
        let word = reservations.0 + 1;
        let is_held = after.is_held();
        *reservations = (word, after);
        self.word.store(if is_held { word } else { 0 }, Ordering::Release);
        Ok(())
    }

    /// Keeps the reservations through power loss from now on, or no longer (Reservation
    /// Persistence feature). Blocks for the store.
    ///
    /// # Errors
    /// As [`Home::apply`].
    pub(crate) fn persist(&self, is_kept: bool) -> Result<(), Status> {
        let _change = lock(&self.change);
        let before = self.reservations();
        if before.state().ptpl == is_kept {
            return Ok(());
        }
        let mut state = before.to_state();
        state.ptpl = is_kept;
        let after = Reservations::from_state(state).map_err(|_| Status::INTERNAL_ERROR)?;
        self.replace(&before, after)
    }

    /// A volume is this one from now on.
    pub(crate) fn join(&self, index: u32) {
        lock(&self.volumes).push(index);
    }

    /// A volume is not used any more.
    pub(crate) fn leave(&self, index: u32) {
        let mut volumes = lock(&self.volumes);
        if let Some(at) = volumes.iter().position(|v| *v == index) {
            volumes.swap_remove(at);
        }
    }

    /// The volumes that are this one now.
    pub(crate) fn volumes(&self) -> Vec<u32> {
        lock(&self.volumes).clone()
    }
}

impl std::fmt::Debug for Home {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Home").field("uuid", &self.uuid).finish_non_exhaustive()
    }
}

/// All homes of a target.
#[derive(Default)]
pub(crate) struct Homes {
    store: Option<Arc<dyn ReservationStore>>,
    by_uuid: Mutex<BTreeMap<[u8; 16], Arc<Home>>>,
}

impl Homes {
    pub(crate) fn new(store: Option<Arc<dyn ReservationStore>>) -> Homes {
        Homes { store, by_uuid: Mutex::default() }
    }

    /// The home of a volume, with what was kept of its reservations. Blocks for the store.
    ///
    /// # Errors
    /// What was kept cannot be read: serving the volume without it would let hosts in that a
    /// reservation keeps out.
    pub(crate) fn home(&self, uuid: [u8; 16]) -> io::Result<Arc<Home>> {
        let mut homes = lock(&self.by_uuid);
        if let Some(home) = homes.get(&uuid) {
            return Ok(Arc::clone(home));
        }
        let home = Arc::new(Home::new(uuid, self.store.clone())?);
        homes.insert(uuid, Arc::clone(&home));
        Ok(home)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use nvme::subsys::reservation::{
        Access, AcquireAction, PersistChange, RegisterAction, ReleaseAction, ReservationState,
        ReservationType,
    };

    use super::*;

    #[derive(Default)]
    struct Store {
        states: Mutex<BTreeMap<[u8; 16], ReservationState>>,
        is_full: AtomicBool,
    }

    impl ReservationStore for Store {
        fn load(&self, uuid: &[u8; 16]) -> io::Result<Option<ReservationState>> {
            if self.is_full.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::Other.into());
            }
            Ok(lock(&self.states).get(uuid).cloned())
        }

        fn save(&self, uuid: &[u8; 16], state: &ReservationState) -> io::Result<()> {
            if self.is_full.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            lock(&self.states).insert(*uuid, state.clone());
            Ok(())
        }
    }

    const A: HostId = [1; 16];
    const B: HostId = [2; 16];

    fn register(key: u64, persist: PersistChange) -> ReservationRequest {
        let (action, iekey) = (RegisterAction::Register, false);
        ReservationRequest::Register { action, iekey, persist, crkey: 0, nrkey: key }
    }

    fn acquire(key: u64) -> ReservationRequest {
        ReservationRequest::Acquire {
            action: AcquireAction::Acquire,
            rtype: ReservationType::WriteExclusive,
            crkey: key,
            prkey: 0,
        }
    }

    #[test]
    fn word_is_zero_when_nothing_is_held_and_new_with_every_change() {
        let home = Home::new([9; 16], None).expect("nothing to load");
        home.apply(&A, &register(7, PersistChange::Keep)).expect("room");
        assert_eq!(home.word(), 0, "a registration alone takes nothing from anybody");
        home.apply(&A, &acquire(7)).expect("free");
        let held = home.word();
        assert_ne!(held, 0);
        let (word, rights) = home.rights(&B);
        assert_eq!(word, held);
        assert!(rights.allows(Access::Read) && !rights.allows(Access::Write));
        assert!(home.rights(&A).1.allows(Access::Write));
        home.apply(&B, &register(8, PersistChange::Keep)).expect("room");
        assert_ne!(home.word(), held);
        assert_eq!(home.rights(&B).0, home.word());
        let action = ReleaseAction::Release(Some(ReservationType::WriteExclusive));
        home.apply(&A, &ReservationRequest::Release { action, crkey: 7 }).expect("held");
        assert_eq!(home.word(), 0);
    }

    #[test]
    fn what_is_to_be_kept_is_stored_before_it_is_true() {
        let store = Arc::new(Store::default());
        let homes = Homes::new(Some(store.clone()));
        let home = homes.home([9; 16]).expect("nothing stored");
        home.apply(&B, &register(8, PersistChange::Keep)).expect("room");
        assert!(lock(&store.states).is_empty(), "nobody asked for it to be kept");
        home.apply(&A, &register(7, PersistChange::Set)).expect("room");
        home.apply(&A, &acquire(7)).expect("free");
        let kept = home.reservations().to_state();
        assert_eq!(lock(&store.states).get(&[9; 16]), Some(&kept));

        store.is_full.store(true, Ordering::Relaxed);
        let refused =
            home.apply(&A, &ReservationRequest::Release { action: ReleaseAction::Clear, crkey: 7 });
        assert_eq!(refused, Err(Status::INTERNAL_ERROR));
        assert_eq!(home.reservations().to_state(), kept, "nothing changed");
        assert_eq!(
            Homes::new(Some(store.clone())).home([9; 16]).map(drop).map_err(|e| e.kind()),
            Err(io::ErrorKind::Other),
            "what cannot be loaded is not served"
        );
        store.is_full.store(false, Ordering::Relaxed);

        let again = Homes::new(Some(store.clone())).home([9; 16]).expect("sound");
        assert_eq!(again.reservations().to_state(), kept);
        assert_ne!(again.word(), 0, "binding from the start");
        assert!(!again.rights(&B).1.write && again.rights(&A).1.write);
        // No longer to be kept: the store hears of it, and a restart finds nothing.
        again
            .apply(
                &A,
                &ReservationRequest::Register {
                    action: RegisterAction::Replace,
                    iekey: false,
                    persist: PersistChange::Clear,
                    crkey: 7,
                    nrkey: 9,
                },
            )
            .expect("registered");
        let last = Homes::new(Some(store)).home([9; 16]).expect("sound");
        assert_eq!(last.reservations(), Reservations::new());
    }

    #[test]
    fn volume_has_one_home_however_often_it_is_attached() {
        let homes = Homes::new(None);
        let a = homes.home([1; 16]).expect("nothing to load");
        let b = homes.home([1; 16]).expect("nothing to load");
        assert!(Arc::ptr_eq(&a, &b));
        a.join(3);
        b.join(5);
        a.leave(3);
        assert_eq!(b.volumes(), [5]);
        assert!(!Arc::ptr_eq(&a, &homes.home([2; 16]).expect("nothing to load")));
    }
}
