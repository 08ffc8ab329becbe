//! What a subsystem offers, as plain data: an `Arc<SubsystemInfo>` is the snapshot every core
//! decodes I/O against; a change is a new snapshot.

pub mod ana;
pub mod discovery;
pub mod reservation;

use self::ana::{ANA_GROUPS_MAX, AnaGroup, AnaState};
use crate::spec::{AsciiField, NSID_ALL, Nqn, Status};
use crate::xfer::Transport;

/// Unit of MDTS and WZSL: the minimum page size, CAP.MPSMIN = 0.
pub const PAGE_BYTES: u32 = 4096;

/// Largest Write Zeroes command in bytes: what 65,536 blocks of 512 bytes come to, reported as
/// WZSL. A power of two times [`PAGE_BYTES`].
pub const WRITE_ZEROES_BYTES_MAX: u32 = 32 << 20;

/// Largest Verify command in bytes, reported as VSL. A power of two times [`PAGE_BYTES`].
pub const VERIFY_BYTES_MAX: u32 = 32 << 20;

/// Largest Write Uncorrectable command in bytes, reported as WUSL. A power of two times
/// [`PAGE_BYTES`].
pub const WRITE_UNCORRECTABLE_BYTES_MAX: u32 = 32 << 20;

/// Most source ranges of one Copy command; MSRC is this minus one.
pub const COPY_RANGES_MAX: u16 = 128;

/// Largest source range of a Copy command in bytes; [`NamespaceInfo::mssrl_blocks`] says it in
/// blocks.
pub const COPY_RANGE_BYTES_MAX: u32 = 4 << 20;

/// Most bytes one Copy command moves; [`NamespaceInfo::mcl_blocks`] says it in blocks.
pub const COPY_BYTES_MAX: u32 = 32 << 20;

/// Blocks that a fused Compare and Write may have: what is compared and written as one step that
/// no other command sees half done. ACWU is this minus one.
pub const COMPARE_AND_WRITE_BLOCKS_MAX: u32 = 1;

/// What every controller of a subsystem grants.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Entries of a queue, one-based, at least 2 (32 or more for hosts in the field).
    pub queue_entries_max: u16,
    /// I/O queues of one association, at least 1.
    pub io_queues_max: u16,
    /// Largest Read or Write in bytes. At least 8192; rounded down to a power of two by
    /// [`SubsystemInfo::new`], because MDTS cannot say anything else.
    pub mdts_bytes: u32,
    /// In-capsule data an I/O queue accepts, bytes; rounded down to a multiple of 16.
    pub in_capsule_bytes: u32,
    /// Longest keep alive timeout granted; a longer one is refused.
    pub kato_max: core::time::Duration,
    /// Namespaces the subsystem may ever have, and largest NSID.
    pub namespaces_max: u32,
    /// How commands and data reach its controllers.
    pub transport: Transport,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            queue_entries_max: 128,
            io_queues_max: 64,
            mdts_bytes: 1 << 20,
            in_capsule_bytes: 4096,
            kato_max: core::time::Duration::from_secs(600),
            namespaces_max: 1024,
            transport: Transport::Fabrics,
        }
    }
}

/// One namespace.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NamespaceInfo {
    /// Namespace identifier, 1..=`namespaces_max`.
    pub nsid: u32,
    /// Logical block size, bytes: a power of two, 512..=65536.
    pub block_bytes: u32,
    /// Size in logical blocks.
    pub blocks: u64,
    /// UUID; zero: none.
    pub uuid: [u8; 16],
    /// NGUID; zero: none.
    pub nguid: [u8; 16],
    /// EUI64; zero: none.
    pub eui64: [u8; 8],
    /// Writes are refused.
    pub read_only: bool,
    /// A volatile write cache is behind it: Flush and FUA matter.
    pub write_cache: bool,
    /// Deallocate (Dataset Management) does something.
    pub deallocate: bool,
    /// Write Zeroes is supported.
    pub write_zeroes: bool,
    /// Deallocated blocks read as zeroes.
    pub deallocated_reads_zero: bool,
    /// Preferred write granularity in bytes (a multiple of the block size); 0: not reported.
    pub write_granularity_bytes: u32,
    /// Preferred deallocate granularity in bytes; 0: not reported.
    pub deallocate_granularity_bytes: u32,
    /// Optimal write size in bytes; 0: not reported.
    pub optimal_write_bytes: u32,
    /// Allocated bytes if the backing object knows; `None`: everything.
    pub used_bytes: Option<u64>,
    /// ANA group (ANAGRPID), 1..=[`ANA_GROUPS_MAX`].
    pub ana_group: u32,
    /// The reservation commands are supported: hosts share the namespace and coordinate by them.
    pub reservations: bool,
    /// Reservations can be kept through power loss.
    pub ptpl: bool,
    /// A host has write protected the namespace (Namespace Write Protection feature). `read_only`
    /// is what the backing object says; either makes writes fail.
    pub write_protect: bool,
    /// Write Uncorrectable is supported.
    pub write_uncorrectable: bool,
    /// Compare is supported.
    pub compare: bool,
    /// Compare and Write is, as a fused operation.
    pub compare_and_write: bool,
    /// Verify is supported.
    pub verify: bool,
    /// Copy is supported.
    pub copy: bool,
}

