//! A session as bytes and file descriptors, and back. The contract is that of the session's module.

use super::*;

const MAGIC: [u8; 8] = *b"PSTKVFU1";

/// A session, to be taken up elsewhere.
#[derive(Debug)]
pub struct Exported<'a> {
    /// What [`Session::import`] reads.
    pub bytes: Vec<u8>,
    /// Every file descriptor that the bytes name, with its key.
    pub fds: Vec<(u64, BorrowedFd<'a>)>,
}

/// What cannot be taken up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadExport {
    /// Not an export, of another version, or cut short.
    #[error("not an exported session of this version")]
    Unknown,
    /// A file descriptor is missing.
    #[error("file descriptor {0} of the session is missing")]
    Fd(u64),
    /// A map of the client's memory cannot be made again.
    #[error("client memory at {0:#x} cannot be mapped again")]
    Map(u64),
    /// What it says contradicts itself.
    #[error("the exported session makes no sense")]
    Inconsistent,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    /// Of the capabilities.
    max_msg_fds: u64,
    max_data_xfer_size: u64,
    write_multiple: u32,
    is_negotiated: u32,
    next_key: u64,
    /// 0: there is no dirty log.
    log_page_bytes: u64,
    /// 0: there is none.
    unmask_key: u64,
    migration: u32,
    maps: u32,
    triggers: u32,
    log_ranges: u32,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct MapRow {
    request: wire::DmaMap,
    /// 0: there is no file.
    key: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct TriggerRow {
    kind: u32,
    vector: u32,
    key: u64,
}

impl Session {
    /// All of the session, as it is between two messages.
    pub fn export(&self) -> Exported<'_> {
        let client = self.client.unwrap_or_default();
        let mut fds = Vec::new();
        let mut bytes = Vec::new();
        let head = Head {
            magic: MAGIC,
            max_msg_fds: client.max_msg_fds,
            max_data_xfer_size: client.max_data_xfer_size,
            write_multiple: client.write_multiple.into(),
            is_negotiated: self.client.is_some().into(),
            next_key: self.next_key,
            log_page_bytes: self.log.as_ref().map_or(0, |log| log.page_bytes()),
            unmask_key: self.unmask.as_ref().map_or(0, |trigger| trigger.key),
            migration: self.migration.0,
            maps: self.table.len() as u32,
            triggers: self.triggers.len() as u32,
            log_ranges: self.log_ranges.len() as u32,
        };
        bytes.extend_from_slice(head.as_bytes());
        for map in self.table.iter() {
            let key = map.file.as_ref().map_or(0, |file| file.key);
            bytes.extend_from_slice(MapRow { request: map.request, key }.as_bytes());
            fds.extend(map.file.as_ref().map(|file| (file.key, file.fd.as_fd())));
        }
        for (&(kind, vector), trigger) in &self.triggers {
            let row = TriggerRow { kind, vector, key: trigger.key };
            bytes.extend_from_slice(row.as_bytes());
            fds.push((trigger.key, trigger.fd.as_fd()));
        }
        for &(iova, length) in &self.log_ranges {
            bytes.extend_from_slice(wire::LoggingRange { iova, length }.as_bytes());
        }
        fds.extend(self.unmask.as_ref().map(|trigger| (trigger.key, trigger.fd.as_fd())));
        Exported { bytes, fds }
    }

    /// Take up an exported session: takes the file descriptors it names out of `fds`, and tells
    /// the function of memory, eventfds and dirty log. [`Outcome::Pending`] as for a message.
    pub fn import(
        bytes: &[u8],
        fds: &mut BTreeMap<u64, OwnedFd>,
        function: &mut dyn Function,
    ) -> Result<(Session, Outcome), BadExport> {
        let bad = |_| BadExport::Unknown;
        let (head, rest) = Head::read_from_prefix(bytes).map_err(|_| BadExport::Unknown)?;
        if head.magic != MAGIC || head.maps as usize > dma::MAPS_MAX {
            return Err(BadExport::Unknown);
        }
        let (maps, rest) = <[MapRow]>::ref_from_prefix_with_elems(rest, head.maps as usize)
            .map_err(|_| bad(()))?;
        let (triggers, rest) =
            <[TriggerRow]>::ref_from_prefix_with_elems(rest, head.triggers as usize)
                .map_err(|_| bad(()))?;
        let ranges =
            <[wire::LoggingRange]>::ref_from_bytes_with_elems(rest, head.log_ranges as usize)
                .map_err(|_| bad(()))?;

        let mut session = Session::new(function);
        session.client = (head.is_negotiated != 0).then_some(Capabilities {
            max_msg_fds: head.max_msg_fds,
            max_data_xfer_size: head.max_data_xfer_size,
            write_multiple: head.write_multiple != 0,
        });
        session.next_key = head.next_key;
        let mut take = |key: u64| fds.remove(&key).ok_or(BadExport::Fd(key));
        for row in maps {
            let file = match row.key {
                0 => None,
                key => Some(File { key, fd: Arc::new(take(key)?) }),
            };
            let map = session.table.map(row.request, file);
            map.map_err(|_| BadExport::Map(row.request.address))?;
        }
        for row in triggers {
            if row.vector >= session.vectors(row.kind) {
                return Err(BadExport::Inconsistent);
            }
            let trigger = Trigger { key: row.key, fd: Arc::new(take(row.key)?) };
            if let Some(irq) = kind(row.kind) {
                function.set_trigger(irq, row.vector, Some(Arc::clone(&trigger.fd)));
            }
            session.triggers.insert((row.kind, row.vector), trigger);
        }
        if head.unmask_key != 0 {
            let fd = Arc::new(take(head.unmask_key)?);
            session.unmask = Some(Trigger { key: head.unmask_key, fd });
        }
        if head.log_page_bytes != 0 {
            let wanted: Vec<(u64, u64)> =
                ranges.iter().map(|range| (range.iova, range.length)).collect();
            let log =
                DirtyLog::new(head.log_page_bytes, &wanted).map_err(|_| BadExport::Inconsistent)?;
            // What had been marked is lost, so everything may have been.
            for &(start, len_bytes) in &wanted {
                log.mark(start, len_bytes);
            }
            session.log = Some(Arc::new(log));
            session.log_ranges = wanted;
        }
        session.migration = match State(head.migration) {
            State::RUNNING => State::RUNNING,
            // Saved or half-written state is gone.
            _ => State::ERROR,
        };
        let next = match function.set_memory(&session.table.memory(), false) {
            Step::Done => session.import_next(ImportStage::DirtyLog, function),
            Step::Pending => Ok(Next::Wait(Work::Import(ImportStage::DirtyLog))),
        };
        let outcome = session.conclude(0, Command(0), true, next);
        Ok((session, outcome))
    }

    pub(super) fn import_next(
        &mut self,
        mut stage: ImportStage,
        function: &mut dyn Function,
    ) -> Result<Next, Errno> {
        loop {
            let (step, next) = match stage {
                ImportStage::DirtyLog => {
                    let step = match &self.log {
                        Some(log) => function.set_dirty_log(Some(Arc::clone(log))),
                        None => Step::Done,
                    };
                    (step, ImportStage::Running)
                }
                ImportStage::Running => {
                    let step = match self.migration {
                        State::RUNNING => Step::Done,
                        _ => function.set_running(false),
                    };
                    (step, ImportStage::Done)
                }
                ImportStage::Done => return answered(&[]),
            };
            if step == Step::Pending {
                return Ok(Next::Wait(Work::Import(next)));
            }
            stage = next;
        }
    }
}
