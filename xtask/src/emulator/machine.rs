//! The description of an emulated machine.

use std::fs::OpenOptions;
use std::path::PathBuf;

use anyhow::{bail, Context, Result};

use super::accel::Acceleration;
use super::hardware::Hardware;
use super::network::Network;
use super::{bochs, firmware, qemu};
use crate::build::Images;
use crate::bundle::Bundle;
use crate::exec::CommandLine;
use crate::image;
use crate::size::Size;

/// Which emulator.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// QEMU, which emulates SVM.
    #[default]
    Qemu,
    /// Bochs, which emulates VMX and SVM, is slower and starts from an image only.
    Bochs,
}

impl Kind {
    /// The emulator's own name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU",
            Self::Bochs => "Bochs",
        }
    }
}

/// How Umbra gets into the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Boot {
    /// QEMU loads the ELF file and the bundle by the PVH protocol.
    #[default]
    Pvh,
    /// GRUB loads both from an image, on a BIOS.
    Iso,
    /// GRUB loads both from an image, on UEFI.
    Uefi,
    /// The BIOS boots from the machine's network.
    Pxe,
    /// UEFI boots from the machine's network.
    PxeUefi,
    /// QEMU loads a Multiboot 1 kernel in Umbra's place, without a bundle, and gives it the exit port of the test
    /// guests: what such a guest does on the bare machine is what it should do under Umbra.
    Bare,
    /// QEMU loads a Linux kernel in Umbra's place, and an initial ramdisk in the bundle's. It is told to be quiet, to trust
    /// the processor, and to end when it panics.
    Linux,
}

/// What an image is on, for the firmware that starts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Medium {
    /// A CD.
    #[default]
    Cd,
    /// A disk on an AHCI controller.
    Disk,
    /// A stick on an xHCI controller.
    Usb,
}

/// Whether QEMU counts instructions in place of time, which makes a run repeatable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Icount {
    /// The machine's time is the host's.
    #[default]
    Off,
    /// One instruction is one nanosecond, and nothing in the machine depends on the host's time.
    On,
}

/// What the firmware has done with VMX in IA32_FEATURE_CONTROL. Intel SDM vol. 3, 24.7.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Vmx {
    /// What the emulator's firmware does: switched it on, where there is any.
    #[default]
    Usual,
    /// Locked it off. In Bochs only: its legacy BIOS leaves the register to GRUB.
    LockedOff,
}

impl Vmx {
    /// The command that GRUB executes first: what does this, or else the `usual` one.
    fn grub_command(self, usual: &'static str) -> &'static str {
        match self {
            Self::Usual => usual,
            // IA32_FEATURE_CONTROL: the lock bit, and no other.
            Self::LockedOff => "wrmsr 0x3a 0x1",
        }
    }
}

/// An emulated machine: what a person would set on its command line.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Which emulator.
    pub kind: Kind,
    /// The emulator's program; `None` takes the one on the path.
    pub program: Option<PathBuf>,
    /// How Umbra gets into it.
    pub boot: Boot,
    /// What an image is on.
    pub medium: Medium,
    /// What it boots from by PXE, where Umbra and the bundle are.
    pub network: Option<Network>,
    /// How much of the image the medium has, in bytes, if not all: the copy broke off.
    pub image_bytes: Option<u64>,
    /// Umbra's ELF file.
    pub umbra: PathBuf,
    /// Processors.
    pub cpus: u32,
    /// Memory.
    pub memory: Size,
    /// Emulation or the host's virtualization.
    pub acceleration: Acceleration,
    /// The emulator's processor model; `None` takes the one that offers Umbra most.
    pub cpu: Option<String>,
    /// What the firmware has done with VMX.
    pub vmx: Vmx,
    /// What is unusual about the rest of it.
    pub hardware: Hardware,
    /// Repeatable time.
    pub icount: Icount,
    /// The machine waits for a debugger on TCP port 1234.
    pub gdb: bool,
    /// The folder for what this machine needs: the bundle, an image, the firmware's variables, logs.
    pub dir: PathBuf,
}

