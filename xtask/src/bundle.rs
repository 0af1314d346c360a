//! The boot bundle: umbra.toml and the files it names, in one cpio archive that Umbra gets as its ramdisk.

use std::fs;
use std::path::Path;

use anyhow::{bail, Context, Result};
use boot::bundle::Writer;
use boot::config::Config;

use crate::paths;

/// The name of the configuration inside a bundle.
const CONFIG: &str = "umbra.toml";

/// What goes into a bundle.
#[derive(Clone, Debug)]
pub struct Bundle {
    config: Vec<u8>,
    files: Vec<(String, Vec<u8>)>,
}

impl Bundle {
    /// A bundle with a configuration that nobody has checked, and no files yet. For tests, which also want broken ones.
    pub fn new(config: impl Into<Vec<u8>>) -> Self {
        Self { config: config.into(), files: Vec::new() }
    }

    /// Adds a file, under the name by which the configuration knows it.
    pub fn file(mut self, name: &str, data: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), data.into()));
        self
    }

    /// Adds the file at `path` under the name `name`.
    pub fn file_from(self, name: &str, path: &Path) -> Result<Self> {
        let data = read(path)?;
        Ok(self.file(name, data))
    }

    /// Reads a configuration, checks it by the schema that Umbra itself uses at boot, and reads the files it names,
    /// relative to the configuration's folder.
    pub fn load(path: &Path) -> Result<Self> {
        let shown = paths::display(path);
        let folder = path.parent().unwrap_or(Path::new("."));
        let text = String::from_utf8(read(path)?)
            .map_err(|error| anyhow::anyhow!("{shown} is not UTF-8 text: {}", error.utf8_error()))?;
        let config = Config::parse(&shown, &text)?;
        let mut bundle = Self::new(text);
        for file in config.files() {
            if bundle.files.iter().any(|(known, _)| *known == file.name) {
                continue;
            }
            let path = folder.join(&file.name);
            if !path.exists() {
                bail!("{} (looked for {})", config.file_not_found(file), paths::display(&path));
            }
            bundle = bundle.file_from(&file.name, &path)?;
        }
        Ok(bundle)
    }

    /// The archive.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let mut archive = Writer::new();
        archive.file(CONFIG, 0o644, &self.config)?;
        for (name, data) in &self.files {
            archive.file(name, 0o644, data)?;
        }
        Ok(archive.finish())
    }

    /// About how large the archive is, in bytes.
    pub fn size_bytes(&self) -> u64 {
        let files: usize = self.files.iter().map(|(_, data)| data.len()).sum();
        (self.config.len() + files) as u64
    }
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
    }

    #[test]
    fn files_are_found_beside_the_configuration() {
        let dir = std::env::temp_dir().join(format!("umbra-bundle-{}", std::process::id()));
        fs::create_dir_all(dir.join("sub")).unwrap();
        let config = dir.join("umbra.toml");
        fs::write(dir.join("sub/kernel"), "K").unwrap();
        fs::write(dir.join("m"), "M").unwrap();
        let text =
            "[[vm]]\nname = \"a\"\nmemory = \"16M\"\nkernel = \"sub/kernel\"\nmodules = [\"m with args\"]\n";
        fs::write(&config, text).unwrap();
        let bundle = Bundle::load(&config).unwrap();
        assert_eq!(bundle.files, [("sub/kernel".to_owned(), b"K".to_vec()), ("m".to_owned(), b"M".to_vec())]);

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
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn toml_strings_are_escaped() {
        assert_eq!(toml_string(r#"a "b" \c"#), r#""a \"b\" \\c""#);
        assert_eq!(toml_string("a\nb"), r#""a\u000Ab""#);
    }
}
