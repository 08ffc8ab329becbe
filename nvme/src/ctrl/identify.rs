//! Identify.

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromZeros, IntoBytes};

use super::{ABORT_MAX, AER_MAX, Controller, ERROR_LOG_MAX, keep_alive};
use crate::spec::{
    CSI_NVM, Cns, IDENTIFY_LEN, IdentifyController, IdentifyControllerNvm, IdentifyNamespace,
    IdentifyNamespaceIndependent, LbaFormat, Sqe, Status, VERSION_2_0, nidt,
};
use crate::subsys::{NamespaceInfo, PAGE_BYTES, WRITE_ZEROES_BYTES_MAX};

const INVALID_FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();
const INVALID_NAMESPACE: Status = Status::INVALID_NAMESPACE_OR_FORMAT.dnr();

/// CCRL. Each is completed when it is done, so that the admin queue is the bound; hosts send one.
const CROSS_RESETS_MAX: u8 = 1;

/// Entries of a namespace list.
const LIST_MAX: usize = IDENTIFY_LEN / 4;

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
            Cns::ACTIVE_NAMESPACES | Cns::IOCS_ACTIVE_NAMESPACES => {
                self.active_namespaces(nsid, out)?;
            }
            Cns::NAMESPACE => {
                if let Some(ns) = self.valid_namespace(nsid)? {
                    out.extend_from_slice(identify_namespace(ns).as_bytes());
                }
            }
            Cns::INDEPENDENT_NAMESPACE => {
                if let Some(ns) = self.valid_namespace(nsid)? {
                    out.extend_from_slice(identify_namespace_independent(ns).as_bytes());
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
        id.ctratt = U32::new(Id::CTRATT_HOST_ID_128 | Id::CTRATT_TBKAS);
        id.aerl_z = (AER_MAX - 1) as u8;
        id.lpa = Id::LPA_EXTENDED;
        id.kas = U16::new(keep_alive::KAS);
        id.maxcmd = U16::new(limits.queue_entries_max);
        id.sgls = U32::new(Id::SGLS_SUPPORTED | Id::SGLS_OFFSET | Id::SGLS_TRANSPORT);
        id.subnqn = self.subsys.nqn().to_field();
        // Units of 16 bytes: the 64-byte SQE and in-capsule data; the 16-byte CQE.
        id.ioccsz = U32::new((64 + limits.in_capsule_bytes) / 16);
        id.iorcsz = U32::new(1);
        id.msdbd = 1;
        if self.is_discovery() {
            id.cntrltype = Id::CNTRLTYPE_DISCOVERY;
            id.dctype = Id::DCTYPE_DDC;
            return id;
        }
        id.cntrltype = Id::CNTRLTYPE_IO;
        id.cmic = Id::CMIC_MULTI_PORT | Id::CMIC_MULTI_CONTROLLER;
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
        // A namespace with a volatile cache may be added any time, and a host that was told there
        // is none would not flush. Namespaces without one say so in NSFEAT.VWCNP (CNS 08h).
        id.vwc = Id::VWC_PRESENT | Id::VWC_NO_BROADCAST_FLUSH;
        id.ofcs = U16::new(Id::OFCS_DISCONNECT);
        if let Some(instance) = self.instance {
            id.ciu = instance.ciu;
            id.cirn = U64::new(instance.cirn);
            id.ccrl = CROSS_RESETS_MAX;
        }
        id
    }

    /// ONCS. While there is no namespace to ask, what namespaces usually support: hosts read it
    /// once, when they connect.
    fn optional_nvm_commands(&self) -> u16 {
        let namespaces = self.subsys.namespaces();
        let write_zeroes = namespaces.is_empty() || namespaces.iter().any(|ns| ns.write_zeroes);
        let mut oncs = IdentifyController::ONCS_DSM
            | IdentifyController::ONCS_SAVE_SELECT
            | IdentifyController::ONCS_TIMESTAMP;
        if write_zeroes {
            oncs |= IdentifyController::ONCS_WRITE_ZEROES;
        }
        oncs
    }
}

fn identify_controller_nvm() -> IdentifyControllerNvm {
    let mut id = IdentifyControllerNvm::new_zeroed();
    id.wzsl = (WRITE_ZEROES_BYTES_MAX / PAGE_BYTES).ilog2() as u8;
    id
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
    id.nmic = Id::NMIC_SHARED;
    if ns.deallocated_reads_zero {
        id.dlfeat = Id::DLFEAT_READS_ZERO;
    }
    if ns.write_zeroes && ns.deallocate {
        id.dlfeat |= Id::DLFEAT_WRITE_ZEROES;
    }
    id.nvmcap = U128::new(u128::from(ns.size_bytes()));
    id.nsattr = if ns.read_only { Id::NSATTR_WRITE_PROTECTED } else { 0 };
    id.nguid = ns.nguid;
    id.eui64 = ns.eui64;
    id.lbaf[0] = LbaFormat { ms: U16::ZERO, lbads: ns.block_bytes.trailing_zeros() as u8, rp: 0 };
    id
}

fn identify_namespace_independent(ns: &NamespaceInfo) -> IdentifyNamespaceIndependent {
    let mut id = IdentifyNamespaceIndependent::new_zeroed();
    id.nsfeat = IdentifyNamespace::NSFEAT_UID_REUSE;
    if !ns.write_cache {
        id.nsfeat |= IdentifyNamespaceIndependent::NSFEAT_VWC_NOT_PRESENT;
    }
    id.nmic = IdentifyNamespace::NMIC_SHARED;
    id.nsattr = if ns.read_only { IdentifyNamespace::NSATTR_WRITE_PROTECTED } else { 0 };
    id.nstat = IdentifyNamespaceIndependent::NSTAT_READY;
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
