//! What each command becomes: one I/O, or several one after the other.

use super::*;

impl Engine {
    pub(super) fn start(&mut self, at: usize, slot: u16, sqe: &Sqe) -> Result<(), Status> {
        let decoded = io::decode(sqe, &self.subsys);
        let fuse = Fuse::of(sqe);
        if !self.sqs[at].pairing.is_idle(fuse) {
            return self.start_paired(at, slot, sqe, fuse, decoded);
        }
        self.carry_out(at, slot, sqe, decoded?)
    }

    #[inline]
    pub(super) fn carry_out(
        &mut self,
        at: usize,
        slot: u16,
        sqe: &Sqe,
        command: IoCommand,
    ) -> Result<(), Status> {
        self.sqs[at].slots[usize::from(slot)].command = Some(command);
        match command {
            IoCommand::Read { nsid, offset, len, fua } => {
                self.transfer(at, slot, sqe, Op::Read, nsid, (offset, len), fua)
            }
            IoCommand::Write { nsid, offset, len, fua } => {
                self.transfer(at, slot, sqe, Op::Write, nsid, (offset, len), fua)
            }
            IoCommand::Compare { nsid, offset, len, fua } => {
                self.transfer(at, slot, sqe, Op::Compare, nsid, (offset, len), fua)
            }
            IoCommand::ReservationReport { nsid, len } => {
                self.transfer(at, slot, sqe, Op::ReservationReport, nsid, (0, len), false)
            }
            IoCommand::Flush { .. } => self.next_step(at, slot),
            IoCommand::WriteZeroes { nsid, offset, len, no_unmap, fua } => {
                let (space, mut io) = self.io(at, slot, Op::WriteZeroes, nsid)?;
                (io.offset, io.len, io.no_unmap, io.fua) = (offset, len, no_unmap, fua);
                self.submit(space, io);
                Ok(())
            }
            IoCommand::Verify { nsid, offset, len, fua } => {
                let (space, mut io) = self.io(at, slot, Op::Verify, nsid)?;
                (io.offset, io.len, io.fua) = (offset, len, fua);
                self.submit(space, io);
                Ok(())
            }
            IoCommand::Advisory { .. } => {
                self.complete(at, slot, Status::SUCCESS, 0);
                Ok(())
            }
            IoCommand::Deallocate { .. } => {
                self.read_structure(at, slot, sqe, command.host_data_len())?;
                self.next_step(at, slot)
            }
            IoCommand::Copy { nsid, offset, ranges, fua } => {
                self.read_structure(at, slot, sqe, command.host_data_len())?;
                self.copy(at, slot, nsid, offset, ranges, fua)
            }
            IoCommand::ReservationRegister { .. }
            | IoCommand::ReservationAcquire { .. }
            | IoCommand::ReservationRelease { .. } => {
                self.read_structure(at, slot, sqe, command.host_data_len())?;
                self.reserve(at, slot, &command)
            }
            // No namespace says that it can.
            IoCommand::WriteUncorrectable { .. } => Err(Status::INVALID_COMMAND_OPCODE.dnr()),
        }
    }

    /// An I/O for a command, and where it goes.
    pub(super) fn io(
        &mut self,
        at: usize,
        slot: u16,
        op: Op,
        nsid: u32,
    ) -> Result<(usize, Box<Io>), Status> {
        let space = self.space_of(nsid).ok_or(Status::INTERNAL_ERROR)?;
        // One for each slot; those of a queue that was deleted meanwhile may be missing.
        let mut io = self.ios.pop().unwrap_or_else(|| Box::new(Io::with_capacity(SEGMENTS)));
        (io.op, io.offset, io.len) = (op, 0, 0);
        (io.fua, io.no_unmap, io.result) = (false, false, Ok(()));
        io.tag = u64::from(self.sqs[at].qid) << TAG_SHIFT | u64::from(slot);
        Ok((space, io))
    }

