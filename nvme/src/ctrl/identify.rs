//! Identify.

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromZeros, IntoBytes};

use super::log::ENDURANCE_GROUP;
use super::{ABORT_MAX, AER_MAX, Controller, ERROR_LOG_MAX, io, keep_alive};
use crate::spec::{
    CSI_NVM, Cns, IDENTIFY_LEN, IdentifyController, IdentifyControllerNvm, IdentifyNamespace,
    IdentifyNamespaceIndependent, LbaFormat, NSID_ALL, Sqe, Status, VERSION_2_0, nidt,
};
use crate::subsys::ana::{ANA_GROUPS_MAX, AnaState};
use crate::subsys::{
    COMPARE_AND_WRITE_BLOCKS_MAX, COPY_RANGES_MAX, NamespaceInfo, PAGE_BYTES, VERIFY_BYTES_MAX,
    WRITE_UNCORRECTABLE_BYTES_MAX, WRITE_ZEROES_BYTES_MAX,
};

const INVALID_FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();
const INVALID_NAMESPACE: Status = Status::INVALID_NAMESPACE_OR_FORMAT.dnr();

/// CCRL. Each is completed when it is done, so that the admin queue is the bound; hosts send one.
const CROSS_RESETS_MAX: u8 = 1;

/// Entries of a namespace list.
const LIST_MAX: usize = IDENTIFY_LEN / 4;
/// Entries of a controller or endurance group list, which begins with their number.
const ID_LIST_MAX: usize = IDENTIFY_LEN / 2 - 1;

/// ANATT: how long a group may be in the Change state, seconds.
const ANA_TRANSITION_SECONDS: u8 = 10;

/// CNTID of the I/O Command Set data structure: the controller that processes the command.
const CNTID_THIS: u16 = 0xffff;