impl NamespaceInfo {
    /// A read-write namespace with no identifiers and no optional features but Compare, fused or
    /// not, Verify and Copy, which a target can do by reading and writing.
    #[must_use]
    pub fn new(nsid: u32, block_bytes: u32, blocks: u64) -> NamespaceInfo {
        NamespaceInfo {
            nsid,
            block_bytes,
            blocks,
            uuid: [0; 16],
            nguid: [0; 16],
            eui64: [0; 8],
            read_only: false,
            write_cache: false,
            deallocate: false,
            write_zeroes: false,
            deallocated_reads_zero: false,
            write_granularity_bytes: 0,
            deallocate_granularity_bytes: 0,
            optimal_write_bytes: 0,
            used_bytes: None,
            ana_group: 1,
            reservations: false,
            ptpl: false,
            write_protect: false,
            write_uncorrectable: false,
            compare: true,
            compare_and_write: true,
            verify: true,
            copy: true,
        }
    }

    /// Whether writes are refused with Namespace is Write Protected.
    #[must_use]
    #[inline]
    pub fn refuses_writes(&self) -> bool {
        self.read_only | self.write_protect
    }

    /// MSSRL: blocks that one source range of a Copy command may have.
    #[must_use]
    pub fn mssrl_blocks(&self) -> u16 {
        const { assert!(COPY_RANGE_BYTES_MAX >> 9 <= u16::MAX as u32) };
        (COPY_RANGE_BYTES_MAX >> self.block_shift()) as u16
    }

    /// MCL: blocks that one Copy command may move.
    #[must_use]
    pub fn mcl_blocks(&self) -> u32 {
        COPY_BYTES_MAX >> self.block_shift()
    }

    /// Size in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.blocks * u64::from(self.block_bytes)
    }

    /// Block size as a power of two.
    #[must_use]
    #[inline]
    pub(crate) fn block_shift(&self) -> u32 {
        self.block_bytes.trailing_zeros()
    }
}

/// A subsystem cannot be what was asked for.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InvalidSubsystem {
    /// NSID out of range.
    #[error("namespace id {nsid} is not in 1..={max}")]
    Nsid {
        /// The identifier.
        nsid: u32,
        /// Largest allowed.
        max: u32,
    },
    /// Two namespaces with one NSID.
    #[error("namespace id {0} is used twice")]
    DuplicateNsid(u32),
    /// Block size not supported.
    #[error("namespace {nsid}: block size {block_bytes} is not a power of two from 512 to 65536")]
    BlockSize {
        /// The namespace.
        nsid: u32,
        /// Its block size.
        block_bytes: u32,
    },
    /// No block, or more bytes than 64 bits count.
    #[error("namespace {nsid}: a size of {blocks} blocks is not possible")]
    Size {
        /// The namespace.
        nsid: u32,
        /// Its size.
        blocks: u64,
    },
    /// An ANA group identifier out of range.
    #[error("ANA group {id} is not in 1..={max}")]
    AnaGroupId {
        /// The identifier.
        id: u32,
        /// Largest allowed.
        max: u32,
    },
    /// Two ANA groups with one identifier.
    #[error("ANA group {0} is listed twice")]
    DuplicateAnaGroup(u32),
    /// A namespace in an ANA group that is not listed.
    #[error("namespace {nsid} is in ANA group {group}, which does not exist")]
    UnknownAnaGroup {
        /// The namespace.
        nsid: u32,
        /// Its group.
        group: u32,
    },
    /// A limit that no controller can have.
    #[error("{name} of {value} is below the smallest possible, {min}")]
    Limit {
        /// Which limit.
        name: &'static str,
        /// What was asked for.
        value: u32,
        /// Smallest possible.
        min: u32,
    },
}