    /// A command whose data is the volume's as it is the guest's.
    #[expect(clippy::too_many_arguments, reason = "the parts of one command")]
    fn transfer(
        &mut self,
        at: usize,
        slot: u16,
        sqe: &Sqe,
        op: Op,
        nsid: u32,
        (offset, len): (u64, u32),
        fua: bool,
    ) -> Result<(), Status> {
        let (space, mut io) = self.io(at, slot, op, nsid)?;
        (io.offset, io.len, io.fua) = (offset, u64::from(len), fua);
        self.turn_bytes = self.turn_bytes.saturating_sub(u64::from(len));
        let view = &self.view;
        let data = &mut io.data;
        let mut leaves_out = false;
        let mut walked = walk(
            sqe,
            len,
            true,
            &mut Discarding {
                read: |addr, dst: &mut [u8]| view.read(addr, dst).map_err(|_| TRANSFER),
                piece: |addr, len| {
                    // Data for the volume may lie in memory that is only read.
                    let appended = match op {
                        Op::Write | Op::Compare => view.append_source(data, addr, len),
                        _ => view.append(data, addr, len),
                    };
                    appended.map_err(|_| TRANSFER)?;
                    segments_fit(data.segments().len())
                },
                discard: |_| {
                    leaves_out = true;
                    Ok(())
                },
            },
        );
        if leaves_out && walked.is_ok() {
            walked = self.bounce(at, slot, &mut io);
        }
        if let Err(status) = walked {
            io.data.clear();
            self.ios.push(io);
            return Err(status);
        }
        self.submit(space, io);
        Ok(())
    }

    /// Gives a read memory of the core's, as the guest's has no room for all of it.
    #[cold]
    fn bounce(&mut self, at: usize, slot: u16, io: &mut Io) -> Result<(), Status> {
        io.data.clear();
        // When memory is short, the command may be sent again.
        let pool = self.pool.as_ref().ok_or(Status::INTERNAL_ERROR)?;
        pool.alloc(io.len as usize, &mut io.data).map_err(|_| Status::INTERNAL_ERROR)?;
        self.sqs[at].slots[usize::from(slot)].is_bounced = true;
        Ok(())
    }

    /// Copies a command's structure out of guest memory, once.
    fn read_structure(&mut self, at: usize, slot: u16, sqe: &Sqe, len: u32) -> Result<(), Status> {
        let view = &self.view;
        let data = &mut self.sqs[at].slots[usize::from(slot)].data;
        data.clear();
        data.reserve(len as usize);
        walk(
            sqe,
            len,
            true,
            &mut Copying {
                read: |addr, dst: &mut [u8]| view.read(addr, dst).map_err(|_| TRANSFER),
                piece: |addr, len| {
                    let from = data.len();
                    data.resize(from + len as usize, 0);
                    view.read(addr, &mut data[from..]).map_err(|_| TRANSFER)
                },
            },
        )
    }

    /// The next I/O of a command that is several, or its end.
    pub(super) fn next_step(&mut self, at: usize, slot: u16) -> Result<(), Status> {
        let entry = &mut self.sqs[at].slots[usize::from(slot)];
        match entry.command {
            Some(IoCommand::Flush { nsid }) => {
                let done = entry.step;
                let next = match nsid {
                    NSID_ALL => {
                        let all = self.subsys.namespaces();
                        all.iter().map(|ns| ns.nsid).find(|nsid| *nsid > done)
                    }
                    _ if done == 0 => Some(nsid),
                    _ => None,
                };
                let Some(nsid) = next else {
                    self.complete(at, slot, Status::SUCCESS, 0);
                    return Ok(());
                };
                self.sqs[at].slots[usize::from(slot)].step = nsid;
                let (space, io) = self.io(at, slot, Op::Flush, nsid)?;
                self.submit(space, io);
            }
            Some(IoCommand::Deallocate { nsid, ranges }) => loop {
                let entry = &mut self.sqs[at].slots[usize::from(slot)];
                if entry.step == u32::from(ranges) {
                    self.complete(at, slot, Status::SUCCESS, 0);
                    break;
                }
                let from = (entry.step * DSM_RANGE_LEN) as usize;
                entry.step += 1;
                let range = entry.data.get(from..).and_then(|rest| rest.first_chunk::<16>());
                let ns = self.subsys.namespace(nsid);
                let ns = ns.ok_or(INACTIVE)?;
                let range = range.ok_or(Status::INTERNAL_ERROR)?;
                let (offset, len) = io::dsm_range(range, ns)?;
                if len == 0 {
                    continue;
                }
                let (space, mut io) = self.io(at, slot, Op::Deallocate, nsid)?;
                (io.offset, io.len) = (offset, len);
                self.submit(space, io);
                break;
            },
            _ => return Err(Status::INTERNAL_ERROR),
        }
        Ok(())
    }

