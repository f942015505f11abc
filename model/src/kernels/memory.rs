//! Owns how large arrays get their memory: all of it or an error, in huge pages where the system
//! has some. Knows nothing of what they hold.
#![allow(unsafe_code)] // advice to the system about memory of our own

use std::collections::TryReserveError;
use std::mem::MaybeUninit;

/// A vector of `len` copies, or an error when the memory is not there.
///
/// # Errors
/// When the memory is not there.
pub fn filled<T: Copy>(len: usize, value: T) -> Result<Vec<T>, TryReserveError> {
    let mut vec = Vec::new();
    vec.try_reserve_exact(len)?;
    advise_huge_pages(vec.spare_capacity_mut());
    vec.resize(len, value);
    Ok(vec)
}

/// Asks for huge pages, before the memory is touched: a pass over a large model then needs a
/// translation per 2 MiB instead of one per 4 KiB. Refusal only costs speed.
fn advise_huge_pages<T>(memory: &mut [MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    {
        use rustix::mm::{Advice, madvise};

        let page_bytes = rustix::param::page_size();
        let bytes = memory.as_mut_ptr_range();
        let start = bytes.start.addr().next_multiple_of(page_bytes);
        let end = bytes.end.addr() / page_bytes * page_bytes;
        if end < start.saturating_add(HUGE_PAGE_BYTES) {
            return;
        }
        let first = bytes.start.cast::<u8>().wrapping_add(start - bytes.start.addr());
        // SAFETY: the pages lie within memory that is borrowed mutably, and this advice changes
        // neither its contents nor what may be done with it.
        let _refused = unsafe { madvise(first.cast(), end - start, Advice::LinuxHugepage) };
    }
}

/// What a huge page holds on the systems that we ask for them; smaller arrays cannot have one.
#[cfg(target_os = "linux")]
const HUGE_PAGE_BYTES: usize = 2 << 20;
