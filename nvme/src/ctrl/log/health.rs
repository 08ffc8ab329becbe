//! Health, endurance and errors: what fills log pages 01h, 02h and 09h.

use core::time::Duration;
use std::collections::VecDeque;

use zerocopy::FromZeros;
use zerocopy::little_endian::{U16, U32, U64, U128};

use super::super::ERROR_LOG_MAX;
use crate::spec::{EnduranceGroupLog, ErrorEntry, SmartLog, Status, critical_warning};

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

/// What the host set, and what is there: kelvin, 0 for "nothing measures it".
#[derive(Clone, Copy)]
pub(crate) struct Thresholds {
    /// Over temperature threshold.
    pub(crate) over: u16,
    /// Under temperature threshold.
    pub(crate) under: u16,
}

/// Errors and counters of one controller.
#[derive(Debug, Default)]
pub(crate) struct Health {
    counters: HealthCounters,
    /// Newest first.
    errors: VecDeque<ErrorEntry>,
    error_count: u64,
}

impl core::fmt::Debug for ErrorEntry {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "error {} {}", self.error_count, Status::from_wire(self.status_raw.get()))
    }
}

impl Health {
    pub(crate) fn set(&mut self, counters: HealthCounters) {
        self.counters = counters;
    }

    pub(crate) fn set_critical_warning(&mut self, bits: u8) {
        self.counters.critical_warning = bits;
    }

    /// Critical Warning: what the driver says, and the temperature.
    pub(crate) fn critical_warning(&self, thresholds: Thresholds) -> u8 {
        let kelvin = self.counters.temperature_kelvin;
        let is_measured = kelvin != 0;
        let is_outside = kelvin >= thresholds.over || kelvin <= thresholds.under;
        let temperature = if is_measured && is_outside { critical_warning::TEMPERATURE } else { 0 };
        self.counters.critical_warning & critical_warning::ALL | temperature
    }

    pub(crate) fn record(&mut self, record: &ErrorRecord) {
        const NOT_APPLICABLE: u16 = 0xffff;
        self.error_count += 1;
        self.errors.truncate(ERROR_LOG_MAX - 1);
        // TRTYPE stays 0: these are not errors of the transport.
        self.errors.push_front(ErrorEntry {
            error_count: U64::new(self.error_count),
            sqid: U16::new(record.sqid),
            cid: U16::new(record.cid),
            status_raw: U16::new(record.status.to_wire()),
            parameter_error_location: U16::new(NOT_APPLICABLE),
            lba: U64::new(record.lba),
            nsid: U32::new(record.nsid),
            opcode: record.opcode,
            version: 1,
            ..ErrorEntry::default()
        });
    }

    /// The whole Error Information log: newest first, unused entries zero.
    pub(crate) fn error_log(&self) -> Vec<ErrorEntry> {
        let mut entries: Vec<ErrorEntry> = self.errors.iter().copied().collect();
        entries.resize(ERROR_LOG_MAX, ErrorEntry::default());
        entries
    }

    pub(crate) fn smart(&self, thresholds: Thresholds) -> SmartLog {
        let counters = &self.counters;
        let mut page = SmartLog::new_zeroed();
        page.critical_warning = self.critical_warning(thresholds);
        page.composite_temperature = U16::new(counters.temperature_kelvin);
        page.available_spare = counters.available_spare_percent;
        page.available_spare_threshold = counters.available_spare_threshold_percent;
        page.percentage_used = counters.percentage_used;
        page.endurance_group_warning = self.endurance_warning();
        page.data_units_read = U128::new(data_units(counters.bytes_read));
        page.data_units_written = U128::new(data_units(counters.bytes_written));
        page.host_reads = U128::new(u128::from(counters.read_commands));
        page.host_writes = U128::new(u128::from(counters.write_commands));
        page.busy_minutes = U128::new(u128::from(counters.busy.as_secs() / 60));
        page.power_cycles = U128::new(u128::from(counters.power_cycles));
        page.power_on_hours = U128::new(u128::from(counters.power_on.as_secs() / 3600));
        page.unsafe_shutdowns = U128::new(u128::from(counters.unsafe_shutdowns));
        page.media_errors = U128::new(u128::from(counters.media_errors));
        page.error_log_entries = U128::new(u128::from(self.error_count));
        page
    }

    /// The one endurance group, which all namespaces of the subsystem are in.
    pub(crate) fn endurance_group(&self, total_bytes: u128) -> EnduranceGroupLog {
        let counters = &self.counters;
        let mut page = EnduranceGroupLog::new_zeroed();
        page.critical_warning = self.endurance_warning();
        page.available_spare = counters.available_spare_percent;
        page.available_spare_threshold = counters.available_spare_threshold_percent;
        page.percentage_used = counters.percentage_used;
        page.data_units_read = U128::new(billions(counters.bytes_read));
        page.data_units_written = U128::new(billions(counters.bytes_written));
        page.host_reads = U128::new(u128::from(counters.read_commands));
        page.host_writes = U128::new(u128::from(counters.write_commands));
        page.media_errors = U128::new(u128::from(counters.media_errors));
        page.error_log_entries = U128::new(u128::from(self.error_count));
        page.total_capacity = U128::new(total_bytes);
        page
    }

    /// The bits that are about an endurance group.
    fn endurance_warning(&self) -> u8 {
        const BITS: u8 =
            critical_warning::SPARE | critical_warning::DEGRADED | critical_warning::READ_ONLY;
        self.counters.critical_warning & BITS
    }
}

/// "Reported in thousands (a value of 1 corresponds to 1000 units of 512 bytes), rounded up."
fn data_units(bytes: u64) -> u128 {
    u128::from(bytes.div_ceil(512_000))
}

/// Endurance groups count in billions of bytes, rounded up.
fn billions(bytes: u64) -> u128 {
    u128::from(bytes.div_ceil(1_000_000_000))
}
