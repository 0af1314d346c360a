//! The boot bundle: umbra.toml and the files it names, in one cpio archive that Umbra gets as its ramdisk.

mod check;
mod command;
mod list;

use std::fs;
use std::path::Path;

use anyhow::{bail, Context, Result};
use boot::bundle::{manifest, Writer};
use boot::config::{Config, FILE_NAME};

pub use command::{bundle, Options};
pub use list::{file_line, list};

use crate::paths;

/// What goes into a bundle.
#[derive(Clone, Debug)]
pub struct Bundle(Contents);

#[derive(Clone, Debug)]
enum Contents {
    /// A configuration and files, with or without a manifest.
    Parts { config: Vec<u8>, files: Vec<(String, Vec<u8>)>, manifest: bool },
    /// An archive as somebody has made it.
    Archive(Vec<u8>),
}

impl Bundle {
    /// A bundle with a configuration that nobody has checked, and no files yet. For tests, which also want broken ones.
    pub fn new(config: impl Into<Vec<u8>>) -> Self {
        Self(Contents::Parts { config: config.into(), files: Vec::new(), manifest: false })
    }

    /// An archive that nobody has checked. For tests.
    pub fn unchecked(archive: impl Into<Vec<u8>>) -> Self {
        Self(Contents::Archive(archive.into()))
    }

    /// Adds a file, under the name by which the configuration knows it. An archive stays as it is.
    pub fn file(mut self, name: &str, data: impl Into<Vec<u8>>) -> Self {
        if let Contents::Parts { files, .. } = &mut self.0 {
            files.push((name.to_owned(), data.into()));
        }
        self
    }

    /// Adds the file at `path` under the name `name`.
    pub fn file_from(self, name: &str, path: &Path) -> Result<Self> {
        let data = read(path)?;
        Ok(self.file(name, data))
    }

    /// With a manifest of all files. An archive stays as it is.
    pub fn with_manifest(mut self) -> Self {
        if let Contents::Parts { manifest, .. } = &mut self.0 {
            *manifest = true;
        }
        self
    }

    /// Reads a configuration and the files it names, relative to the configuration's folder, or a bundle that was made
    /// before. Either is held against what Umbra itself checks at boot: manifest, schema, kernels.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = read(path)?;
        let shown = paths::display(path);
        if is_archive(&bytes) {
            list(&shown, &bytes, |_| {})?;
            return Ok(Self(Contents::Archive(bytes)));
        }
        let folder = path.parent().unwrap_or(Path::new("."));
        let text = String::from_utf8(bytes)
            .map_err(|error| anyhow::anyhow!("{shown} is not UTF-8 text: {}", error.utf8_error()))?;
        let config = Config::parse(&shown, &text)?;
        let mut files: Vec<(String, Vec<u8>)> = Vec::new();
        for file in config.files() {
            if files.iter().any(|(known, _)| *known == file.name) {
                continue;
            }
            let path = folder.join(&file.name);
            if !path.exists() {
                bail!("{} (looked for {})", config.file_not_found(file), paths::display(&path));
            }
            files.push((file.name.clone(), read(&path)?));
        }
        let bundle = Self(Contents::Parts { config: text.into(), files, manifest: false });
        check::kernels(&shown, &config, &boot::bundle::Bundle::new(&bundle.archive()?)?)?;
        Ok(bundle)
    }

    /// The archive. Of the same contents always the same.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let (config, files, manifest) = match &self.0 {
            Contents::Parts { config, files, manifest } => (config, files, *manifest),
            Contents::Archive(bytes) => return Ok(bytes.clone()),
        };
        let config = (FILE_NAME, config);
        let mut archive = Writer::new();
        let mut lines = String::new();
        for (name, data) in
            std::iter::once(config).chain(files.iter().map(|(name, data)| (name.as_str(), data)))
        {
            archive.file(name, 0o644, data)?;
            if manifest {
                lines += &manifest::line(name, data).with_context(|| {
                    format!("{name:?} cannot be in a manifest; take a name without backslash and line end")
                })?;
            }
        }
        if manifest {
            archive.file(manifest::FILE_NAME, 0o644, lines.as_bytes())?;
        }
        Ok(archive.finish())
    }

    /// About how large the archive is, in bytes.
    pub fn size_bytes(&self) -> u64 {
        let size = match &self.0 {
            Contents::Parts { config, files, .. } => {
                config.len() + files.iter().map(|(_, data)| data.len()).sum::<usize>()
            }
            Contents::Archive(bytes) => bytes.len(),
        };
        size as u64
    }
}

