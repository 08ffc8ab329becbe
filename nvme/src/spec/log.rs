//! Log pages (NVMe Base 2.0, "Get Log Page command").

use core::fmt;

use zerocopy::little_endian::{U16, U32, U64, U128};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Sqe;
use super::command::open_u8;

open_u8! {
    /// Log Page Identifier (LID).
    LogPage {
        /// Supported Log Pages.
        SUPPORTED_LOG_PAGES = 0x00;
        /// Error Information.
        ERROR_INFORMATION = 0x01;
        /// SMART / Health Information.
        SMART = 0x02;
        /// Firmware Slot Information.
        FIRMWARE_SLOT = 0x03;
        /// Changed Namespace List.
        CHANGED_NAMESPACES = 0x04;
        /// Commands Supported and Effects.
        COMMANDS_SUPPORTED = 0x05;
        /// Endurance Group Information; the Log Specific Identifier says which group.
        ENDURANCE_GROUP = 0x09;
        /// Asymmetric Namespace Access.
        ANA = 0x0c;
        /// Feature Identifiers Supported and Effects.
        FEATURES_SUPPORTED = 0x12;
        /// Discovery.
        DISCOVERY = 0x70;
        /// Reservation Notification.
        RESERVATION_NOTIFICATION = 0x80;
    }
}

/// The fields of a Get Log Page command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GetLogPage {
    /// Log page.
    pub lid: LogPage,
    /// Log Specific Parameter.
    pub lsp: u8,
    /// Retain Asynchronous Event: reading does not clear the event.
    pub rae: bool,
    /// Bytes asked for, from NUMDU and NUMDL; at most 16 GiB.
    pub len: u64,
    /// Log Specific Identifier.
    pub lsi: u16,
    /// Log Page Offset in bytes.
    pub offset: u64,
    /// Offset Type: the offset is an index into a list of data structures.
    pub offset_is_index: bool,
    /// Command Set Identifier.
    pub csi: u8,
    /// UUID Index.
    pub uuid_index: u8,
}

impl GetLogPage {
    /// Takes the fields out of an SQE.
    #[must_use]
    pub fn from_sqe(sqe: &Sqe) -> GetLogPage {
        let (cdw10, cdw11, cdw14) = (sqe.cdw10.get(), sqe.cdw11.get(), sqe.cdw14.get());
        let numd_z = u64::from(cdw10 >> 16) | u64::from(cdw11 & 0xffff) << 16;
        GetLogPage {
            lid: LogPage(cdw10 as u8),
            lsp: (cdw10 >> 8 & 0x7f) as u8,
            rae: cdw10 & 1 << 15 != 0,
            len: (numd_z + 1) * 4,
            lsi: (cdw11 >> 16) as u16,
            offset: sqe.cdw12_13(),
            offset_is_index: cdw14 & 1 << 23 != 0,
            csi: (cdw14 >> 24) as u8,
            uuid_index: (cdw14 & 0x7f) as u8,
        }
    }

    /// Puts the fields into an SQE's dwords. `len` is rounded up to dwords and must not be 0.
    pub fn apply(&self, sqe: &mut Sqe) {
        let numd_z = (self.len.div_ceil(4).saturating_sub(1)) as u32;
        sqe.cdw10.set(
            u32::from(self.lid.0)
                | u32::from(self.lsp & 0x7f) << 8
                | u32::from(self.rae) << 15
                | (numd_z & 0xffff) << 16,
        );
        sqe.cdw11.set(numd_z >> 16 | u32::from(self.lsi) << 16);
        sqe.cdw12.set(self.offset as u32);
        sqe.cdw13.set((self.offset >> 32) as u32);
        sqe.cdw14.set(
            u32::from(self.csi) << 24
                | u32::from(self.offset_is_index) << 23
                | u32::from(self.uuid_index & 0x7f),
        );
    }
}

/// Error Information log entry (LID 01h), 64 bytes.
#[derive(
    Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct ErrorEntry {
    /// Error Count: unique and rising; 0: an unused entry.
    pub error_count: U64,
    /// Submission Queue ID.
    pub sqid: U16,
    /// Command ID.
    pub cid: U16,
    /// Status Field, shifted by the phase tag as in a completion.
    pub status_raw: U16,
    /// Parameter Error Location: byte in bits 7:0, bit in 10:8; FFFFh: not applicable.
    pub parameter_error_location: U16,
    /// LBA.
    pub lba: U64,
    /// Namespace.
    pub nsid: U32,
    /// Vendor Specific Information Available.
    pub vendor_log: u8,
    /// Transport Type.
    pub trtype: u8,
    /// Command Set Indicator.
    pub csi: u8,
    /// Opcode of the command.
    pub opcode: u8,
    /// Command Specific Information.
    pub command_specific: U64,
    /// Transport Type Specific Information.
    pub transport_specific: U16,
    /// Reserved.
    pub reserved: [u8; 21],
    /// Log Page Version: 1 says that the opcode and CSI fields are valid.
    pub version: u8,
}
const _: () = assert!(size_of::<ErrorEntry>() == 64);

