//! The tree that a TFTP or HTTP server offers: written beside its place, then moved there.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{bail, Context, Result};
use sha2::{Digest, Sha256};

use super::boot_image;
use super::key::Key;
use super::server::Server;
use crate::paths;

/// The list of all files with their hashes, in the format of `sha256sum -c`. It also tells a tree from other folders.
pub const SUMS: &str = "SHA256SUMS";
/// Its first line.
const MARK: &str = "# A tree for machines that boot Umbra from the network, made by `cargo xtask pxe`.";
/// The folder with one folder for each machine.
pub const MACHINES: &str = "machines";
/// The machine's folder of those that have none of their own.
pub const DEFAULT: &str = "default";
/// The bundle in a machine's folder.
pub const BUNDLE: &str = "bundle.cpio";

/// What goes into a tree.
#[derive(Debug)]
pub struct Contents<'a> {
    /// Umbra's ELF file.
    pub umbra: &'a Path,
    /// Where the tree will be served, if the boot loaders cannot find out.
    pub server: Option<Server>,
    /// Where Umbra and the bundles are to be loaded from by HTTP.
    pub http: Option<Server>,
    /// The bundle of machines that have none of their own.
    pub default: Option<Vec<u8>>,
    /// The bundles of single machines.
    pub machines: Vec<(Key, Vec<u8>)>,
}

/// A file of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its path within the tree.
    pub path: String,
    /// Its size.
    pub size_bytes: u64,
    /// SHA-256 of its contents, in hexadecimal.
    pub sha256: String,
    /// It was in the earlier tree and nobody has named it anew.
    pub kept: bool,
}

/// Refuses an `out` that holds something else than an earlier tree.
pub fn check(out: &Path) -> Result<()> {
    let shown = paths::display(out);
    let refuse =
        |what: &str| bail!("{shown} {what}; name a folder that is new, empty or of an earlier `pxe`");
    if !out.exists() {
        return Ok(());
    }
    if !out.is_dir() {
        return refuse("is a file");
    }
    if out.canonicalize()?.file_name().is_none() {
        return refuse("is the top folder");
    }
    let names = names_in(out)?;
    let marked = fs::read_to_string(out.join(SUMS)).is_ok_and(|text| text.starts_with(MARK));
    if !marked && !names.is_empty() {
        return refuse(&format!("holds {:?}, but not a tree with a {SUMS} of `cargo xtask pxe`", names[0]));
    }
    let ours = ["umbra", "grub.cfg", boot_image::BIOS, boot_image::UEFI, boot_image::IPXE, SUMS, MACHINES];
    match names.iter().find(|name| !ours.contains(&name.as_str())) {
        Some(other) => refuse(&format!("holds {other:?}, which belongs to no tree")),
        None => Ok(()),
    }
}

/// Whether `out` has a bundle for machines without one of their own.
pub fn has_default(out: &Path) -> bool {
    out.join(MACHINES).join(DEFAULT).join(BUNDLE).is_file()
}

/// Writes a tree to `out`. What lies under `machines` of an earlier tree there stays unless `contents` names it. After an
/// error `out` is as it was.
pub fn write(out: &Path, contents: &Contents<'_>) -> Result<Vec<Listed>> {
    check(out)?;
    // Moving a link would leave what it leads to.
    let out = if out.exists() { out.canonicalize()? } else { std::path::absolute(out)? };
    let beside = |ending: &str| {
        let mut name = out.file_name().unwrap_or_default().to_owned();
        name.push(ending);
        out.with_file_name(name)
    };
    let (unfinished, earlier) = (beside(".unfinished"), beside(".earlier"));
    for leftover in [&unfinished, &earlier] {
        remove(leftover)?;
    }
    let written = fill(&unfinished, &out, contents).and_then(|files| {
        swap(&unfinished, &out, &earlier)?;
        Ok(files)
    });
    if written.is_err() {
        // The error is told; what is left of the attempt is not worth a second one.
        let _ = remove(&unfinished);
    }
    written
}

