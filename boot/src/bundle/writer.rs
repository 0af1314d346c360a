//! Writes newc archives: bundles, and initial RAM disks for Linux guests.
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use super::{mode, MAGIC, TRAILER};

/// Why an entry cannot be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WriteError {
    /// A name that no archive can hold: empty, with a NUL, or the one that ends an archive.
    BadName(String),
    /// More data than the 32 bits of a header can count: name and size in bytes.
    TooLarge(String, usize),
}

impl fmt::Display for WriteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadName(name) => write!(f, "{name:?} cannot be a name in a cpio archive"),
            Self::TooLarge(name, size) => {
                write!(f, "{name:?} has {size} bytes; a file in a cpio archive has less than 4 GiB")
            }
        }
    }
}

impl core::error::Error for WriteError {}

/// Builds an archive in memory. The same calls give the same bytes: no owner, no time, inodes in order.
#[derive(Debug, Default)]
pub struct Writer {
    out: Vec<u8>,
    inodes: u32,
}

impl Writer {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a regular file.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> Result<(), WriteError> {
        self.entry(name, mode::FILE | permissions & 0o7777, (0, 0), data)
    }

    /// Adds a directory. Linux wants one before what it contains.
    pub fn directory(&mut self, name: &str, permissions: u32) -> Result<(), WriteError> {
        self.entry(name, mode::DIRECTORY | permissions & 0o7777, (0, 0), &[])
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, name: &str, target: &str) -> Result<(), WriteError> {
        self.entry(name, mode::SYMLINK | 0o777, (0, 0), target.as_bytes())
    }

    /// Adds a character device.
    pub fn char_device(
        &mut self,
        name: &str,
        permissions: u32,
        major: u32,
        minor: u32,
    ) -> Result<(), WriteError> {
        self.entry(name, mode::CHAR_DEVICE | permissions & 0o7777, (major, minor), &[])
    }

    /// Adds a block device.
    pub fn block_device(
        &mut self,
        name: &str,
        permissions: u32,
        major: u32,
        minor: u32,
    ) -> Result<(), WriteError> {
        self.entry(name, mode::BLOCK_DEVICE | permissions & 0o7777, (major, minor), &[])
    }

    /// Ends the archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.header(0, 0, (0, 0), 0, TRAILER.len() + 1);
        self.name(TRAILER);
        self.out
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<(), WriteError> {
        if name.is_empty() || name.contains('\0') || name == TRAILER {
            return Err(WriteError::BadName(name.into()));
        }
        let size = u32::try_from(data.len()).map_err(|_| WriteError::TooLarge(name.into(), data.len()))?;
        self.inodes += 1;
        self.header(self.inodes, mode, device, size, name.len() + 1);
        self.name(name);
        self.out.extend(data);
        self.pad();
        Ok(())
    }

    fn header(&mut self, inode: u32, mode: u32, device: (u32, u32), size: u32, name_size: usize) {
        let links = if mode & mode::TYPE == mode::DIRECTORY { 2 } else { 1 };
        // Inode, mode, owner, group, links, time, size, device, special device, name size, checksum.
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size as u32, 0];
        self.out.extend(MAGIC);
        for field in fields {
            self.out.extend(format!("{field:08x}").as_bytes());
        }
    }

    fn name(&mut self, name: &str) {
        self.out.extend(name.as_bytes());
        self.out.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }
}
