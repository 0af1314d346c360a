//! The manifest that a bundle may have: a SHA-256 digest for each of its files, in the format of `sha256sum`, so that
//! `sha256sum` and `cpio` can make one. It tells damage; it is not a signature. FIPS 180-4; GNU coreutils, "md5sum
//! invocation".
use alloc::format;
use alloc::string::String;
use core::fmt;

use sha2::{Digest as _, Sha256};

use super::{plain, Bundle, Kind};

/// Name of the manifest in a bundle.
pub const FILE_NAME: &str = "SHA256SUMS";

/// A SHA-256 digest. Displays as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// Reads 64 hexadecimal digits.
    fn parse(digits: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
        if pairs.len() != bytes.len() || !rest.is_empty() {
            return None;
        }
        for (byte, &[high, low]) in bytes.iter_mut().zip(pairs) {
            let value = |digit: u8| (digit as char).to_digit(16);
            *byte = (value(high)? << 4 | value(low)?) as u8;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What is wrong with a bundle, held against its manifest. Lines are counted from one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error<'a> {
    /// The manifest is not text: the first offset that is not UTF-8.
    NotText(usize),
    /// A line is none of sha256sum's.
    BadLine {
        /// Its number.
        line: usize,
        /// The line.
        text: &'a str,
    },
    /// A listed file is not in the bundle.
    NotThere {
        /// The number of its line.
        line: usize,
        /// The file.
        name: &'a str,
    },
    /// A file of the bundle is not listed.
    NotListed {
        /// The file.
        name: &'a str,
    },
    /// A file has another digest.
    Differs {
        /// The number of its line.
        line: usize,
        /// The file.
        name: &'a str,
        /// The digest of what is in the bundle.
        found: Digest,
        /// The digest in the manifest.
        expected: Digest,
    },
}

impl fmt::Display for Error<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NotText(offset) => {
                write!(f, "{FILE_NAME} is not UTF-8 text at byte {offset}; make it with `sha256sum`")
            }
            Self::BadLine { line, text } => {
                // As much as shows what it is.
                let quoted: String = text.chars().take(80).collect();
                write!(
                    f,
                    "{FILE_NAME}:{line}: {quoted:?} is not a line as `sha256sum` writes it; write 64 hexadecimal \
                     digits, two spaces and the name of a file"
                )
            }
            Self::NotThere { line, name } => write!(
                f,
                "{FILE_NAME}:{line}: {name:?} is not in the bundle; add the file or remove the line"
            ),
            Self::NotListed { name } => write!(
                f,
                "{FILE_NAME} does not list {name:?}, which is in the bundle; add its line, as `sha256sum` prints it, \
                 or remove the file"
            ),
            Self::Differs { line, name, found, expected } => write!(
                f,
                "{FILE_NAME}:{line}: {name:?} is not the file that was listed: its SHA-256 is {found}, expected is \
                 {expected}; make the bundle again"
            ),
        }
    }
}

impl core::error::Error for Error<'_> {}

/// A bundle's manifest.
#[derive(Clone, Copy, Debug)]
pub struct Manifest<'a> {
    bytes: &'a [u8],
}

impl<'a> Manifest<'a> {
    /// The manifest of `bundle`, if it has one.
    pub fn of(bundle: &Bundle<'a>) -> Option<Self> {
        bundle.file(FILE_NAME).map(|bytes| Self { bytes })
    }

    /// Holds the bundle against the manifest: every file must be listed, and as listed. `before` is called with name and
    /// size of each file before it is hashed. Returns how many files there are.
    pub fn verify(
        &self,
        bundle: &Bundle<'a>,
        mut before: impl FnMut(&'a str, usize),
    ) -> Result<usize, Error<'a>> {
        let text = core::str::from_utf8(self.bytes).map_err(|error| Error::NotText(error.valid_up_to()))?;
        // What is told first is what needs no hashing.
        let mut count = 0;
        for line in lines(text) {
            line?.data(bundle)?;
            count += 1;
        }
        let listed = |name: &str| lines(text).flatten().any(|line| line.name == name);
        let files = bundle.entries().filter(|entry| entry.kind == Kind::File && entry.name != FILE_NAME);
        if let Some(entry) = files.into_iter().find(|entry| !listed(entry.name)) {
            return Err(Error::NotListed { name: entry.name });
        }
        for line in lines(text) {
            let line @ Line { number, name, digest: expected } = line?;
            let data = line.data(bundle)?;
            before(name, data.len());
            let found = Digest::of(data);
            if found != expected {
                return Err(Error::Differs { line: number, name, found, expected });
            }
        }
        Ok(count)
    }
}