fn fill(dir: &Path, out: &Path, contents: &Contents<'_>) -> Result<Vec<Listed>> {
    make_folder(dir)?;
    boot_image::write(contents.server.as_ref(), dir)?;
    for name in [boot_image::BIOS, boot_image::UEFI] {
        open_for_all(&dir.join(name), 0o644)?;
    }
    put(&dir.join("grub.cfg"), boot_image::grub_cfg(contents.http.as_ref()).as_bytes())?;
    put(&dir.join(boot_image::IPXE), boot_image::ipxe(contents.server.as_ref()).as_bytes())?;
    copy(contents.umbra, &dir.join("umbra"))?;
    let machines = dir.join(MACHINES);
    make_folder(&machines)?;
    let default = contents.default.iter().map(|bundle| (DEFAULT.to_owned(), bundle));
    let single = contents.machines.iter().map(|(key, bundle)| (key.folder(), bundle));
    for (name, bundle) in default.chain(single) {
        make_folder(&machines.join(&name))?;
        put(&machines.join(&name).join(BUNDLE), bundle)?;
    }
    let kept = keep(&out.join(MACHINES), &machines)?;
    list(dir, &kept)
}

/// Takes over the folders of `from` that `to` does not have; their names.
fn keep(from: &Path, to: &Path) -> Result<Vec<String>> {
    let mut kept = Vec::new();
    if !from.is_dir() {
        return Ok(kept);
    }
    for name in names_in(from)? {
        if to.join(&name).exists() {
            continue;
        }
        copy_all(&from.join(&name), &to.join(&name))?;
        kept.push(format!("{MACHINES}/{name}"));
    }
    Ok(kept)
}

fn copy_all(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        // Both trees are on one file system, where a second name costs nothing.
        return fs::hard_link(from, to).or_else(|_| copy(from, to));
    }
    make_folder(to)?;
    names_in(from)?.iter().try_for_each(|name| copy_all(&from.join(name), &to.join(name)))
}

/// Writes the list of the files in `dir`, and returns it.
fn list(dir: &Path, kept: &[String]) -> Result<Vec<Listed>> {
    let mut paths = Vec::new();
    files_in(dir, "", &mut paths)?;
    let mut files = Vec::new();
    let mut sums = format!("{MARK}\n");
    for path in paths {
        let file = dir.join(&path);
        let (size_bytes, sha256) = digest(&file)?;
        sums += &format!("{sha256}  {path}\n");
        let kept = kept.iter().any(|folder| Path::new(&path).starts_with(folder));
        files.push(Listed { path, size_bytes, sha256, kept });
    }
    put(&dir.join(SUMS), sums.as_bytes())?;
    Ok(files)
}

fn files_in(dir: &Path, prefix: &str, found: &mut Vec<String>) -> Result<()> {
    for name in names_in(dir)? {
        let path = format!("{prefix}{name}");
        if dir.join(&name).is_dir() {
            files_in(&dir.join(&name), &format!("{path}/"), found)?;
        } else {
            found.push(path);
        }
    }
    Ok(())
}

fn digest(file: &Path) -> Result<(u64, String)> {
    let mut hasher = Sha256::new();
    let mut source = File::open(file).with_context(|| format!("cannot read {}", paths::display(file)))?;
    let size_bytes = io::copy(&mut source, &mut hasher)
        .with_context(|| format!("cannot read {}", paths::display(file)))?;
    Ok((size_bytes, hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
}

/// Puts the new tree in the place of the old one, or leaves the old one there.
fn swap(new: &Path, out: &Path, earlier: &Path) -> Result<()> {
    let cannot = || format!("cannot put the tree at {}", paths::display(out));
    let replaces = out.exists();
    if replaces {
        fs::rename(out, earlier).with_context(cannot)?;
    }
    if let Err(error) = fs::rename(new, out) {
        if replaces {
            fs::rename(earlier, out).with_context(cannot)?;
        }
        return Err(error).with_context(cannot);
    }
    remove(earlier)
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", paths::display(dir)))
        }
        _ => Ok(()),
    }
}

/// The names in a folder, sorted.
fn names_in(dir: &Path) -> Result<Vec<String>> {
    let cannot = || format!("cannot list {}", paths::display(dir));
    let mut names = Vec::new();
    for entry in dir.read_dir().with_context(cannot)? {
        let name = entry.with_context(cannot)?.file_name();
        names.push(name.into_string().map_err(|name| {
            anyhow::anyhow!("{} holds {name:?}, whose name is not UTF-8; rename it", paths::display(dir))
        })?);
    }
    names.sort();
    Ok(names)
}

fn make_folder(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create {}", paths::display(dir)))?;
    open_for_all(dir, 0o755)
}

fn put(file: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(file, bytes).with_context(|| format!("cannot write {}", paths::display(file)))?;
    open_for_all(file, 0o644)
}

/// Read and written, not copied: a copy would take over a mode that a server's user cannot read by.
fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", paths::display(from)))?;
    put(to, &bytes)
}

