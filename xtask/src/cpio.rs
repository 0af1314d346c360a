//! Writes newc cpio archives, the format of the boot bundle and of Linux's initramfs
//! (Linux, Documentation/driver-api/early-userspace/buffer-format.rst).

/// The type bits of a mode (POSIX `st_mode`).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// A newc archive under construction. Every entry belongs to root and has time 0, so that the same files always make
/// the same archive.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// Why an entry cannot be in an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge;

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a file in a cpio archive must be smaller than 4 GiB")
    }
}

impl std::error::Error for TooLarge {}

impl Archive {
    /// An archive with nothing in it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a folder; the folders above it must come first.
    pub fn directory(&mut self, name: &str) {
        self.header(name, DIRECTORY | 0o755, 2, 0, (0, 0));
    }

    /// Adds a file that can be executed or only read.
    pub fn file(&mut self, name: &str, executable: bool, data: &[u8]) -> Result<(), TooLarge> {
        let len = u32::try_from(data.len()).map_err(|_| TooLarge)?;
        self.header(name, REGULAR | if executable { 0o755 } else { 0o644 }, 1, len, (0, 0));
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// Adds a symbolic link to `to`.
    pub fn symlink(&mut self, name: &str, to: &str) {
        self.header(name, SYMLINK | 0o777, 1, to.len() as u32, (0, 0));
        self.bytes.extend_from_slice(to.as_bytes());
        self.pad();
    }

    /// Adds a character device.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.header(name, CHARACTER_DEVICE | 0o600, 1, 0, (major, minor));
    }

    /// The archive's bytes.
    pub fn finish(mut self) -> Vec<u8> {
        self.entries = 0;
        self.header("TRAILER!!!", 0, 1, 0, (0, 0));
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn header(&mut self, name: &str, mode: u32, links: u32, len: u32, device: (u32, u32)) {
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, nlink, mtime, size, dev (2), rdev (2), name with its NUL, check sum (unused)
        let name_len = name.len() as u32 + 1;
        for field in [self.entries, mode, 0, 0, links, 0, len, 0, 0, device.0, device.1, name_len, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.entries += 1;
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Name, mode and data of each entry, read back by the format's definition.
    fn entries(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |n: usize| {
                let digits = std::str::from_utf8(&bytes[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(digits, 16).unwrap() as usize
            };
            let (mode, len, name_len) = (field(1), field(6), field(11));
            let name = String::from_utf8(bytes[110..110 + name_len - 1].to_vec()).unwrap();
            assert_eq!(bytes[110 + name_len - 1], 0);
            if name == "TRAILER!!!" {
                return entries;
            }
            let data = (110 + name_len).next_multiple_of(4);
            entries.push((name, mode as u32, bytes[data..data + len].to_vec()));
            bytes = &bytes[(data + len).next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_is_written_can_be_read() {
        let mut archive = Archive::new();
        archive.directory("bin");
        archive.file("bin/odd", true, b"12345").unwrap();
        archive.file("empty", false, b"").unwrap();
        archive.symlink("init", "bin/odd");
        archive.character_device("console", 5, 1);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 512, 0);
        assert_eq!(
            entries(&bytes),
            [
                ("bin".into(), 0o040_755, vec![]),
                ("bin/odd".into(), 0o100_755, b"12345".to_vec()),
                ("empty".into(), 0o100_644, vec![]),
                ("init".into(), 0o120_777, b"bin/odd".to_vec()),
                ("console".into(), 0o020_600, vec![]),
            ]
        );
    }

    #[test]
    fn the_same_files_make_the_same_archive() {
        let make = || {
            let mut archive = Archive::new();
            archive.file("a", false, b"x").unwrap();
            archive.finish()
        };
        assert_eq!(make(), make());
    }
}
