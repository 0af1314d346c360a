//! Where things are: the workspace, its target directory, the cache that outlives a clone.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The workspace's root folder.
pub fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."))
}

/// Cargo's target directory: `CARGO_TARGET_DIR` if it is set, else `target` in the workspace.
pub fn target_dir() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(dir) if !dir.is_empty() => workspace_root().join(dir),
        _ => workspace_root().join("target"),
    }
}

/// Umbra's cache, `umbra` in the user's cache folder as the XDG base directory specification defines it. Not created.
pub fn cache_dir() -> Result<PathBuf> {
    cache_dir_from(env::var_os("XDG_CACHE_HOME").map(PathBuf::from), env::var_os("HOME").map(PathBuf::from))
        .context("neither XDG_CACHE_HOME nor HOME names a folder for downloads; set one of them")
}

fn cache_dir_from(xdg: Option<PathBuf>, home: Option<PathBuf>) -> Option<PathBuf> {
    // A relative XDG_CACHE_HOME is to be ignored (XDG base directory specification, "Basics").
    let base = xdg
        .filter(|dir| dir.is_absolute())
        .or_else(|| home.filter(|dir| dir.is_absolute()).map(|dir| dir.join(".cache")))?;
    Some(base.join("umbra"))
}

/// `path` relative to the current directory where that is shorter to read, else unchanged.
pub fn display(path: &Path) -> String {
    let shown = env::current_dir().ok().and_then(|dir| path.strip_prefix(dir).ok().map(Path::to_path_buf));
    shown
        .filter(|rest| !rest.as_os_str().is_empty())
        .unwrap_or_else(|| path.to_path_buf())
        .display()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_follows_the_xdg_specification() {
        let path = |s: &str| Some(PathBuf::from(s));
        assert_eq!(cache_dir_from(path("/x"), path("/home/u")), path("/x/umbra"));
        assert_eq!(cache_dir_from(path("x"), path("/home/u")), path("/home/u/.cache/umbra"));
        assert_eq!(cache_dir_from(path(""), path("/home/u")), path("/home/u/.cache/umbra"));
        assert_eq!(cache_dir_from(None, path("/home/u")), path("/home/u/.cache/umbra"));
        assert_eq!(cache_dir_from(None, None), None);
    }

    #[test]
    fn the_workspace_holds_this_crate() {
        assert!(workspace_root().join("xtask/Cargo.toml").is_file());
    }
}
