//! A connection of the TLS library whose socket is two buffers in memory.

// UNSAFETY: the library is C and does its I/O by two callbacks with a context pointer; its binding
// offers no safe form of them.
#![expect(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use errno::{Errno, set_errno};
use s2n_tls::connection::Connection;
use s2n_tls::error::Error;

/// Type of a record that is encrypted (RFC 8446, section 5.1).
const APPLICATION_DATA: u8 = 23;
/// Linux: the call would block; the I/O failed.
const EAGAIN: i32 = 11;
const EIO: i32 = 5;

/// The two buffers.
#[derive(Default)]
pub(super) struct Buffers {
    /// Received; what the library has taken is before `taken`.
    pub(super) received: Vec<u8>,
    pub(super) taken: usize,
    /// Bytes that the library may still take.
    pub(super) budget: usize,
    pub(super) is_over_budget: bool,
    pub(super) to_send: Vec<u8>,
    /// An encrypted record was written: an alert without protection would come too late.
    pub(super) is_protected: bool,
}

/// A connection and its buffers.
pub(super) struct Pipe {
    /// Dropped first (fields are dropped in order): it holds a pointer into `buffers`.
    connection: Connection,
    /// Never replaced, so that the pointer stays good.
    buffers: Arc<Mutex<Buffers>>,
}

impl Pipe {
    pub(super) fn new(mut connection: Connection, budget: usize) -> Result<Pipe, Error> {
        let buffers = Arc::new(Mutex::new(Buffers { budget, ..Buffers::default() }));
        let context = Arc::as_ptr(&buffers).cast_mut().cast::<c_void>();
        connection.set_receive_callback(Some(receive))?.set_send_callback(Some(send))?;
        // SAFETY: `context` points into the allocation of `buffers`, which this `Pipe` keeps for
        // longer than `connection`: it is never given away and dropped after it.
        unsafe { connection.set_receive_context(context) }?;
        // SAFETY: as above.
        unsafe { connection.set_send_context(context) }?;
        Ok(Pipe { connection, buffers })
    }

    pub(super) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Do not keep the guard while calling the connection.
    pub(super) fn buffers(&self) -> MutexGuard<'_, Buffers> {
        lock(&self.buffers)
    }
}

fn lock(buffers: &Mutex<Buffers>) -> MutexGuard<'_, Buffers> {
    buffers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Called by the library to read up to `len` bytes to `data`.
///
/// # Safety
///
/// `context` is the one set by `Pipe::new`, and `data` is writable for `len` bytes.
unsafe extern "C" fn receive(context: *mut c_void, data: *mut u8, len: u32) -> c_int {
    // SAFETY: `Pipe::new` made it of a mutex that outlives the connection, hence this call; only
    // shared references to it exist.
    let buffers = unsafe { &*context.cast_const().cast::<Mutex<Buffers>>() };
    let mut buffers = lock(buffers);
    let available = &buffers.received[buffers.taken..];
    if available.is_empty() {
        set_errno(Errno(EAGAIN));
        return -1;
    }
    let count = available.len().min(len as usize).min(c_int::MAX as usize);
    if count > buffers.budget {
        buffers.is_over_budget = true;
        set_errno(Errno(EIO));
        return -1;
    }
    // SAFETY: the library promises `len` writable bytes, and `count` is at most that; the source is
    // a vector of ours.
    unsafe { std::ptr::copy_nonoverlapping(available.as_ptr(), data, count) };
    buffers.taken += count;
    buffers.budget -= count;
    count as c_int
}

/// Called by the library to write `len` bytes from `data`.
///
/// # Safety
///
/// `context` is the one set by `Pipe::new`, and `data` is readable for `len` bytes.
unsafe extern "C" fn send(context: *mut c_void, data: *const u8, len: u32) -> c_int {
    // SAFETY: as in `receive`.
    let buffers = unsafe { &*context.cast_const().cast::<Mutex<Buffers>>() };
    if data.is_null() || len == 0 || len > c_int::MAX as u32 {
        return 0;
    }
    // SAFETY: the library promises `len` readable bytes, which it does not change meanwhile; the
    // pointer is not null.
    let bytes = unsafe { std::slice::from_raw_parts(data, len as usize) };
    let mut buffers = lock(buffers);
    // Everything is always taken, so that what comes begins with a record.
    let mut rest = bytes;
    while let Some((&[kind, _, _, high, low], after)) = rest.split_first_chunk() {
        buffers.is_protected |= kind == APPLICATION_DATA;
        rest = after.get(usize::from(high) << 8 | usize::from(low)..).unwrap_or_default();
    }
    buffers.to_send.extend_from_slice(bytes);
    len as c_int
}
