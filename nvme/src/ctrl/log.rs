//! Get Log Page and what fills the pages.

use core::time::Duration;
use std::borrow::Cow;
use std::collections::VecDeque;

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromZeros, IntoBytes};

use super::{Controller, ControllerKind, ERROR_LOG_MAX};
use crate::spec::{
    AdminOpcode, ErrorEntry, FirmwareSlotLog, GetLogPage, LogPage, NSID_ALL, NvmOpcode, SmartLog,
    Sqe, Status, effects,
};

/// What a target knows of its own health and load, in plain units; the SMART log is made of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HealthCounters {
    /// Critical Warning bits (bit 3: all media is read-only).
    pub critical_warning: u8,
    /// Composite temperature in kelvin; 0 when nothing measures it.
    pub temperature_kelvin: u16,
    /// Remaining spare capacity, percent.
    pub available_spare_percent: u8,
    /// Below which spare capacity is critical, percent.
    pub available_spare_threshold_percent: u8,
    /// Life used, percent (255: that or more).
    pub percentage_used: u8,
    /// Bytes read by hosts.
    pub bytes_read: u64,
    /// Bytes written by hosts.
    pub bytes_written: u64,
    /// Read commands.
    pub read_commands: u64,
    /// Write commands.
    pub write_commands: u64,
    /// Time with I/O outstanding.
    pub busy: Duration,
    /// Starts of the target.
    pub power_cycles: u64,
    /// Time the target has been running, over all starts.
    pub power_on: Duration,
    /// Starts after which data had to be recovered.
    pub unsafe_shutdowns: u64,
    /// Unrecovered media errors.
    pub media_errors: u64,
}

impl Default for HealthCounters {
    /// A fresh and healthy target.
    fn default() -> Self {
        HealthCounters {
            critical_warning: 0,
            temperature_kelvin: 0,
            available_spare_percent: 100,
            available_spare_threshold_percent: 0,
            percentage_used: 0,
            bytes_read: 0,
            bytes_written: 0,
            read_commands: 0,
            write_commands: 0,
            busy: Duration::ZERO,
            power_cycles: 0,
            power_on: Duration::ZERO,
            unsafe_shutdowns: 0,
            media_errors: 0,
        }
    }
}

/// A failed command for the Error Information log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ErrorRecord {
    /// Queue.
    pub sqid: u16,
    /// Command identifier.
    pub cid: u16,
    /// Status it was completed with.
    pub status: Status,
    /// Opcode.
    pub opcode: u8,
    /// Namespace; 0 if none.
    pub nsid: u32,
    /// First LBA affected; 0 if none.
    pub lba: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Logs {
    health: HealthCounters,
    /// Newest first.
    errors: VecDeque<ErrorEntry>,
    error_count: u64,
}

impl core::fmt::Debug for ErrorEntry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "error {} {}", self.error_count, Status::from_wire(self.status_raw.get()))
    }
}

impl Logs {
    pub(crate) fn set_health(&mut self, health: HealthCounters) {
        self.health = health;
    }

    pub(crate) fn record(&mut self, record: &ErrorRecord) {
        const NOT_APPLICABLE: u16 = 0xffff;
        const TRTYPE_TCP: u8 = 3;
        self.error_count += 1;
        self.errors.truncate(ERROR_LOG_MAX - 1);
        self.errors.push_front(ErrorEntry {
            error_count: U64::new(self.error_count),
            sqid: U16::new(record.sqid),
            cid: U16::new(record.cid),
            status_raw: U16::new(record.status.to_wire()),
            parameter_error_location: U16::new(NOT_APPLICABLE),
            lba: U64::new(record.lba),
            nsid: U32::new(record.nsid),
            trtype: TRTYPE_TCP,
            opcode: record.opcode,
            version: 1,
            ..ErrorEntry::default()
        });
    }

    fn smart(&self) -> SmartLog {
        let health = &self.health;
        let mut page = SmartLog::new_zeroed();
        page.critical_warning = health.critical_warning;
        page.composite_temperature = U16::new(health.temperature_kelvin);
        page.available_spare = health.available_spare_percent;
        page.available_spare_threshold = health.available_spare_threshold_percent;
        page.percentage_used = health.percentage_used;
        page.data_units_read = U128::new(data_units(health.bytes_read));
        page.data_units_written = U128::new(data_units(health.bytes_written));
        page.host_reads = U128::new(u128::from(health.read_commands));
        page.host_writes = U128::new(u128::from(health.write_commands));
        page.busy_minutes = U128::new(u128::from(health.busy.as_secs() / 60));
        page.power_cycles = U128::new(u128::from(health.power_cycles));
        page.power_on_hours = U128::new(u128::from(health.power_on.as_secs() / 3600));
        page.unsafe_shutdowns = U128::new(u128::from(health.unsafe_shutdowns));
        page.media_errors = U128::new(u128::from(health.media_errors));
        page.error_log_entries = U128::new(u128::from(self.error_count));
        page
    }
}

/// "Reported in thousands (a value of 1 corresponds to 1000 units of 512 bytes), rounded up."
fn data_units(bytes: u64) -> u128 {
    u128::from(bytes.div_ceil(512_000))
}

fn page_of_dwords(dwords: impl Iterator<Item = (u8, u32)>) -> Vec<u8> {
    let mut page = vec![U32::ZERO; 256];
    for (index, value) in dwords {
        page[usize::from(index)] = U32::new(value);
    }
    page.as_bytes().to_vec()
}

impl Controller {
    fn has_log_page(&self, lid: LogPage) -> bool {
        match lid {
            LogPage::SUPPORTED_LOG_PAGES => true,
            LogPage::DISCOVERY => self.is_discovery(),
            LogPage::ERROR_INFORMATION
            | LogPage::SMART
            | LogPage::FIRMWARE_SLOT
            | LogPage::CHANGED_NAMESPACES
            | LogPage::COMMANDS_SUPPORTED
            | LogPage::FEATURES_SUPPORTED => !self.is_discovery(),
            _ => false,
        }
    }

