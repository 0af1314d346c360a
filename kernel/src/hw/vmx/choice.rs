//! Which VMX controls Umbra uses: what it must have, what it takes where a CPU offers it. SDM vol. 3, 25.6 to
//! 25.8.
use super::capabilities::{EptVpid, VmxCapabilities, WRITE_BACK};
use super::controls::{EntryControls, ExitControls, Pin, Primary, Secondary};
use bitflags::Flags;
use core::fmt::{self, Write};

/// How guests' addresses are translated, and so in which modes the processor runs guests by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// By EPT, and where the CPU can, unpaged and in real mode, too.
    Unrestricted,
    /// By EPT, in protected, paged mode alone.
    Restricted,
    /// By shadow tables for CR3: in protected, paged mode alone.
    Shadow,
}

/// The controls of a vCPU in reset state, fit for a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Controls {
    /// Pin-based controls.
    pub pin: Pin,
    /// Primary processor-based controls.
    pub primary: Primary,
    /// Secondary processor-based controls.
    pub secondary: Secondary,
    /// VM-exit controls.
    pub exit: ExitControls,
    /// VM-entry controls; "IA-32e mode guest" follows the guest's EFER.LMA.
    pub entry: EntryControls,
    /// Secondary controls that the CPU offers and that are on only at times: while dirty pages are logged, while the
    /// processor has the local APIC.
    pub offered: Secondary,
    /// Whether the CPU has a VMX-preemption timer whose rest an exit can save. Off until someone sets it.
    pub preemption_timer: bool,
}

/// Required controls that a CPU lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Missing {
    controls: MissingControls,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MissingControls {
    Pin(Pin),
    Primary(Primary),
    Secondary(Secondary),
    Exit(ExitControls),
    Entry(EntryControls),
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.controls {
            MissingControls::Pin(set) => names(f, "pin-based", set.iter_names()),
            MissingControls::Primary(set) => names(f, "primary", set.iter_names()),
            MissingControls::Secondary(set) => names(f, "secondary", set.iter_names()),
            MissingControls::Exit(set) => names(f, "VM-exit", set.iter_names()),
            MissingControls::Entry(set) => names(f, "VM-entry", set.iter_names()),
        }
    }
}

