//! Reading and writing archives.
use super::*;
use proptest::prelude::*;
use std::string::{String, ToString};
use std::vec::Vec;

fn sample() -> Vec<u8> {
    let mut writer = Writer::new();
    writer.file("umbra.toml", 0o644, b"[[vm]]\n").unwrap();
    writer.directory("dev", 0o755).unwrap();
    writer.char_device("dev/console", 0o600, 5, 1).unwrap();
    writer.block_device("dev/vda", 0o660, 254, 0).unwrap();
    writer.file("bin/busybox", 0o4755, &[1, 2, 3, 4, 5]).unwrap();
    writer.symlink("bin/sh", "busybox").unwrap();
    writer.file("empty", 0o400, b"").unwrap();
    writer.finish()
}

/// One entry as other tools write it, all its fields free.
fn raw(magic: &str, fields: [u32; 13], name: &[u8], data: &[u8]) -> Vec<u8> {
    let mut out: Vec<u8> = magic.into();
    out.extend(fields.iter().flat_map(|field| format!("{field:08X}").into_bytes()));
    out.extend(name);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(data);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn file_fields(inode: u32, links: u32, size: usize, name: &[u8], checksum: u32) -> [u32; 13] {
    [inode, 0o100_644, 1000, 1000, links, 7, size as u32, 8, 1, 0, 0, name.len() as u32, checksum]
}

fn trailer() -> Vec<u8> {
    Writer::new().finish()
}

#[test]
fn what_was_written_is_read_back() {
    let bytes = sample();
    let bundle = Bundle::new(&bytes).unwrap();
    let entries: Vec<_> =
        bundle.entries().map(|entry| (entry.name, entry.kind, entry.permissions, entry.data)).collect();
    assert_eq!(
        entries,
        [
            ("umbra.toml", Kind::File, 0o644, &b"[[vm]]\n"[..]),
            ("dev", Kind::Directory, 0o755, b""),
            ("dev/console", Kind::CharDevice(5, 1), 0o600, b""),
            ("dev/vda", Kind::BlockDevice(254, 0), 0o660, b""),
            ("bin/busybox", Kind::File, 0o4755, &[1, 2, 3, 4, 5]),
            ("bin/sh", Kind::Symlink, 0o777, b"busybox"),
            ("empty", Kind::File, 0o400, b""),
        ]
    );
}

#[test]
fn files_are_found_by_name() {
    let bytes = sample();
    let bundle = Bundle::new(&bytes).unwrap();
    for name in ["bin/busybox", "./bin/busybox", "/bin/busybox", ".//bin/busybox"] {
        assert_eq!(bundle.file(name), Some(&[1, 2, 3, 4, 5][..]), "{name}");
    }
    assert_eq!(bundle.file("empty"), Some(&[][..]));
    for name in ["busybox", "bin", "dev", "bin/sh", "", "TRAILER!!!"] {
        assert_eq!(bundle.file(name), None, "{name}");
    }
}

#[test]
fn a_leading_dot_in_the_archive_makes_no_difference() {
    let name = b"./umbra.toml\0";
    let bytes = [raw("070701", file_fields(1, 1, 2, name, 0), name, b"hi"), trailer()].concat();
    assert_eq!(Bundle::new(&bytes).unwrap().file("umbra.toml"), Some(&b"hi"[..]));
}

#[test]
fn the_last_of_two_files_wins() {
    let mut writer = Writer::new();
    writer.file("a", 0o644, b"first").unwrap();
    writer.file("./a", 0o644, b"second").unwrap();
    let bytes = writer.finish();
    assert_eq!(Bundle::new(&bytes).unwrap().file("a"), Some(&b"second"[..]));
}

#[test]
fn hard_links_share_their_data() {
    let bytes = [
        raw("070701", file_fields(9, 2, 0, b"one\0", 0), b"one\0", b""),
        raw("070701", file_fields(8, 1, 2, b"no\0", 0), b"no\0", b"no"),
        raw("070701", file_fields(9, 2, 4, b"two\0", 0), b"two\0", b"data"),
        trailer(),
    ]
    .concat();
    let bundle = Bundle::new(&bytes).unwrap();
    assert_eq!(bundle.file("one"), Some(&b"data"[..]));
    assert_eq!(bundle.file("two"), Some(&b"data"[..]));
}

#[test]
fn checksums_are_verified() {
    let name = b"f\0";
    let archive =
        |sum| [raw("070702", file_fields(1, 1, 3, name, sum), name, &[1, 2, 255]), trailer()].concat();
    assert_eq!(Bundle::new(&archive(258)).unwrap().file("f"), Some(&[1, 2, 255][..]));
    assert_eq!(Bundle::new(&archive(2)).err(), Some(Error::BadChecksum { offset: 0 }));
}

#[test]
fn what_follows_the_trailer_is_ignored() {
    let mut bytes = sample();
    bytes.extend([0x55; 300]);
    assert_eq!(Bundle::new(&bytes).unwrap().entries().count(), 7);
}

#[test]
fn every_cut_is_noticed() {
    let bytes = sample();
    // The padding after the trailer's name may be missing.
    let whole = bytes.len() - 3;
    for len in 0..whole {
        let error = Bundle::new(&bytes[..len]).err();
        assert!(
            matches!(error, Some(Error::CutShort { .. } | Error::NoTrailer { .. })),
            "cut to {len} bytes: {error:?}"
        );
    }
}

#[test]
fn damage_is_located() {
    let damaged = |at: usize, byte: u8| {
        let mut bytes = sample();
        bytes[at] = byte;
        Bundle::new(&bytes).err()
    };
    assert_eq!(damaged(0, 0x1f), Some(Error::BadMagic { offset: 0 }));
    assert_eq!(damaged(5, b'7'), Some(Error::BadMagic { offset: 0 }));
    assert_eq!(damaged(6 + 8 + 3, b'g'), Some(Error::BadNumber { offset: 14 }));
    assert_eq!(damaged(6 + 8 + 3, b'+'), Some(Error::BadNumber { offset: 14 }));
    assert_eq!(damaged(112, 0xff), Some(Error::BadName { offset: 110 }));
    assert_eq!(damaged(112, 0), Some(Error::BadName { offset: 110 }));
    assert_eq!(damaged(120, b'x'), Some(Error::BadName { offset: 110 }));
    // A name of no bytes has no terminator.
    assert_eq!(damaged(6 + 11 * 8 + 7, b'0'), Some(Error::BadName { offset: 110 }));
    // The first file's size.
    assert_eq!(damaged(6 + 6 * 8, b'f'), Some(Error::CutShort { offset: 0 }));
}

#[test]
fn errors_are_sentences() {
    let sentence = |bytes: &[u8]| Bundle::new(bytes).err().map(|error| error.to_string());
    assert_eq!(
        sentence(&[0x1f, 0x8b, 8]).as_deref(),
        Some("the bundle has no newc cpio entry at byte 0; make it with `cpio -o -H newc`, uncompressed")
    );
    assert_eq!(
        sentence(b"").as_deref(),
        Some("the bundle is cut short: it ends at byte 0 without a trailer")
    );
    assert_eq!(sentence(b"070701").as_deref(), Some("the bundle is cut short in the entry at byte 0"));
}

#[test]
fn names_that_cannot_be_read_back_are_not_written() {
    let mut writer = Writer::new();
    for name in ["", "a\0b", "TRAILER!!!"] {
        assert_eq!(writer.file(name, 0, b""), Err(WriteError::BadName(name.into())));
    }
    assert_eq!(Bundle::new(&writer.finish()).unwrap().entries().count(), 0);
}

#[test]
fn the_same_calls_give_the_same_bytes() {
    assert_eq!(sample(), sample());
    assert!(sample().starts_with(
        b"07070100000001000081a4000000000000000000000001000000000000000700000000000000000000000000000000\
          0000000b00000000umbra.toml\0"
    ));
}

proptest! {
    #[test]
    fn round_trip(
        files in prop::collection::vec(
            ("[a-z0-9._-]{1,20}", 0u32..0o10000, prop::collection::vec(any::<u8>(), 0..60)), 0..12),
    ) {
        let mut writer = Writer::new();
        for (name, permissions, data) in &files {
            writer.file(name, *permissions, data).unwrap();
        }
        let bytes = writer.finish();
        let read: Vec<(String, u32, Vec<u8>)> = Bundle::new(&bytes)
            .unwrap()
            .entries()
            .map(|entry| (entry.name.to_string(), entry.permissions, entry.data.to_vec()))
            .collect();
        prop_assert_eq!(read, files);
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Bundle::new(&bytes);
    }

    #[test]
    fn a_damaged_archive_is_read_or_refused(damage in prop::collection::vec((0usize..900, any::<u8>()), 1..6)) {
        let mut bytes = sample();
        for (at, byte) in damage {
            let at = at % bytes.len();
            bytes[at] = byte;
        }
        if let Ok(bundle) = Bundle::new(&bytes) {
            bundle.entries().for_each(|entry| assert_eq!(bundle.file(entry.name).is_some(), entry.kind == Kind::File));
        }
    }

    #[test]
    fn any_header_numbers_are_read_or_refused(fields: [u32; 13], name in prop::collection::vec(any::<u8>(), 0..8)) {
        let _ = Bundle::new(&[raw("070702", fields, &name, b"data"), trailer()].concat());
    }
}
