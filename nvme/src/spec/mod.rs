//! Wire structures: what is on the wire, byte for byte, by zerocopy. Values a peer may choose are
//! open newtypes; checking is the business of the modules that use these types.

mod command;
pub mod discovery;
pub mod fabrics;
mod feature;
mod identify;
mod log;
mod nqn;
pub mod pdu;
mod property;
pub mod status;

pub use command::{
    AdminOpcode, CopyRange, Cqe, Direction, DsmRange, FLAGS_PSDT_SGL, FabricsType, NSID_ALL,
    NvmOpcode, SglDescriptor, Sqe,
};
pub use fabrics::ConnectData;
pub use feature::{Feature, Select, WriteProtectState, event};
pub use identify::{
    AsciiField, CSI_NVM, Cns, IDENTIFY_LEN, IdentifyController, IdentifyControllerNvm,
    IdentifyNamespace, IdentifyNamespaceIndependent, InvalidAscii, LbaFormat, nidt,
};
pub use log::{
    ANA_LSP_GROUPS_ONLY, CHANGED_NAMESPACES_MAX, EnduranceGroupLog, ErrorEntry, FirmwareSlotLog,
    GetLogPage, LogPage, ReservationNotificationLog, SmartLog, critical_warning, effects,
};
pub use nqn::{DISCOVERY_NQN, InvalidNqn, NQN_FIELD_LEN, NQN_LEN_MAX, Nqn};
pub use property::{Cap, Cc, Csts, NSSR_RESET, Property, VERSION_2_0};
pub use status::{SCT_COMMAND_SPECIFIC, SCT_GENERIC, SCT_MEDIA, SCT_PATH, Status};