/// SMART / Health Information log page (LID 02h), 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SmartLog {
    /// Critical Warning bits.
    pub critical_warning: u8,
    /// Composite Temperature, kelvin.
    pub composite_temperature: U16,
    /// Available Spare, percent.
    pub available_spare: u8,
    /// Available Spare Threshold, percent.
    pub available_spare_threshold: u8,
    /// Percentage Used.
    pub percentage_used: u8,
    /// Endurance Group Critical Warning Summary.
    pub endurance_group_warning: u8,
    /// Reserved.
    pub reserved_7: [u8; 25],
    /// Data Units Read: thousands of 512-byte units, rounded up.
    pub data_units_read: U128,
    /// Data Units Written, likewise.
    pub data_units_written: U128,
    /// Host Read Commands.
    pub host_reads: U128,
    /// Host Write Commands.
    pub host_writes: U128,
    /// Controller Busy Time, minutes.
    pub busy_minutes: U128,
    /// Power Cycles.
    pub power_cycles: U128,
    /// Power On Hours.
    pub power_on_hours: U128,
    /// Unsafe Shutdowns.
    pub unsafe_shutdowns: U128,
    /// Media and Data Integrity Errors.
    pub media_errors: U128,
    /// Number of Error Information Log Entries over the life of the controller.
    pub error_log_entries: U128,
    /// Warning and Critical Composite Temperature Time, minutes.
    pub temperature_minutes: [U32; 2],
    /// Temperature Sensors 1 to 8, kelvin; 0: not implemented.
    pub temperature_sensors: [U16; 8],
    /// Bytes 216..512: thermal management counters, reserved.
    pub reserved_216: [u8; 296],
}
const _: () = assert!(size_of::<SmartLog>() == 512);

/// Firmware Slot Information log page (LID 03h), 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FirmwareSlotLog {
    /// Active Firmware Info: slot in use in bits 2:0.
    pub afi: u8,
    /// Reserved.
    pub reserved_1: [u8; 7],
    /// Firmware Revision for Slot 1 to 7.
    pub frs: [[u8; 8]; 7],
    /// Reserved.
    pub reserved_64: [u8; 448],
}
const _: () = assert!(size_of::<FirmwareSlotLog>() == 512);

/// Critical Warning bits of the SMART log, and the bits of the Asynchronous Event Configuration that
/// enable their events.
pub mod critical_warning {
    /// Available Spare Capacity Below Threshold.
    pub const SPARE: u8 = 1 << 0;
    /// Temperature Threshold Condition.
    pub const TEMPERATURE: u8 = 1 << 1;
    /// NVM Subsystem Degraded Reliability.
    pub const DEGRADED: u8 = 1 << 2;
    /// All Media Read-Only.
    pub const READ_ONLY: u8 = 1 << 3;
    /// Volatile Memory Backup Failed.
    pub const VOLATILE_MEMORY_BACKUP: u8 = 1 << 4;
    /// Persistent Memory Region Read-Only.
    pub const PMR_READ_ONLY: u8 = 1 << 5;
    /// Those whose event says NVM Subsystem Reliability.
    pub const RELIABILITY: u8 = DEGRADED | READ_ONLY | VOLATILE_MEMORY_BACKUP | PMR_READ_ONLY;
    /// All that are defined.
    pub const ALL: u8 = SPARE | TEMPERATURE | RELIABILITY;
}

/// Endurance Group Information log page (LID 09h), 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct EnduranceGroupLog {
    /// Critical Warning: bits 0, 2 and 3 as in [`critical_warning`].
    pub critical_warning: u8,
    /// Endurance Group Features.
    pub features: u8,
    /// Reserved.
    pub reserved_2: u8,
    /// Available Spare, percent.
    pub available_spare: u8,
    /// Available Spare Threshold, percent.
    pub available_spare_threshold: u8,
    /// Percentage Used.
    pub percentage_used: u8,
    /// Domain Identifier.
    pub domain: U16,
    /// Reserved.
    pub reserved_8: [u8; 24],
    /// Endurance Estimate: billions of bytes that may be written; 0: not reported.
    pub endurance_estimate: U128,
    /// Data Units Read: billions of bytes, rounded up.
    pub data_units_read: U128,
    /// Data Units Written, likewise.
    pub data_units_written: U128,
    /// Media Units Written, likewise; 0: not reported.
    pub media_units_written: U128,
    /// Host Read Commands.
    pub host_reads: U128,
    /// Host Write Commands.
    pub host_writes: U128,
    /// Media and Data Integrity Errors.
    pub media_errors: U128,
    /// Number of Error Information Log Entries.
    pub error_log_entries: U128,
    /// Total Endurance Group Capacity in bytes; 0: not reported.
    pub total_capacity: U128,
    /// Unallocated Endurance Group Capacity in bytes.
    pub unallocated_capacity: U128,
    /// Reserved.
    pub reserved_192: [u8; 320],
}
const _: () = assert!(size_of::<EnduranceGroupLog>() == 512);

