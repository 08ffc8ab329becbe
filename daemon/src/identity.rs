//! Identities: what makes a volume the same disk to every host, after every restart.
//!
//! With a data directory identities are minted once and stored ([`crate::state`]). Without one they
//! are *derived*: a version 5 UUID of the subsystem NQN and the volume's name, so that the same
//! command line gives the same disk. Nothing here is secret.

use block::Identity;
use nvme::spec::Nqn;
use uuid::Uuid;

/// Name space of every UUID derived here; chosen once, never to be changed.
const NAMESPACE: Uuid = Uuid::from_u128(0x7b0f_6d2e_94a1_4c57_8e3d_2f60_c5a9_1b84);

/// The NQN form that needs no registered domain: a UUID.
pub(crate) const UUID_NQN: &str = "nqn.2014-08.org.nvmexpress:uuid:";

/// A subsystem or host name and the identifier that goes with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostIdentity {
    /// Host NQN.
    pub nqn: Nqn,
    /// Host Identifier: 16 bytes, the UUID in the NQN.
    pub id: [u8; 16],
}

/// The subsystem served by a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubsystemIdentity {
    /// Subsystem NQN.
    pub nqn: Nqn,
    /// Serial number: 20 ASCII characters, padded with spaces.
    pub serial: [u8; 20],
}

/// An NQN made of a UUID.
pub fn uuid_nqn(uuid: Uuid) -> Nqn {
    Nqn::new(&format!("{UUID_NQN}{}", uuid.hyphenated()))
        .expect("68 graphic characters after nqn.2014-08. are an NQN")
}

/// A volume's identity, all of it from one UUID.
pub fn volume_from_uuid(uuid: Uuid) -> Identity {
    Identity::from_uuid(*uuid.as_bytes())
}

/// The identity of volume `name` in subsystem `subnqn`, where nothing is stored.
pub fn derive_volume(subnqn: &Nqn, name: &str) -> Identity {
    volume_from_uuid(derive(&["volume", subnqn.as_str(), name]))
}

/// What the identity of an emulated device's own volume is derived from: the device's name.
pub(crate) fn derive_local(device: &str) -> Nqn {
    uuid_nqn(derive(&["device", device]))
}

/// The subsystem served where nothing is stored: `nqn` if the operator chose one, otherwise one
/// derived from this machine and the first address listened on.
pub fn derive_subsystem(nqn: Option<&Nqn>, listen: &str) -> SubsystemIdentity {
    match nqn {
        Some(nqn) => SubsystemIdentity {
            nqn: nqn.clone(),
            serial: serial(derive(&["subsystem", nqn.as_str()])),
        },
        None => subsystem_from_uuid(derive(&["target", &machine(), listen])),
    }
}

/// The discovery subsystem's own NQN where nothing is stored.
pub(crate) fn derive_discovery(listen: &str) -> Nqn {
    uuid_nqn(derive(&["discovery", &machine(), listen]))
}

/// A controller of a device that has whatever namespaces its subsystem has: none of them says who it is.
pub(crate) fn derive_device(subnqn: &Nqn, name: &str) -> Identity {
    Identity::from_uuid(*derive(&["device", subnqn.as_str(), name]).as_bytes())
}

/// A subsystem named by a UUID.
pub fn subsystem_from_uuid(uuid: Uuid) -> SubsystemIdentity {
    SubsystemIdentity { nqn: uuid_nqn(uuid), serial: serial(uuid) }
}

/// This machine as an NVMe host, where nothing is stored.
pub fn derive_host() -> HostIdentity {
    host_from_uuid(derive(&["host", &machine()]))
}

/// A host named by a UUID.
pub fn host_from_uuid(uuid: Uuid) -> HostIdentity {
    HostIdentity { nqn: uuid_nqn(uuid), id: *uuid.as_bytes() }
}

/// A version 5 UUID of the parts; their lengths are part of it, so that no two lists are alike.
fn derive(parts: &[&str]) -> Uuid {
    let mut name = Vec::new();
    for part in parts {
        name.extend_from_slice(&(part.len() as u64).to_le_bytes());
        name.extend_from_slice(part.as_bytes());
    }
    Uuid::new_v5(&NAMESPACE, &name)
}

/// `PS` and 16 hexadecimal digits, padded with spaces to the 20 bytes of Identify Controller.
fn serial(uuid: Uuid) -> [u8; 20] {
    let mut serial = [b' '; 20];
    let (head, _) = uuid.as_u64_pair();
    let text = format!("PS{head:016X}");
    serial[..text.len()].copy_from_slice(text.as_bytes());
    serial
}

/// Something stable about this machine. Without a machine ID the host name has to do.
fn machine() -> String {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .ok()
            .map(|text| text.trim().to_owned())
            .filter(|text| !text.is_empty())
    };
    read("/etc/machine-id")
        .or_else(|| read("/proc/sys/kernel/hostname"))
        .unwrap_or_else(|| "unknown machine".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nqn(text: &str) -> Nqn {
        text.parse().unwrap()
    }

    /// Derived identities are what hosts remember: a change of these values is a change of disks.
    #[test]
    fn derivation_is_frozen() {
        let identity = derive_volume(&nqn("nqn.2014-08.com.example:a"), "vol0");
        assert_eq!(
            Uuid::from_bytes(identity.uuid).to_string(),
            "57765962-d898-54cd-bf63-65c14bd2803b"
        );
        assert_eq!(identity.nguid, identity.uuid);
        assert_eq!(&identity.serial, b"57765962d89854cdbf63");
    }

    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(derive(&["a", "bc"]), derive(&["ab", "c"]));
        let subnqn = nqn("nqn.2014-08.com.example:a");
        assert_ne!(derive_volume(&subnqn, "a").uuid, derive_volume(&subnqn, "b").uuid);
        assert_ne!(
            derive_subsystem(None, "127.0.0.1:1").nqn,
            derive_subsystem(None, "127.0.0.1:2").nqn
        );
    }

    #[test]
    fn derived_names_are_valid_and_stable() {
        let subsystem = derive_subsystem(None, "127.0.0.1:4420");
        assert_eq!(subsystem, derive_subsystem(None, "127.0.0.1:4420"));
        let host = derive_host();
        assert!(host.nqn.as_str().ends_with(&Uuid::from_bytes(host.id).to_string()));
    }
}
