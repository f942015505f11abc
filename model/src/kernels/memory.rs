//! Owns how large arrays get their memory: all of it or an error, in huge pages where the system
//! has some. Knows nothing of what they hold.
#![allow(unsafe_code)] // advice to the system about memory of our own

use std::alloc::{Layout, alloc_zeroed};
use std::collections::TryReserveError;
use std::mem::MaybeUninit;

use bytemuck::Zeroable;

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

/// A vector of `len` zeros, or an error when the memory is not there. The system gives each page
/// when it is first used, so that large arrays cost nothing until then.
///
/// # Errors
/// When the memory is not there; holds the bytes needed.
pub fn zeros<T: Zeroable>(len: usize) -> Result<Vec<T>, usize> {
    let num_bytes = len.saturating_mul(size_of::<T>());
    if num_bytes == 0 {
        return Ok((0..len).map(|_| T::zeroed()).collect());
    }
    let layout = Layout::array::<T>(len).map_err(|_| num_bytes)?;
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc_zeroed(layout) }.cast::<T>();
    if memory.is_null() {
        return Err(num_bytes);
    }
    // SAFETY: the memory is new, from the allocator of vectors, with the layout of `len` values of
    // this type, and bytes of zero are such a value.
    let mut vec = unsafe { Vec::from_raw_parts(memory, 0, len) };
    advise_huge_pages(vec.spare_capacity_mut());
    // SAFETY: as before: all of them are there and are zero.
    unsafe { vec.set_len(len) };
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

#[cfg(test)]
mod tests {
    use half::f16;

    use super::zeros;

    #[test]
    fn zeros_are_zero_or_an_error() {
        for len in [0, 1, 1000, 3 << 20] {
            let numbers = zeros::<f32>(len).expect("there is memory");
            assert!(numbers.len() == len && numbers.iter().all(|number| number.to_bits() == 0));
        }
        assert_eq!(zeros::<f16>(5).expect("there is memory"), [f16::ZERO; 5]);
        assert_eq!(zeros::<u64>(usize::MAX / 8).err(), Some(usize::MAX / 8 * 8));
        assert_eq!(zeros::<u64>(usize::MAX).err(), Some(usize::MAX));
    }
}
