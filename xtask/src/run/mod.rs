//! `run`: boots Umbra with a guest whose console is this terminal.

mod chord;
mod script;
mod terminal;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, Context, Result};
use regex::bytes::Regex;

use self::terminal::{End, Limits};
use crate::build::Images;
use crate::bundle::Bundle;
use crate::emulator::{
    check_model, line_regex, Accel, Boot, Emulator, Kind, Machine, Medium, Messages, Network,
};
use crate::guest::description;
use crate::pxe::tree::{self, Contents};
use crate::setup::{self, Component};
use crate::size::Size;
use crate::{build, paths, say};

/// The status of a run that ended without Umbra's word on it.
const NO_VERDICT: u8 = 70;

/// What of the machine's memory a bundle must leave to Umbra.
const UMBRA_NEEDS: Size = Size::mib(32);

/// The command line of `run`.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Run the virtual machines that this umbra.toml describes (its files are looked for beside it), or those of a bundle
    #[arg(long, value_name = "FILE", conflicts_with_all = ["kernel", "initrd", "cmdline"])]
    pub vm: Option<PathBuf>,
    /// Run this kernel: a bzImage, a PVH or a Multiboot 1 ELF file [default: Debian's Linux]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The kernel's initial ramdisk [default: BusyBox with Debian's Linux, else none]
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line [default: console=ttyS0]
    #[arg(long, value_name = "TEXT")]
    pub cmdline: Option<String>,
    /// How the guest's addresses are translated: by nested page tables, or by shadows of its own [default: direct]
    #[arg(long, value_enum, conflicts_with = "vm")]
    pub mmu: Option<MmuMode>,
    /// Processors of the machine that Umbra runs on
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=255))]
    pub cpus: u32,
    /// Memory of the machine that Umbra runs on
    #[arg(long, value_name = "SIZE", default_value = "2G")]
    pub memory: Size,
    /// Emulate the machine (tcg) or use KVM, which must offer nested virtualization
    #[arg(long, value_enum, default_value_t)]
    pub accel: Accel,
    /// The emulator
    #[arg(long, value_enum, default_value_t)]
    pub emulator: Kind,
    /// The emulator's processor: one of `qemu-system-x86_64 -cpu help`, with features, or of `bochs -help cpu`
    /// [default: the one that offers most]
    #[arg(long, value_name = "MODEL")]
    pub cpu: Option<String>,
    /// Boot by GRUB on UEFI
    #[arg(long)]
    pub uefi: bool,
    /// Boot by GRUB from an ISO image on a BIOS
    #[arg(long, conflicts_with = "uefi")]
    pub iso: bool,
    /// What the image is on, with --iso or --uefi
    #[arg(long, value_enum, default_value_t)]
    pub medium: Medium,
    /// Boot over the network: by iPXE and GRUB on a BIOS, by UEFI's own PXE and GRUB with --uefi
    #[arg(long, conflicts_with = "iso")]
    pub pxe: bool,
    /// Stop before the first instruction and wait for gdb
    #[arg(long)]
    pub gdb: bool,
    /// End with status 0 as soon as the console shows a match (^ and $ are the ends of a line)
    #[arg(long, value_name = "REGEX", value_parser = regex_argument)]
    pub until: Option<Regex>,
    /// End with status 1 after this many seconds
    #[arg(long, value_name = "S", value_parser = clap::value_parser!(u64).range(1..=31_536_000))]
    pub timeout: Option<u64>,
}

/// The key `mmu` of umbra.toml.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum MmuMode {
    /// Nested page tables.
    #[default]
    Direct,
    /// Shadow tables.
    Shadow,
}

fn regex_argument(text: &str) -> Result<Regex, String> {
    line_regex(text).map_err(|error| {
        let reason = error.to_string();
        format!(
            "not a regular expression: {}",
            reason.lines().last().unwrap_or_default().trim_start_matches("error: ")
        )
    })
}