impl Machine {
    /// A machine with QEMU's best processor, one CPU and 2 GiB, that starts the built Umbra by PVH and keeps its files
    /// in `dir`.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            kind: Kind::Qemu,
            program: None,
            boot: Boot::Pvh,
            medium: Medium::Cd,
            network: None,
            image_bytes: None,
            umbra: Images::places().umbra,
            cpus: 1,
            memory: Size::mib(2048),
            acceleration: Acceleration::Tcg,
            cpu: None,
            vmx: Vmx::Usual,
            hardware: Hardware::default(),
            icount: Icount::Off,
            gdb: false,
            dir: dir.into(),
        }
    }

    /// The bundle's file in the machine's folder.
    pub(super) fn bundle_file(&self) -> PathBuf {
        self.dir.join("bundle.cpio")
    }

    /// The image's file in the machine's folder.
    pub(super) fn iso_file(&self) -> PathBuf {
        self.dir.join("umbra.iso")
    }

    /// The copy of the UEFI variables in the machine's folder.
    pub(super) fn uefi_variables_file(&self) -> PathBuf {
        self.dir.join("uefi-variables.fd")
    }

    /// Writes what the machine starts from into its folder.
    pub(super) fn prepare(&self, bundle: &Bundle) -> Result<()> {
        self.check()?;
        std::fs::create_dir_all(&self.dir)
            .with_context(|| format!("cannot create {}", self.dir.display()))?;
        std::fs::write(self.bundle_file(), bundle.archive()?)
            .with_context(|| format!("cannot write {}", self.bundle_file().display()))?;
        if matches!(self.boot, Boot::Iso | Boot::Uefi) {
            let work = self.dir.join("iso");
            image::write_iso(
                &self.umbra,
                &self.bundle_file(),
                self.vmx.grub_command(self.hardware.grub_command),
                &work,
                &self.iso_file(),
            )?;
            if let Some(len) = self.image_bytes {
                OpenOptions::new().write(true).open(self.iso_file())?.set_len(len)?;
            }
        }
        match self.kind {
            Kind::Bochs => bochs::write_configuration(self)?,
            Kind::Qemu if matches!(self.boot, Boot::Uefi | Boot::PxeUefi) => {
                firmware::copy_variables(&self.uefi_variables_file())?
            }
            Kind::Qemu => {}
        }
        Ok(())
    }

    /// Refuses what the emulator cannot do.
    pub fn check(&self) -> Result<()> {
        if !self.umbra.is_file() {
            bail!("{} is not there; `cargo xtask build` makes it", self.umbra.display());
        }
        if matches!(self.boot, Boot::Pxe | Boot::PxeUefi) != self.network.is_some() {
            bail!("a machine has a network if and only if it boots from it");
        }
        if self.icount == Icount::On && self.cpus != 1 {
            bail!("a machine that counts instructions has one CPU, not {}", self.cpus);
        }
        if self.vmx == Vmx::LockedOff && self.kind != Kind::Bochs {
            bail!("only in Bochs can VMX be locked off");
        }
        if self.kind == Kind::Bochs {
            if (Hardware { grub_command: "", ..self.hardware }) != Hardware::default() {
                bail!("only QEMU has other hardware than the usual");
            }
            if self.boot != Boot::Iso {
                bail!("Bochs starts Umbra from a BIOS image only; leave out --uefi or use QEMU");
            }
            if self.medium != Medium::Cd {
                bail!("Bochs starts Umbra from a CD only; leave out --medium or use QEMU");
            }
            if self.gdb {
                bail!("Debian's Bochs has no gdb stub; use QEMU with --gdb");
            }
            if self.icount == Icount::On {
                bail!("only QEMU counts instructions");
            }
        }
        Ok(())
    }

    /// A command line without arguments: the emulator, by default `usual`.
    pub(super) fn emulator(&self, usual: &str) -> CommandLine {
        self.program.as_ref().map_or_else(|| CommandLine::new(usual), CommandLine::new)
    }

    /// The emulator's command line, its serial line being `serial` (Bochs) or its standard input and output (QEMU).
    pub(super) fn command_line(&self, serial: &str) -> Result<CommandLine> {
        match self.kind {
            Kind::Qemu => qemu::command_line(self),
            Kind::Bochs => Ok(bochs::command_line(self, serial)),
        }
    }
}
