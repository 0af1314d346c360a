//! What is unusual about an emulated machine's hardware, for tests of machines that are not like most.

/// The hardware beside processors and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hardware {
    /// QEMU's machine type with its properties, as `-machine` takes them.
    pub board: &'static str,
    /// Whether there is COM1. Without it QEMU's monitor has the emulator's standard input and output.
    pub com1: bool,
    /// Whether there is a VGA with a framebuffer.
    pub screen: bool,
    /// Processors that could be plugged in, beside those that are there.
    pub absent_cpus: u32,
    /// A command that GRUB executes before it loads Umbra; none if empty.
    pub grub_command: &'static str,
}

impl Default for Hardware {
    fn default() -> Self {
        Self { board: "q35", com1: true, screen: false, absent_cpus: 0, grub_command: "" }
    }
}

impl Hardware {
    /// The value of QEMU's `-smp` with `cpus` processors.
    pub(super) fn smp(&self, cpus: u32) -> String {
        match self.absent_cpus {
            0 => cpus.to_string(),
            absent => format!("{cpus},maxcpus={}", cpus + absent),
        }
    }

    /// QEMU's arguments for the serial line and the screen.
    pub(super) fn devices(&self) -> [&'static str; 4] {
        let serial = if self.com1 { "-serial" } else { "-monitor" };
        ["-vga", if self.screen { "std" } else { "none" }, serial, "stdio"]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_hardware_is_plain() {
        let usual = Hardware::default();
        assert_eq!(usual.smp(4), "4");
        assert_eq!(usual.devices(), ["-vga", "none", "-serial", "stdio"]);
    }

    #[test]
    fn unusual_hardware_becomes_arguments() {
        let unusual = Hardware { com1: false, screen: true, absent_cpus: 3, ..Hardware::default() };
        assert_eq!(unusual.smp(2), "2,maxcpus=5");
        assert_eq!(unusual.devices(), ["-vga", "std", "-monitor", "stdio"]);
    }
}
