// UNSAFETY: memfd_create and a second mapping, which play the guest's side.
#![expect(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::{OutOfBounds, Pool, SgList};

fn memfd(size: u64) -> File {
    // SAFETY: the name is a valid C string.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0);
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).unwrap();
    file
}

fn region(size: u64, guest_addr: u64, user_addr: u64) -> Arc<GuestRegion> {
    GuestRegion::map(memfd(size).as_fd(), 0, size, guest_addr, user_addr).unwrap()
}

/// [0x1000, 0x4000) and [0x4000, 0x5800) adjacent, then a hole, then [0x10000, 0x10100).
fn memory() -> GuestMemory {
    let regions = vec![
        region(0x100, 0x10000, 0x7000_0000),
        region(0x3000, 0x1000, 0x5000_0000),
        region(0x1800, 0x4000, 0x6000_0000),
    ];
    GuestMemory::new(regions).unwrap()
}

#[test]
fn regions_are_checked() {
    let file = memfd(0x2000);
    let map = |offset, size, guest, user| GuestRegion::map(file.as_fd(), offset, size, guest, user);
    assert!(map(0, 0x2000, 0, 0).is_ok());
    assert!(map(0x800, 0x1800, 0, 0).is_ok());
    for (offset, size, guest, user, want) in [
        (0, 0, 0, 0, "0 bytes"),
        (0, 0x2001, 0, 0, "beyond its file of 8192 bytes"),
        (0x1001, 0x1000, 0, 0, "beyond its file"),
        (u64::MAX, 2, 0, 0, "beyond its file"),
        (0, 0x1000, u64::MAX - 0xFFE, 0, "wraps around"),
        (0, 0x1000, 0, u64::MAX - 5, "wraps around"),
        (0, u64::MAX, 0, 0, "beyond its file"),
    ] {
        let message = map(offset, size, guest, user).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    }
    let (reader, _writer) = std::io::pipe().unwrap();
    let message = GuestRegion::map(reader.as_fd(), 0, 1, 0, 0).unwrap_err().to_string();
    assert!(message.contains("not a regular file"), "{message}");
}

