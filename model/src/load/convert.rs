//! Owns the way of one tensor's numbers from a file into a format in memory, piece by piece, so
//! that neither the file nor a widened copy of a large tensor is ever in memory as a whole. Numbers
//! that the format cannot hold are refused. Knows types and blocks; knows no tensor's meaning.

use std::borrow::Cow;
use std::num::NonZero;
use std::thread;

use candle_core::Device;
use candle_core::quantized::{QStorage, QTensor};
use half::{bf16, f16};

use super::quantize::{
    Q4Blocks, Q8Blocks, dequantize_q8_0, quantize_q4_0, quantize_q8_0, unpack_q4_0,
};
use super::source::Source;
use super::stored::{HeldType, StoredTensor, StoredType};
use crate::error::{LoadError, tensor};
use crate::weights::{MatrixData, Q4_0_BLOCK_LEN, Q8_0_BLOCK_LEN};

/// Weights read at a time: a multiple of every block.
const PIECE_LEN: usize = 1 << 20;
/// Fewest weights that a thread of its own is worth.
const PART_LEN_MIN: usize = 1 << 16;
/// Most threads that round a piece.
const THREADS_MAX: usize = 16;
/// Bytes of a Q8_0 block: a half-precision scale, then the quants.
const Q8_0_BLOCK_BYTES: usize = 2 + Q8_0_BLOCK_LEN;
/// Bytes of a Q4_0 block: a half-precision scale, then the nibbles.
const Q4_0_BLOCK_BYTES: usize = 2 + Q4_0_BLOCK_LEN / 2;
/// What candle's blocks are aligned to, at most.
const ALIGNMENT: usize = 8;

/// One tensor on its way into memory.
pub(super) struct Conversion<'a> {
    pub(super) source: &'a Source<'a>,
    pub(super) name: &'a str,
    pub(super) tensor: &'a StoredTensor,
}

/// Memory that converting a tensor takes beside its result: a piece as stored, as floats (candle
/// has blocks and floats of it at the same time) and rounded.
pub(super) fn buffer_bytes(num_weights: u64) -> u64 {
    num_weights.min(PIECE_LEN as u64) * 16
}

