//! The Linux guest: an unmodified kernel of the distribution and BusyBox, from the cache.

pub mod description;
pub mod initramfs;

use std::path::PathBuf;

/// The prompt of the Linux guest's shell.
pub const PROMPT: &str = "umbra-guest# ";

/// The files of the Linux guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linux {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// BusyBox, statically linked.
    pub busybox: PathBuf,
}

/// The same Linux as a hypervisor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmHost {
    /// The kernel and BusyBox.
    pub linux: Linux,
    /// The kernel's modules of KVM, in the order in which they are loaded.
    pub modules: Vec<PathBuf>,
}