    fn copy(
        &mut self,
        at: usize,
        slot: u16,
        nsid: u32,
        offset: u64,
        ranges: u16,
        fua: bool,
    ) -> Result<(), Status> {
        let subsys = Arc::clone(&self.subsys);
        let ns = subsys.namespace(nsid).ok_or(INACTIVE)?;
        let data = &self.sqs[at].slots[usize::from(slot)].data;
        let range = |index: u16| {
            let from = usize::from(index) * COPY_RANGE_LEN as usize;
            data.get(from..).and_then(|rest| rest.first_chunk::<32>()).copied()
        };
        let total = io::copy_check(offset, ranges, ns, range)?;
        let (space, mut io) = self.io(at, slot, Op::Copy, nsid)?;
        (io.offset, io.len, io.fua) = (offset, total, fua);
        io.sources.clear();
        let data = &self.sqs[at].slots[usize::from(slot)].data;
        for bytes in data.as_chunks::<32>().0.iter().take(usize::from(ranges)) {
            // All have been checked.
            if let Ok((offset, len)) = io::copy_range(bytes, ns) {
                io.sources.push(Extent { offset, len });
            }
        }
        self.submit(space, io);
        Ok(())
    }

    fn reserve(&mut self, at: usize, slot: u16, command: &IoCommand) -> Result<(), Status> {
        let data = &self.sqs[at].slots[usize::from(slot)].data;
        let key = |index: usize| {
            let bytes = data.get(8 * index..).and_then(|rest| rest.first_chunk::<8>());
            bytes.map(|bytes| u64::from_le_bytes(*bytes)).ok_or(Status::INTERNAL_ERROR)
        };
        let crkey = key(0)?;
        let reserve = match *command {
            IoCommand::ReservationRegister { action, iekey, persist, .. } => Reserve::Register {
                action: match action {
                    RegisterAction::Register => block::RegisterAction::Register,
                    RegisterAction::Unregister => block::RegisterAction::Unregister,
                    RegisterAction::Replace => block::RegisterAction::Replace,
                },
                iekey,
                persist: match persist {
                    PersistChange::Keep => None,
                    PersistChange::Clear => Some(false),
                    PersistChange::Set => Some(true),
                },
                crkey,
                nrkey: key(1)?,
            },
            IoCommand::ReservationAcquire { action, rtype, .. } => Reserve::Acquire {
                action: match action {
                    AcquireAction::Acquire => block::AcquireAction::Acquire,
                    AcquireAction::Preempt => block::AcquireAction::Preempt,
                    AcquireAction::PreemptAndAbort => block::AcquireAction::PreemptAndAbort,
                },
                rtype: reservation_type(rtype)?,
                crkey,
                prkey: key(1)?,
            },
            IoCommand::ReservationRelease { action, .. } => match action {
                ReleaseAction::Clear => Reserve::Clear { crkey },
                ReleaseAction::Release(Some(rtype)) => {
                    Reserve::Release { rtype: reservation_type(rtype)?, crkey }
                }
                // A type that does not exist is not that of the reservation.
                ReleaseAction::Release(None) => {
                    return Err(Status::INVALID_FIELD_IN_COMMAND.dnr());
                }
            },
            _ => return Err(Status::INTERNAL_ERROR),
        };
        let (space, mut io) = self.io(at, slot, Op::Reserve, command.nsid())?;
        io.reserve = reserve;
        self.submit(space, io);
        Ok(())
    }
}

fn reservation_type(rtype: ReservationType) -> Result<block::ReservationType, Status> {
    block::ReservationType::from_wire(rtype as u8).ok_or(Status::INVALID_FIELD_IN_COMMAND.dnr())
}

/// Whether one command may have so many pieces of memory.
#[inline]
pub(super) fn segments_fit(count: usize) -> Result<(), Status> {
    match count <= SEGMENTS_MAX {
        true => Ok(()),
        false => Err(Status::INVALID_NUMBER_OF_SGL_DESCRIPTORS.dnr()),
    }
}