    /// Get Log Page: fills `out` with exactly the number of bytes asked for.
    pub(crate) fn get_log_page(
        &mut self,
        sqe: &Sqe,
        transfer_len: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Status> {
        let get = GetLogPage::from_sqe(sqe);
        if !self.has_log_page(get.lid) {
            return Err(Status::INVALID_LOG_PAGE.dnr());
        }
        // Offsets are byte offsets ("bits 1:0 shall be cleared"), and a list index is not
        // supported for any page.
        if get.offset_is_index || !get.offset.is_multiple_of(4) {
            return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
        }
        if get.len > u64::from(self.subsys.limits().mdts_bytes) {
            return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
        }
        if get.len != u64::from(transfer_len) {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        let page = self.log_page(&get, sqe.nsid.get())?;
        // "If the host specifies an offset greater than the size of the log page, the controller
        // shall abort the command with Invalid Field in Command."
        let offset = usize::try_from(get.offset)
            .ok()
            .filter(|&offset| offset <= page.len())
            .ok_or(Status::INVALID_FIELD_IN_COMMAND.dnr())?;
        let end = page.len().min(offset + transfer_len as usize);
        out.extend_from_slice(&page[offset..end]);
        // What is beyond the end of a page is undefined; it must not be stale memory.
        out.resize(transfer_len as usize, 0);
        if !get.rae {
            self.aer.log_read(get.lid);
        }
        Ok(())
    }

    fn log_page(&self, get: &GetLogPage, nsid: u32) -> Result<Cow<'_, [u8]>, Status> {
        Ok(match get.lid {
            LogPage::SUPPORTED_LOG_PAGES => {
                let supported = (0..=u8::MAX).filter(|&lid| self.has_log_page(LogPage(lid)));
                Cow::Owned(page_of_dwords(supported.map(|lid| (lid, effects::SUPPORTED))))
            }
            LogPage::ERROR_INFORMATION => {
                let mut entries: Vec<ErrorEntry> = self.log.errors.iter().copied().collect();
                entries.resize(ERROR_LOG_MAX, ErrorEntry::default());
                Cow::Owned(entries.as_bytes().to_vec())
            }
            LogPage::SMART => {
                // LPA bit 0 is clear: there is no page per namespace.
                if !matches!(nsid, 0 | NSID_ALL) {
                    return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
                }
                Cow::Owned(self.log.smart().as_bytes().to_vec())
            }
            LogPage::FIRMWARE_SLOT => {
                let mut page = FirmwareSlotLog::new_zeroed();
                page.afi = 1;
                page.frs[0] = *self.subsys.firmware().bytes();
                Cow::Owned(page.as_bytes().to_vec())
            }
            LogPage::CHANGED_NAMESPACES => {
                let mut list: Vec<U32> =
                    self.aer.changed_list().into_iter().map(U32::new).collect();
                list.resize(crate::spec::CHANGED_NAMESPACES_MAX, U32::ZERO);
                Cow::Owned(list.as_bytes().to_vec())
            }
            LogPage::COMMANDS_SUPPORTED => {
                if get.csi != crate::spec::CSI_NVM {
                    return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
                }
                Cow::Owned(commands_supported(self.instance.is_some()))
            }
            LogPage::FEATURES_SUPPORTED => {
                let entry = effects::SUPPORTED | effects::SCOPE_CONTROLLER;
                Cow::Owned(page_of_dwords(self.feature_ids().map(|fid| (fid.0, entry))))
            }
            LogPage::DISCOVERY => match &self.kind {
                ControllerKind::Discovery(log) => Cow::Borrowed(log.bytes()),
                ControllerKind::Io => return Err(Status::INVALID_LOG_PAGE.dnr()),
            },
            _ => return Err(Status::INVALID_LOG_PAGE.dnr()),
        })
    }
}

/// Commands Supported and Effects: 256 dwords for admin commands, 256 for I/O commands, and 2048
/// reserved bytes. The command scope is not reported (LPA bit 5 is clear): Linux logs a warning
/// about "unusual effects" on passthrough when an I/O command has scope bits.
fn commands_supported(cross_reset: bool) -> Vec<u8> {
    let admin = [
        AdminOpcode::GET_LOG_PAGE,
        AdminOpcode::IDENTIFY,
        AdminOpcode::ABORT,
        AdminOpcode::SET_FEATURES,
        AdminOpcode::GET_FEATURES,
        AdminOpcode::ASYNC_EVENT_REQUEST,
        AdminOpcode::KEEP_ALIVE,
        AdminOpcode::FABRICS,
    ];
    let io = [
        (NvmOpcode::FLUSH, 0),
        (NvmOpcode::WRITE, effects::CONTENT_CHANGE),
        (NvmOpcode::READ, 0),
        (NvmOpcode::WRITE_ZEROES, effects::CONTENT_CHANGE),
        (NvmOpcode::DATASET_MANAGEMENT, effects::CONTENT_CHANGE),
        (NvmOpcode::FABRICS, 0),
    ];
    let mut page = page_of_dwords(admin.iter().map(|op| (op.0, effects::SUPPORTED)));
    if cross_reset {
        let at = usize::from(AdminOpcode::CROSS_CONTROLLER_RESET.0) * 4;
        page[at..at + 4].copy_from_slice(&effects::SUPPORTED.to_le_bytes());
    }
    page.extend(page_of_dwords(io.iter().map(|(op, effect)| (op.0, effects::SUPPORTED | effect))));
    page.resize(4096, 0);
    page
}