/// The line of a manifest for the file `name`; `None` if it is one that `sha256sum` would have to escape.
pub fn line(name: &str, data: &[u8]) -> Option<String> {
    (!name.contains(['\\', '\n', '\r'])).then(|| format!("{}  {name}\n", Digest::of(data)))
}

/// A line of a manifest.
#[derive(Clone, Copy)]
struct Line<'a> {
    number: usize,
    name: &'a str,
    digest: Digest,
}

impl<'a> Line<'a> {
    /// Reads `DIGEST  NAME`, or `DIGEST *NAME` as of a file that was read in binary.
    fn parse(text: &'a str) -> Option<(Digest, &'a str)> {
        let (digest, rest) = text.split_once(' ')?;
        let name = rest.strip_prefix([' ', '*'])?;
        (!plain(name).is_empty()).then_some((Digest::parse(digest)?, plain(name)))
    }

    fn data(&self, bundle: &Bundle<'a>) -> Result<&'a [u8], Error<'a>> {
        bundle.file(self.name).ok_or(Error::NotThere { line: self.number, name: self.name })
    }
}

fn lines(text: &str) -> impl Iterator<Item = Result<Line<'_>, Error<'_>>> {
    text.lines().enumerate().map(|(index, text)| {
        let number = index + 1;
        let (digest, name) = Line::parse(text).ok_or(Error::BadLine { line: number, text })?;
        Ok(Line { number, name, digest })
    })
}

#[cfg(test)]
mod tests {
    use super::super::Writer;
    use super::*;
    use proptest::prelude::*;
    use std::string::ToString;
    use std::vec::Vec;