/// Whatever the umask says: servers run as users of their own.
fn open_for_all(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", paths::display(path)))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    /// An empty folder of this test's own.
    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("umbra-pxe-{name}-{}", std::process::id()));
        remove(&dir).unwrap();
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn mark(dir: &Path) {
        fs::create_dir_all(dir.join(MACHINES)).unwrap();
        fs::write(dir.join(SUMS), format!("{MARK}\n")).unwrap();
    }

    #[test]
    fn only_a_tree_is_replaced() {
        let dir = scratch("check");
        check(&dir).unwrap();
        check(&dir.join("new")).unwrap();
        let refusal = |dir: &Path| check(dir).unwrap_err().to_string();
        fs::write(dir.join("letter"), "").unwrap();
        assert!(refusal(&dir).contains("holds \"letter\", but not a tree"), "{}", refusal(&dir));
        mark(&dir);
        assert!(refusal(&dir).contains("holds \"letter\", which belongs to no tree"), "{}", refusal(&dir));
        assert!(refusal(&dir.join("letter")).contains("is a file"));
        fs::remove_file(dir.join("letter")).unwrap();
        check(&dir).unwrap();
        fs::write(dir.join(SUMS), "another list\n").unwrap();
        assert!(refusal(&dir).contains("not a tree"));
        assert!(refusal(Path::new("/")).contains("name a folder"));
        remove(&dir).unwrap();
    }

    #[test]
    fn machines_stay_that_nobody_names_anew() {
        let dir = scratch("keep");
        let (old, new) = (dir.join("old"), dir.join("new"));
        for machine in ["default", "mac-1", "serial-x/notes"] {
            make_folder(&old.join(machine)).unwrap();
            put(&old.join(machine).join(BUNDLE), machine.as_bytes()).unwrap();
        }
        make_folder(&new.join("mac-1")).unwrap();
        assert_eq!(keep(&old, &new).unwrap(), ["machines/default", "machines/serial-x"]);
        assert_eq!(fs::read(new.join("serial-x/notes").join(BUNDLE)).unwrap(), b"serial-x/notes");
        assert!(!new.join("mac-1").join(BUNDLE).exists());
        assert_eq!(keep(&dir.join("none"), &new).unwrap(), [""; 0]);
        remove(&dir).unwrap();
    }

    #[test]
    fn the_list_has_every_file_with_its_hash() {
        let dir = scratch("list");
        make_folder(&dir.join("machines/default")).unwrap();
        put(&dir.join("machines/default").join(BUNDLE), b"").unwrap();
        put(&dir.join("umbra"), b"abc").unwrap();
        let files = list(&dir, &["machines/default".into()]).unwrap();
        // FIPS 180-4's example, and the hash of nothing.
        let sums = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855  machines/default/bundle.cpio\n\
                    ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  umbra\n";
        assert_eq!(fs::read_to_string(dir.join(SUMS)).unwrap(), format!("{MARK}\n{sums}"));
        assert_eq!(
            files.iter().map(|file| (file.size_bytes, file.kept)).collect::<Vec<_>>(),
            [(0, true), (3, false)]
        );
        remove(&dir).unwrap();
    }

    #[test]
    fn a_tree_takes_the_place_of_the_earlier_one_or_leaves_it() {
        let dir = scratch("swap");
        let (new, out, earlier) = (dir.join("new"), dir.join("out"), dir.join("earlier"));
        for (folder, text) in [(&new, "new"), (&out, "old")] {
            make_folder(folder).unwrap();
            put(&folder.join("umbra"), text.as_bytes()).unwrap();
        }
        assert!(swap(&dir.join("none"), &out, &earlier).is_err());
        assert_eq!(fs::read(out.join("umbra")).unwrap(), b"old");
        swap(&new, &out, &earlier).unwrap();
        assert_eq!(fs::read(out.join("umbra")).unwrap(), b"new");
        assert!(!new.exists() && !earlier.exists());
        remove(&dir).unwrap();
    }

    #[test]
    fn files_are_for_every_user() {
        let dir = scratch("mode");
        put(&dir.join("umbra"), b"").unwrap();
        assert_eq!(dir.join("umbra").metadata().unwrap().permissions().mode() & 0o777, 0o644);
        make_folder(&dir.join("machines")).unwrap();
        assert_eq!(dir.join("machines").metadata().unwrap().permissions().mode() & 0o777, 0o755);
        remove(&dir).unwrap();
    }
}
