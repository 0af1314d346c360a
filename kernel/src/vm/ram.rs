//! Guest memory as devices and loaders see it: a copying cursor by guest-physical address, never a reference.
use core::fmt;

/// A guest-physical range that is not (wholly) RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadGpa {
    /// First guest-physical address of the access.
    pub gpa: u64,
    /// Length of the access in bytes.
    pub len: usize,
}

impl fmt::Display for BadGpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest-physical range {:#x}+{:#x} is not RAM", self.gpa, self.len)
    }
}

/// Copying access to a guest's RAM. An access that touches anything but RAM fails as a whole.
pub trait GuestRam {
    /// Copies guest memory at `gpa` into `buf`.
    fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), BadGpa>;
    /// Copies `data` to guest memory at `gpa`.
    fn write(&self, gpa: u64, data: &[u8]) -> Result<(), BadGpa>;
}