/// Writes the names of controls as words.
fn names<T>(
    f: &mut fmt::Formatter<'_>,
    group: &str,
    set: impl Iterator<Item = (&'static str, T)>,
) -> fmt::Result {
    write!(f, "{group} VMX control")?;
    for (n, (name, _)) in set.enumerate() {
        f.write_str(if n == 0 { " " } else { ", " })?;
        name.chars().try_for_each(|letter| f.write_char(if letter == '_' { ' ' } else { letter }))?;
    }
    Ok(())
}

/// A set of controls that has its own capability MSR.
pub trait ControlSet: Flags<Bits = u32> + Copy {
    /// `set` as what a CPU lacks.
    fn missing(set: Self) -> Missing;
}

macro_rules! control_sets {
    ($($set:ident $variant:ident),*) => {
        $(impl ControlSet for $set {
            fn missing(set: Self) -> Missing {
                Missing { controls: MissingControls::$variant(set) }
            }
        })*
    };
}

control_sets!(Pin Pin, Primary Primary, Secondary Secondary, ExitControls Exit, EntryControls Entry);

/// The controls that a CPU grants: all that are wanted, those of `optional` that it has, and those that it
/// has fixed to 1. `allowed` is its capability MSR: bits that must be 1 below, that may be 1 above (SDM vol.
/// 3, A.3 to A.5).
pub fn adjust<C: ControlSet>(wanted: C, optional: C, allowed: u64) -> Result<C, Missing> {
    let (must, may) = (allowed as u32, (allowed >> 32) as u32);
    match wanted.bits() & !may {
        0 => Ok(C::from_bits_retain(wanted.bits() | optional.bits() & may | must)),
        lacking => Err(C::missing(C::from_bits_retain(lacking))),
    }
}

/// Controls of a capability MSR that may be 1.
fn possible<C: ControlSet>(allowed: u64) -> C {
    C::from_bits_retain((allowed >> 32) as u32)
}

impl Controls {
    /// The controls that Umbra runs guests with. If the guest runs unpaged and in real mode by itself,
    /// [`Secondary::UNRESTRICTED_GUEST`] is among them, and CR3 is the guest's own.
    pub fn choose(capabilities: &VmxCapabilities, mode: Mode) -> Result<Self, Missing> {
        let pin = adjust(
            Pin::EXTERNAL_INTERRUPT_EXITING | Pin::NMI_EXITING | Pin::VIRTUAL_NMIS,
            Pin::empty(),
            capabilities.pin,
        )?;
        let mode = match mode {
            Mode::Unrestricted if !capabilities.unrestricted_guest() => Mode::Restricted,
            mode => mode,
        };
        let primary = choose_primary(capabilities, mode)?;
        let secondary = choose_secondary(capabilities, mode)?;
        let exit = adjust(
            ExitControls::SAVE_DEBUG_CONTROLS | ExitControls::HOST_ADDRESS_SPACE_SIZE,
            ExitControls::SAVE_PAT
                | ExitControls::LOAD_PAT
                | ExitControls::SAVE_EFER
                | ExitControls::LOAD_EFER,
            capabilities.exit,
        )?;
        let entry = adjust(
            EntryControls::LOAD_DEBUG_CONTROLS | EntryControls::IA32E_GUEST,
            EntryControls::LOAD_PAT | EntryControls::LOAD_EFER,
            capabilities.entry,
        )?;
        Ok(Self {
            pin,
            primary,
            secondary,
            exit,
            entry: entry - EntryControls::IA32E_GUEST,
            offered: OFFERED & possible(capabilities.secondary),
            preemption_timer: possible::<Pin>(capabilities.pin).contains(Pin::PREEMPTION_TIMER)
                && possible::<ExitControls>(capabilities.exit).contains(ExitControls::SAVE_PREEMPTION_TIMER),
        })
    }

    /// Whether MOV to and from CR3 can run without exit: not on CPUs that fix those exits.
    pub fn cr3_can_run_free(capabilities: &VmxCapabilities) -> bool {
        capabilities.primary as u32 & CR3_EXITING.bits() == 0
    }

    /// Whether the processor can have a guest's local APIC. It needs the TPR shadow (SDM vol. 3, 27.2.1.1); and where
    /// interrupts in real mode are delivered by software, the processor must not.
    pub fn can_virtualize_apic(&self) -> bool {
        self.offered.contains(APIC_VIRTUALIZATION)
            && self.primary.contains(Primary::TPR_SHADOW)
            && self.secondary.contains(Secondary::UNRESTRICTED_GUEST)
    }

    /// Whether guests run unpaged and in real mode by themselves.
    pub fn unrestricted(&self) -> bool {
        self.secondary.contains(Secondary::UNRESTRICTED_GUEST)
    }

    /// Whether guests' addresses are translated by shadow tables for CR3.
    pub fn shadow(&self) -> bool {
        !self.secondary.contains(Secondary::EPT)
    }

    /// Whether the guest's EFER is loaded by entries, and the host's by exits, without MSR areas.
    pub fn switch_efer(&self) -> bool {
        self.entry.contains(EntryControls::LOAD_EFER)
            && self.exit.contains(ExitControls::LOAD_EFER | ExitControls::SAVE_EFER)
    }

    /// Whether the guest's PAT is loaded by entries, and the host's by exits, without MSR areas.
    pub fn switch_pat(&self) -> bool {
        self.entry.contains(EntryControls::LOAD_PAT)
            && self.exit.contains(ExitControls::LOAD_PAT | ExitControls::SAVE_PAT)
    }
}

/// Exits at MOV to and from CR3: on while a guest's CR3 is not the one that the processor uses.
pub const CR3_EXITING: Primary = Primary::CR3_LOAD_EXITING.union(Primary::CR3_STORE_EXITING);

/// The controls by which the processor has the guest's local APIC in x2APIC mode: TPR, EOI, self-IPI and the delivery of
/// what is requested. All or none of them are of use.
pub const APIC_VIRTUALIZATION: Secondary = Secondary::VIRTUALIZE_X2APIC
    .union(Secondary::APIC_REGISTER_VIRTUALIZATION)
    .union(Secondary::VIRTUAL_INTERRUPT_DELIVERY);

/// Controls that are on at times.
const OFFERED: Secondary = Secondary::PAGE_MODIFICATION_LOG.union(APIC_VIRTUALIZATION);

fn choose_primary(capabilities: &VmxCapabilities, mode: Mode) -> Result<Primary, Missing> {
    let possible: Primary = possible(capabilities.primary);
    let mut wanted = Primary::TSC_OFFSETTING
        | Primary::HLT_EXITING
        | Primary::MWAIT_EXITING
        | Primary::MONITOR_EXITING
        | Primary::RDPMC_EXITING
        | Primary::MSR_BITMAPS
        | Primary::SECONDARY_CONTROLS;
    // Off until an interrupt waits, but without it none could ever be injected late.
    let needed_later = Primary::INTERRUPT_WINDOW_EXITING | Primary::NMI_WINDOW_EXITING;
    wanted |= if possible.contains(Primary::UNCONDITIONAL_IO_EXITING) {
        Primary::UNCONDITIONAL_IO_EXITING
    } else {
        Primary::IO_BITMAPS
    };
    wanted |= if possible.contains(Primary::TPR_SHADOW) {
        Primary::TPR_SHADOW
    } else {
        Primary::CR8_LOAD_EXITING | Primary::CR8_STORE_EXITING
    };
    if mode != Mode::Unrestricted {
        // A guest starts unpaged, and then CR3 holds identity tables of the host.
        wanted |= CR3_EXITING;
    }
    if mode == Mode::Shadow {
        // INVPCID with it.
        wanted |= Primary::INVLPG_EXITING;
    }
    Ok(adjust(wanted | needed_later, Primary::empty(), capabilities.primary)? - needed_later)
}

fn choose_secondary(capabilities: &VmxCapabilities, mode: Mode) -> Result<Secondary, Missing> {
    let mut optional = Secondary::RDTSCP
        | Secondary::INVPCID
        | Secondary::XSAVES
        | Secondary::PAUSE_LOOP_EXITING
        | Secondary::ENCLS_EXITING;
    // A VPID is of use only with a way to flush it.
    if capabilities.ept_vpid.contains(EptVpid::INVVPID | EptVpid::INVVPID_ALL) {
        optional |= Secondary::VPID;
    }
    let mut wanted = Secondary::WBINVD_EXITING;
    if mode != Mode::Shadow {
        wanted |= Secondary::EPT;
        optional |= Secondary::MODE_BASED_EXECUTE;
    }
    if mode == Mode::Unrestricted {
        optional |= Secondary::UNRESTRICTED_GUEST;
    }
    adjust(wanted, optional, capabilities.secondary)
}

/// Why a CPU with VMX cannot run guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsuitable {
    /// No EPT.
    NoEpt,
    /// EPT structures cannot be write-back.
    NoWriteBackEpt,
    /// EPT does not have four levels.
    NoFourLevelEpt,
    /// No INVEPT, of one context or all.
    NoInvept,
    /// The processor does not access the VMCS and what it points to write-back, but with this memory type.
    MemoryType(u8),
    /// A control is missing.
    Missing(Missing),
}

