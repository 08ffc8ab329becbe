//! Features (NVMe Base 2.0, "Feature Identifiers").

use core::fmt;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::command::open_u8;

open_u8! {
    /// Feature Identifier (FID).
    Feature {
        /// Arbitration.
        ARBITRATION = 0x01;
        /// Power Management.
        POWER_MANAGEMENT = 0x02;
        /// Temperature Threshold.
        TEMPERATURE_THRESHOLD = 0x04;
        /// Error Recovery (NVM Command Set).
        ERROR_RECOVERY = 0x05;
        /// Volatile Write Cache.
        VOLATILE_WRITE_CACHE = 0x06;
        /// Number of Queues.
        NUMBER_OF_QUEUES = 0x07;
        /// Interrupt Coalescing (memory-based transports only).
        INTERRUPT_COALESCING = 0x08;
        /// Interrupt Vector Configuration (memory-based transports only).
        INTERRUPT_VECTOR = 0x09;
        /// Write Atomicity Normal (NVM Command Set).
        WRITE_ATOMICITY = 0x0a;
        /// Asynchronous Event Configuration.
        ASYNC_EVENT_CONFIGURATION = 0x0b;
        /// Timestamp.
        TIMESTAMP = 0x0e;
        /// Keep Alive Timer.
        KEEP_ALIVE_TIMER = 0x0f;
        /// Host Behavior Support.
        HOST_BEHAVIOR = 0x16;
        /// Host Identifier.
        HOST_IDENTIFIER = 0x81;
        /// Reservation Notification Mask.
        RESERVATION_NOTIFICATION_MASK = 0x82;
        /// Reservation Persistence.
        RESERVATION_PERSISTENCE = 0x83;
        /// Namespace Write Protection Config.
        NAMESPACE_WRITE_PROTECTION = 0x84;
    }
}

open_u8! {
    /// Select field of Get Features.
    Select {
        /// Current value.
        CURRENT = 0;
        /// Default value.
        DEFAULT = 1;
        /// Saved value.
        SAVED = 2;
        /// Supported capabilities: bit 0 saveable, 1 namespace specific, 2 changeable.
        CAPABILITIES = 3;
    }
}

/// Namespace write protection states that exist here (NVMe Base 2.0, "Namespace Write Protection
/// Config"); the other two are not supported.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteProtectState {
    /// No Write Protect.
    NoWriteProtect = 0,
    /// Write Protect: until the state is set again.
    WriteProtect = 1,
}

/// Asynchronous event types and the information of the notices used here (NVMe Base 2.0,
/// "Asynchronous Event Request command").
pub mod event {
    /// Type: error status.
    pub const TYPE_ERROR: u32 = 0;
    /// Type: SMART / health status.
    pub const TYPE_SMART: u32 = 1;
    /// Type: notice.
    pub const TYPE_NOTICE: u32 = 2;
    /// Type: I/O command specific status.
    pub const TYPE_IO_COMMAND: u32 = 6;
    /// Error: Write to Invalid Doorbell Register.
    pub const ERROR_DOORBELL_REGISTER: u32 = 0x00;
    /// Error: Invalid Doorbell Write Value.
    pub const ERROR_DOORBELL_VALUE: u32 = 0x01;
    /// Error: Persistent Internal Error.
    pub const ERROR_PERSISTENT: u32 = 0x03;
    /// Error: Transient Internal Error.
    pub const ERROR_TRANSIENT: u32 = 0x04;
    /// SMART: NVM Subsystem Reliability.
    pub const SMART_RELIABILITY: u32 = 0x00;
    /// SMART: Temperature Threshold.
    pub const SMART_TEMPERATURE: u32 = 0x01;
    /// SMART: Spare Below Threshold.
    pub const SMART_SPARE: u32 = 0x02;
    /// Notice: Namespace Attribute Changed.
    pub const NOTICE_NAMESPACE_ATTRIBUTE: u32 = 0x00;
    /// Notice: Asymmetric Namespace Access Change.
    pub const NOTICE_ANA: u32 = 0x03;
    /// I/O command specific: Reservation Log Page Available.
    pub const IO_COMMAND_RESERVATION_LOG: u32 = 0x00;
    /// Notice: Discovery Log Page Change.
    pub const NOTICE_DISCOVERY_LOG: u32 = 0xf0;

    /// Dword 0 of an AER completion.
    #[must_use]
    pub const fn dw0(event_type: u32, info: u32, lid: u8) -> u32 {
        event_type & 7 | (info & 0xff) << 8 | (lid as u32) << 16
    }
}
