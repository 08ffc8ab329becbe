//! A record layer for tests: frames of up to 1000 bytes, "encrypted" with a running key.

use iobuf::SgList;
use reactor::net::{Gather, Layer, LayerError, Placed, Plain};

const FRAME_MAX: usize = 1000;
const HEAD: usize = 4;

#[derive(Default)]
pub(crate) struct Xor {
    sealed: u8,
    opened: u8,
    /// An incomplete frame.
    partial: Vec<u8>,
}

impl Layer for Xor {
    fn seal(&mut self, plain: &Gather<'_>, out: &mut Vec<u8>) -> Result<(), LayerError> {
        let mut at = 0;
        while at < plain.len() {
            let len = (plain.len() - at).min(FRAME_MAX);
            out.extend([b'X', self.sealed]);
            out.extend((len as u16).to_be_bytes());
            let start = out.len();
            plain.append_to(at, len, out).map_err(|_| LayerError("short"))?;
            out[start..].iter_mut().for_each(|byte| *byte ^= self.sealed);
            self.sealed = self.sealed.wrapping_add(1);
            at += len;
        }
        Ok(())
    }

    fn open(&mut self, wire: &mut [u8], sink: &mut dyn FnMut(Plain<'_>)) -> Result<(), LayerError> {
        let mut at = 0;
        while at < wire.len() {
            if self.partial.is_empty()
                && let Some(len) = self.frame(&wire[at..])?
            {
                let range = at + HEAD..at + HEAD + len;
                wire[range.clone()].iter_mut().for_each(|byte| *byte ^= self.opened);
                self.opened = self.opened.wrapping_add(1);
                at = range.end;
                sink(Plain::InPlace(range));
                continue;
            }
            self.partial.push(wire[at]);
            at += 1;
            if let Some(len) = self.frame(&self.partial)? {
                let frame = &mut self.partial[HEAD..HEAD + len];
                frame.iter_mut().for_each(|byte| *byte ^= self.opened);
                self.opened = self.opened.wrapping_add(1);
                sink(Plain::Copied(frame));
                self.partial.clear();
            }
        }
        Ok(())
    }

    fn first_len(&self, wire: &[u8]) -> usize {
        match self.frame(wire) {
            Ok(Some(len)) if self.partial.is_empty() => HEAD + len,
            _ => wire.len(),
        }
    }

    fn open_to(
        &mut self,
        wire: &mut [u8],
        to: &SgList,
        offset: usize,
        len: usize,
    ) -> Result<Placed, LayerError> {
        let mut sum = Placed::default();
        while self.partial.is_empty()
            && let Some(frame) = self.frame(&wire[sum.taken..])?
            && frame <= len - sum.placed
        {
            let bytes = &mut wire[sum.taken + HEAD..][..frame];
            bytes.iter_mut().for_each(|byte| *byte ^= self.opened);
            to.copy_from_slice(offset + sum.placed, bytes).map_err(|_| LayerError("no room"))?;
            self.opened = self.opened.wrapping_add(1);
            sum = Placed { taken: sum.taken + HEAD + frame, placed: sum.placed + frame };
        }
        Ok(sum)
    }

    fn farewell(&mut self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"not a frame");
    }
}

impl Xor {
    /// Length of the frame at the start, if it is complete.
    fn frame(&self, bytes: &[u8]) -> Result<Option<usize>, LayerError> {
        if bytes.first().is_some_and(|byte| *byte != b'X')
            || bytes.get(1).is_some_and(|byte| *byte != self.opened)
        {
            return Err(LayerError("not a frame"));
        }
        let Some(len) = bytes.get(2..HEAD) else { return Ok(None) };
        let len = usize::from(u16::from_be_bytes([len[0], len[1]]));
        Ok((bytes.len() >= HEAD + len).then_some(len))
    }
}