impl fmt::Display for Unsuitable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoEpt => f.write_str("VMX without EPT"),
            Self::NoWriteBackEpt => f.write_str("EPT without write-back paging structures"),
            Self::NoFourLevelEpt => f.write_str("EPT without four-level tables"),
            Self::NoInvept => f.write_str("EPT without INVEPT"),
            Self::MemoryType(kind) => write!(f, "VMX structures of memory type {kind}, not write-back"),
            Self::Missing(missing) => write!(f, "VMX without the {missing}"),
        }
    }
}

/// Whether Umbra can run guests on a CPU, and with which controls.
pub fn examine(capabilities: &VmxCapabilities, mode: Mode) -> Result<Controls, Unsuitable> {
    if mode == Mode::Shadow {
        return examine_without_ept(capabilities, mode);
    }
    if !possible::<Secondary>(capabilities.secondary).contains(Secondary::EPT) {
        return Err(Unsuitable::NoEpt);
    }
    let ept = capabilities.ept_vpid;
    if !ept.contains(EptVpid::FOUR_LEVELS) {
        return Err(Unsuitable::NoFourLevelEpt);
    }
    if !ept.contains(EptVpid::WRITE_BACK) {
        return Err(Unsuitable::NoWriteBackEpt);
    }
    if !ept.contains(EptVpid::INVEPT) || !ept.intersects(EptVpid::INVEPT_SINGLE | EptVpid::INVEPT_ALL) {
        return Err(Unsuitable::NoInvept);
    }
    examine_without_ept(capabilities, mode)
}

