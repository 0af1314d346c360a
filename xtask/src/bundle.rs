//! The boot bundle: umbra.toml and the files it names, in one cpio archive that Umbra gets as its ramdisk.

use std::fs;
use std::path::Path;

use anyhow::{bail, Context, Result};

use crate::cpio::Archive;
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
    pub fn load(config: &Path) -> Result<Self> {
        let shown = paths::display(config);
        let text = String::from_utf8(read(config)?)
            .map_err(|error| anyhow::anyhow!("{shown} is not UTF-8 text: {}", error.utf8_error()))?;
        let names = files_named_by(&text).with_context(|| shown.clone())?;
        let folder = config.parent().unwrap_or(Path::new("."));
        let mut bundle = Self::new(text);
        for name in names {
            if !bundle.files.iter().any(|(known, _)| *known == name) {
                bundle = bundle
                    .file_from(&name, &folder.join(&name))
                    .with_context(|| format!("{shown} names the file `{name}`"))?;
            }
        }
        Ok(bundle)
    }

    /// The archive.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let mut archive = Archive::new();
        archive.file(CONFIG, false, &self.config)?;
        for (name, data) in &self.files {
            let mut folder = String::new();
            for part in Path::new(name).parent().into_iter().flatten() {
                folder.push_str(&part.to_string_lossy());
                archive.directory(&folder);
                folder.push('/');
            }
            archive.file(name, false, data).with_context(|| format!("cannot bundle `{name}`"))?;
        }
        Ok(archive.finish())
    }

    /// About how large the archive is, in bytes.
    pub fn size_bytes(&self) -> u64 {
        let files: usize = self.files.iter().map(|(_, data)| data.len()).sum();
        (self.config.len() + files) as u64
    }
}

/// The files that a configuration names: kernels, initial ramdisks, modules.
fn files_named_by(text: &str) -> Result<Vec<String>> {
    let table: toml::Table = text.parse()?;
    let mut names = Vec::new();
    let machines = table.get("vm").and_then(|vm| vm.as_array());
    for vm in machines.into_iter().flatten() {
        for key in ["kernel", "initrd"] {
            names.extend(vm.get(key).and_then(|v| v.as_str()).map(str::to_owned));
        }
        for module in vm.get("modules").and_then(|v| v.as_array()).into_iter().flatten() {
            names.extend(module.as_str().and_then(|m| m.split_whitespace().next()).map(str::to_owned));
        }
    }
    Ok(names)
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
    fn a_bundle_starts_with_its_configuration() {
        let bundle = Bundle::new("x = 1").file("guests/a", *b"A").file("b", *b"B");
        let archive = bundle.archive().unwrap();
        let text = String::from_utf8_lossy(&archive);
        let place = |what: &str| text.find(what).unwrap_or_else(|| panic!("no {what}"));
        assert!(place("umbra.toml\0") < place("guests\0"));
        assert!(place("guests\0") < place("guests/a\0"));
        assert!(place("guests/a\0") < place("b\0"));
        assert_eq!(bundle.size_bytes(), 7);
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

        fs::remove_file(dir.join("m")).unwrap();
        let error = format!("{:#}", Bundle::load(&config).unwrap_err());
        assert!(error.contains("`m`") && error.contains("cannot read"), "{error}");
        fs::create_dir(dir.join("m")).unwrap();
        let error = format!("{:#}", Bundle::load(&config).unwrap_err());
        assert!(error.contains("is a folder"), "{error}");
        fs::write(&config, "[[vm]\n").unwrap();
        let error = format!("{:#}", Bundle::load(&config).unwrap_err());
        assert!(error.contains("umbra.toml") && error.contains("line 1"), "{error}");
        fs::write(&config, b"\xff").unwrap();
        assert!(format!("{:#}", Bundle::load(&config).unwrap_err()).contains("UTF-8"));
        fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn toml_strings_are_escaped() {
        assert_eq!(toml_string(r#"a "b" \c"#), r#""a \"b\" \\c""#);
        assert_eq!(toml_string("a\nb"), r#""a\u000Ab""#);
    }
}