/// A subsystem: names, limits and namespaces. Immutable and checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SubsystemInfo {
    nqn: Nqn,
    serial: AsciiField<20>,
    model: AsciiField<40>,
    firmware: AsciiField<8>,
    namespaces: Vec<NamespaceInfo>,
    limits: Limits,
    /// By identifier; empty: no ANA reporting.
    ana_groups: Vec<AnaGroup>,
    /// Per namespace, the state of its group; empty when `ana_impaired` is not set.
    ana_states: Vec<AnaState>,
    /// Some namespace is in a state that refuses I/O. Per I/O this is the one thing looked at.
    ana_impaired: bool,
}

impl SubsystemInfo {
    /// Checks everything, sorts the namespaces and normalises the limits.
    ///
    /// # Errors
    /// [`InvalidSubsystem`] says what is impossible.
    pub fn new(
        nqn: Nqn,
        serial: AsciiField<20>,
        model: AsciiField<40>,
        firmware: AsciiField<8>,
        mut namespaces: Vec<NamespaceInfo>,
        mut limits: Limits,
    ) -> Result<SubsystemInfo, InvalidSubsystem> {
        let floors = [
            ("queue_entries_max", u32::from(limits.queue_entries_max), 2),
            ("io_queues_max", u32::from(limits.io_queues_max), 1),
            // One page would be MDTS 0, which means "no limit".
            ("mdts_bytes", limits.mdts_bytes, 2 * PAGE_BYTES),
            ("namespaces_max", limits.namespaces_max, 1),
        ];
        for (name, value, min) in floors {
            if value < min {
                return Err(InvalidSubsystem::Limit { name, value, min });
            }
        }
        // NCQA and NSQA are zero-based and FFFFh is reserved.
        limits.io_queues_max = limits.io_queues_max.min(u16::MAX - 1);
        limits.mdts_bytes = 1 << limits.mdts_bytes.ilog2();
        limits.in_capsule_bytes &= !15;
        limits.namespaces_max = limits.namespaces_max.min(NSID_ALL - 1);

        namespaces.sort_by_key(|ns| ns.nsid);
        for ns in &namespaces {
            let nsid = ns.nsid;
            if nsid == 0 || nsid > limits.namespaces_max {
                return Err(InvalidSubsystem::Nsid { nsid, max: limits.namespaces_max });
            }
            if !ns.block_bytes.is_power_of_two() || !(512..=65536).contains(&ns.block_bytes) {
                return Err(InvalidSubsystem::BlockSize { nsid, block_bytes: ns.block_bytes });
            }
            if ns.blocks == 0 || ns.blocks.checked_mul(u64::from(ns.block_bytes)).is_none() {
                return Err(InvalidSubsystem::Size { nsid, blocks: ns.blocks });
            }
        }
        if let Some(pair) = namespaces.windows(2).find(|pair| pair[0].nsid == pair[1].nsid) {
            return Err(InvalidSubsystem::DuplicateNsid(pair[0].nsid));
        }
        Ok(SubsystemInfo {
            nqn,
            serial,
            model,
            firmware,
            namespaces,
            limits,
            ana_groups: Vec::new(),
            ana_states: Vec::new(),
            ana_impaired: false,
        })
    }

    /// The discovery subsystem: no namespaces, the well-known NQN.
    ///
    /// # Errors
    /// [`InvalidSubsystem::Limit`] for impossible limits.
    pub fn discovery(
        serial: AsciiField<20>,
        model: AsciiField<40>,
        firmware: AsciiField<8>,
        limits: Limits,
    ) -> Result<SubsystemInfo, InvalidSubsystem> {
        Self::new(Nqn::discovery(), serial, model, firmware, Vec::new(), limits)
    }

    /// The same subsystem with other namespaces and the same ANA groups.
    ///
    /// # Errors
    /// [`InvalidSubsystem`] says what is impossible.
    pub fn with_namespaces(
        &self,
        namespaces: Vec<NamespaceInfo>,
    ) -> Result<SubsystemInfo, InvalidSubsystem> {
        Self::new(
            self.nqn.clone(),
            self.serial,
            self.model,
            self.firmware,
            namespaces,
            self.limits,
        )?
        .with_ana_groups(self.ana_groups.clone())
    }

