//! Owns where the bytes of a model come from: a file that is read by position, piece by piece, or
//! bytes inside this program. Files are never mapped into memory: whoever cuts one short meanwhile
//! makes loading fail, not the process. Knows no format.

use std::borrow::Cow;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{LoadError, shown};

/// Bytes that are read by position.
pub(super) enum Source<'a> {
    /// Inside this program.
    Bytes(&'a [u8]),
    File(RegularFile),
}

/// An open file with the length that it had then.
pub(super) struct RegularFile {
    path: PathBuf,
    file: File,
    len: u64,
}

impl Source<'_> {
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        RegularFile::open(path).map(Self::File)
    }

    pub(super) fn num_bytes(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(file) => file.len,
        }
    }

    /// The first `len` bytes, or as many as there are.
    pub(super) fn prefix(&self, len: usize) -> Result<Cow<'_, [u8]>, LoadError> {
        match self {
            Self::Bytes(bytes) => Ok(Cow::Borrowed(&bytes[..len.min(bytes.len())])),
            Self::File(file) => file.prefix(len as u64).map(Cow::Owned),
        }
    }

    /// Fills `buffer` with what begins at `start`. Callers have compared it with the length.
    pub(super) fn read_at(&self, start: u64, buffer: &mut [u8]) -> Result<(), LoadError> {
        match self {
            Self::Bytes(bytes) => {
                let end = start.saturating_add(buffer.len() as u64);
                let range = usize::try_from(start).unwrap_or(usize::MAX)
                    ..usize::try_from(end).unwrap_or(usize::MAX);
                let Some(part) = bytes.get(range) else {
                    return Err(LoadError::malformed("the embedded model", "it ends too early"));
                };
                buffer.copy_from_slice(part);
                Ok(())
            }
            Self::File(file) => file.read_at(start, buffer),
        }
    }
}

impl RegularFile {
    fn open(path: &Path) -> Result<Self, LoadError> {
        let io = |source| LoadError::Io { path: path.to_owned(), source };
        // Asked before opening: opening a pipe would wait for its writer.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(LoadError::unsupported(called(path), "it is not a regular file"));
        }
        let file = File::open(path).map_err(io)?;
        let len = file.metadata().map_err(io)?.len();
        Ok(Self { path: path.to_owned(), file, len })
    }

    fn prefix(&self, len: u64) -> Result<Vec<u8>, LoadError> {
        let len = len.min(self.len);
        let mut bytes = Vec::new();
        let capacity = usize::try_from(len).unwrap_or(usize::MAX);
        bytes
            .try_reserve_exact(capacity)
            .map_err(|_| LoadError::OutOfMemory { what: called(&self.path), bytes: len })?;
        bytes.resize(capacity, 0);
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }

    fn read_at(&self, start: u64, buffer: &mut [u8]) -> Result<(), LoadError> {
        let mut file = &self.file;
        let read = file.seek(SeekFrom::Start(start)).and_then(|_| file.read_exact(buffer));
        read.map_err(|source| match source.kind() {
            ErrorKind::UnexpectedEof => {
                let reason = "it became shorter while it was read";
                LoadError::malformed(called(&self.path), reason)
            }
            _ => LoadError::Io { path: self.path.clone(), source },
        })
    }
}

/// Reads a regular file of at most `limit` bytes into memory.
pub(super) fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>, LoadError> {
    let file = RegularFile::open(path)?;
    if file.len > limit {
        let (what, size) = (called(path), file.len);
        return Err(LoadError::TooLarge { what, size, unit: "bytes", limit });
    }
    file.prefix(limit)
}

/// How messages call a file.
fn called(path: &Path) -> String {
    shown(&path.display().to_string())
}