#[test]
fn an_offset_inside_a_page_is_honoured() {
    use std::os::unix::fs::FileExt;
    let file = memfd(0x3000);
    file.write_all_at(b"hello", 0x1234).unwrap();
    let region = GuestRegion::map(file.as_fd(), 0x1234, 0x100, 0x9000, 0).unwrap();
    let view = GuestMemory::new(vec![region]).unwrap().view();
    let mut bytes = [0; 5];
    view.read(0x9000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
    view.write(0x90fd, b"end").unwrap();
    assert_eq!(view.write(0x90fe, b"end"), Err(BadAddress { addr: 0x90fe, len: 3 }));
    let mut end = [0; 3];
    file.read_exact_at(&mut end, 0x1234 + 0xfd).unwrap();
    assert_eq!(&end, b"end");
}

#[test]
fn overlap_is_refused() {
    let bad = GuestMemory::new(vec![region(0x1000, 0x2000, 0), region(0x1001, 0x1000, 0)]);
    assert_eq!(bad.err(), Some(BadMemory::Overlap { lower: 0x1000, higher: 0x2000 }));
    let same = GuestMemory::new(vec![region(1, 0x2000, 0), region(1, 0x2000, 0)]);
    assert!(same.is_err());
    // The last address of all is not usable, so that ends never wrap.
    assert!(GuestMemory::new(vec![region(0x1000, u64::MAX - 0x1000, 0), region(1, 0, 0)]).is_ok());
}

#[test]
fn user_addresses_translate() {
    let memory = memory();
    assert_eq!(memory.user_to_guest(0x5000_0000), Some(0x1000));
    assert_eq!(memory.user_to_guest(0x6000_17ff), Some(0x57ff));
    assert_eq!(memory.user_to_guest(0x6000_1800), None);
    assert_eq!(memory.user_to_guest(0), None);
}

#[test]
fn our_addresses_translate_back() {
    let view = memory().view();
    let mut sg = SgList::default();
    view.append(&mut sg, 0x3F00, 0x200).unwrap();
    let [low, high] = sg.segments() else { panic!("two regions") };
    assert_eq!(view.guest_addr(low.as_ptr(), low.len()), Some(0x3F00));
    assert_eq!(view.guest_addr(high.as_ptr(), high.len()), Some(0x4000));
    assert_eq!(view.guest_addr(low.as_ptr(), 0x101), None, "not in one region");
    assert_eq!(view.slice(0x10010, 16).unwrap().guest_addr(), Some(0x10010));
    let other = memory().view();
    assert_eq!(other.guest_addr(low.as_ptr(), 1), None, "another mapping");
}

#[test]
fn bits_are_set_and_none_is_cleared() {
    let view = memory().view();
    let slice = view.slice(0x1001, 3).unwrap();
    slice.write(0, &[1, 0x40, 0xFF]).unwrap();
    slice.set_bits_u8(1, 0x82, Ordering::Release).unwrap();
    assert_eq!(slice.read(0), Ok([1, 0xC2, 0xFF]));
    assert_eq!(slice.set_bits_u8(3, 1, Ordering::Release), Err(OutOfBounds));
}

#[test]
fn lists_cross_adjacent_regions_and_no_holes() {
    let view = memory().view();
    let mut sg = SgList::default();
    view.append(&mut sg, 0x3f00, 0x200).unwrap();
    assert_eq!((sg.len(), sg.segments().len()), (0x200, 2));
    let before = sg.segments().len();
    assert_eq!(view.append(&mut sg, 0x5700, 0x101), Err(BadAddress { addr: 0x5700, len: 0x101 }));
    assert!(view.append(&mut sg, 0x0fff, 2).is_err());
    assert!(view.append(&mut sg, 0x6000, 1).is_err());
    assert!(view.append(&mut sg, u64::MAX, 2).is_err());
    assert!(view.append(&mut sg, 0x1000, u64::MAX).is_err());
    assert_eq!((sg.len(), sg.segments().len()), (0x200, before));
    // Neighbouring pieces of one region become one segment.
    sg.clear();
    view.append(&mut sg, 0x1000, 0x1000).unwrap();
    view.append(&mut sg, 0x2000, 0x1000).unwrap();
    assert_eq!(sg.segments().len(), 1);
    view.append(&mut sg, 0x1000, 0x10).unwrap();
    assert_eq!((sg.len(), sg.segments().len()), (0x2010, 2));
    assert_eq!(view.users(), 1);
    drop(sg);
    assert_eq!(view.users(), 0);
}

/// What a guest can change is copied before it is looked at; the pool's memory is not.
#[test]
fn pieces_of_guest_memory_are_copies() {
    let pool = Pool::new(1 << 20).unwrap();
    let (mut own, mut lent) = (SgList::default(), SgList::default());
    pool.alloc(0x3000, &mut own).unwrap();
    memory().view().append(&mut lent, 0x1000, 0x3000).unwrap();
    for (list, is_copied) in [(&own, false), (&lent, true)] {
        list.fill(0, 0x3000, 7).unwrap();
        let places: Vec<_> = list
            .segments()
            .iter()
            .map(|s| s.as_ptr().addr()..s.as_ptr().addr() + s.len())
            .collect();
        let mut len = 0;
        let mut look = |bytes: &[u8]| {
            assert!(bytes.iter().all(|byte| *byte == 7));
            assert_ne!(places.iter().any(|p| p.contains(&bytes.as_ptr().addr())), is_copied);
            len += bytes.len();
        };
        list.for_each_piece(0x10, 0x2ff0, &mut look).unwrap();
        assert_eq!(len, 0x2ff0);
    }
}

#[test]
fn a_list_keeps_its_memory_mapped() {
    let memory = memory();
    let mut sg = SgList::default();
    memory.view().append(&mut sg, 0x1000, 0x2000).unwrap();
    drop(memory);
    sg.fill(0, 0x2000, 9).unwrap();
    let pool = Pool::new(1 << 20).unwrap();
    let mut copy = SgList::default();
    pool.alloc(0x2000, &mut copy).unwrap();
    sg.copy_to(0, &copy, 0, 0x2000).unwrap();
    let mut last = [0];
    copy.copy_to_slice(0x1fff, &mut last).unwrap();
    assert_eq!(last, [9]);
}

#[test]
fn slices_check_bounds_and_alignment() {
    let view = memory().view();
    assert!(view.slice(0x3f00, 0x200).is_err(), "crosses regions");
    let slice = view.slice(0x1002, 16).unwrap();
    assert_eq!(slice.len(), 16);
    slice.write(0, &[1, 2, 3, 4, 5]).unwrap();
    assert_eq!(slice.read::<5>(0), Ok([1, 2, 3, 4, 5]));
    assert_eq!(slice.load_u16(2, Ordering::Acquire), Ok(0x0403));
    assert_eq!(slice.load_u16(1, Ordering::Acquire), Err(OutOfBounds), "misaligned");
    assert_eq!(slice.load_u32(2, Ordering::Acquire), Ok(0x0005_0403));
    assert_eq!(slice.load_u32(0, Ordering::Acquire), Err(OutOfBounds), "misaligned");
    assert_eq!(slice.store_u64(6, 0x1122_3344_5566_7788, Ordering::Release), Ok(()));
    assert_eq!(slice.read::<8>(6), Ok(0x1122_3344_5566_7788u64.to_le_bytes()));
    assert_eq!(slice.store_u16(16, 1, Ordering::Release), Err(OutOfBounds));
    assert_eq!(slice.read::<1>(16), Err(OutOfBounds));
    assert_eq!(slice.read::<2>(usize::MAX), Err(OutOfBounds));
    assert_eq!(slice.write(15, &[1, 2]), Err(OutOfBounds));
    assert_eq!(slice.write(16, &[]), Ok(()));
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..Default::default() }
}