impl Options {
    /// How Umbra gets into the machine.
    fn boot(&self) -> Boot {
        match (self.pxe, self.uefi, self.iso || self.emulator == Kind::Bochs) {
            (true, false, _) => Boot::Pxe,
            (true, true, _) => Boot::PxeUefi,
            (false, true, _) => Boot::Uefi,
            (false, false, true) => Boot::Iso,
            (false, false, false) => Boot::Pvh,
        }
    }

    /// What this run needs to be installed.
    fn components(&self) -> Vec<Component> {
        let mut needed = vec![Component::Target];
        needed.push(match self.emulator {
            Kind::Qemu => Component::Qemu,
            Kind::Bochs => Component::Bochs,
        });
        match self.boot() {
            Boot::Pvh | Boot::Bare | Boot::Linux => {}
            Boot::Iso | Boot::Pxe => needed.push(Component::Grub),
            Boot::Uefi | Boot::PxeUefi => needed.extend([Component::Uefi, Component::Grub]),
        }
        if self.vm.is_none() && self.kernel.is_none() {
            needed.push(Component::Linux);
        }
        needed
    }

    /// Refuses, before anything is installed or built, what cannot work.
    fn check(&self) -> Result<()> {
        if self.emulator == Kind::Bochs && (self.uefi || self.pxe || self.gdb || self.accel == Accel::Kvm) {
            bail!("Bochs emulates a BIOS machine without a network: --uefi, --pxe, --gdb and --accel kvm need --emulator qemu");
        }
        if self.medium != Medium::Cd
            && (!matches!(self.boot(), Boot::Iso | Boot::Uefi) || self.emulator == Kind::Bochs)
        {
            bail!("--medium says what an image is on: it needs --iso or --uefi, and --emulator qemu");
        }
        if self.memory < UMBRA_NEEDS {
            bail!(
                "--memory {} is too little for a machine; give Umbra and its guest 1G or more",
                self.memory
            );
        }
        for file in [&self.vm, &self.kernel, &self.initrd].into_iter().flatten() {
            let shown = paths::display(file);
            match file.metadata() {
                Ok(data) if data.is_dir() => bail!("{shown} is a folder; a file is wanted"),
                Ok(_) => {}
                Err(error) => bail!("cannot read {shown}: {error}"),
            }
        }
        if let Some(vm) = &self.vm {
            self.check_size(&Bundle::load(vm)?)?;
        }
        Ok(())
    }

    fn check_size(&self, bundle: &Bundle) -> Result<()> {
        let needed = bundle.size_bytes().saturating_add(UMBRA_NEEDS.bytes());
        if needed > self.memory.bytes() {
            bail!(
                "the guest's files are {} MiB, which a machine with --memory {} cannot hold beside Umbra; give it more",
                bundle.size_bytes().div_ceil(1 << 20),
                self.memory
            );
        }
        Ok(())
    }
}

