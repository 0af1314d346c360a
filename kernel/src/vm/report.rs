//! How a VM ends, and the one line that says why.
use core::fmt;

/// Why a VM was stopped by Umbra rather than by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// A third fault while a double fault was delivered.
    TripleFault,
    /// The hardware refused to run the guest's state.
    InvalidState(&'static str),
    /// An instruction on a device that the emulator does not do.
    Unsupported(&'static str),
    /// Instructions were fetched from where there is no RAM.
    FetchOutsideRam {
        /// Guest-physical address.
        gpa: u64,
    },
    /// Delivery of an event needed memory that is not RAM: the IDT, the GDT, the TSS or the stack.
    DeliveryOutsideRam {
        /// Guest-physical address.
        gpa: u64,
    },
    /// The vCPU made no progress: the same fault at the same place over and over.
    NoProgress {
        /// Guest-physical address.
        gpa: u64,
    },
    /// The host has no memory left for this guest's page tables.
    NoTableMemory,
    /// A reserved bit was found set in one of our own tables.
    CorruptTables {
        /// Guest-physical address.
        gpa: u64,
    },
    /// The processor reported a hardware error while the guest ran.
    MachineCheck,
    /// An exit that was not asked for.
    UnknownExit(u64),
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::TripleFault => f.write_str(
                "triple fault: an exception could not be delivered, nor the double fault after it",
            ),
            Self::InvalidState(why) => write!(f, "the processor refused to enter the guest: {why}"),
            Self::Unsupported(what) => write!(f, "instruction not emulated: {what}"),
            Self::FetchOutsideRam { gpa } => {
                write!(f, "instruction fetch from guest-physical {gpa:#x}, which is not RAM")
            }
            Self::DeliveryOutsideRam { gpa } => {
                write!(f, "event delivery through guest-physical {gpa:#x}, which is not RAM")
            }
            Self::NoProgress { gpa } => write!(f, "no progress at guest-physical {gpa:#x}"),
            Self::NoTableMemory => f.write_str("the host has no memory left for page tables"),
            Self::CorruptTables { gpa } => {
                write!(f, "reserved bit in a second-stage table of Umbra at guest-physical {gpa:#x}; please report this")
            }
            Self::MachineCheck => f.write_str("machine check: the processor reported a hardware error"),
            Self::UnknownExit(code) => {
                write!(f, "exit {code:#x}, which was not asked for; please report this")
            }
        }
    }
}

/// A stopped vCPU, for the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// Why.
    pub reason: StopReason,
    /// Index of the vCPU.
    pub vcpu: usize,
    /// Its RIP.
    pub rip: u64,
    /// Instruction bytes at RIP.
    pub bytes: [u8; 15],
    /// How many of them could be read.
    pub bytes_len: u8,
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (vcpu {}, rip {:#x}, bytes", self.reason, self.vcpu, self.rip)?;
        match &self.bytes[..usize::from(self.bytes_len.min(15))] {
            [] => f.write_str(" unreadable")?,
            bytes => bytes.iter().try_for_each(|byte| write!(f, " {byte:02x}"))?,
        }
        f.write_str(")")
    }
}

/// How a VM ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// ACPI S5.
    PoweredOff,
    /// Reset by the guest.
    Reset,
    /// The exit device was written.
    ExitPort(u32),
    /// All vCPUs halted with interrupts off: nothing can wake them.
    Halted,
    /// Umbra stopped it.
    Stopped(Stop),
}

impl End {
    /// Exit status that the run ends with if this is the worst end of any VM.
    pub fn status(&self) -> u8 {
        match *self {
            Self::PoweredOff | Self::Reset | Self::Halted => 0,
            // As QEMU's isa-debug-exit: an odd number, so that it is never taken for a plain success.
            Self::ExitPort(value) => (value << 1 | 1) as u8,
            Self::Stopped(_) => 64,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("powered off"),
            Self::Reset => f.write_str("reset"),
            Self::ExitPort(value) => write!(f, "exit port wrote {value:#04x}"),
            Self::Halted => f.write_str("halted with interrupts off"),
            Self::Stopped(stop) => write!(f, "stopped: {stop}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::string::ToString;

    fn stop(reason: StopReason, bytes: &[u8]) -> Stop {
        let mut all = [0; 15];
        all[..bytes.len()].copy_from_slice(bytes);
        Stop { reason, vcpu: 1, rip: 0x10_0000, bytes: all, bytes_len: bytes.len() as u8 }
    }

    #[test]
    fn a_report_names_vcpu_rip_and_bytes() {
        let end = End::Stopped(stop(StopReason::Unsupported("fxsave"), &[0x0f, 0xae, 0x00]));
        assert_eq!(
            end.to_string(),
            "stopped: instruction not emulated: fxsave (vcpu 1, rip 0x100000, bytes 0f ae 00)"
        );
        let end = stop(StopReason::FetchOutsideRam { gpa: 0xf000_0000 }, &[]);
        assert!(end
            .to_string()
            .ends_with("0xf0000000, which is not RAM (vcpu 1, rip 0x100000, bytes unreadable)"));
    }

    #[test]
    fn exit_port_statuses_are_those_of_isa_debug_exit() {
        for (value, status) in [(0, 1), (1, 3), (0x10, 0x21), (0x7f, 0xff), (0x80, 1)] {
            assert_eq!(End::ExitPort(value).status(), status);
        }
        assert_eq!(End::PoweredOff.status(), 0);
        assert_eq!(End::Stopped(stop(StopReason::TripleFault, &[])).status(), 64);
    }
}