impl Conversion<'_> {
    /// The numbers, row-major, in a format that divides the rows. Rounds where it must.
    pub(super) fn read(&self, held: HeldType) -> Result<MatrixData, LoadError> {
        let data = match held {
            HeldType::F32 => MatrixData::F32(self.floats()?),
            HeldType::F16 => MatrixData::F16(self.halves(f16::from_le_bytes)?),
            HeldType::Bf16 => MatrixData::Bf16(self.halves(bf16::from_le_bytes)?),
            HeldType::Q8_0 => self.q8_0()?,
            HeldType::Q4_0 => self.q4_0()?,
        };
        let is_finite = match &data {
            MatrixData::F32(numbers) => numbers.iter().all(|x| x.is_finite()),
            MatrixData::F16(numbers) => numbers.iter().all(|x| x.is_finite()),
            MatrixData::Bf16(numbers) => numbers.iter().all(|x| x.is_finite()),
            MatrixData::Q8_0 { scales, .. } | MatrixData::Q4_0 { scales, .. } => {
                scales.iter().all(|scale| scale.is_finite())
            }
        };
        if is_finite { Ok(data) } else { Err(self.not_finite()) }
    }

    /// The numbers as 32-bit floats, each of them finite.
    pub(super) fn finite_floats(&self) -> Result<Vec<f32>, LoadError> {
        let numbers = self.floats()?;
        if numbers.iter().all(|x| x.is_finite()) { Ok(numbers) } else { Err(self.not_finite()) }
    }

    fn floats(&self) -> Result<Vec<f32>, LoadError> {
        let mut numbers = self.room(self.tensor.num_weights())?;
        self.pieces(|piece| {
            numbers.extend(self.widened(piece)?);
            Ok(())
        })?;
        Ok(numbers)
    }

    /// Numbers of two bytes as they are stored.
    fn halves<T>(&self, read: impl Fn([u8; 2]) -> T) -> Result<Vec<T>, LoadError> {
        let mut numbers = self.room(self.tensor.num_weights())?;
        self.pieces(|piece| {
            numbers.extend(piece.as_chunks().0.iter().map(|bytes| read(*bytes)));
            Ok(())
        })?;
        Ok(numbers)
    }

    fn q8_0(&self) -> Result<MatrixData, LoadError> {
        let num_weights = self.tensor.num_weights();
        let mut scales = self.room(num_weights / Q8_0_BLOCK_LEN)?;
        let mut quants: Vec<i8> = self.room(num_weights)?;
        self.pieces(|piece| {
            let parts = match self.tensor.stored_type {
                StoredType::Q8_0 => vec![split_q8_0(piece)],
                StoredType::Q4_0 => {
                    let (scales, quants) = split_q4_0(piece);
                    vec![(scales, unpack_q4_0(&quants))]
                }
                StoredType::F32
                | StoredType::F16
                | StoredType::Bf16
                | StoredType::Q4_1
                | StoredType::Q5_0
                | StoredType::Q5_1
                | StoredType::Q4K
                | StoredType::Q5K
                | StoredType::Q6K => self.rounded(piece, HeldType::Q8_0, quantize_q8_0)?,
            };
            for (more_scales, more_quants) in parts {
                scales.extend(more_scales);
                quants.extend(more_quants);
            }
            Ok(())
        })?;
        Ok(MatrixData::Q8_0 { scales, quants })
    }

    fn q4_0(&self) -> Result<MatrixData, LoadError> {
        let num_weights = self.tensor.num_weights();
        let mut scales = self.room(num_weights / Q4_0_BLOCK_LEN)?;
        let mut quants: Vec<u8> = self.room(num_weights / 2)?;
        self.pieces(|piece| {
            let parts = if self.tensor.stored_type == StoredType::Q4_0 {
                vec![split_q4_0(piece)]
            } else {
                self.rounded(piece, HeldType::Q4_0, quantize_q4_0)?
            };
            for (more_scales, more_quants) in parts {
                scales.extend(more_scales);
                quants.extend(more_quants);
            }
            Ok(())
        })?;
        Ok(MatrixData::Q4_0 { scales, quants })
    }

    /// A piece rounded by several threads, each its own blocks: the same blocks as by one.
    fn rounded<T: Send>(
        &self,
        piece: &[u8],
        to: HeldType,
        round: impl Fn(&[f32]) -> Option<T> + Sync,
    ) -> Result<Vec<T>, LoadError> {
        let weights = self.widened(piece)?;
        if !weights.iter().all(|x| x.is_finite()) {
            return Err(self.not_finite());
        }
        let num_threads = thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
        let part_len = weights.len().div_ceil(num_threads).max(PART_LEN_MIN);
        let parts = weights.chunks(part_len.next_multiple_of(to.block_len()));
        let rounded = in_parallel(parts, round);
        rounded.into_iter().collect::<Option<_>>().ok_or_else(|| {
            let reason = format!("its weights are too large for {}", to.name());
            LoadError::unsupported(tensor(self.name), reason)
        })
    }

    /// Whole blocks as 32-bit floats.
    fn widened(&self, piece: &[u8]) -> Result<Vec<f32>, LoadError> {
        let stored_type = self.tensor.stored_type;
        match stored_type {
            StoredType::F32 => Ok(numbers(piece, f32::from_le_bytes)),
            StoredType::F16 => Ok(numbers(piece, |x| f16::from_le_bytes(x).to_f32())),
            StoredType::Bf16 => Ok(numbers(piece, |x| bf16::from_le_bytes(x).to_f32())),
            StoredType::Q8_0 => {
                let (scales, quants) = split_q8_0(piece);
                Ok(dequantize_q8_0(&scales, &quants))
            }
            StoredType::Q4_0 => {
                let (scales, quants) = split_q4_0(piece);
                Ok(dequantize_q8_0(&scales, &unpack_q4_0(&quants)))
            }
            StoredType::Q4_1
            | StoredType::Q5_0
            | StoredType::Q5_1
            | StoredType::Q4K
            | StoredType::Q5K
            | StoredType::Q6K => {
                by_candle(piece, stored_type).map_err(|error| LoadError::candle(self.name, &error))
            }
        }
    }

    /// Calls `take` with one piece after the other, in order.
    fn pieces(
        &self,
        mut take: impl FnMut(&[u8]) -> Result<(), LoadError>,
    ) -> Result<(), LoadError> {
        let StoredTensor { stored_type, start, .. } = *self.tensor;
        let piece_bytes = PIECE_LEN / stored_type.block_len() * stored_type.block_bytes();
        let total = self.tensor.num_bytes();
        // As candle wants its blocks; nothing promises it of a vector of bytes.
        let mut buffer: Vec<u8> = self.room(piece_bytes.min(total as usize) + ALIGNMENT)?;
        buffer.resize(buffer.capacity(), 0);
        let aligned = buffer.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        let mut done = 0;
        while done < total {
            let len = (total - done).min(piece_bytes as u64);
            let piece = &mut buffer[aligned..aligned + len as usize];
            self.source.read_at(start + done, piece)?;
            take(piece)?;
            done += len;
        }
        Ok(())
    }

    fn room<T>(&self, len: usize) -> Result<Vec<T>, LoadError> {
        let mut room = Vec::new();
        room.try_reserve_exact(len).map_err(|_| LoadError::OutOfMemory {
            what: tensor(self.name),
            bytes: (len as u64).saturating_mul(size_of::<T>() as u64),
        })?;
        Ok(room)
    }

    fn not_finite(&self) -> LoadError {
        LoadError::malformed(tensor(self.name), "a weight is infinite or not a number")
    }
}