impl Controller {
    /// Identify: fills `out` with 4096 bytes.
    pub(crate) fn identify(
        &self,
        sqe: &Sqe,
        transfer_len: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Status> {
        let cns = Cns(sqe.cdw10.get() as u8);
        let csi = (sqe.cdw11.get() >> 24) as u8;
        let nsid = sqe.nsid.get();
        if self.is_discovery() && cns != Cns::CONTROLLER {
            return Err(INVALID_FIELD);
        }
        let takes_csi =
            matches!(cns, Cns::IOCS_NAMESPACE | Cns::IOCS_CONTROLLER | Cns::IOCS_ACTIVE_NAMESPACES);
        if takes_csi && csi != CSI_NVM {
            return Err(INVALID_FIELD);
        }
        match cns {
            Cns::CONTROLLER => out.extend_from_slice(self.identify_controller().as_bytes()),
            Cns::IOCS_CONTROLLER => out.extend_from_slice(identify_controller_nvm().as_bytes()),
            // Every namespace is attached to the controllers that may know of it: allocated ones
            // are the active ones.
            Cns::ACTIVE_NAMESPACES | Cns::IOCS_ACTIVE_NAMESPACES | Cns::ALLOCATED_NAMESPACES => {
                self.active_namespaces(nsid, out)?;
            }
            Cns::NAMESPACE | Cns::ALLOCATED_NAMESPACE => {
                if let Some(ns) = self.valid_namespace(nsid)? {
                    let state = self.subsys.ana_state(ns);
                    out.extend_from_slice(self.identify_namespace(ns, state).as_bytes());
                }
            }
            Cns::INDEPENDENT_NAMESPACE => {
                if let Some(ns) = self.valid_namespace(nsid)? {
                    out.extend_from_slice(self.identify_namespace_independent(ns).as_bytes());
                }
            }
            // The NVM Command Set specific structure describes protection information, which no
            // namespace has: all zeroes.
            Cns::IOCS_NAMESPACE => {
                self.valid_namespace(nsid)?;
            }
            Cns::NAMESPACE_DESCRIPTORS => {
                let ns = self.valid_namespace(nsid)?.ok_or(INVALID_NAMESPACE)?;
                namespace_descriptors(ns, out);
            }
            Cns::NAMESPACE_CONTROLLERS => {
                // Not a namespace, and here it is the field that is invalid.
                if nsid == NSID_ALL {
                    return Err(INVALID_FIELD);
                }
                let is_active = self.valid_namespace(nsid)?.is_some();
                let controllers = if is_active { &self.controllers[..] } else { &[] };
                id_list(controllers, cntid(sqe), out);
            }
            Cns::CONTROLLERS => id_list(&self.controllers, cntid(sqe), out),
            Cns::ENDURANCE_GROUPS => {
                let from = sqe.cdw11.get() as u16;
                id_list(&[ENDURANCE_GROUP], from, out);
            }
            Cns::COMMAND_SETS => {
                let cntid = cntid(sqe);
                if cntid != CNTID_THIS && self.controllers.binary_search(&cntid).is_err() {
                    return Err(INVALID_FIELD);
                }
                // One combination: the NVM Command Set alone. The other 511 are zero.
                out.extend_from_slice(&(1u64 << CSI_NVM).to_le_bytes());
            }
            _ => return Err(INVALID_FIELD),
        }
        // An inactive namespace is described by zeroes, and lists are padded with them.
        out.resize(IDENTIFY_LEN, 0);
        if transfer_len as usize != IDENTIFY_LEN {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        Ok(())
    }

    /// The namespace, `None` if the NSID is valid but inactive.
    fn valid_namespace(&self, nsid: u32) -> Result<Option<&NamespaceInfo>, Status> {
        // FFFFFFFFh (common capabilities) needs namespace management support.
        if nsid == 0 || nsid > self.subsys.limits().namespaces_max {
            return Err(INVALID_NAMESPACE);
        }
        Ok(self.subsys.namespace(nsid))
    }

    /// Active namespaces with an NSID above `after`.
    fn active_namespaces(&self, after: u32, out: &mut Vec<u8>) -> Result<(), Status> {
        // "FFFFFFFEh and FFFFFFFFh are not valid."
        if after >= 0xffff_fffe {
            return Err(INVALID_NAMESPACE);
        }
        let namespaces = self.subsys.namespaces();
        let from = namespaces.partition_point(|ns| ns.nsid <= after);
        for ns in namespaces[from..].iter().take(LIST_MAX) {
            out.extend_from_slice(&ns.nsid.to_le_bytes());
        }
        Ok(())
    }

    fn identify_controller(&self) -> IdentifyController {
        type Id = IdentifyController;
        let limits = self.subsys.limits();
        let mut id = IdentifyController::new_zeroed();
        id.sn = *self.subsys.serial().bytes();
        id.mn = *self.subsys.model().bytes();
        id.fr = *self.subsys.firmware().bytes();
        id.mdts = self.subsys.mdts_shift();
        id.cntlid = U16::new(self.cntlid);
        id.ver = U32::new(VERSION_2_0);
        id.oaes = U32::new(self.optional_async_events());
        let mut ctratt = Id::CTRATT_HOST_ID_128;
        id.aerl_z = (AER_MAX - 1) as u8;
        id.lpa = Id::LPA_EXTENDED;
        id.maxcmd = U16::new(limits.queue_entries_max);
        id.subnqn = self.subsys.nqn().to_field();
        if self.is_pcie() {
            // Data blocks, bit buckets, segments and last segments, of any alignment and length.
            id.sgls = U32::new(Id::SGLS_SUPPORTED | Id::SGLS_BIT_BUCKET | Id::SGLS_LONGER);
            id.oacs = U16::new(Id::OACS_DOORBELL_BUFFER);
        } else {
            ctratt |= Id::CTRATT_TBKAS;
            id.kas = U16::new(keep_alive::KAS);
            id.sgls = U32::new(Id::SGLS_SUPPORTED | Id::SGLS_OFFSET | Id::SGLS_TRANSPORT);
            // Units of 16 bytes: the 64-byte SQE and in-capsule data; the 16-byte CQE.
            id.ioccsz = U32::new((64 + limits.in_capsule_bytes) / 16);
            id.iorcsz = U32::new(1);
            id.msdbd = 1;
        }
        id.ctratt = U32::new(ctratt);
        if self.is_discovery() {
            id.cntrltype = Id::CNTRLTYPE_DISCOVERY;
            id.dctype = Id::DCTYPE_DDC;
            return id;
        }
        id.cntrltype = Id::CNTRLTYPE_IO;
        if !self.is_pcie() {
            id.cmic = Id::CMIC_MULTI_PORT | Id::CMIC_MULTI_CONTROLLER;
            id.ofcs = U16::new(Id::OFCS_DISCONNECT);
            id.nwpc = Id::NWPC_WRITE_PROTECT;
        }
        if self.has(|ns| ns.compare_and_write) {
            id.fuses = U16::new(Id::FUSES_COMPARE_AND_WRITE);
            id.acwu_z = U16::new((COMPARE_AND_WRITE_BLOCKS_MAX - 1) as u16);
        }
        if self.has_ana() {
            id.cmic |= Id::CMIC_ANA;
            id.anatt = ANA_TRANSITION_SECONDS;
            id.anacap = Id::ANACAP_ALL_STATES;
            id.anagrpmax = U32::new(ANA_GROUPS_MAX);
            id.nanagrpid = U32::new(ANA_GROUPS_MAX);
        }
        id.ctratt = U32::new(ctratt | Id::CTRATT_ENDURANCE_GROUPS);
        id.endgidmax = U16::new(ENDURANCE_GROUP);
        id.acl_z = ABORT_MAX - 1;
        // One read-only firmware slot.
        id.frmw = 1 | 1 << 1;
        id.lpa |= Id::LPA_EFFECTS;
        id.elpe_z = (ERROR_LOG_MAX - 1) as u8;
        // Entries of 2^6 and 2^4 bytes, required and maximum.
        id.sqes = 0x66;
        id.cqes = 0x44;
        id.nn = U32::new(limits.namespaces_max);
        id.mnan = U32::new(limits.namespaces_max);
        id.oncs = U16::new(self.optional_nvm_commands());
        id.cdfs = U16::new(io::COPY_FORMATS);
        // AWUN and AWUPF are 0: one logical block, the least there is.
        // A namespace with a volatile cache may be added any time, and a host that was told there
        // is none would not flush. Namespaces without one say so in NSFEAT.VWCNP (CNS 08h).
        id.vwc = Id::VWC_PRESENT | Id::VWC_BROADCAST_FLUSH;
        if let Some(instance) = self.instance {
            id.ciu = instance.ciu;
            id.cirn = U64::new(instance.cirn);
            id.ccrl = CROSS_RESETS_MAX;
        }
        id
    }

    /// Whether any namespace can do it. While there is none to ask, what namespaces usually can:
    /// hosts read it once, when they connect.
    fn has(&self, ability: fn(&NamespaceInfo) -> bool) -> bool {
        let namespaces = self.subsys.namespaces();
        namespaces.is_empty() || namespaces.iter().any(ability)
    }

    /// ONCS.
    pub(crate) fn optional_nvm_commands(&self) -> u16 {
        type Id = IdentifyController;
        let namespaces = self.subsys.namespaces();
        let mut oncs = Id::ONCS_DSM | Id::ONCS_SAVE_SELECT | Id::ONCS_TIMESTAMP;
        if self.has(|ns| ns.compare) {
            oncs |= Id::ONCS_COMPARE;
        }
        if self.has(|ns| ns.verify) {
            oncs |= Id::ONCS_VERIFY;
        }
        if self.has(|ns| ns.copy) {
            oncs |= Id::ONCS_COPY;
        }
        if self.has(|ns| ns.write_zeroes) {
            oncs |= Id::ONCS_WRITE_ZEROES;
        }
        if self.has(|ns| ns.reservations) {
            oncs |= Id::ONCS_RESERVATIONS;
        }
        if namespaces.iter().any(|ns| ns.write_uncorrectable) {
            oncs |= Id::ONCS_WRITE_UNCORRECTABLE;
        }
        oncs
    }

    /// NMIC: controllers of a target share its namespaces; those of a PCI function are its own.
    fn sharing(&self) -> u8 {
        if self.is_pcie() { 0 } else { IdentifyNamespace::NMIC_SHARED }
    }

    /// ANAGRPID, 0 where ANA is not reported.
    fn ana_group(&self, ns: &NamespaceInfo) -> U32 {
        U32::new(if self.has_ana() { ns.ana_group } else { 0 })
    }

    fn identify_namespace(&self, ns: &NamespaceInfo, state: AnaState) -> IdentifyNamespace {
        let mut id = identify_namespace(ns);
        id.nmic = self.sharing();
        // Without access "capacity fields are cleared to 0h" (NVMe Base 2.2, Figure 589): the
        // utilization is. The size stays, against the letter, because Linux takes a namespace
        // without one for gone and drops the path.
        if matches!(state, AnaState::Inaccessible | AnaState::PersistentLoss) {
            id.nuse = U64::ZERO;
        }
        id.anagrpid = self.ana_group(ns);
        id
    }

    /// Ready in every ANA state: the state says which path works, NSTAT that there is a namespace.
    fn identify_namespace_independent(&self, ns: &NamespaceInfo) -> IdentifyNamespaceIndependent {
        let mut id = IdentifyNamespaceIndependent::new_zeroed();
        id.nsfeat = IdentifyNamespace::NSFEAT_UID_REUSE;
        if !ns.write_cache {
            id.nsfeat |= IdentifyNamespaceIndependent::NSFEAT_VWC_NOT_PRESENT;
        }
        id.nmic = self.sharing();
        id.rescap = rescap(ns);
        id.anagrpid = self.ana_group(ns);
        id.nsattr = nsattr(ns);
        id.endgid = U16::new(ENDURANCE_GROUP);
        id.nstat = IdentifyNamespaceIndependent::NSTAT_READY;
        id
    }
}

fn identify_controller_nvm() -> IdentifyControllerNvm {
    let size_limit = |bytes: u32| (bytes / PAGE_BYTES).ilog2() as u8;
    let mut id = IdentifyControllerNvm::new_zeroed();
    id.vsl = size_limit(VERIFY_BYTES_MAX);
    id.wzsl = size_limit(WRITE_ZEROES_BYTES_MAX);
    id.wusl = size_limit(WRITE_UNCORRECTABLE_BYTES_MAX);
    id
}

/// CNTID: controllers are listed from this one on.
fn cntid(sqe: &Sqe) -> u16 {
    (sqe.cdw10.get() >> 16) as u16
}

/// A list of identifiers that are `from` or above: their number, then they. `ids` is ascending.
fn id_list(ids: &[u16], from: u16, out: &mut Vec<u8>) {
    let ids = &ids[ids.partition_point(|&id| id < from)..];
    let ids = &ids[..ids.len().min(ID_LIST_MAX)];
    out.extend_from_slice(&(ids.len() as u16).to_le_bytes());
    ids.iter().for_each(|id| out.extend_from_slice(&id.to_le_bytes()));
}

fn rescap(ns: &NamespaceInfo) -> u8 {
    type Id = IdentifyNamespace;
    match (ns.reservations, ns.ptpl) {
        (false, _) => 0,
        (true, false) => Id::RESCAP_ALL_TYPES,
        (true, true) => Id::RESCAP_ALL_TYPES | Id::RESCAP_PTPL,
    }
}

fn nsattr(ns: &NamespaceInfo) -> u8 {
    if ns.refuses_writes() { IdentifyNamespace::NSATTR_WRITE_PROTECTED } else { 0 }
}

/// Bytes as a zero-based number of blocks, if it is a whole number of them that fits.
fn blocks_z(bytes: u32, ns: &NamespaceInfo) -> Option<U16> {
    if bytes == 0 || !bytes.is_multiple_of(ns.block_bytes) {
        return None;
    }
    u16::try_from(bytes / ns.block_bytes - 1).ok().map(U16::new)
}

fn identify_namespace(ns: &NamespaceInfo) -> IdentifyNamespace {
    type Id = IdentifyNamespace;
    let mut id = IdentifyNamespace::new_zeroed();
    id.nsze = U64::new(ns.blocks);
    id.ncap = U64::new(ns.blocks);
    let used = ns.used_bytes.map_or(ns.blocks, |bytes| bytes.div_ceil(u64::from(ns.block_bytes)));
    id.nuse = U64::new(used.min(ns.blocks));
    id.nsfeat = Id::NSFEAT_UID_REUSE;
    let write = blocks_z(ns.write_granularity_bytes, ns);
    let deallocate = blocks_z(ns.deallocate_granularity_bytes, ns);
    if write.is_some() || deallocate.is_some() {
        // All five fields count once OPTPERF is set; 0 (one block) is the neutral value.
        id.nsfeat |= Id::NSFEAT_OPTPERF;
        id.npwg_z = write.unwrap_or_default();
        id.npwa_z = id.npwg_z;
        id.npdg_z = deallocate.unwrap_or_default();
        id.npda_z = id.npdg_z;
        id.nows_z = blocks_z(ns.optimal_write_bytes, ns).unwrap_or(id.npwg_z);
    }
    if ns.deallocated_reads_zero {
        id.dlfeat = Id::DLFEAT_READS_ZERO;
    }
    if ns.write_zeroes && ns.deallocate {
        id.dlfeat |= Id::DLFEAT_WRITE_ZEROES;
    }
    id.nvmcap = U128::new(u128::from(ns.size_bytes()));
    id.rescap = rescap(ns);
    id.mssrl = U16::new(ns.mssrl_blocks());
    id.mcl = U32::new(ns.mcl_blocks());
    id.msrc_z = (COPY_RANGES_MAX - 1) as u8;
    id.nsattr = nsattr(ns);
    id.endgid = U16::new(ENDURANCE_GROUP);
    id.nguid = ns.nguid;
    id.eui64 = ns.eui64;
    id.lbaf[0] = LbaFormat { ms: U16::ZERO, lbads: ns.block_bytes.trailing_zeros() as u8, rp: 0 };
    id
}

/// The identifiers a namespace has, and its command set. The list ends with a zero type.
fn namespace_descriptors(ns: &NamespaceInfo, out: &mut Vec<u8>) {
    let mut push = |kind: u8, id: &[u8]| {
        if kind == nidt::CSI || id.iter().any(|&b| b != 0) {
            out.extend_from_slice(&[kind, id.len() as u8, 0, 0]);
            out.extend_from_slice(id);
        }
    };
    push(nidt::EUI64, &ns.eui64);
    push(nidt::NGUID, &ns.nguid);
    push(nidt::UUID, &ns.uuid);
    push(nidt::CSI, &[CSI_NVM]);
}
