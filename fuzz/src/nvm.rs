//! A subsystem to ask about, and commands that are wrong in few places at a time.

use nvme::spec::{AsciiField, Nqn, SglDescriptor, Sqe};
use nvme::subsys::ana::{AnaGroup, AnaState};
use nvme::subsys::{Limits, NamespaceInfo, SubsystemInfo};

use crate::Input;

/// Namespaces of all kinds; each bit of `shape` changes something that a host can see.
pub fn subsystem(shape: u8) -> SubsystemInfo {
    let bit = |n: u8| shape >> n & 1 == 1;
    let plain = NamespaceInfo {
        deallocate: bit(0),
        write_zeroes: bit(1),
        write_cache: bit(2),
        ana_group: 1 + u32::from(bit(3)),
        ..NamespaceInfo::new(1, 512, 2048 + u64::from(shape))
    };
    let shared = NamespaceInfo {
        uuid: [7; 16],
        reservations: true,
        ptpl: bit(4),
        write_uncorrectable: true,
        write_zeroes: true,
        deallocate: true,
        ..NamespaceInfo::new(2, 4096, 1 << 40)
    };
    let protected = NamespaceInfo {
        read_only: bit(5),
        write_protect: !bit(5),
        ..NamespaceInfo::new(7, 512, 1)
    };
    let mut namespaces = vec![plain, shared, protected];
    if bit(6) {
        namespaces.extend((100..900).map(|nsid| NamespaceInfo::new(nsid, 512, 8)));
    }
    let text = "a valid name";
    let subsys = SubsystemInfo::new(
        Nqn::new("nqn.2026-11.io.penstock:fuzz").expect(text),
        AsciiField::new("FUZZ").expect(text),
        AsciiField::new("Fuzz").expect(text),
        AsciiField::new("1").expect(text),
        namespaces,
        Limits::default(),
    )
    .expect("possible namespaces");
    let state = [AnaState::Optimized, AnaState::Inaccessible][usize::from(bit(7))];
    let groups = vec![AnaGroup::new(1, AnaState::Optimized), AnaGroup::new(2, state)];
    subsys.with_ana_groups(groups).expect("both groups")
}

/// An SQE: of arbitrary bytes, or sound but for what the input says.
pub fn sqe(input: &mut Input<'_>, opcodes: &[u8]) -> Sqe {
    let how = input.byte();
    let mut bytes = [0; 64];
    if how == 0xff {
        let from = input.take(64);
        bytes[..from.len()].copy_from_slice(from);
        return Sqe::from_bytes(&bytes);
    }
    bytes[0] = opcodes[usize::from(input.byte()) % opcodes.len()];
    (bytes[1], bytes[2]) = (0x40 | input.byte() & 3, input.byte());
    bytes[4] = input.byte() % 10;
    // Dwords 10 to 15: a byte of each, at a place that the input picks.
    for at in (40..64).step_by(4) {
        let (place, value) = (input.byte(), input.byte());
        bytes[at + usize::from(place % 4)] = value;
        bytes[at] |= place >> 4;
    }
    let mut sqe = Sqe::from_bytes(&bytes);
    let len = match how % 8 {
        0 => 0,
        1 => u32::from(input.byte()),
        2 => 512 * (u32::from(input.byte()) + 1),
        3 => 16 * (u32::from(input.byte()) + 1),
        // Just what a read, write or compare of this many blocks needs.
        4 => 512 * ((sqe.cdw12.get() & 0xffff) + 1),
        // Just what a log page of this many dwords needs.
        5 => 4 * ((sqe.cdw10.get() >> 16) + 1),
        _ => 4096,
    };
    sqe.dptr = match how >> 3 & 7 {
        0 => SglDescriptor::in_capsule(u64::from(input.byte()), len),
        1 => SglDescriptor { identifier: input.byte(), ..SglDescriptor::transport(len) },
        _ => SglDescriptor::transport(len),
    };
    sqe
}