/// Sets up what is missing, builds, boots and stays until the run ends; the run's status.
pub fn run(options: &Options) -> Result<ExitCode> {
    options.check()?;
    let ready = setup::ensure(&options.components())?;
    if let Some(model) = &options.cpu {
        check_model(options.emulator, model)?;
    }
    let images = build::build(ready.compiler()?)?;
    let dir = paths::target_dir().join("run");
    let bundle = match &options.vm {
        Some(vm) => Bundle::load(vm)?,
        None => {
            let request = description::Request {
                kernel: options.kernel.clone(),
                initrd: options.initrd.clone(),
                mmu: options.mmu.unwrap_or_default(),
                cmdline: options.cmdline.clone(),
            };
            description::write(&request, ready.linux.as_ref(), &dir.join("guest"))?
        }
    };
    options.check_size(&bundle)?;
    let (acceleration, why) = options.accel.choose();
    if let Some(why) = why.filter(|_| options.emulator == Kind::Qemu) {
        say!("{why}");
    }
    let network = if options.pxe { Some(network(&bundle, &images, &dir)?) } else { None };
    let machine = Machine {
        network,
        kind: options.emulator,
        boot: options.boot(),
        medium: options.medium,
        cpus: options.cpus,
        memory: options.memory,
        acceleration,
        cpu: options.cpu.clone(),
        gdb: options.gdb,
        ..Machine::new(dir)
    };
    let emulator = Emulator::start(&machine, &bundle, Messages::Shown)?;
    if options.gdb {
        say!("the machine waits for gdb: gdb -ex 'target remote :1234' {}", paths::display(&machine.umbra));
    }
    let limits = Limits { until: options.until.clone(), timeout: options.timeout.map(Duration::from_secs) };
    let end = terminal::join(emulator, &limits).context("the run was broken off")?;
    let (status, sentence) = verdict(end, options);
    if let Some(sentence) = sentence {
        say!("{sentence}");
    }
    Ok(ExitCode::from(status))
}

/// A network that has the tree with this bundle.
fn network(bundle: &Bundle, images: &Images, dir: &Path) -> Result<Network> {
    let tree = dir.join("pxe");
    let contents = Contents {
        umbra: &images.umbra,
        server: None,
        http: None,
        default: Some(bundle.archive()?),
        machines: Vec::new(),
    };
    tree::write(&tree, &contents)?;
    say!("the machine boots from the tree {}", paths::display(&tree));
    Ok(Network::user(tree))
}