    /// The same subsystem with these ANA groups, in the states they have for the controllers that
    /// this view is for. No group: no ANA reporting, and the namespaces' group is not looked at.
    ///
    /// # Errors
    /// [`InvalidSubsystem`] if an identifier is out of range or listed twice, or if a namespace
    /// is in a group that is not listed.
    pub fn with_ana_groups(
        mut self,
        mut groups: Vec<AnaGroup>,
    ) -> Result<SubsystemInfo, InvalidSubsystem> {
        groups.sort_by_key(|group| group.id);
        if let Some(group) = groups.iter().find(|g| g.id == 0 || g.id > ANA_GROUPS_MAX) {
            return Err(InvalidSubsystem::AnaGroupId { id: group.id, max: ANA_GROUPS_MAX });
        }
        if let Some(pair) = groups.windows(2).find(|pair| pair[0].id == pair[1].id) {
            return Err(InvalidSubsystem::DuplicateAnaGroup(pair[0].id));
        }
        self.ana_groups = groups;
        self.find_ana_states()?;
        Ok(self)
    }

    /// Looks every namespace's group up, once per view instead of once per I/O.
    fn find_ana_states(&mut self) -> Result<(), InvalidSubsystem> {
        self.ana_states.clear();
        self.ana_impaired = false;
        if self.ana_groups.is_empty() {
            return Ok(());
        }
        self.ana_states.reserve_exact(self.namespaces.len());
        for ns in &self.namespaces {
            let Some(group) = ana::group(&self.ana_groups, ns.ana_group) else {
                return Err(InvalidSubsystem::UnknownAnaGroup {
                    nsid: ns.nsid,
                    group: ns.ana_group,
                });
            };
            self.ana_states.push(group.state);
            self.ana_impaired |= group.state.refusal().is_some();
        }
        if !self.ana_impaired {
            self.ana_states = Vec::new();
        }
        Ok(())
    }

    /// The same subsystem with the namespaces that `keep` says: what one host may see of it.
    #[must_use]
    pub fn restricted(&self, mut keep: impl FnMut(&NamespaceInfo) -> bool) -> SubsystemInfo {
        let mut view = SubsystemInfo {
            namespaces: self.namespaces.iter().filter(|ns| keep(ns)).cloned().collect(),
            nqn: self.nqn.clone(),
            ana_groups: self.ana_groups.clone(),
            ana_states: Vec::new(),
            ..*self
        };
        let found = view.find_ana_states();
        debug_assert!(found.is_ok(), "every namespace's group was listed before");
        view
    }

    /// NQN.
    #[must_use]
    pub fn nqn(&self) -> &Nqn {
        &self.nqn
    }
    /// Serial number.
    #[must_use]
    pub fn serial(&self) -> &AsciiField<20> {
        &self.serial
    }
    /// Model number.
    #[must_use]
    pub fn model(&self) -> &AsciiField<40> {
        &self.model
    }
    /// Firmware revision.
    #[must_use]
    pub fn firmware(&self) -> &AsciiField<8> {
        &self.firmware
    }
    /// Limits, normalised.
    #[must_use]
    #[inline]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
    /// Namespaces in NSID order.
    #[must_use]
    pub fn namespaces(&self) -> &[NamespaceInfo] {
        &self.namespaces
    }

    /// The namespace with this NSID.
    #[must_use]
    #[inline]
    pub fn namespace(&self, nsid: u32) -> Option<&NamespaceInfo> {
        self.namespace_index(nsid).map(|index| &self.namespaces[index])
    }

    /// Index in [`SubsystemInfo::namespaces`] of this NSID: a dense table in the driver can be
    /// indexed with it.
    #[must_use]
    #[inline]
    pub fn namespace_index(&self, nsid: u32) -> Option<usize> {
        // Namespaces are usually numbered from 1 without gaps: look there before searching.
        let guess = (nsid as usize).wrapping_sub(1);
        if self.namespaces.get(guess).is_some_and(|ns| ns.nsid == nsid) {
            return Some(guess);
        }
        self.namespaces.binary_search_by_key(&nsid, |ns| ns.nsid).ok()
    }

    /// ANA groups by identifier; empty: no ANA reporting.
    #[must_use]
    pub fn ana_groups(&self) -> &[AnaGroup] {
        &self.ana_groups
    }

    /// Change count of the whole ANA log: grows with each group's.
    #[must_use]
    pub fn ana_change_count(&self) -> u64 {
        self.ana_groups.iter().fold(0, |sum, group| sum.wrapping_add(group.change_count))
    }

    /// ANA state of a namespace in this view; Optimized where ANA is not reported.
    #[must_use]
    pub fn ana_state(&self, ns: &NamespaceInfo) -> AnaState {
        ana::group(&self.ana_groups, ns.ana_group).map_or(AnaState::Optimized, |group| group.state)
    }