/// Applies `work` to all parts at the same time, the results in the parts' order.
fn in_parallel<'p, T: Send>(
    parts: impl Iterator<Item = &'p [f32]>,
    work: impl Fn(&[f32]) -> T + Sync,
) -> Vec<T> {
    let work = &work;
    thread::scope(|scope| {
        let running: Vec<_> = parts
            .map(|part| {
                let builder = thread::Builder::new();
                // Where the system refuses a thread, this one does the work.
                builder.spawn_scoped(scope, move || work(part)).map_err(|_| work(part))
            })
            .collect();
        let finished = |part: Result<thread::ScopedJoinHandle<'_, T>, T>| match part {
            Ok(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            Err(done) => done,
        };
        running.into_iter().map(finished).collect()
    })
}

fn numbers<const N: usize>(bytes: &[u8], read: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    bytes.as_chunks::<N>().0.iter().map(|number| read(*number)).collect()
}

fn split_q8_0(bytes: &[u8]) -> Q8Blocks {
    let blocks = bytes.as_chunks::<Q8_0_BLOCK_BYTES>().0;
    let scales = blocks.iter().map(|block| f16::from_le_bytes([block[0], block[1]])).collect();
    let quants = blocks.iter().flat_map(|block| &block[2..]).map(|byte| *byte as i8).collect();
    (scales, quants)
}

fn split_q4_0(bytes: &[u8]) -> Q4Blocks {
    let blocks = bytes.as_chunks::<Q4_0_BLOCK_BYTES>().0;
    let scales = blocks.iter().map(|block| f16::from_le_bytes([block[0], block[1]])).collect();
    let quants = blocks.iter().flat_map(|block| &block[2..]).copied().collect();
    (scales, quants)
}

fn by_candle(bytes: &[u8], stored_type: StoredType) -> candle_core::Result<Vec<f32>> {
    let num_weights = bytes.len() / stored_type.block_bytes() * stored_type.block_len();
    let blocks = QStorage::from_data(Cow::Borrowed(bytes), &Device::Cpu, stored_type.in_candle())?;
    QTensor::new(blocks, num_weights)?.dequantize(&Device::Cpu)?.to_vec1()
}