/// The status of the command, and what to say about it.
fn verdict(end: End, options: &Options) -> (u8, Option<String>) {
    let waited = options.until.as_ref().map(|regex| format!("/{}/ was not seen", regex.as_str()));
    match (end, waited) {
        (End::Seen, _) => (0, None),
        (End::Left, _) => (0, Some("left the guest; the machine is switched off".into())),
        (End::Signal(signal), _) => (128 + signal as u8, Some(format!("ended by signal {signal}"))),
        (End::TimedOut, waited) => {
            let what = waited.unwrap_or_else(|| "the run did not end".into());
            (1, Some(format!("{what} within {} s", options.timeout.unwrap_or_default())))
        }
        (End::Umbra(status), None) => (status, None),
        (End::Umbra(status), Some(waited)) => {
            (status.max(1), Some(format!("{waited} before the run ended (status {status})")))
        }
        (End::Emulator(how), _) => {
            let program = match options.emulator {
                Kind::Qemu => "QEMU",
                Kind::Bochs => "Bochs (its log is target/run/bochs.log)",
            };
            let sentence = if how.success() {
                "the machine was reset or switched off without Umbra's last line".into()
            } else {
                format!("{program} ended ({how}) without Umbra's last line")
            };
            (NO_VERDICT, Some(sentence))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: Options,
    }

    fn parse(args: &[&str]) -> Result<Options, String> {
        Cli::try_parse_from(["run"].iter().chain(args))
            .map(|cli| cli.options)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_plain_run_boots_linux_in_qemu() {
        let options = parse(&[]).unwrap();
        assert_eq!((options.cpus, options.memory), (1, Size::mib(2048)));
        assert_eq!(options.boot(), Boot::Pvh);
        assert_eq!(options.components(), [Component::Target, Component::Qemu, Component::Linux]);
        assert!(options.check().is_ok());
    }

    #[test]
    fn a_run_asks_only_for_what_it_needs() {
        let options = parse(&["--uefi", "--kernel", "k"]).unwrap();
        assert_eq!(options.boot(), Boot::Uefi);
        use Component::{Bochs, Grub, Qemu, Target, Uefi};
        assert_eq!(options.components(), [Target, Qemu, Uefi, Grub]);
        let options = parse(&["--pxe", "--kernel", "k"]).unwrap();
        assert_eq!((options.boot(), options.components()), (Boot::Pxe, vec![Target, Qemu, Grub]));
        let options = parse(&["--pxe", "--uefi", "--kernel", "k"]).unwrap();
        assert_eq!((options.boot(), options.components()), (Boot::PxeUefi, vec![Target, Qemu, Uefi, Grub]));
        let options = parse(&["--emulator", "bochs", "--vm", "x.toml"]).unwrap();
        assert_eq!(options.boot(), Boot::Iso);
        assert_eq!(options.components(), [Target, Bochs, Grub]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (args, words) in [
            (&["--memory", "lots"][..], "`lots` is not a size"),
            (&["--until", "(x"], "unclosed group"),
            (&["--cpus", "0"], "0"),
            (&["--timeout", "soon"], "soon"),
            (&["--vm", "a", "--kernel", "b"], "cannot be used with"),
            (&["--iso", "--uefi"], "cannot be used with"),
            (&["--iso", "--medium", "tape"], "tape"),
            (&["--iso", "--pxe"], "cannot be used with"),
            (&["--mmu", "shadow", "--vm", "a"], "cannot be used with"),
            (&["--mmu", "none"], "none"),
            (&["--accel", "hvf"], "hvf"),
            (&["--cpu"], "--cpu <MODEL>"),
        ] {
            let error = parse(args).unwrap_err();
            assert!(error.contains(words), "{args:?}: {error}");
        }
        for (args, words) in [
            (&["--emulator", "bochs", "--uefi"][..], "need --emulator qemu"),
            (&["--medium", "usb"], "needs --iso or --uefi"),
            (&["--medium", "disk", "--emulator", "bochs"], "--emulator qemu"),
            (&["--emulator", "bochs", "--pxe"], "need --emulator qemu"),
            (&["--kernel", "/nonexistent"], "/nonexistent"),
            (&["--initrd", "/"], "is a folder"),
            (&["--vm", "/"], "is a folder"),
            (&["--memory", "16M"], "too little"),
        ] {
            let error = parse(args).unwrap().check().unwrap_err().to_string();
            assert!(error.contains(words), "{args:?}: {error}");
        }
    }

    #[test]
    fn files_larger_than_the_machine_are_refused() {
        let options = parse(&["--memory", "64M"]).unwrap();
        assert!(options.check_size(&Bundle::new("").file("a", vec![0; 32 << 20])).is_ok());
        let error =
            options.check_size(&Bundle::new("").file("a", vec![0; 33 << 20])).unwrap_err().to_string();
        assert!(error.contains("33 MiB") && error.contains("--memory 64M"), "{error}");
    }

    #[test]
    fn the_status_is_umbras() {
        let plain = parse(&[]).unwrap();
        assert_eq!(verdict(End::Umbra(0), &plain), (0, None));
        assert_eq!(verdict(End::Umbra(65), &plain).0, 65);
        assert_eq!(verdict(End::Left, &plain).0, 0);
        assert_eq!(verdict(End::Signal(15), &plain).0, 143);
        assert_eq!(verdict(End::Emulator(ExitStatus::from_raw(0)), &plain).0, NO_VERDICT);
        assert_eq!(verdict(End::Emulator(ExitStatus::from_raw(6)), &plain).0, NO_VERDICT);
    }

    #[test]
    fn until_asks_for_a_sight() {
        let until = parse(&["--until", "^ready", "--timeout", "30"]).unwrap();
        assert_eq!(verdict(End::Seen, &until), (0, None));
        let (status, sentence) = verdict(End::TimedOut, &until);
        assert_eq!((status, sentence.as_deref()), (1, Some("/^ready/ was not seen within 30 s")));
        let (status, sentence) = verdict(End::Umbra(0), &until);
        assert_eq!(
            (status, sentence.as_deref()),
            (1, Some("/^ready/ was not seen before the run ended (status 0)"))
        );
        assert_eq!(verdict(End::Umbra(64), &until).0, 64);
    }
}