fn examine_without_ept(capabilities: &VmxCapabilities, mode: Mode) -> Result<Controls, Unsuitable> {
    if capabilities.memory_type() != WRITE_BACK {
        return Err(Unsuitable::MemoryType(capabilities.memory_type()));
    }
    Controls::choose(capabilities, mode).map_err(Unsuitable::Missing)
}

#[cfg(test)]
mod tests {
    use super::super::capabilities::samples::{cpu, EMULATED, FIRST, NEHALEM, SKYLAKE};
    use super::*;

    #[test]
    fn controls_are_granted_as_the_manual_says() {
        // Bit 0 must be 1, bits 3:0 may be.
        let allowed = 0xf_0000_0001;
        let pin = |bits| Pin::from_bits_retain(bits);
        assert_eq!(adjust(pin(2), pin(0), allowed), Ok(pin(3)));
        assert_eq!(adjust(pin(2), pin(0x28), allowed), Ok(pin(0xb)), "optional ones where possible");
        assert_eq!(adjust(pin(0x20), pin(0), allowed), Err(Pin::missing(Pin::VIRTUAL_NMIS)));
    }

    #[test]
    fn every_capable_cpu_gets_legal_controls() {
        for (name, msrs) in [("Nehalem", NEHALEM), ("Skylake", SKYLAKE), ("emulated", EMULATED)] {
            let capabilities = cpu(&msrs);
            for mode in [Mode::Restricted, Mode::Unrestricted] {
                let controls = examine(&capabilities, mode).unwrap();
                for (bits, allowed) in [
                    (controls.pin.bits(), capabilities.pin),
                    (controls.primary.bits(), capabilities.primary),
                    (controls.secondary.bits(), capabilities.secondary),
                    (controls.secondary.bits() | controls.offered.bits(), capabilities.secondary),
                    (controls.exit.bits(), capabilities.exit),
                    (controls.entry.bits(), capabilities.entry),
                ] {
                    assert_eq!(allowed as u32 & !bits, 0, "{name}: a bit that must be 1");
                    assert_eq!(bits & !((allowed >> 32) as u32), 0, "{name}: a bit that must be 0");
                }
                assert!(controls.switch_efer() && controls.switch_pat(), "{name}");
                assert!(controls.secondary.contains(Secondary::EPT | Secondary::VPID), "{name}");
                assert!(controls.primary.contains(Primary::TPR_SHADOW | Primary::UNCONDITIONAL_IO_EXITING));
                assert!(!controls.primary.intersects(
                    Primary::INVLPG_EXITING
                        | Primary::RDTSC_EXITING
                        | Primary::INTERRUPT_WINDOW_EXITING
                        | Primary::CR8_LOAD_EXITING
                ));
                assert!(!controls.secondary.intersects(
                    Secondary::DESCRIPTOR_TABLE_EXITING
                        | Secondary::RDRAND_EXITING
                        | Secondary::RDSEED_EXITING
                        | Secondary::USER_WAIT
                        | OFFERED
                ));
                assert!(!controls.exit.contains(ExitControls::ACKNOWLEDGE_INTERRUPT));
                assert!(controls.preemption_timer, "{name}");
            }
        }
    }

    #[test]
    fn cr3_exits_as_long_as_the_guest_cannot_run_unpaged() {
        let on = Controls::choose(&cpu(&SKYLAKE), Mode::Unrestricted).unwrap();
        assert!(on.secondary.contains(Secondary::UNRESTRICTED_GUEST));
        assert!(!on.primary.intersects(CR3_EXITING));
        for controls in [
            Controls::choose(&cpu(&SKYLAKE), Mode::Restricted).unwrap(),
            Controls::choose(&cpu(&NEHALEM), Mode::Unrestricted).unwrap(),
        ] {
            assert!(!controls.secondary.contains(Secondary::UNRESTRICTED_GUEST));
            assert!(controls.primary.contains(CR3_EXITING));
        }
        assert!(Controls::cr3_can_run_free(&cpu(&NEHALEM)));
        assert!(!Controls::cr3_can_run_free(&cpu(&FIRST)));
    }

