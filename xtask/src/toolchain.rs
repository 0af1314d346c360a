//! Which compiler builds the bare-metal crates: rustup's with the target installed, or Debian's with the standard
//! library's source.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::bundle::toml_string;
use crate::exec::CommandLine;
use crate::paths;

/// The target of the kernel and of the test guests.
pub const BARE_METAL: &str = "x86_64-unknown-none";

/// Debian's packages that together replace rustup's target.
pub const DEBIAN_PACKAGES: [&str; 4] = ["rustc-web", "cargo-web", "rust-web-src", "lld-22"];

/// The oldest compiler that builds the workspace (`rust-version` in Cargo.toml).
const OLDEST: (u32, u32) = (1, 91);

/// A compiler for the bare-metal target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compiler {
    /// The `cargo` on the path, whose toolchain has the target.
    WithTarget,
    /// `/usr/bin/cargo` from Debian's packages, which builds `core` and `alloc` from source.
    Debian,
}

impl Compiler {
    /// `cargo SUBCOMMAND` for the bare-metal target, in the workspace.
    pub fn cargo(self, subcommand: &str) -> CommandLine {
        let line = match self {
            Self::WithTarget => CommandLine::new("cargo").arg(subcommand),
            // Building the standard library is unstable, hence RUSTC_BOOTSTRAP; /usr/bin comes first so that this
            // cargo takes its own rustc and not rustup's.
            Self::Debian => CommandLine::new("/usr/bin/cargo")
                .env("RUSTC_BOOTSTRAP", "1")
                .env("PATH", path_from_usr_bin())
                .arg(subcommand)
                .arg("-Zbuild-std=core,alloc"),
        };
        let home = std::env::var_os("CARGO_HOME").map(PathBuf::from).filter(|home| home.is_absolute());
        let home = home.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
        let remapped = remapped_paths(home.as_deref(), paths::workspace_root(), &paths::target_dir());
        line.args(["--target", BARE_METAL, "--config", &remapped]).dir(paths::workspace_root())
    }

    /// What it is, for messages.
    pub fn describe(self) -> &'static str {
        match self {
            Self::WithTarget => "the toolchain's own x86_64-unknown-none target",
            Self::Debian => {
                "Debian's compiler, which builds core and alloc from source (about a minute, once)"
            }
        }
    }
}

/// The configuration that keeps the folders of this machine out of what is built, so that every machine builds the same
/// bytes: where cargo keeps its crates, the workspace, and the target directory, which need not be in it. Of several
/// prefixes that fit, the last counts. It adds to the flags in `.cargo/config.toml`.
fn remapped_paths(cargo_home: Option<&Path>, workspace: &Path, target: &Path) -> String {
    let folders = [(cargo_home, "/cargo"), (Some(workspace), "."), (Some(target), "target")];
    let flags: Vec<String> = folders
        .iter()
        .filter_map(|(folder, name)| {
            Some(toml_string(&format!("--remap-path-prefix={}={name}", folder.as_ref()?.display())))
        })
        .collect();
    format!("target.{BARE_METAL}.rustflags=[{}]", flags.join(", "))
}

fn path_from_usr_bin() -> OsString {
    let mut path = OsString::from("/usr/bin");
    if let Some(rest) = std::env::var_os("PATH") {
        path.push(":");
        path.push(rest);
    }
    path
}

/// Whether the `rustc` on the path has the target's `core`.
pub fn target_is_installed() -> bool {
    CommandLine::new("rustc")
        .args(["--print", "target-libdir", "--target", BARE_METAL])
        .dir(paths::workspace_root())
        .read()
        .is_ok_and(|dir| holds_core(Path::new(dir.trim())))
}

fn holds_core(libdir: &Path) -> bool {
    let Ok(entries) = libdir.read_dir() else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

/// Whether Debian's compiler, its source of the standard library and a linker are all installed and new enough.
pub fn debian_is_complete() -> bool {
    let recent = |program: &str| {
        CommandLine::new(program).arg("--version").read().ok().and_then(|text| version(&text)) >= Some(OLDEST)
    };
    let source = || {
        let sysroot = CommandLine::new("/usr/bin/rustc").args(["--print", "sysroot"]).read();
        sysroot.is_ok_and(|dir| PathBuf::from(dir.trim()).join("lib/rustlib/src/rust/library/core").is_dir())
    };
    Path::new("/usr/bin/lld-22").exists() && recent("/usr/bin/rustc") && recent("/usr/bin/cargo") && source()
}

/// Major and minor version in `rustc 1.96.0 (…)`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_whitespace().nth(1)?.split('.').map(|n| n.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// The compiler that can be used as things are, if any.
pub fn installed() -> Option<Compiler> {
    if target_is_installed() {
        Some(Compiler::WithTarget)
    } else {
        debian_is_complete().then_some(Compiler::Debian)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read() {
        assert_eq!(version("rustc 1.96.0 (30a34c682 2026-05-25)"), Some((1, 96)));
        assert_eq!(version("cargo 2.0.0-nightly"), Some((2, 0)));
        assert_eq!(version("rustc"), None);
        assert_eq!(version("rustc x.y"), None);
        assert!(version("rustc 1.63.0 (Debian)") < Some(OLDEST));
    }

    #[test]
    fn each_compiler_has_its_command_line() {
        let line = Compiler::WithTarget.cargo("build").to_string();
        assert!(line.contains("cargo build --target x86_64-unknown-none --config 'target."), "{line}");
        let line = Compiler::Debian.cargo("build").to_string();
        assert!(line.contains("RUSTC_BOOTSTRAP=1 PATH=/usr/bin:\"$PATH\" "), "{line}");
        assert!(
            line.contains(
                "/usr/bin/cargo build -Zbuild-std=core,alloc --target x86_64-unknown-none --config"
            ),
            "{line}"
        );
    }

    #[test]
    fn what_is_built_names_no_folder_of_this_machine() {
        let config = remapped_paths(Some(Path::new("/home/a b/.cargo")), Path::new("/w"), Path::new("/t"));
        assert_eq!(
            config,
            "target.x86_64-unknown-none.rustflags=[\"--remap-path-prefix=/home/a b/.cargo=/cargo\", \
             \"--remap-path-prefix=/w=.\", \"--remap-path-prefix=/t=target\"]"
        );
        assert!(!remapped_paths(None, Path::new("/w"), Path::new("/t")).contains("/cargo"));
    }

    #[test]
    fn an_empty_library_folder_is_no_target() {
        assert!(!holds_core(Path::new("/nonexistent")));
        assert!(!holds_core(&paths::workspace_root().join("xtask/src")));
    }
}
