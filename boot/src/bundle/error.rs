//! What can be wrong with a bundle.
use core::fmt;

/// Why an archive cannot be read; each carries the offset in bytes at which the trouble begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// No entry begins here.
    BadMagic {
        /// Where an entry should begin.
        offset: usize,
    },
    /// An entry promises more than there is.
    CutShort {
        /// Where the entry begins.
        offset: usize,
    },
    /// The archive ends between two entries.
    NoTrailer {
        /// Length of the archive.
        offset: usize,
    },
    /// A header field is not a hexadecimal number.
    BadNumber {
        /// Where the field begins.
        offset: usize,
    },
    /// A name is not UTF-8 or not terminated.
    BadName {
        /// Where the name begins.
        offset: usize,
    },
    /// The data does not have the sum that the header gives.
    BadChecksum {
        /// Where the entry begins.
        offset: usize,
    },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadMagic { offset } => write!(
                f,
                "the bundle has no newc cpio entry at byte {offset}; make it with `cpio -o -H newc`, uncompressed"
            ),
            Self::CutShort { offset } => write!(f, "the bundle is cut short in the entry at byte {offset}"),
            Self::NoTrailer { offset } => {
                write!(f, "the bundle is cut short: it ends at byte {offset} without a trailer")
            }
            Self::BadNumber { offset } => {
                write!(f, "the bundle is damaged: byte {offset} does not begin a hexadecimal number")
            }
            Self::BadName { offset } => {
                write!(f, "the bundle is damaged: the name at byte {offset} is not NUL-terminated UTF-8")
            }
            Self::BadChecksum { offset } => {
                write!(f, "the bundle is damaged: the entry at byte {offset} has a wrong checksum")
            }
        }
    }
}

impl core::error::Error for Error {}