proptest! {
    #![proptest_config(cases(200))]

    /// Reads, writes and lists agree with a byte array of the whole address space, and exactly the
    /// ranges that are all memory are accepted.
    #[test]
    fn guest_memory_is_sparse_bytes(
        steps in vec((0..0x10200u64, 0..0x3000usize, any::<u8>(), 0..3u8), 1..60),
    ) {
        let view: Rc<GuestView> = memory().view();
        let is_memory = |a: u64| (0x1000..0x5800).contains(&a) || (0x10000..0x10100).contains(&a);
        let mut model = vec![0u8; 0x14000];
        for (addr, len, byte, kind) in steps {
            let len = if byte % 2 == 0 { len % 70 } else { len };
            let valid = (addr..addr + len as u64).all(is_memory);
            let range = addr as usize..addr as usize + len;
            let data: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
            match kind {
                0 if valid => {
                    view.write(addr, &data).unwrap();
                    model[range].copy_from_slice(&data);
                }
                1 => {
                    let mut sg = SgList::default();
                    prop_assert_eq!(view.append(&mut sg, addr, len as u64).is_ok(), valid);
                    if valid {
                        sg.copy_from_slice(0, &data).unwrap();
                        model[range].copy_from_slice(&data);
                    }
                }
                _ => {
                    let mut seen = vec![0; len];
                    prop_assert_eq!(view.read(addr, &mut seen).is_ok(), valid);
                    if valid { prop_assert_eq!(&seen, &model[range]); }
                }
            }
        }
    }
}

#[test]
fn truncation_gives_zeros_and_poisons_one_region() {
    let (file, other) = (memfd(0x10000), memfd(0x1000));
    let memory = GuestMemory::new(vec![
        GuestRegion::map(file.as_fd(), 0, 0x10000, 0, 0).unwrap(),
        GuestRegion::map(other.as_fd(), 0, 0x1000, 0x100000, 0).unwrap(),
    ])
    .unwrap();
    let view = memory.view();
    view.write(0x5000, &[1; 300]).unwrap();
    view.write(0x100000, &[2; 300]).unwrap();
    let ring = view.slice(0x5000, 64).unwrap();
    let mut sg = SgList::default();
    view.append(&mut sg, 0x4000, 0x4000).unwrap();
    assert!(!view.is_poisoned() && !memory.is_poisoned());

    file.set_len(0).unwrap();
    assert_eq!(ring.load_u16(0, Ordering::Acquire), Ok(0));
    assert!(memory.regions()[0].is_poisoned() && view.is_poisoned() && memory.is_poisoned());
    assert!(!memory.regions()[1].is_poisoned());
    // Everything goes on working, on private zeros.
    sg.fill(0, 0x4000, 3).unwrap();
    ring.store_u16(0, 7, Ordering::Release).unwrap();
    let mut bytes = [0; 300];
    view.read(0x100000, &mut bytes).unwrap();
    assert_eq!(bytes, [2; 300]);
    // A second truncation under the same handler, and many regions: slots are reused and extended.
    other.set_len(0).unwrap();
    view.read(0x100000, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 300]);
    drop((ring, sg, view, memory));
    let regions: Vec<_> = (0..200).map(|i| (memfd(0x1000), i)).collect();
    let mapped: Vec<_> = regions
        .iter()
        .map(|(f, i)| GuestRegion::map(f.as_fd(), 0, 0x1000, i << 16, 0).unwrap())
        .collect();
    assert!(mapped.iter().all(|r| !r.is_poisoned()), "a reused slot starts clean");
    regions[199].0.set_len(0).unwrap();
    let view = GuestMemory::new(mapped).unwrap().view();
    view.read(199 << 16, &mut bytes).unwrap();
    assert!(view.is_poisoned());
}