/// Whether a file is rather an archive than a configuration: a newc one, or, so that the error is about archives, an old
/// one (POSIX `odc`, or binary) or a compressed one (gzip, xz, zstd).
fn is_archive(bytes: &[u8]) -> bool {
    let magics: [&[u8]; 5] = [b"0707", b"\xc7\x71", b"\x1f\x8b", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"];
    magics.iter().any(|magic| bytes.starts_with(magic))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let shown = paths::display(path);
    if path.is_dir() {
        bail!("{shown} is a folder; a file is wanted");
    }
    fs::read(path).with_context(|| format!("cannot read {shown}"))
}

/// `text` as a basic string of TOML (v1.0.0, "String").
pub fn toml_string(text: &str) -> String {
    let mut quoted = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn umbra_can_read_what_is_written() {
        let bundle = Bundle::new("x = 1").file("guests/a", *b"A").file("b", *b"");
        let archive = bundle.archive().unwrap();
        let read = boot::bundle::Bundle::new(&archive).unwrap();
        assert_eq!(read.file("umbra.toml"), Some(&b"x = 1"[..]));
        assert_eq!((read.file("guests/a"), read.file("b")), (Some(&b"A"[..]), Some(&b""[..])));
        assert_eq!(bundle.size_bytes(), 6);
        assert_eq!(
            bundle.clone().with_manifest().archive().unwrap(),
            bundle.with_manifest().archive().unwrap()
        );
    }

    /// The least that the loaders take: a Multiboot 1 header with addresses, for 1 MiB and up, and one instruction.
    /// Multiboot specification 0.6.96, 3.1.
    fn kernel() -> Vec<u8> {
        const START: u32 = 1 << 20;
        let (magic, flags) = (0x1bad_b002u32, 1 << 16);
        let checksum = 0u32.wrapping_sub(magic + flags);
        let words = [magic, flags, checksum, START, START, 0, 0, START + 32, 0xf4];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn with_folder(name: &str, test: impl FnOnce(&Path)) {
        let dir = std::env::temp_dir().join(format!("umbra-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        test(&dir);
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn files_are_found_beside_the_configuration() {
        with_folder("bundle", |dir| {
            let config = dir.join("umbra.toml");
            fs::create_dir(dir.join("sub")).unwrap();
            fs::write(dir.join("sub/kernel"), kernel()).unwrap();
            fs::write(dir.join("m"), "M").unwrap();
            let text = "[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"sub/kernel\"\nmodules = [\"m with args\"]\n";
            fs::write(&config, text).unwrap();
            let archive = Bundle::load(&config).unwrap().archive().unwrap();
            let read = boot::bundle::Bundle::new(&archive).unwrap();
            assert_eq!(read.file("umbra.toml"), Some(text.as_bytes()));
            assert_eq!((read.file("sub/kernel"), read.file("m")), (Some(&kernel()[..]), Some(&b"M"[..])));

            let refusal = || format!("{:#}", Bundle::load(&config).unwrap_err());
            fs::remove_file(dir.join("m")).unwrap();
            assert!(refusal().contains("umbra.toml:5:12: modules names \"m\""), "{}", refusal());
            assert!(refusal().contains("looked for"), "{}", refusal());
            fs::create_dir(dir.join("m")).unwrap();
            assert!(refusal().contains("is a folder"), "{}", refusal());
            fs::write(&config, "[[vm]\n").unwrap();
            assert!(refusal().contains("umbra.toml:1:6: "), "{}", refusal());
            fs::write(&config, b"\xff").unwrap();
            assert!(refusal().contains("UTF-8"), "{}", refusal());
        });
    }

    #[test]
    fn what_umbra_could_not_load_is_refused_with_its_place() {
        with_folder("bundle-kernels", |dir| {
            let config = dir.join("umbra.toml");
            let refusal = |memory: &str, kernel: &[u8]| {
                fs::write(dir.join("k"), kernel).unwrap();
                let text =
                    format!("[[vm]]\nname = \"a\"\nmemory = {memory:?}\nkernel = \"k\"\ninitrd = \"i\"\n");
                fs::write(&config, text).unwrap();
                Bundle::load(&config).map(drop).map_err(|error| error.to_string())
            };
            fs::write(dir.join("i"), [0; 5000]).unwrap();
            assert_eq!(refusal("2M", &kernel()), Ok(()));
            let shown = config.display();
            assert_eq!(
                refusal("1M", &kernel()).unwrap_err(),
                format!(
                    "{shown}:4:10: vm \"a\": \"k\" needs memory up to 2M, and the VM has it up to 1M; raise its memory"
                )
            );
            assert!(refusal("2M", b"no kernel")
                .unwrap_err()
                .contains(":4:10: vm \"a\": \"k\" is not a kernel"));
            fs::write(dir.join("i"), vec![0; 2 << 20]).unwrap();
            assert!(refusal("2M", &kernel())
                .unwrap_err()
                .contains(":5:10: vm \"a\": \"i\" has 2097152 bytes"));
        });
    }

    fn listed(archive: &[u8]) -> (String, Result<(), String>) {
        let mut lines = String::new();
        let verdict = list("b.cpio", archive, |line| lines += &format!("{line}\n"));
        (lines, verdict.map_err(|error| format!("{error:#}")))
    }

    /// A bundle for one VM with this configuration.
    fn small(more: &str) -> Bundle {
        let text = format!("[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"k\"\n{more}");
        Bundle::new(text).file("k", kernel())
    }

    #[test]
    fn a_list_has_files_and_machines() {
        let bundle =
            small("vcpus = 2\ninitrd = \"./i\"\nmodules = [\"m x\"]\n").file("i", *b"").file("m", *b"M");
        let (lines, verdict) = listed(&bundle.clone().file("more", *b"").archive().unwrap());
        assert_eq!(verdict, Ok(()));
        let nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for line in [
            &format!("             0 bytes  sha256 {nothing}  i")[..],
            &format!("             0 bytes  sha256 {nothing}  more (no VM names it)"),
            "manifest: none (SHA256SUMS)",
            "vm \"a\": 2 vCPUs, 16M of memory, Multiboot 1 image \"k\", initrd \"./i\", module \"m\"",
        ] {
            assert!(lines.lines().any(|other| other.trim() == line.trim()), "{line}\n{lines}");
        }
        let (lines, _) = listed(&bundle.clone().file("a\x1b[2J", *b"").archive().unwrap());
        assert!(lines.contains(r#"  "a\u{1b}[2J" (no VM names it)"#), "{lines}");
        let (lines, verdict) = listed(&bundle.with_manifest().archive().unwrap());
        assert_eq!(verdict, Ok(()));
        assert!(lines.contains("manifest: all 4 files are as SHA256SUMS lists them"), "{lines}");
    }

    #[test]
    fn a_list_ends_with_what_umbra_would_refuse() {
        let good = small("").with_manifest().archive().unwrap();
        let (lines, verdict) = listed(&good[..good.len() - 200]);
        assert!(verdict.unwrap_err().starts_with("b.cpio: the bundle is cut short"), "{lines}");

        let mut damaged = good.clone();
        let at = good.windows(4).position(|bytes| bytes == 0xf4u32.to_le_bytes()).unwrap();
        damaged[at] = 0x90;
        let (lines, verdict) = listed(&damaged);
        let error = verdict.unwrap_err();
        assert!(error.starts_with("b.cpio: SHA256SUMS:2: \"k\" is not the file that was listed"), "{error}");
        assert!(lines.contains("  umbra.toml\n") && lines.contains("  k\n"), "{lines}");

        let (_, verdict) = listed(&small("initrd = \"i\"").archive().unwrap());
        let error = verdict.unwrap_err();
        assert!(error.starts_with("b.cpio: umbra.toml:5:10: initrd names \"i\""), "{error}");
        let (_, verdict) = listed(&small("").file("k", *b"no kernel").archive().unwrap());
        let error = verdict.unwrap_err();
        assert!(error.starts_with("b.cpio: umbra.toml:4:10: vm \"a\": \"k\" is not a kernel"), "{error}");
    }

    #[test]
    fn an_archive_is_taken_as_it_is() {
        with_folder("archive", |dir| {
            let file = dir.join("b.cpio");
            let archive = small("").with_manifest().archive().unwrap();
            fs::write(&file, &archive).unwrap();
            assert_eq!(Bundle::load(&file).unwrap().archive().unwrap(), archive);
            assert_eq!(Bundle::load(&file).unwrap().size_bytes(), archive.len() as u64);
            let refusal = |bytes: &[u8]| {
                fs::write(&file, bytes).unwrap();
                format!("{:#}", Bundle::load(&file).unwrap_err())
            };
            assert!(refusal(&archive[..100]).contains("cut short"));
            // Compressed, and in cpio's oldest format.
            for magic in [&b"\x1f\x8b\x08\0"[..], b"\xc7\x71\0\0"] {
                assert!(refusal(magic).contains("make it with `cpio -o -H newc`, uncompressed"));
            }
        });
    }

    #[test]
    fn toml_strings_are_escaped() {
        assert_eq!(toml_string(r#"a "b" \c"#), r#""a \"b\" \\c""#);
        assert_eq!(toml_string("a\nb"), r#""a\u000Ab""#);
    }
}
