//! The boot bundle: a newc cpio archive, so that `cpio -o -H newc` and `bsdtar --format newc` can make one.
//!
//! An entry is a header of fourteen ASCII fields, a NUL-terminated name and the data, the last two each padded to a
//! multiple of four bytes from the start of the archive. Linux Documentation/driver-api/early-userspace/buffer-format.

mod error;
pub mod manifest;
mod writer;

pub use error::Error;
pub use writer::{WriteError, Writer};

/// Length of a header: the magic and thirteen numbers of eight hexadecimal digits.
const HEADER: usize = 6 + 13 * 8;
/// newc, and newc with checksums.
const MAGIC: &[u8] = b"070701";
/// See [`MAGIC`].
const MAGIC_WITH_CHECKSUM: &[u8] = b"070702";
/// The name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// File type bits of a mode. POSIX sys/stat.h, as every Unix has them.
mod mode {
    pub(super) const TYPE: u32 = 0o170_000;
    pub(super) const FILE: u32 = 0o100_000;
    pub(super) const DIRECTORY: u32 = 0o040_000;
    pub(super) const SYMLINK: u32 = 0o120_000;
    pub(super) const CHAR_DEVICE: u32 = 0o020_000;
    pub(super) const BLOCK_DEVICE: u32 = 0o060_000;
}

/// An archive that was checked from its first entry to its trailer.
#[derive(Clone, Copy, Debug)]
pub struct Bundle<'a> {
    bytes: &'a [u8],
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link; its data is the target.
    Symlink,
    /// A character device: major and minor number.
    CharDevice(u32, u32),
    /// A block device: major and minor number.
    BlockDevice(u32, u32),
    /// A pipe, a socket or something unheard of.
    Other,
}

/// One entry of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The path as the archive has it, without a leading `./` or `/`.
    pub name: &'a str,
    /// What it is.
    pub kind: Kind,
    /// Permission bits, 0 to 0o7777.
    pub permissions: u32,
    /// A file's contents or a link's target; empty for anything else.
    pub data: &'a [u8],
    /// Inode number and device, equal among hard links, and the number of links.
    inode: (u32, u32, u32),
    links: u32,
    /// Sum of a file's bytes, if the archive has sums.
    checksum: Option<u32>,
}

impl Entry<'_> {
    fn has_right_checksum(&self) -> bool {
        let sum = || self.data.iter().fold(0u32, |sum, &byte| sum.wrapping_add(u32::from(byte)));
        // Of several hard links all have the sum, but only one the data.
        let checked = self.kind == Kind::File && !self.data.is_empty();
        !checked || self.checksum.is_none_or(|checksum| checksum == sum())
    }
}

impl<'a> Bundle<'a> {
    /// Checks every entry of the archive at the start of `bytes`. What follows the trailer is ignored.
    pub fn new(bytes: &'a [u8]) -> Result<Self, Error> {
        let mut offset = 0;
        while let Some((entry, next)) = read_entry(bytes, offset)? {
            if !entry.has_right_checksum() {
                return Err(Error::BadChecksum { offset });
            }
            offset = next;
        }
        Ok(Self { bytes })
    }

    /// All entries, in the archive's order.
    pub fn entries(&self) -> Entries<'a> {
        Entries { bytes: self.bytes, offset: 0 }
    }

    /// The contents of the regular file `name`; a leading `./` or `/` makes no difference. The last of several wins,
    /// as when an archive is unpacked.
    pub fn file(&self, name: &str) -> Option<&'a [u8]> {
        let name = plain(name);
        let found = self.entries().filter(|entry| entry.kind == Kind::File && entry.name == name).last()?;
        if !found.data.is_empty() || found.links < 2 {
            return Some(found.data);
        }
        // Of several hard links only one carries the data.
        let with_data = |entry: &Entry<'_>| entry.inode == found.inode && !entry.data.is_empty();
        Some(self.entries().find(with_data).map_or(found.data, |entry| entry.data))
    }
}

/// Iterator over the entries of a [`Bundle`].
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Iterator for Entries<'a> {
    type Item = Entry<'a>;

    fn next(&mut self) -> Option<Entry<'a>> {
        // `Bundle::new` has seen that there is no error up to the trailer.
        let (entry, next) = read_entry(self.bytes, self.offset).ok()??;
        self.offset = next;
        Some(entry)
    }
}

/// Reads the entry at `offset`. Returns it with the offset of the next one, or `None` for the trailer.
fn read_entry(bytes: &[u8], offset: usize) -> Result<Option<(Entry<'_>, usize)>, Error> {
    let take = |start: usize, len: usize| {
        let end = start.checked_add(len).ok_or(Error::CutShort { offset })?;
        bytes.get(start..end).ok_or(Error::CutShort { offset })
    };
    if offset == bytes.len() {
        return Err(Error::NoTrailer { offset });
    }
    let magic = &bytes[offset..bytes.len().min(offset + MAGIC.len())];
    if !MAGIC.starts_with(magic) && !MAGIC_WITH_CHECKSUM.starts_with(magic) {
        return Err(Error::BadMagic { offset });
    }
    let header = take(offset, HEADER)?;
    let number = |index: usize| {
        let at = MAGIC.len() + index * 8;
        parse_hex(&header[at..at + 8]).ok_or(Error::BadNumber { offset: offset + at })
    };
    let [inode, mode, links, size, major, minor, device_major, device_minor, name_size, checksum] = [
        number(0)?,
        number(1)?,
        number(4)?,
        number(6)?,
        number(7)?,
        number(8)?,
        number(9)?,
        number(10)?,
        number(11)?,
        number(12)?,
    ];

    let name_start = offset + HEADER;
    let name = take(name_start, name_size as usize)?.strip_suffix(b"\0");
    let name = name.and_then(|name| core::str::from_utf8(name).ok()).filter(|name| !name.contains('\0'));
    let name = name.ok_or(Error::BadName { offset: name_start })?;
    if name == TRAILER {
        return Ok(None);
    }

    let data_start = (name_start + name_size as usize).next_multiple_of(4);
    let data = take(data_start, size as usize)?;
    let kind = match mode & mode::TYPE {
        mode::FILE => Kind::File,
        mode::DIRECTORY => Kind::Directory,
        mode::SYMLINK => Kind::Symlink,
        mode::CHAR_DEVICE => Kind::CharDevice(device_major, device_minor),
        mode::BLOCK_DEVICE => Kind::BlockDevice(device_major, device_minor),
        _ => Kind::Other,
    };
    let entry = Entry {
        name: plain(name),
        kind,
        permissions: mode & 0o7777,
        data,
        inode: (inode, major, minor),
        links,
        checksum: (magic == MAGIC_WITH_CHECKSUM).then_some(checksum),
    };
    // The padding of the last entry before a cut is missed by the next header.
    Ok(Some((entry, (data_start + size as usize).next_multiple_of(4).min(bytes.len()))))
}

/// A path without the prefixes that say nothing in an archive.
pub fn plain(mut name: &str) -> &str {
    while let Some(rest) = name.strip_prefix("./").or_else(|| name.strip_prefix('/')) {
        name = rest;
    }
    name
}

fn parse_hex(digits: &[u8]) -> Option<u32> {
    digits.iter().try_fold(0u32, |value, &digit| Some(value << 4 | (digit as char).to_digit(16)?))
}

#[cfg(test)]
mod tests;
