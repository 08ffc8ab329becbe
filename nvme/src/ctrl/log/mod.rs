//! Get Log Page. What fills the pages: `health`, `effects`, `notices`, and
//! `subsys` for what is not the controller's own.

mod ana;
mod effects;
mod health;
mod notices;

use std::borrow::Cow;

use zerocopy::little_endian::U32;
use zerocopy::{FromZeros, IntoBytes};

pub(crate) use self::ana::has_changed as ana_changed;
pub(crate) use self::health::Thresholds;
pub use self::health::{ErrorRecord, HealthCounters};
use super::{Controller, ControllerKind};
use crate::spec::discovery::DISCOVERY_LID_SPECIFIC;
use crate::spec::{
    ANA_LSP_GROUPS_ONLY, CHANGED_NAMESPACES_MAX, CSI_NVM, FirmwareSlotLog, GetLogPage, LogPage,
    NSID_ALL, Sqe, Status, effects as bits,
};
use crate::subsys::ana::ana_log;

const INVALID_FIELD: Status = Status::INVALID_FIELD_IN_COMMAND.dnr();

/// The one endurance group.
pub(crate) const ENDURANCE_GROUP: u16 = 1;

/// What a controller keeps for its log pages; the changed namespaces are with the events.
#[derive(Debug, Default)]
pub(crate) struct Logs {
    pub(crate) health: health::Health,
    pub(crate) notices: notices::Notices,
}

impl Controller {
    pub(crate) fn has_log_page(&self, lid: LogPage) -> bool {
        match lid {
            LogPage::SUPPORTED_LOG_PAGES => true,
            LogPage::DISCOVERY => self.is_discovery(),
            LogPage::ANA => self.has_ana(),
            LogPage::ERROR_INFORMATION
            | LogPage::SMART
            | LogPage::FIRMWARE_SLOT
            | LogPage::CHANGED_NAMESPACES
            | LogPage::COMMANDS_SUPPORTED
            | LogPage::ENDURANCE_GROUP
            | LogPage::FEATURES_SUPPORTED
            | LogPage::RESERVATION_NOTIFICATION => !self.is_discovery(),
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
        // supported for any page (IOS is clear in the Supported Log Pages).
        if get.offset_is_index || !get.offset.is_multiple_of(4) {
            return Err(INVALID_FIELD);
        }
        if get.len > u64::from(self.subsys.limits().mdts_bytes) {
            return Err(INVALID_FIELD);
        }
        if get.len != u64::from(transfer_len) {
            return Err(Status::DATA_SGL_LENGTH_INVALID.dnr());
        }
        // No page is about a namespace (LPA bit 0 is clear), and a controller should not take any
        // other namespace identifier for pages that are not.
        if !self.is_discovery() && !matches!(sqe.nsid.get(), 0 | NSID_ALL) {
            return Err(INVALID_FIELD);
        }
        let page = self.log_page(&get)?;
        // "If the host specifies an offset greater than the size of the log page, the controller
        // shall abort the command with Invalid Field in Command."
        let offset = usize::try_from(get.offset)
            .ok()
            .filter(|&offset| offset <= page.len())
            .ok_or(INVALID_FIELD)?;
        let end = page.len().min(offset + transfer_len as usize);
        out.extend_from_slice(&page[offset..end]);
        // What is beyond the end of a page is undefined; it must not be stale memory.
        out.resize(transfer_len as usize, 0);
        self.log_page_read(&get);
        Ok(())
    }

    /// Generation of the pages that are read in pieces.
    fn log_version(&self, lid: LogPage) -> u64 {
        match (lid, &self.kind) {
            (LogPage::ANA, _) => self.subsys.ana_change_count(),
            (LogPage::DISCOVERY, ControllerKind::Discovery(log)) => log.genctr(),
            _ => 0,
        }
    }

    /// A read succeeded: events are cleared, unless retained, and notices that were read are gone.
    fn log_page_read(&mut self, get: &GetLogPage) {
        const VERSION_LEN: u64 = 8;
        let version = self.log_version(get.lid);
        if get.offset == 0 && get.len >= VERSION_LEN {
            self.aer.version_read(get.lid, version);
        }
        // A Get Log Page command "removes that Reservation Notification log page from the queue"
        // (NVMe Base 2.1, section 5.1.12.1.32); retaining is for the event alone.
        let is_notice = get.lid == LogPage::RESERVATION_NOTIFICATION;
        let has_more = is_notice && self.log.notices.pop();
        if get.rae {
            return;
        }
        self.aer.log_read(get.lid, version, has_more);
    }

    fn log_page(&self, get: &GetLogPage) -> Result<Cow<'_, [u8]>, Status> {
        Ok(match get.lid {
            LogPage::SUPPORTED_LOG_PAGES => Cow::Owned(self.supported_log_pages()),
            LogPage::ERROR_INFORMATION => {
                Cow::Owned(self.log.health.error_log().as_bytes().to_vec())
            }
            LogPage::SMART => {
                let page = self.log.health.smart(self.features.thresholds());
                Cow::Owned(page.as_bytes().to_vec())
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
                list.resize(CHANGED_NAMESPACES_MAX, U32::ZERO);
                Cow::Owned(list.as_bytes().to_vec())
            }
            LogPage::COMMANDS_SUPPORTED => {
                if get.csi != CSI_NVM {
                    return Err(INVALID_FIELD);
                }
                Cow::Owned(self.commands_supported())
            }
            LogPage::ENDURANCE_GROUP => {
                if get.lsi != ENDURANCE_GROUP {
                    return Err(INVALID_FIELD);
                }
                let sizes = self.subsys.namespaces().iter().map(|ns| u128::from(ns.size_bytes()));
                let page = self.log.health.endurance_group(sizes.sum());
                Cow::Owned(page.as_bytes().to_vec())
            }
            LogPage::ANA => {
                let groups_only = get.lsp & ANA_LSP_GROUPS_ONLY != 0;
                Cow::Owned(ana_log(&self.subsys, groups_only))
            }
            LogPage::FEATURES_SUPPORTED => {
                let entries = self.feature_ids().map(|fid| (fid.0, self.feature_effects(fid)));
                Cow::Owned(effects::page_of_dwords(entries))
            }
            LogPage::RESERVATION_NOTIFICATION => {
                Cow::Owned(self.log.notices.page().as_bytes().to_vec())
            }
            LogPage::DISCOVERY => match &self.kind {
                ControllerKind::Discovery(log) => log.page(get.lsp, self.portid),
                ControllerKind::Io => return Err(Status::INVALID_LOG_PAGE.dnr()),
            },
            _ => return Err(Status::INVALID_LOG_PAGE.dnr()),
        })
    }

    /// Supported Log Pages: LSUPP in bit 0, IOS (index offsets) in bit 1 and clear, what the page
    /// itself defines in bits 31:16.
    fn supported_log_pages(&self) -> Vec<u8> {
        let supported = (0..=u8::MAX).map(LogPage).filter(|&lid| self.has_log_page(lid));
        effects::page_of_dwords(supported.map(|lid| {
            let specific =
                if lid == LogPage::DISCOVERY { u32::from(DISCOVERY_LID_SPECIFIC) } else { 0 };
            (lid.0, bits::SUPPORTED | specific << 16)
        }))
    }
}
