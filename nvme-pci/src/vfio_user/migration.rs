//! Save and restore of the device: the states and arcs of VFIO's migration protocol
//! (vfio-user, "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE"; `enum vfio_device_mig_state`), and the
//! stream of saved state.
//!
//! Of the optional states only STOP_COPY is offered. A device state is a few kilobytes, so there is
//! nothing to copy in advance.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Longest state that is taken from a client.
pub const STATE_BYTES_MAX: usize = 16 << 20;

/// A migration state, as VFIO numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(pub u32);

impl State {
    /// The device has failed and must be reset.
    pub const ERROR: State = State(0);
    /// Changes neither its own state nor memory.
    pub const STOP: State = State(1);
    /// Runs normally.
    pub const RUNNING: State = State(2);
    /// Stopped, and its state can be read.
    pub const STOP_COPY: State = State(3);
    /// Stopped, and its state can be written.
    pub const RESUMING: State = State(4);

    /// The next state on the shortest way from here to `target`, which has no saving state in
    /// between. None: there is no way, or we are there.
    pub fn next(self, target: State) -> Option<State> {
        let is_known = |state: State| (State::STOP.0..=State::RESUMING.0).contains(&state.0);
        match (self, target) {
            _ if !is_known(self) || !is_known(target) || self == target => None,
            // All ways lead through STOP.
            (State::STOP, target) => Some(target),
            _ => Some(State::STOP),
        }
    }
}

const MAGIC: [u8; 8] = *b"PSTKNVME";
const VERSION: u32 = 1;

/// What stands in front of a function's state in the stream. Little-endian, since the two machines
/// of a migration need not be alike.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Envelope {
    magic: [u8; 8],
    version: zerocopy::little_endian::U32,
    /// Bytes of the function's state.
    len_bytes: zerocopy::little_endian::U32,
}

const ENVELOPE_BYTES: usize = 16;
const _: () = assert!(size_of::<Envelope>() == ENVELOPE_BYTES);

/// Wraps a function's state for the stream.
pub fn seal(state: &[u8]) -> Vec<u8> {
    let len_bytes = u32::try_from(state.len()).expect("a device state is small");
    let envelope = Envelope { magic: MAGIC, version: VERSION.into(), len_bytes: len_bytes.into() };
    [envelope.as_bytes(), state].concat()
}

/// The function's state out of a whole stream. None: it is not whole, or not ours.
pub fn open(stream: &[u8]) -> Option<&[u8]> {
    let (envelope, state) = Envelope::ref_from_prefix(stream).ok()?;
    let is_ours = envelope.magic == MAGIC && envelope.version.get() == VERSION;
    (is_ours && envelope.len_bytes.get() as usize == state.len()).then_some(state)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table of the document, with PRE_COPY and P2P taken out.
    #[test]
    fn every_way_is_the_shortest_and_has_no_saving_state_within() {
        let known = [State::STOP, State::RUNNING, State::STOP_COPY, State::RESUMING];
        for from in known {
            for to in known {
                let mut way = vec![from];
                while let Some(next) = way.last().unwrap().next(to) {
                    way.push(next);
                }
                let direct = from == State::STOP || to == State::STOP;
                let arcs = if from == to {
                    0
                } else if direct {
                    1
                } else {
                    2
                };
                assert_eq!(way.len() - 1, arcs, "{from:?} to {to:?}: {way:?}");
                assert_eq!(*way.last().unwrap(), to);
                if arcs == 2 {
                    assert_eq!(way[1], State::STOP);
                }
            }
        }
    }

    #[test]
    fn there_is_no_way_out_of_error_or_to_what_is_not_offered() {
        for target in 0..10 {
            assert_eq!(State::ERROR.next(State(target)), None);
        }
        for target in [0, 5, 6, 7, 8, u32::MAX] {
            assert_eq!(State::RUNNING.next(State(target)), None);
            assert_eq!(State::STOP.next(State(target)), None);
        }
    }

    #[test]
    fn only_a_whole_stream_of_ours_is_opened() {
        let stream = seal(b"state");
        assert_eq!(stream, *b"PSTKNVME\x01\0\0\0\x05\0\0\0state");
        assert_eq!(open(&stream), Some(&b"state"[..]));
        for cut in 0..stream.len() {
            assert_eq!(open(&stream[..cut]), None);
        }
        assert_eq!(open(&[&stream[..], b"x"].concat()), None);
        for at in 0..16 {
            let mut other = stream.clone();
            other[at] ^= 1;
            assert_eq!(open(&other), None, "byte {at}");
        }
    }
}