    /// FIPS 180-4's example of one block, as `printf abc | sha256sum` prints it.
    const ABC: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    /// Of nothing.
    const NOTHING: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = Writer::new();
        files.iter().for_each(|(name, data)| writer.file(name, 0o644, data).unwrap());
        writer.finish()
    }

    fn verify(manifest: &str, files: &[(&str, &[u8])]) -> Result<usize, String> {
        let bytes = archive(&[files, &[(FILE_NAME, manifest.as_bytes())]].concat());
        let bundle = Bundle::new(&bytes).unwrap();
        let manifest = Manifest::of(&bundle).unwrap();
        manifest.verify(&bundle, |_, _| {}).map_err(|error| error.to_string())
    }

    #[test]
    fn digests_are_those_of_the_standard() {
        assert_eq!(Digest::of(b"abc").to_string(), ABC);
        assert_eq!(Digest::of(b"").to_string(), NOTHING);
        assert_eq!(Digest::parse(&ABC.to_uppercase()), Some(Digest::of(b"abc")));
        for bad in ["", "ba", &ABC[1..], &ABC.replace('f', "g"), &format!("{ABC}0")] {
            assert_eq!(Digest::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_bundle_need_not_have_one() {
        let bytes = archive(&[("a", b"abc")]);
        assert!(Manifest::of(&Bundle::new(&bytes).unwrap()).is_none());
    }

    #[test]
    fn what_is_listed_and_there_is_right() {
        let manifest = format!("{ABC}  a\n{NOTHING} *./sub/b c\n");
        assert_eq!(verify(&manifest, &[("a", b"abc"), ("sub/b c", b"")]), Ok(2));
        // Without the last end of line, and with those of other systems.
        assert_eq!(verify(&format!("{ABC}  a"), &[("./a", b"abc")]), Ok(1));
        assert_eq!(verify(&format!("{ABC}  a\r\n"), &[("a", b"abc")]), Ok(1));
        assert_eq!(verify("", &[]), Ok(0));
    }

    #[test]
    fn each_file_is_named_before_it_is_hashed() {
        let bytes =
            archive(&[("a", b"abc"), ("b", b""), (FILE_NAME, format!("{ABC}  a\n{ABC}  b\n").as_bytes())]);
        let bundle = Bundle::new(&bytes).unwrap();
        let mut named = Vec::new();
        let verdict = Manifest::of(&bundle).unwrap().verify(&bundle, |name, size| named.push((name, size)));
        assert!(matches!(verdict, Err(Error::Differs { line: 2, name: "b", .. })));
        assert_eq!(named, [("a", 3), ("b", 0)]);
    }

    #[test]
    fn of_two_files_with_one_name_the_one_that_counts_is_hashed() {
        assert_eq!(verify(&format!("{ABC}  a\n"), &[("a", b"old"), ("a", b"abc")]), Ok(1));
        assert!(verify(&format!("{ABC}  a\n"), &[("a", b"abc"), ("a", b"new")]).is_err());
    }

    #[test]
    fn a_difference_is_told_with_both_digests() {
        assert_eq!(
            verify(&format!("{ABC}  a\n"), &[("a", b"")]),
            Err(format!(
                "SHA256SUMS:1: \"a\" is not the file that was listed: its SHA-256 is {NOTHING}, expected is {ABC}; \
                 make the bundle again"
            ))
        );
    }

    #[test]
    fn list_and_archive_must_agree() {
        assert_eq!(
            verify(&format!("{ABC}  a\n{ABC}  b\n"), &[("a", b"abc")]).unwrap_err(),
            "SHA256SUMS:2: \"b\" is not in the bundle; add the file or remove the line"
        );
        assert_eq!(
            verify(&format!("{ABC}  a\n"), &[("a", b"abc"), ("b", b"")]).unwrap_err(),
            "SHA256SUMS does not list \"b\", which is in the bundle; add its line, as `sha256sum` prints it, or remove \
             the file"
        );
    }

    #[test]
    fn broken_lines_are_quoted() {
        for text in [
            "",
            "abc",
            ABC,
            &format!("{ABC} a"),
            &format!("{ABC}  "),
            &format!("{ABC}  ./"),
            "SHA256 (a) = 12",
        ] {
            assert_eq!(
                verify(&format!("{ABC}  a\n{text}\n"), &[("a", b"abc")]).unwrap_err(),
                format!(
                    "SHA256SUMS:2: {text:?} is not a line as `sha256sum` writes it; write 64 hexadecimal digits, two \
                     spaces and the name of a file"
                )
            );
        }
        let bytes = archive(&[(FILE_NAME, b"ab\xff")]);
        let bundle = Bundle::new(&bytes).unwrap();
        let verdict = Manifest::of(&bundle).unwrap().verify(&bundle, |_, _| {});
        assert_eq!(verdict, Err(Error::NotText(2)));
    }

    #[test]
    fn names_that_need_escapes_are_not_written() {
        assert_eq!(line("a b", b"abc"), Some(format!("{ABC}  a b\n")));
        for name in ["a\\b", "a\nb", "a\rb"] {
            assert_eq!(line(name, b""), None);
        }
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed(
            mut data in proptest::collection::vec(any::<u8>(), 1..300),
            at: prop::sample::Index,
            flip in 1u8..,
        ) {
            let manifest = line("f", &data).unwrap();
            prop_assert_eq!(verify(&manifest, &[("f", &data)]), Ok(1));
            let at = at.index(data.len());
            data[at] ^= flip;
            prop_assert!(verify(&manifest, &[("f", &data)]).is_err());
        }

        #[test]
        fn no_manifest_makes_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let archive = archive(&[("a", b"abc"), (FILE_NAME, &bytes)]);
            let bundle = Bundle::new(&archive).unwrap();
            let manifest = Manifest::of(&bundle).unwrap();
            let verdict = manifest.verify(&bundle, |_, _| {});
            prop_assert!(verdict.is_err());
        }
    }
}
