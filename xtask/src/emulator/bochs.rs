//! Bochs's configuration and command line.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cpu::BochsCpu;
use super::machine::{Machine, Vmx};
use crate::exec::CommandLine;

/// The program.
pub(super) const PROGRAM: &str = "bochs";

/// The processor that offers most: only Bochs emulates VMX.
const BEST_CPU: BochsCpu = BochsCpu::SkylakeX;

/// Where the BIOS images are: distributions first, then Homebrew.
const SHARES: [&str; 3] = ["/usr/share/bochs", "/usr/local/share/bochs", "/opt/homebrew/share/bochs"];

/// Writes the configuration and the debugger's one command into the machine's folder.
pub(super) fn write_configuration(machine: &Machine) -> Result<()> {
    let share = SHARES.iter().map(Path::new).find(|dir| dir.join("BIOS-bochs-latest").is_file());
    let share = share.unwrap_or(Path::new(SHARES[0]));
    let write = |path: PathBuf, text: String| {
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    write(machine.dir.join("bochsrc"), configuration(machine, share))?;
    // Debian builds Bochs with its debugger, which stops before the first instruction: continue.
    write(machine.dir.join("bochs-debugger"), "c\n".into())
}

/// There is no display that shows nothing; a VNC server that waits for nobody comes closest. A plain VGA leaves Umbra
/// text mode, which takes less of the emulator's time than pixels.
fn configuration(machine: &Machine, share: &Path) -> String {
    let share = share.display();
    let memory = machine.memory.whole_mib();
    format!(
        "\
display_library: rfb, options=\"timeout=0\"
romimage: file={share}/{bios}
vgaromimage: file={share}/VGABIOS-lgpl-latest
vga: extension=none
cpu: model={cpu}, count={cpus}, ips=50000000, reset_on_triple_fault=0
memory: guest={memory}, host={memory}
clock: sync=none
boot: cdrom
ata0-master: type=cdrom, path=\"{iso}\", status=inserted
log: \"{log}\"
panic: action=fatal
error: action=ignore
info: action=ignore
",
        bios = match machine.vmx {
            Vmx::Usual => "BIOS-bochs-latest",
            Vmx::LockedOff => "BIOS-bochs-legacy",
        },
        cpu = machine.cpu.as_deref().unwrap_or(BEST_CPU.model()),
        cpus = machine.cpus,
        iso = machine.iso_file().display(),
        log = machine.dir.join("bochs.log").display(),
    )
}

/// The serial line is the terminal `serial`.
pub(super) fn command_line(machine: &Machine, serial: &str) -> CommandLine {
    machine
        .emulator(PROGRAM)
        .args(["-q", "-f"])
        .arg(machine.dir.join("bochsrc"))
        .arg("-rc")
        .arg(machine.dir.join("bochs-debugger"))
        .arg(format!("com1: enabled=1, mode=term, dev={serial}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::size::Size;

    #[test]
    fn the_configuration_describes_the_machine() {
        let machine = Machine { cpus: 2, memory: Size::mib(256), ..Machine::new("/t/run") };
        let text = configuration(&machine, Path::new("/usr/share/bochs"));
        for part in [
            "model=corei7_skylake_x, count=2",
            "guest=256, host=256",
            "path=\"/t/run/umbra.iso\"",
            "sync=none",
        ] {
            assert!(text.contains(part), "{part}");
        }
        let machine = Machine { cpu: Some("ryzen".into()), ..machine };
        assert!(configuration(&machine, Path::new("/usr/share/bochs")).contains("model=ryzen, count=2"));
        let machine = Machine { vmx: Vmx::LockedOff, ..machine };
        assert!(configuration(&machine, Path::new("/usr/share/bochs")).contains("/BIOS-bochs-legacy\n"));
    }

    #[test]
    fn the_command_line_names_the_serial_line() {
        let line = command_line(&Machine::new("/t/run"), "/dev/pts/7").to_string();
        assert_eq!(
            line,
            "bochs -q -f /t/run/bochsrc -rc /t/run/bochs-debugger 'com1: enabled=1, mode=term, dev=/dev/pts/7'"
        );
    }
}
