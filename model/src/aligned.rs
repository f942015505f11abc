//! Owns numbers in memory that begins at a cache line, so that no vector of theirs lies across two.
//! Knows nothing of what they mean.

use bytemuck::Zeroable;

use crate::kernels::memory::zeros;

/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Numbers that begin at a cache line. As many as it was made with.
#[derive(Debug, Default)]
pub struct Aligned<T> {
    numbers: Vec<T>,
    first: usize,
    len: usize,
}

impl<T: Zeroable + Default> Aligned<T> {
    /// `len` zeros. Memory that is never touched costs nothing.
    ///
    /// # Errors
    /// When the memory is not there; holds the bytes needed.
    pub fn zeros(len: usize) -> Result<Self, usize> {
        let extra = LINE_BYTES / size_of::<T>();
        let num_bytes = len.saturating_mul(size_of::<T>());
        let room = len.checked_add(extra).ok_or(num_bytes)?;
        let numbers: Vec<T> = zeros(room).map_err(|_| num_bytes)?;
        // What cannot be aligned is only slower.
        let first = numbers.as_ptr().align_offset(LINE_BYTES).min(extra);
        Ok(Self { numbers, first, len })
    }

    /// All numbers.
    #[must_use]
    pub fn as_slice(&self) -> &[T] {
        &self.numbers[self.first..][..self.len]
    }

    /// All numbers.
    pub fn as_mut_slice(&mut self) -> &mut [T] {
        &mut self.numbers[self.first..][..self.len]
    }

    /// Makes room for `len` numbers, whatever they are, and returns them. Never gives memory back,
    /// and grows by half at least, so that lengths that creep up seldom allocate.
    ///
    /// # Panics
    /// When the memory is not there.
    pub fn at_least(&mut self, len: usize) -> &mut [T] {
        if self.len < len {
            let room = len.max(self.len + self.len / 2);
            // The old ones go first, so that memory never holds both.
            *self = Self::default();
            *self = Self::zeros(room).expect("memory for the scratch of a step");
        }
        &mut self.as_mut_slice()[..len]
    }
}
