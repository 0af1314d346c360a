//! QEMU's command line.

use std::path::Path;

use anyhow::{Context, Result};

use super::accel::Acceleration;
use super::firmware;
use super::machine::{Boot, Icount, Machine, Medium};
use crate::exec::CommandLine;

/// The program.
pub(super) const PROGRAM: &str = "qemu-system-x86_64";

/// The processor of an emulated machine: everything that TCG can do, and SVM with nested paging.
const TCG_CPU: &str = "max,+svm,+npt";

/// The command line of a Linux in Umbra's place. Without mitigations it is at its fastest; -1 reboots at once after a panic,
/// which ends QEMU.
const LINUX_CMDLINE: &str = "console=ttyS0 quiet mitigations=off panic=-1";

pub(super) fn command_line(machine: &Machine) -> Result<CommandLine> {
    let line = base(machine.emulator(PROGRAM), machine);
    let line = acceleration(line, machine);
    let line = icount(line, machine);
    let line = debugger(line, machine);
    boot(line, machine)
}

/// The parts that do not depend on a choice: no device and no setting that we did not name, and the serial line on
/// standard input and output.
fn base(line: CommandLine, machine: &Machine) -> CommandLine {
    line.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-machine", machine.hardware.board, "-smp", &machine.hardware.smp(machine.cpus)])
        .args(["-m", &format!("{}M", machine.memory.whole_mib())])
        .args(machine.hardware.devices())
}

fn acceleration(line: CommandLine, machine: &Machine) -> CommandLine {
    let (accelerator, best_cpu) = match machine.acceleration {
        Acceleration::Kvm => ("kvm", "host"),
        Acceleration::Tcg => ("tcg", TCG_CPU),
    };
    line.args(["-accel", accelerator, "-cpu", machine.cpu.as_deref().unwrap_or(best_cpu)])
}

/// With the clock, the start date and the random numbers fixed as well, two runs are the same.
fn icount(line: CommandLine, machine: &Machine) -> CommandLine {
    match machine.icount {
        Icount::Off => line,
        Icount::On => line
            .args(["-icount", "shift=0,sleep=off"])
            .args(["-rtc", "base=2026-01-01,clock=vm"])
            .args(["-seed", "1"]),
    }
}

fn debugger(line: CommandLine, machine: &Machine) -> CommandLine {
    if machine.gdb {
        line.args(["-s", "-S"])
    } else {
        line
    }
}

fn boot(line: CommandLine, machine: &Machine) -> Result<CommandLine> {
    Ok(match machine.boot {
        Boot::Pvh => line.arg("-kernel").arg(&machine.umbra).arg("-initrd").arg(machine.bundle_file()),
        Boot::Bare => {
            line.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]).arg("-kernel").arg(&machine.umbra)
        }
        Boot::Linux => line
            .arg("-kernel")
            .arg(&machine.umbra)
            .arg("-initrd")
            .arg(machine.bundle_file())
            .args(["-append", LINUX_CMDLINE]),
        Boot::Iso => medium(line, machine),
        Boot::Uefi => medium(uefi(line, machine)?, machine),
        Boot::Pxe => network(line, machine)?,
        Boot::PxeUefi => network(uefi(line, machine)?, machine)?,
    })
}

fn network(line: CommandLine, machine: &Machine) -> Result<CommandLine> {
    let network = machine.network.as_ref().context("the machine has no network")?;
    Ok(network.add_to(line, machine.boot))
}

/// The firmware and the machine's copy of its variables.
fn uefi(line: CommandLine, machine: &Machine) -> Result<CommandLine> {
    let files = firmware::uefi_files().context(firmware::NO_UEFI)?;
    let flash = |read_only: &str, file: &Path| {
        format!("if=pflash,format=raw,readonly={read_only},file={}", in_a_list(file))
    };
    Ok(line
        .args(["-drive", &flash("on", &files.code)])
        .args(["-drive", &flash("off", &machine.uefi_variables_file())]))
}

/// The image, as the first thing to start from. What the machine writes to it is forgotten.
fn medium(line: CommandLine, machine: &Machine) -> CommandLine {
    let drive = format!("if=none,id=image,format=raw,snapshot=on,file={}", in_a_list(&machine.iso_file()));
    let line = line.args(["-drive", &drive]);
    match machine.medium {
        Medium::Cd => line.args(["-device", "ide-cd,drive=image,bootindex=0"]),
        Medium::Disk => line.args(["-device", "ide-hd,drive=image,bootindex=0"]),
        Medium::Usb => {
            line.args(["-device", "qemu-xhci", "-device", "usb-storage,drive=image,bootindex=0,removable=on"])
        }
    }
}