    /// Why the namespace at this index of [`SubsystemInfo::namespaces`] takes no I/O command in
    /// its ANA state; `None`: it does.
    #[inline]
    pub(crate) fn ana_refusal(&self, index: usize) -> Option<Status> {
        if self.ana_impaired { self.ana_states[index].refusal() } else { None }
    }

    /// Whether any namespace has a volatile write cache.
    #[must_use]
    pub fn has_write_cache(&self) -> bool {
        self.namespaces.iter().any(|ns| ns.write_cache)
    }

    /// MDTS as a power of two of [`PAGE_BYTES`]; never 0, which would mean "no limit".
    pub(crate) fn mdts_shift(&self) -> u8 {
        (self.limits.mdts_bytes / PAGE_BYTES).ilog2() as u8
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Three namespaces: 1 (512 B, all features, cache), 3 (4096 B, read-only), 9 (512 B, plain).
    pub(crate) fn sample() -> SubsystemInfo {
        let mut one = NamespaceInfo::new(1, 512, 2048);
        one.uuid = [1; 16];
        one.nguid = [0x11; 16];
        one.write_cache = true;
        one.deallocate = true;
        one.write_zeroes = true;
        one.deallocated_reads_zero = true;
        one.write_granularity_bytes = 4096;
        one.deallocate_granularity_bytes = 4096;
        let mut three = NamespaceInfo::new(3, 4096, 256);
        three.uuid = [3; 16];
        three.read_only = true;
        let nine = NamespaceInfo::new(9, 512, 1 << 40);
        build(vec![nine, one, three], Limits::default()).unwrap()
    }

    pub(crate) fn build(
        namespaces: Vec<NamespaceInfo>,
        limits: Limits,
    ) -> Result<SubsystemInfo, InvalidSubsystem> {
        SubsystemInfo::new(
            Nqn::new("nqn.2024-01.io.penstock:test").unwrap(),
            AsciiField::new("SER0001").unwrap(),
            AsciiField::new("Penstock").unwrap(),
            AsciiField::new("0.1").unwrap(),
            namespaces,
            limits,
        )
    }

    #[test]
    fn lookup_with_and_without_gaps() {
        let subsys = sample();
        for nsid in [1, 3, 9] {
            assert_eq!(subsys.namespace(nsid).unwrap().nsid, nsid);
        }
        for nsid in [0, 2, 4, 10, NSID_ALL] {
            assert!(subsys.namespace(nsid).is_none(), "{nsid}");
        }
        assert!(subsys.has_write_cache());
    }

    #[test]
    fn limits_are_normalised() {
        let limits = Limits { mdts_bytes: 100_000, in_capsule_bytes: 4097, ..Limits::default() };
        let subsys = build(vec![], limits).unwrap();
        assert_eq!(subsys.limits().mdts_bytes, 65536);
        assert_eq!(subsys.mdts_shift(), 4);
        assert_eq!(subsys.limits().in_capsule_bytes, 4096);
    }

    #[test]
    fn impossible_subsystems_are_refused() {
        let ns = |nsid, block, blocks| NamespaceInfo::new(nsid, block, blocks);
        let refuse = |list| build(list, Limits::default()).unwrap_err();
        assert_eq!(refuse(vec![ns(0, 512, 1)]), InvalidSubsystem::Nsid { nsid: 0, max: 1024 });
        assert_eq!(
            refuse(vec![ns(1025, 512, 1)]),
            InvalidSubsystem::Nsid { nsid: 1025, max: 1024 }
        );
        assert_eq!(refuse(vec![ns(2, 512, 1), ns(2, 512, 1)]), InvalidSubsystem::DuplicateNsid(2));
        for block_bytes in [0, 256, 520, 1 << 17] {
            let error = refuse(vec![ns(1, block_bytes, 1)]);
            assert_eq!(error, InvalidSubsystem::BlockSize { nsid: 1, block_bytes });
        }
        assert_eq!(refuse(vec![ns(1, 512, 0)]), InvalidSubsystem::Size { nsid: 1, blocks: 0 });
        assert!(matches!(refuse(vec![ns(1, 512, 1 << 55)]), InvalidSubsystem::Size { .. }));
        let limits = Limits { queue_entries_max: 1, ..Limits::default() };
        assert!(matches!(build(vec![], limits), Err(InvalidSubsystem::Limit { .. })));
    }
}
