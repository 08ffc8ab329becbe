//! The data pointer of any SQE.
//!
//! Invariants checked: no panic; in-capsule data lies in the capsule, whatever the capsule has, and
//! is never promised to a host; a smaller capsule never makes more commands valid.
#![no_main]

use libfuzzer_sys::fuzz_target;
use nvme::spec::{Direction, Sqe, Status};
use nvme::xfer::{DataPtr, parse_data};
use penstock_fuzz::Input;

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let mut capsule = [0; 4];
    let from = input.take(4);
    capsule[..from.len()].copy_from_slice(from);
    let capsule = u32::from_le_bytes(capsule);
    let mut bytes = [0; 64];
    let from = input.take(64);
    bytes[..from.len()].copy_from_slice(from);
    let sqe = Sqe::from_bytes(&bytes);
    let len = sqe.dptr.length.get();
    let parsed = parse_data(&sqe, capsule);
    match parsed {
        Ok(DataPtr::None) => assert_eq!(len, 0),
        Ok(DataPtr::Transport { len: parsed }) => assert!(parsed == len && len > 0),
        Ok(DataPtr::InCapsule { offset, len: parsed }) => {
            assert!(parsed == len && len > 0 && sqe.direction() != Direction::ToHost);
            assert!(offset.checked_add(len).expect("no overflow") <= capsule);
        }
        Err(status) => {
            let known = [
                Status::INVALID_FIELD_IN_COMMAND,
                Status::SGL_DESCRIPTOR_TYPE_INVALID,
                Status::SGL_OFFSET_INVALID,
                Status::DATA_SGL_LENGTH_INVALID,
            ];
            assert!(known.iter().any(|known| known.dnr() == status));
        }
    }
    // With no capsule at all only the transport is left.
    match (parsed, parse_data(&sqe, 0)) {
        (_, Ok(DataPtr::InCapsule { .. })) => panic!("data in a capsule of no bytes"),
        (parsed, Ok(small)) => assert_eq!(parsed, Ok(small)),
        (_, Err(_)) => {}
    }
});