/// A file's name as a value in a list of options, where a comma is doubled.
pub(super) fn in_a_list(file: &Path) -> String {
    file.display().to_string().replace(',', ",,")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emulator::Network;
    use crate::size::Size;

    fn machine() -> Machine {
        Machine { umbra: "/t/umbra".into(), ..Machine::new("/t/run") }
    }

    #[test]
    fn the_plain_machine() {
        let line = command_line(&machine()).unwrap();
        assert_eq!(
            line.to_string(),
            "qemu-system-x86_64 -nodefaults -no-user-config -no-reboot -display none -machine q35 -smp 1 -m 2048M \
             -vga none -serial stdio -accel tcg -cpu max,+svm,+npt -kernel /t/umbra -initrd /t/run/bundle.cpio"
        );
    }

    #[test]
    fn choices_become_arguments() {
        let line =
            command_line(&Machine { cpus: 4, memory: Size::mib(512), gdb: true, ..machine() }).unwrap();
        assert_eq!((line.value_of("-smp"), line.value_of("-m")), (Some("4"), Some("512M")));
        assert!(line.has_arg("-s") && line.has_arg("-S"));
        let line = command_line(&Machine { cpu: Some("max,-svm".into()), ..machine() }).unwrap();
        assert_eq!(line.value_of("-cpu"), Some("max,-svm"));
        let line = command_line(&Machine { acceleration: Acceleration::Kvm, ..machine() }).unwrap();
        assert_eq!((line.value_of("-accel"), line.value_of("-cpu")), (Some("kvm"), Some("host")));
        assert!(!line.has_arg("-icount") && !line.has_arg("-S"));
    }

    #[test]
    fn counting_fixes_everything_that_varies() {
        let line = command_line(&Machine { icount: Icount::On, ..machine() }).unwrap();
        assert_eq!(line.value_of("-icount"), Some("shift=0,sleep=off"));
        assert_eq!(line.value_of("-rtc"), Some("base=2026-01-01,clock=vm"));
        assert_eq!(line.value_of("-seed"), Some("1"));
        assert_eq!(line.value_of("-smp"), Some("1"));
    }

    #[test]
    fn a_bare_guest_is_the_kernel_and_has_its_exit_port() {
        let line = command_line(&Machine { boot: Boot::Bare, ..machine() }).unwrap();
        assert_eq!(line.value_of("-kernel"), Some("/t/umbra"));
        assert_eq!(line.value_of("-device"), Some("isa-debug-exit,iobase=0xf4,iosize=4"));
        assert!(!line.has_arg("-initrd"));
    }

    #[test]
    fn linux_in_umbras_place_ends_when_it_panics() {
        let line = command_line(&Machine { boot: Boot::Linux, ..machine() }).unwrap();
        assert_eq!(line.value_of("-kernel"), Some("/t/umbra"));
        assert_eq!(line.value_of("-initrd"), Some("/t/run/bundle.cpio"));
        assert!(line.value_of("-append").unwrap().contains("panic=-1") && line.has_arg("-no-reboot"));
    }

    #[test]
    fn the_network_takes_the_place_of_the_kernel() {
        let network = Some(Network::user("/t/tree"));
        let line = command_line(&Machine { boot: Boot::Pxe, network, ..machine() }).unwrap();
        assert!(line.value_of("-netdev").unwrap().contains("tftp=/t/tree"));
        assert!(!line.has_arg("-kernel") && !line.has_arg("-cdrom"));
        assert!(command_line(&Machine { boot: Boot::Pxe, ..machine() }).is_err());
    }

    #[test]
    fn an_image_takes_the_place_of_the_kernel() {
        let drive = "if=none,id=image,format=raw,snapshot=on,file=/t/a,,b/umbra.iso";
        for (medium, device) in [
            (Medium::Cd, "ide-cd,drive=image,bootindex=0"),
            (Medium::Disk, "ide-hd,drive=image,bootindex=0"),
            (Medium::Usb, "usb-storage,drive=image,bootindex=0,removable=on"),
        ] {
            let machine = Machine { boot: Boot::Iso, medium, dir: "/t/a,b".into(), ..machine() };
            let line = command_line(&machine).unwrap();
            assert_eq!(line.value_of("-drive"), Some(drive));
            assert!(line.has_arg(device) && !line.has_arg("-kernel") && !line.has_arg("-initrd"), "{line}");
            assert_eq!(line.has_arg("qemu-xhci"), medium == Medium::Usb);
        }
    }
}