/// Not a test by itself: dies by a SIGBUS outside any region, or survives one that was ignored when
/// sent.
#[test]
#[ignore = "run in a child process by the test below"]
fn child_with_foreign_sigbus() {
    let _region = region(0x1000, 0, 0);
    let file = memfd(0x1000);
    let flags = libc::MAP_SHARED;
    use std::os::fd::AsRawFd;
    // SAFETY: a fresh mapping of our own file.
    let map = unsafe {
        libc::mmap(std::ptr::null_mut(), 0x1000, libc::PROT_READ, flags, file.as_raw_fd(), 0)
    };
    assert_ne!(map, libc::MAP_FAILED);
    file.set_len(0).unwrap();
    // SAFETY: mapped; the access raises SIGBUS, which is the point.
    let byte = unsafe { map.cast::<u8>().read_volatile() };
    println!("survived with {byte}");
}

#[test]
fn a_foreign_sigbus_still_kills() {
    use std::os::unix::process::ExitStatusExt;
    let name = "guest::tests::child_with_foreign_sigbus";
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&child.stdout);
    assert!(!out.contains("survived"), "{out}");
    let by_signal = child.status.signal() == Some(libc::SIGBUS);
    // AddressSanitizer reports the signal and exits.
    let by_sanitizer = String::from_utf8_lossy(&child.stderr).contains("AddressSanitizer: BUS");
    assert!(by_signal || by_sanitizer, "{:?} {out}", child.status);
}

#[test]
fn memory_that_must_not_be_written_to_is_read_and_nothing_else() {
    let rom = memfd(0x1000);
    rom.write_all_at(b"firmware", 0xFF8).unwrap();
    let memory = GuestMemory::new(vec![
        GuestRegion::map_read_only(rom.as_fd(), 0, 0x1000, 0xF000, 0).unwrap(),
        region(0x1000, 0x10000, 0),
    ])
    .unwrap();
    let view = memory.view();
    let mut text = [0; 10];
    view.read(0xFFF8, &mut text).unwrap();
    assert_eq!(&text, b"firmware\0\0");
    // Alone, and as a part of what is asked for.
    for (addr, len) in [(0xF000, 8), (0xFFFF, 2), (0xF800, 0x1000)] {
        let bad = Err(BadAddress { addr, len: len as u64 });
        assert_eq!(view.write(addr, &vec![0; len]), bad);
        let mut sg = SgList::default();
        assert_eq!(view.append(&mut sg, addr, len as u64), bad);
        assert_eq!(sg.len(), 0);
        view.append_source(&mut sg, addr, len as u64).unwrap();
        assert_eq!(sg.len(), len);
    }
    assert!(view.slice(0xF000, 8).is_err());
    view.write(0x10000, b"ram").unwrap();
    // A file that nobody may write to can be mapped like that, and only like that.
    let path = format!("/proc/self/fd/{}", rom.as_raw_fd());
    let sealed = std::fs::File::open(path).unwrap();
    assert!(GuestRegion::map(sealed.as_fd(), 0, 0x1000, 0, 0).is_err());
    GuestRegion::map_read_only(sealed.as_fd(), 0, 0x1000, 0, 0).unwrap();
}
