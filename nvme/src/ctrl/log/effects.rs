//! What is supported, as log pages 00h, 05h and 12h tell it: a dword per code.

use zerocopy::IntoBytes;
use zerocopy::little_endian::U32;

use super::Controller;
use crate::spec::{AdminOpcode, IdentifyController, NvmOpcode, effects};

/// Length of the Commands Supported and Effects page.
const COMMANDS_SUPPORTED_LEN: usize = 4096;

/// 256 dwords, zero where nothing is said.
pub(crate) fn page_of_dwords(dwords: impl Iterator<Item = (u8, u32)>) -> Vec<u8> {
    let mut page = vec![U32::ZERO; 256];
    for (index, value) in dwords {
        page[usize::from(index)] = U32::new(value);
    }
    page.as_bytes().to_vec()
}

impl Controller {
    /// Commands Supported and Effects: 256 dwords for admin commands, 256 for I/O commands, and
    /// 2048 reserved bytes. The command scope is not reported (LPA bit 5 is clear): Linux logs a
    /// warning about "unusual effects" on passthrough when an I/O command has scope bits.
    pub(crate) fn commands_supported(&self) -> Vec<u8> {
        let mut page = page_of_dwords(
            (0..=u8::MAX)
                .filter(|&opcode| self.has_admin_command(AdminOpcode(opcode)))
                .map(|opcode| (opcode, effects::SUPPORTED)),
        );
        page.extend(page_of_dwords(
            (0..=u8::MAX)
                .filter_map(|opcode| self.io_effects(NvmOpcode(opcode)).map(|bits| (opcode, bits))),
        ));
        page.resize(COMMANDS_SUPPORTED_LEN, 0);
        page
    }

    /// Effects of an I/O command; `None`: not supported.
    fn io_effects(&self, opcode: NvmOpcode) -> Option<u32> {
        type Id = IdentifyController;
        let needs = match opcode {
            NvmOpcode::FLUSH | NvmOpcode::WRITE | NvmOpcode::READ | NvmOpcode::FABRICS => 0,
            NvmOpcode::WRITE_UNCORRECTABLE => Id::ONCS_WRITE_UNCORRECTABLE,
            NvmOpcode::COMPARE => Id::ONCS_COMPARE,
            NvmOpcode::WRITE_ZEROES => Id::ONCS_WRITE_ZEROES,
            NvmOpcode::DATASET_MANAGEMENT => Id::ONCS_DSM,
            NvmOpcode::VERIFY => Id::ONCS_VERIFY,
            NvmOpcode::RESERVATION_REGISTER
            | NvmOpcode::RESERVATION_REPORT
            | NvmOpcode::RESERVATION_ACQUIRE
            | NvmOpcode::RESERVATION_RELEASE => Id::ONCS_RESERVATIONS,
            NvmOpcode::COPY => Id::ONCS_COPY,
            _ => return None,
        };
        if self.optional_nvm_commands() & needs != needs {
            return None;
        }
        let changes_content = matches!(
            opcode,
            NvmOpcode::WRITE
                | NvmOpcode::WRITE_UNCORRECTABLE
                | NvmOpcode::WRITE_ZEROES
                | NvmOpcode::DATASET_MANAGEMENT
                | NvmOpcode::COPY
        );
        let content = if changes_content { effects::CONTENT_CHANGE } else { 0 };
        Some(effects::SUPPORTED | content)
    }
}