    #[test]
    fn what_newer_cpus_offer_is_told() {
        let skylake = Controls::choose(&cpu(&SKYLAKE), Mode::Unrestricted).unwrap();
        assert!(skylake.secondary.contains(
            Secondary::RDTSCP | Secondary::INVPCID | Secondary::XSAVES | Secondary::PAUSE_LOOP_EXITING
        ));
        let server_only = Secondary::APIC_REGISTER_VIRTUALIZATION | Secondary::VIRTUAL_INTERRUPT_DELIVERY;
        assert_eq!(skylake.offered, OFFERED - server_only);
        assert!(Controls::choose(&cpu(&EMULATED), Mode::Unrestricted).unwrap().offered.contains(server_only));
        let nehalem = Controls::choose(&cpu(&NEHALEM), Mode::Unrestricted).unwrap();
        assert_eq!(nehalem.offered, Secondary::VIRTUALIZE_X2APIC);
        assert!(skylake.secondary.contains(Secondary::MODE_BASED_EXECUTE));
        assert!(!nehalem.secondary.contains(Secondary::MODE_BASED_EXECUTE));
    }

    #[test]
    fn the_processor_gets_the_apic_whole_or_not_at_all() {
        let able =
            Controls { offered: OFFERED, ..Controls::choose(&cpu(&SKYLAKE), Mode::Unrestricted).unwrap() };
        assert!(able.can_virtualize_apic());
        for control in APIC_VIRTUALIZATION {
            assert!(!Controls { offered: OFFERED - control, ..able }.can_virtualize_apic(), "{control:?}");
        }
        let without_shadow = Controls { primary: able.primary - Primary::TPR_SHADOW, ..able };
        let restricted = Controls { secondary: able.secondary - Secondary::UNRESTRICTED_GUEST, ..able };
        assert!(!without_shadow.can_virtualize_apic() && !restricted.can_virtualize_apic());
    }

    #[test]
    fn fallbacks_where_a_control_is_missing() {
        let mut capabilities = cpu(&SKYLAKE);
        capabilities.primary &=
            !(u64::from((Primary::TPR_SHADOW | Primary::UNCONDITIONAL_IO_EXITING).bits()) << 32);
        capabilities.entry &= !(u64::from(EntryControls::LOAD_EFER.bits()) << 32);
        capabilities.exit &= !(u64::from(ExitControls::SAVE_PAT.bits()) << 32);
        capabilities.ept_vpid -= EptVpid::INVVPID;
        let controls = Controls::choose(&capabilities, Mode::Unrestricted).unwrap();
        assert!(controls
            .primary
            .contains(Primary::CR8_LOAD_EXITING | Primary::CR8_STORE_EXITING | Primary::IO_BITMAPS));
        assert!(!controls.switch_efer() && !controls.switch_pat());
        assert!(!controls.secondary.contains(Secondary::VPID));
    }

    #[test]
    fn unsuitable_cpus_say_why() {
        let sentence = |capabilities: &VmxCapabilities| {
            std::format!("{}", examine(capabilities, Mode::Unrestricted).unwrap_err())
        };
        assert_eq!(examine(&cpu(&FIRST), Mode::Unrestricted), Err(Unsuitable::NoEpt));
        let mut without = cpu(&SKYLAKE);
        without.primary &= !(u64::from((Primary::HLT_EXITING | Primary::MSR_BITMAPS).bits()) << 32);
        assert_eq!(sentence(&without), "VMX without the primary VMX control HLT EXITING, MSR BITMAPS");
        for (lacking, expected) in [
            (EptVpid::WRITE_BACK, Unsuitable::NoWriteBackEpt),
            (EptVpid::FOUR_LEVELS, Unsuitable::NoFourLevelEpt),
            (EptVpid::INVEPT, Unsuitable::NoInvept),
            (EptVpid::INVEPT_SINGLE | EptVpid::INVEPT_ALL, Unsuitable::NoInvept),
        ] {
            let mut capabilities = cpu(&SKYLAKE);
            capabilities.ept_vpid -= lacking;
            assert_eq!(examine(&capabilities, Mode::Unrestricted), Err(expected));
            assert!(sentence(&capabilities).starts_with("EPT without"));
        }
        let mut uncached = cpu(&SKYLAKE);
        uncached.basic &= !(0xf << 50);
        assert_eq!(examine(&uncached, Mode::Unrestricted), Err(Unsuitable::MemoryType(0)));
    }
}
