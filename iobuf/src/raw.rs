//! Copies between memory that others may change meanwhile.
//!
//! Guest memory is written by other processes, and a buffer under a running read by the kernel.
//! What is read from it may be torn; it must never be read twice where one read was meant. So small
//! copies are volatile, and the bulk copy is a call the compiler cannot look through.

// UNSAFETY: raw memory is the subject of this crate; every pointer comes from a live mapping.
#![expect(unsafe_code)]

use std::ptr;

/// Copies `len` bytes; the ranges may overlap (a guest chooses them). Not inlined, so that the
/// optimiser can neither repeat nor forward the access.
///
/// # Safety
///
/// `src` is readable and `dst` writable for `len` bytes of mapped memory. Contents may change
/// meanwhile.
#[inline(never)]
pub(crate) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller promises both ranges; `ptr::copy` allows overlap.
    unsafe { ptr::copy(src, dst, len) }
}

/// Sets `len` bytes.
///
/// # Safety
///
/// `dst` is writable for `len` bytes of mapped memory.
#[inline(never)]
pub(crate) unsafe fn fill(dst: *mut u8, byte: u8, len: usize) {
    // SAFETY: the caller promises the range.
    unsafe { ptr::write_bytes(dst, byte, len) }
}

/// Reads each byte of a small range exactly once, in words where the address allows it.
///
/// # Safety
///
/// `src` is readable for `dst.len()` bytes of mapped memory.
#[inline(always)]
pub(crate) unsafe fn read_volatile(src: *const u8, dst: &mut [u8]) {
    if src.addr().is_multiple_of(8) && dst.len().is_multiple_of(8) {
        for (i, out) in dst.chunks_exact_mut(8).enumerate() {
            // SAFETY: `8 * i + 8 <= dst.len()`, in the range the caller promises; 8-byte alignment
            // was just checked.
            let word = unsafe { ptr::read_volatile(src.wrapping_add(8 * i).cast::<u64>()) };
            out.copy_from_slice(&word.to_ne_bytes());
        }
    } else if src.addr().is_multiple_of(4) && dst.len().is_multiple_of(4) {
        for (i, out) in dst.chunks_exact_mut(4).enumerate() {
            // SAFETY: `4 * i + 4 <= dst.len()`, in the range the caller promises; 4-byte alignment
            // was just checked.
            let word = unsafe { ptr::read_volatile(src.wrapping_add(4 * i).cast::<u32>()) };
            out.copy_from_slice(&word.to_ne_bytes());
        }
    } else {
        for (i, out) in dst.iter_mut().enumerate() {
            // SAFETY: `i < dst.len()`, in the range the caller promises.
            *out = unsafe { ptr::read_volatile(src.wrapping_add(i)) };
        }
    }
}

/// Writes each byte of a small range exactly once, in words where the address allows it.
///
/// # Safety
///
/// `dst` is writable for `src.len()` bytes of mapped memory.
#[inline(always)]
pub(crate) unsafe fn write_volatile(dst: *mut u8, src: &[u8]) {
    if dst.addr().is_multiple_of(8) && src.len().is_multiple_of(8) {
        for (i, chunk) in src.as_chunks::<8>().0.iter().enumerate() {
            let word = u64::from_ne_bytes(*chunk);
            // SAFETY: `8 * i + 8 <= src.len()`, in the range the caller promises; 8-byte alignment
            // was just checked.
            unsafe { ptr::write_volatile(dst.wrapping_add(8 * i).cast::<u64>(), word) };
        }
    } else if dst.addr().is_multiple_of(4) && src.len().is_multiple_of(4) {
        for (i, chunk) in src.chunks_exact(4).enumerate() {
            let word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]);
            // SAFETY: `4 * i + 4 <= src.len()`, in the range the caller promises; 4-byte alignment
            // was just checked.
            unsafe { ptr::write_volatile(dst.wrapping_add(4 * i).cast::<u32>(), word) };
        }
    } else {
        for (i, byte) in src.iter().enumerate() {
            // SAFETY: `i < src.len()`, in the range the caller promises.
            unsafe { ptr::write_volatile(dst.wrapping_add(i), *byte) };
        }
    }
}