/// LSP of LID 0Ch: Return Groups Only.
pub const ANA_LSP_GROUPS_ONLY: u8 = 1;

/// Reservation Notification log page (LID 80h), 64 bytes.
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ReservationNotificationLog {
    /// Log Page Count: number of this notification; 0 in an empty page.
    pub count: U64,
    /// Reservation Notification Log Page Type: 0 empty, 1 registration preempted, 2 reservation
    /// released, 3 reservation preempted.
    pub kind: u8,
    /// Number of Available Log Pages: that wait behind this one; 255: that or more.
    pub available: u8,
    /// Reserved.
    pub reserved_10: [u8; 2],
    /// Namespace.
    pub nsid: U32,
    /// Reserved.
    pub reserved_16: [u8; 48],
}
const _: () = assert!(size_of::<ReservationNotificationLog>() == 64);

/// Entries of the Changed Namespace List (LID 04h): 1024 namespace identifiers.
pub const CHANGED_NAMESPACES_MAX: usize = 1024;

/// Commands Supported and Effects bits (LID 05h, one dword per opcode).
pub mod effects {
    /// CSUPP: the command is supported. Same bit for features (FSUPP) and log pages (LSUPP).
    pub const SUPPORTED: u32 = 1;
    /// LBCC: logical block content may change. Same bit for features (UDCC).
    pub const CONTENT_CHANGE: u32 = 1 << 1;
    /// NCC: namespace capabilities may change. Same bit for features.
    pub const NAMESPACE_CAPABILITY_CHANGE: u32 = 1 << 2;
    /// CCC: controller capabilities may change.
    pub const CONTROLLER_CAPABILITY_CHANGE: u32 = 1 << 4;
    /// Scope of a feature (LID 12h): controller.
    pub const SCOPE_CONTROLLER: u32 = 1 << 21;
    /// Scope of a feature (LID 12h): namespace.
    pub const SCOPE_NAMESPACE: u32 = 1 << 20;
}

#[cfg(test)]
mod tests {
    use core::mem::offset_of;

    use super::*;

    #[test]
    fn get_log_page_round_trips_hand_built_dwords() {
        let mut sqe = Sqe::new(2);
        // LID 70h, LSP 1, RAE, NUMD 0x0002_03ff (zero-based), LSI 7, LPO 0x1_0000_0400, CSI 2,
        // UUID 5.
        sqe.cdw10.set(0x03ff_8170);
        sqe.cdw11.set(0x0007_0002);
        sqe.cdw12.set(0x400);
        sqe.cdw13.set(1);
        sqe.cdw14.set(0x0280_0005);
        let get = GetLogPage::from_sqe(&sqe);
        assert_eq!(
            get,
            GetLogPage {
                lid: LogPage::DISCOVERY,
                lsp: 1,
                rae: true,
                len: 0x2_0400 * 4,
                lsi: 7,
                offset: 0x1_0000_0400,
                offset_is_index: true,
                csi: 2,
                uuid_index: 5,
            }
        );
        let mut built = Sqe::new(2);
        get.apply(&mut built);
        assert_eq!(built, sqe);
    }

    #[test]
    fn offsets() {
        assert_eq!(offset_of!(ErrorEntry, status_raw), 12);
        assert_eq!(offset_of!(ErrorEntry, lba), 16);
        assert_eq!(offset_of!(ErrorEntry, nsid), 24);
        assert_eq!(offset_of!(ErrorEntry, trtype), 29);
        assert_eq!(offset_of!(ErrorEntry, command_specific), 32);
        assert_eq!(offset_of!(ErrorEntry, version), 63);
        assert_eq!(offset_of!(SmartLog, data_units_read), 32);
        assert_eq!(offset_of!(SmartLog, host_reads), 64);
        assert_eq!(offset_of!(SmartLog, power_on_hours), 128);
        assert_eq!(offset_of!(SmartLog, error_log_entries), 176);
        assert_eq!(offset_of!(SmartLog, temperature_sensors), 200);
        assert_eq!(offset_of!(FirmwareSlotLog, frs), 8);
        assert_eq!(offset_of!(EnduranceGroupLog, available_spare), 3);
        assert_eq!(offset_of!(EnduranceGroupLog, domain), 6);
        assert_eq!(offset_of!(EnduranceGroupLog, endurance_estimate), 32);
        assert_eq!(offset_of!(EnduranceGroupLog, data_units_written), 64);
        assert_eq!(offset_of!(EnduranceGroupLog, host_reads), 96);
        assert_eq!(offset_of!(EnduranceGroupLog, media_errors), 128);
        assert_eq!(offset_of!(EnduranceGroupLog, unallocated_capacity), 176);
        assert_eq!(offset_of!(ReservationNotificationLog, kind), 8);
        assert_eq!(offset_of!(ReservationNotificationLog, available), 9);
        assert_eq!(offset_of!(ReservationNotificationLog, nsid), 12);
    }
}
