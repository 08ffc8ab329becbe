//! Follows a session and checks what it decides.

use crate::device::Device;
use crate::vhost_user::session::{Action, ProtocolFeatures, Refusal, Session};
use crate::vhost_user::wire::{Message, Request};

/// A session whose decisions are checked: rings start and stop in turn, nothing is done to a ring
/// that does not run, and a message that asks for an acknowledgement has one or ends the
/// connection.
pub struct Judge {
    session: Session,
    running: Vec<bool>,
    starts: u64,
}

impl Judge {
    /// A new session.
    pub fn new(device: Device, queue_size_max: u16) -> Judge {
        let running = vec![false; usize::from(device.queues())];
        Judge { session: Session::new(device.into(), queue_size_max), running, starts: 0 }
    }

    /// Rings that have started so far.
    pub fn starts(&self) -> u64 {
        self.starts
    }

    /// A message comes, and what follows from it is carried out or fails. The result is the reply;
    /// an error ends the connection.
    pub fn message(&mut self, message: Message, fails: bool) -> Result<Option<Vec<u8>>, Refusal> {
        let request = message.request;
        let has_acks = self.session.protocol().0 & ProtocolFeatures::REPLY_ACK.0 != 0;
        let is_acked = message.need_reply && has_acks;
        let step = self.session.on_message(message)?;
        assert_eq!(self.session.is_pending(), !step.actions.is_empty());
        if step.actions.is_empty() {
            assert!(step.reply.is_some() || !is_acked, "{request}: no acknowledgement");
            return Ok(step.reply);
        }
        assert!(step.reply.is_none(), "{request}: answered before it is done");
        let (mut base, mut started) = (None, Vec::new());
        for action in step.actions {
            match action {
                Action::Start(start) => {
                    let is_running = &mut self.running[usize::from(start.index)];
                    assert!(!*is_running, "ring {} is started twice", start.index);
                    assert!(start.size.is_power_of_two());
                    *is_running = true;
                    started.push(start.index);
                    self.starts += 1;
                }
                Action::Stop { index, .. } => {
                    let is_running = &mut self.running[usize::from(index)];
                    assert!(*is_running, "ring {index} is stopped twice");
                    *is_running = false;
                    base = Some(u32::from(index) * 100);
                }
                Action::SetKick { index, .. }
                | Action::SetCall { index, .. }
                | Action::SetErr { index, .. }
                | Action::SetLogging { index, .. }
                | Action::SetEnabled { index, .. } => {
                    assert!(self.running[usize::from(index)], "ring {index} does not run");
                }
                Action::SetMemory { .. } | Action::SetWriteThrough(_) => {
                    assert!(self.running.contains(&true), "nobody needs to know");
                }
            }
        }
        if fails && !started.is_empty() {
            for index in started {
                self.running[usize::from(index)] = false;
            }
            return self.session.on_done(Err("it cannot start".to_owned()));
        }
        let reply = self.session.on_done(Ok(base))?;
        let is_answered = [Request::GET_VRING_BASE, Request::SET_LOG_BASE].contains(&request);
        assert_eq!(reply.is_some(), is_acked || is_answered, "{request}");
        Ok(reply)
    }
}
