//! A vhost-user frontend sends hostile bytes and file descriptors.
//!
//! Invariants checked: no panic; messages are the same however the stream is cut; rings start and
//! stop in turn; and a message that asks for an acknowledgement has one or ends the connection.
#![no_main]

use std::cell::RefCell;
use std::os::fd::OwnedFd;

use block::{Geometry, Identity};
use libfuzzer_sys::fuzz_target;
use penstock_fuzz::{Input, cut};
use virtio_blk::device::{Device, DeviceOptions};
use virtio_blk::testing::{Judge, TestMemory};
use virtio_blk::vhost_user::wire::{Decoder, Message, Request, WireFault, request};

/// What a frontend would pass: made once, as it is not what is tested.
struct Files {
    memory: TestMemory,
    event: OwnedFd,
}

thread_local! {
    static FILES: RefCell<Option<Files>> = const { RefCell::new(None) };
}

fn with_files<T>(f: impl FnOnce(&Files) -> T) -> T {
    FILES.with_borrow_mut(|files| {
        let files = files.get_or_insert_with(|| Files {
            memory: TestMemory::new(1 << 20),
            event: rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
                .expect("an eventfd"),
        });
        f(files)
    })
}

fn device() -> Device {
    let geometry = Geometry {
        physical_block_bytes: 4096,
        io_bytes_max: 1 << 20,
        read_only: false,
        write_cache: true,
        deallocate: true,
        write_zeroes: true,
        deallocate_granularity_bytes: 4096,
        deallocated_reads_zero: true,
        ..Geometry::new(512, 1 << 16)
    };
    let options = DeviceOptions { queues: 3, serial: String::new(), read_only: false };
    Device::new(&geometry, &Identity::from_uuid([1; 16]), &options)
}

/// The stream as messages, and where it ends.
fn decode(
    stream: &[u8],
    seed: u64,
    piece_max: usize,
) -> (Vec<(u32, bool, Vec<u8>)>, Option<WireFault>) {
    let (mut decoder, mut messages, mut fault) = (Decoder::new(), Vec::new(), None);
    cut(stream, seed, piece_max, |mut piece| {
        while !piece.is_empty() {
            assert!(decoder.wanted() > 0);
            match decoder.push(&mut piece) {
                Ok(Some(Message { request, need_reply, payload, .. })) => {
                    messages.push((request.0, need_reply, payload));
                }
                Ok(None) => assert!(piece.is_empty()),
                Err(error) => {
                    fault = Some(error);
                    return false;
                }
            }
        }
        true
    });
    (messages, fault)
}

/// Bytes of a frontend that mostly keeps to the protocol.
fn plausible(input: &mut Input<'_>) -> Vec<u8> {
    let kind = Request(u32::from(input.byte()) % 46);
    let shape = input.byte();
    let mut payload = match kind {
        Request::SET_VRING_ADDR => vec![0; 40],
        Request::ADD_MEM_REG | Request::REM_MEM_REG => vec![0; 40],
        Request::SET_MEM_TABLE => vec![0; 8 + 32 * usize::from(shape % 4)],
        Request::GET_CONFIG | Request::SET_CONFIG => vec![0; 12 + usize::from(shape % 64)],
        Request::GET_INFLIGHT_FD | Request::SET_INFLIGHT_FD => vec![0; 20 + usize::from(shape & 4)],
        Request::SET_LOG_BASE => vec![0; 16],
        Request::GET_FEATURES
        | Request::SET_OWNER
        | Request::RESET_OWNER
        | Request::GET_PROTOCOL_FEATURES
        | Request::GET_QUEUE_NUM
        | Request::RESET_DEVICE
        | Request::GET_STATUS
        | Request::SET_LOG_FD
        | Request::SET_BACKEND_REQ_FD
        | Request::GET_MAX_MEM_SLOTS => vec![],
        _ => vec![0; 8],
    };
    // The frontend's memory, so that addresses can lead somewhere.
    let base = with_files(|files| files.memory.region());
    match kind {
        Request::ADD_MEM_REG | Request::REM_MEM_REG => {
            payload[8..16].copy_from_slice(&base.guest_addr.to_ne_bytes());
            payload[16..24].copy_from_slice(&base.size.to_ne_bytes());
            payload[24..32].copy_from_slice(&base.user_addr.to_ne_bytes());
        }
        Request::SET_VRING_ADDR => {
            for at in [8, 16, 24] {
                payload[at..at + 8].copy_from_slice(&base.user_addr.to_ne_bytes());
            }
        }
        Request::SET_MEM_TABLE => payload[0] = shape % 4,
        Request::GET_INFLIGHT_FD | Request::SET_INFLIGHT_FD => {
            payload[..8].copy_from_slice(&0x1_0000u64.to_ne_bytes());
            (payload[16], payload[18]) = (1 + shape % 4, 1 + (shape & 0x70));
        }
        Request::SET_LOG_BASE => payload[1] = 1 + shape % 64,
        Request::GET_CONFIG | Request::SET_CONFIG => payload[4] = shape % 64,
        _ => {}
    }
    // A few bytes of it are the fuzzer's.
    for _ in 0..input.byte() % 4 {
        let (at, byte) = (usize::from(input.byte()), input.byte());
        if let Some(to) = payload.get_mut(at) {
            *to = byte;
        }
    }
    request(kind, shape & 0x80 != 0, &payload)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let seed = u64::from(input.byte());
    let is_raw = input.byte() & 7 == 0;
    let mut judge = Judge::new(device(), 256);
    let mut decoder = Decoder::new();
    let mut stream = Vec::new();
    while !input.is_empty() {
        let bytes = if is_raw { input.take(64).to_vec() } else { plausible(&mut input) };
        stream.extend_from_slice(&bytes);
        let fds = input.byte();
        let fd = |is_event: bool| {
            with_files(|files| match is_event {
                true => files.event.try_clone(),
                false => files.memory.fd().try_clone(),
            })
        };
        for i in 0..(fds & 3).min(fds >> 4) {
            let Ok(fd) = fd(fds >> 2 & 1 == i & 1) else { return };
            if decoder.push_fds([fd]).is_err() {
                return;
            }
        }
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            match decoder.push(&mut rest) {
                // An error would end the connection; the state has to stay sound all the same.
                Ok(Some(message)) => drop(judge.message(message, fds & 8 != 0)),
                Ok(None) => {}
                Err(_) => rest = &[],
            }
        }
        if decode(&bytes, 0, usize::MAX).1.is_some() {
            break;
        }
    }
    assert_eq!(decode(&stream, seed, 5), decode(&stream, 0, usize::MAX));
});
