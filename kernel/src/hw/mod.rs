//! Hardware virtualization behind one trait: what SVM and VMX have in common, in vendor-neutral terms.
//!
//! The code above is generic over [`Vendor`] and monomorphised once for each, so an exit takes no dynamic
//! dispatch. Nothing outside the vendors' folders knows which one runs.
//!
//! Architecture Invariant: an [`Exit`] carries all that its handler needs; no handler reads a vendor structure.

pub mod cr4;
#[cfg(target_os = "none")]
pub mod extended;
#[cfg(test)]
pub(crate) mod fake;
pub mod shadowed;
pub mod svm;
pub mod tag;
pub mod vmx;

#[cfg(target_os = "none")]
pub use svm::is_stray_debug_trap;

use crate::cpu::features::Features;
use crate::devices::lapic::LocalApic;
use arrayvec::ArrayVec;
use bitflags::bitflags;
use core::fmt;
use mmu::EntryFormat;
use shadowed::ShadowFormat;

/// Index of a general-purpose register in [`HwVcpu::gprs`], in the order of instruction encodings.
pub mod gpr {
    /// RAX.
    pub const RAX: usize = 0;
    /// RCX.
    pub const RCX: usize = 1;
    /// RDX.
    pub const RDX: usize = 2;
    /// RBX.
    pub const RBX: usize = 3;
    /// RSP.
    pub const RSP: usize = 4;
    /// RSI.
    pub const RSI: usize = 6;
}

/// A segment register. `attributes` packs descriptor bits 47:40 into bits 7:0 and 55:52 into bits 11:8; P
/// clear means unusable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Type, S, DPL, P in bits 7:0; AVL, L, D/B, G in bits 11:8.
    pub attributes: u16,
    /// Limit in bytes.
    pub limit: u32,
    /// Base.
    pub base: u64,
}

impl Segment {
    /// Code segment runs 64-bit code if the CPU is in long mode.
    pub const LONG: u16 = 1 << 9;
    /// Default operand size is 32 bits.
    pub const DEFAULT_32: u16 = 1 << 10;

    /// A segment as real mode loads it: base is the selector times 16, limit 64 KiB, `kind` the attributes.
    pub const fn real_mode(selector: u16, attributes: u16) -> Self {
        Self { selector, attributes, limit: 0xffff, base: (selector as u64) << 4 }
    }
}

/// Segment registers by their encoding in instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentName {
    /// ES.
    Es,
    /// CS.
    Cs,
    /// SS.
    Ss,
    /// DS.
    Ds,
    /// FS.
    Fs,
    /// GS.
    Gs,
}

/// Base and limit of GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Architectural state that the virtualization hardware switches, general-purpose registers apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuState {
    /// ES, CS, SS, DS, FS, GS.
    pub segments: [Segment; 6],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: TableRegister,
    /// Interrupt descriptor table.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER as the guest sees it.
    pub efer: u64,
    /// DR6.
    pub dr6: u64,
    /// DR7.
    pub dr7: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// RIP.
    pub rip: u64,
}

impl CpuState {
    /// State after INIT or power-up (SDM vol. 3, table 9-1; APM vol. 2, table 14-1), but for general-purpose
    /// registers.
    pub fn reset() -> Self {
        // Type 3: read/write data, accessed; type 0xb: execute/read code, accessed; type 2: LDT; 0xb: busy TSS.
        const DATA: u16 = 0x93;
        const CODE: u16 = 0x9b;
        let data = Segment::real_mode(0, DATA);
        let mut cs = Segment::real_mode(0xf000, CODE);
        cs.base = 0xffff_0000;
        Self {
            segments: [data, cs, data, data, data, data],
            ldtr: Segment { selector: 0, attributes: 0x82, limit: 0xffff, base: 0 },
            tr: Segment { selector: 0, attributes: 0x8b, limit: 0xffff, base: 0 },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            rflags: 2,
            rip: 0xfff0,
        }
    }

    /// State in which a processor starts after SIPI with `vector` (SDM vol. 3, 9.4.4).
    pub fn startup(vector: u8) -> Self {
        let mut state = Self::reset();
        state.segments[SegmentName::Cs as usize] = Segment::real_mode(u16::from(vector) << 8, 0x9b);
        state.rip = 0;
        state
    }
}

/// An event that is delivered through the guest's IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// External interrupt.
    Interrupt(u8),
    /// Non-maskable interrupt.
    Nmi,
    /// Exception with its error code, if it has one.
    Exception(u8, Option<u32>),
}

/// A port access that exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)] // See `Exit`.
pub struct PortAccess {
    /// Port number.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub size: u8,
    /// What kind of access.
    pub kind: PortKind,
    /// Address of the next instruction.
    pub next_rip: u64,
}

/// A page fault of the processor's that exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)] // See `Exit`.
pub struct CpuPageFault {
    /// The error code, as far as hardware without SEV-SNP has it: bits 15:0.
    pub code: u16,
    /// The linear address.
    pub linear: u64,
}

/// An INVLPG that exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)] // See `Exit`.
pub struct Invlpg {
    /// Whether the hardware said the address.
    pub known: bool,
    /// The linear address.
    pub linear: u64,
}

bitflags! {
    /// Kinds of port accesses.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct PortKind: u8 {
        /// IN or INS.
        const IN = 1 << 0;
        /// INS or OUTS: to be emulated as an instruction.
        const STRING = 1 << 2;
    }
}

/// A nested page fault or EPT violation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)] // See `Exit`.
pub struct SecondStageFault {
    /// What happened there.
    pub cause: FaultCause,
    /// Guest-physical address.
    pub gpa: u64,
    /// The linear address that led there, where the hardware says it: VMX.
    pub linear: Option<u64>,
}

bitflags! {
    /// Causes of a second-stage fault; the first five are where a #PF error code has them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct FaultCause: u8 {
        /// The translation was present, but did not allow the access.
        const PRESENT = 1 << 0;
        /// The access was a write. A walk that sets accessed or dirty bits counts as one.
        const WRITE = 1 << 1;
        /// A reserved bit was set in an entry of ours.
        const RESERVED = 1 << 3;
        /// The access was an instruction fetch.
        const EXECUTE = 1 << 4;
        /// The fault hit a read or write of the guest's own page tables, not the final address.
        const TABLE_WALK = 1 << 5;
    }
}

/// Why the guest stopped running.
///
/// The layout is given so that an address shares its bytes with no smaller field of another variant: where it does, the
/// compiler keeps the value of every variant in pieces, and takes addresses apart and puts them together at each exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// A host interrupt, NMI, SMI or INIT is pending; it is taken once interrupts are let in.
    HostInterrupt,
    /// CPUID.
    Cpuid,
    /// RDMSR or WRMSR.
    Msr {
        /// WRMSR.
        write: bool,
    },
    /// Port access.
    Port(PortAccess),
    /// Nested page fault or EPT violation.
    SecondStage(SecondStageFault),
    /// HLT.
    Hlt,
    /// PAUSE in a loop.
    Pause,
    /// The CPU's own page fault, where shadow tables translate: the guest's, or one of the shadow.
    PageFault(CpuPageFault),
    /// INVLPG.
    InvalidatePage(Invlpg),
    /// MOV from a control register whose value the processor has not got.
    ReadCr {
        /// Its number.
        cr: u8,
        /// The general-purpose register that takes the value, where the hardware names it: VMX.
        gpr: Option<u8>,
    },
    /// MOV to a control register that is intercepted now.
    WriteCr {
        /// Its number.
        cr: u8,
        /// The general-purpose register with the value, where the hardware names it: VMX.
        gpr: Option<u8>,
    },
    /// A hardware task switch, which VMX leaves to software.
    TaskSwitch(TaskSwitch),
    /// An instruction that the hardware cannot execute in the guest's state, or that has no exit of its own: it is to be
    /// emulated.
    Emulate,
    /// XSETBV.
    Xsetbv,
    /// INVD or WBINVD: caches need no care, the instruction is skipped.
    CacheFlush,
    /// An instruction that this virtual CPU does not have: the guest gets #UD.
    Undefined,
    /// An instruction that this virtual CPU refuses: the guest gets #GP(0).
    Refused,
    /// An intercepted exception that goes back to the guest as it came.
    Exception(u8, Option<u32>),
    /// A machine check: the host's affair.
    MachineCheck,
    /// The guest ended an interrupt whose end the lent local APIC's owner must hear of, by an instruction that is completed;
    /// see [`LocalApic::ended`].
    ApicEoi(u8),
    /// The guest wrote a register of the lent local APIC with a value that the hardware leaves to software; the instruction
    /// is completed.
    ApicWrite {
        /// The register's number: its offset in the page divided by 16.
        register: u8,
        /// What was written.
        value: u32,
    },
    /// The log that [`HwVcpu::set_dirty_log`] turned on has no room left.
    DirtyLogFull,
    /// The guest can take an interrupt now.
    InterruptWindow,
    /// The guest may be able to take an NMI now.
    NmiWindow,
    /// The TSC has reached what [`HwVcpu::set_deadline`] asked for.
    Deadline,
    /// No entry was made, for the host has no memory left for the guest's tables.
    NoTableMemory,
    /// Triple fault.
    Shutdown,
    /// The hardware refused the guest's state; the reason is in words.
    InvalidState(&'static str),
    /// An exit that was not asked for.
    Unknown(u64),
}

/// What starts a hardware task switch. Intel SDM vol. 3, table 28-6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskSwitchCause {
    /// CALL.
    Call,
    /// IRET with NT set.
    Iret,
    /// JMP.
    Jump,
    /// A task gate in the IDT.
    Gate,
}

/// A hardware task switch that exited. The event whose delivery led through a task gate is in
/// [`HwVcpu::take_interrupted_event`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)] // See `Exit`.
pub struct TaskSwitch {
    /// Selector of the new task's TSS.
    pub selector: u16,
    /// What started it.
    pub cause: TaskSwitchCause,
    /// Address of the next instruction, where an instruction started it and the hardware says it.
    pub next_rip: Option<u64>,
}

/// Why this machine cannot run guests, as a sentence for its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Neither SVM nor VMX in CPUID.
    NoVirtualization,
    /// VM_CR.SVMDIS is set.
    SvmDisabledByFirmware,
    /// No nested paging.
    NoNestedPaging,
    /// IA32_FEATURE_CONTROL is locked without VMX.
    VmxDisabledByFirmware,
    /// VMX without EPT.
    NoExtendedPageTables,
    /// VMX without something that Umbra needs, in words.
    Unsuitable(&'static str),
    /// The CPU would not turn its extension on.
    NotEnabled(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoVirtualization => {
                "this CPU offers neither SVM nor VMX; run Umbra on a CPU with AMD-V, or in QEMU with -cpu max,+svm"
            }
            Self::SvmDisabledByFirmware => {
                "SVM is switched off in this machine's firmware; turn on \"SVM\" or \"AMD-V\" in its setup and boot again"
            }
            Self::NoNestedPaging => {
                "this CPU has SVM without nested paging; in QEMU add +npt to -cpu"
            }
            Self::VmxDisabledByFirmware => {
                "VMX is locked off in this machine's firmware; turn on \"VT-x\" or \"Intel Virtualization Technology\" in its \
                 setup and boot again"
            }
            Self::NoExtendedPageTables => {
                "this CPU has VMX without EPT; CPUs of 2009 and later have it"
            }
            Self::Unsuitable(what) => {
                return write!(f, "this CPU has {what}, with which Umbra cannot run guests; use a newer CPU");
            }
            Self::NotEnabled(why) => {
                return write!(f, "this CPU would not turn on {why}; please report this");
            }
        })
    }
}

/// Why a vCPU could not be made: the host has no memory left for its control structures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

/// What becomes of a capability that a virtualization extension may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Capability {
    /// The CPU has it, and Umbra uses it.
    Used,
    /// The CPU has it.
    Unused,
    /// The CPU has it not.
    Missing,
}

impl Capability {
    /// Of one that the CPU has or not, and that is used or not.
    pub const fn of(present: bool, used: bool) -> Self {
        match (present, used) {
            (true, true) => Self::Used,
            (true, false) => Self::Unused,
            (false, _) => Self::Missing,
        }
    }

    /// Of one that is used where it is present.
    pub const fn used(present: bool) -> Self {
        Self::of(present, true)
    }

    /// Of one that Umbra has no use for.
    pub const fn unused(present: bool) -> Self {
        Self::of(present, false)
    }
}

/// Capabilities by name, for the boot report.
pub type Capabilities = ArrayVec<(&'static str, Capability), 24>;

/// What a virtualization extension offers on a machine. One value, shared by all CPUs.
pub trait Vendor: Copy + fmt::Display + Send + Sync + 'static {
    /// The vCPU of this vendor.
    type Vcpu: HwVcpu;

    /// Format of second-stage tables.
    type Format: EntryFormat;

    /// Name for the log.
    fn name(&self) -> &'static str;

    /// Looks for the extension on this CPU and prepares what all CPUs share.
    fn detect(features: &Features) -> Result<Self, Refusal>;

    /// Turns the extension on for the CPU that runs this. Once on each CPU that is to run guests.
    fn enable_on_this_cpu(&self) -> Result<(), Refusal>;

    /// What the extension can do, by name.
    fn capabilities(&self) -> Capabilities;

    /// How many guests' address spaces a CPU's TLB tells apart, the host's included; 1 if it does not.
    fn tlb_tags(&self) -> u32;

    /// Whether the machine translates in two stages; if not, why.
    fn two_stages(&self) -> Result<(), Refusal>;

    /// The format of second-stage tables as this machine has it.
    fn format(&self) -> Self::Format;

    /// The formats of shadow tables.
    fn shadow_format(&self) -> ShadowFormat;

    /// Guest-physical pages that the hardware needs in a VM beside its RAM, read-only to the guest; empty if none. With
    /// `shadow` for a VM whose addresses are translated by shadow tables.
    fn guest_pages(&self, shadow: bool) -> &'static [GuestPage] {
        let _ = shadow;
        &[]
    }

    /// Makes a vCPU in reset state that translates as `translation` says and whose guest may set the bits `cr4` of CR4.
    fn new_vcpu(&self, translation: Translation, cr4: u64) -> Result<Self::Vcpu, OutOfMemory>;
}

/// Which tables the processor walks while a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Translation {
    /// The guest's own, and those of the second stage below them, whose root this is.
    TwoStages(u64),
    /// Shadows of the guest's own alone: [`HwVcpu::set_root`] says which, before the first entry.
    Shadow,
}

/// A page that the hardware needs at a guest-physical address; see [`Vendor::guest_pages`].
#[derive(Clone, Copy)]
pub struct GuestPage {
    /// Guest-physical address, page-aligned.
    pub gpa: u64,
    /// Writes its content into a zeroed page.
    pub fill: fn(&mut [u8; 4096]),
}

/// What runs on whichever extension the machine has.
pub trait OnVendor {
    /// Goes on with `vendor`, for good.
    fn run<V: Vendor>(self, vendor: V) -> !;
}

/// Takes the extension that this machine has, SVM or VMX, and goes on with it. Returns only to refuse.
#[cfg(target_os = "none")]
pub fn with_vendor(features: &Features, then: impl OnVendor) -> Refusal {
    if features.svm.is_some() {
        match svm::Svm::detect(features) {
            Ok(svm) => then.run(svm),
            Err(refusal) => refusal,
        }
    } else if features.vmx {
        match vmx::Vmx::detect(features) {
            Ok(vmx) => then.run(vmx),
            Err(refusal) => refusal,
        }
    } else {
        Refusal::NoVirtualization
    }
}

/// A vCPU as the hardware runs it.
///
/// State setters take effect at the next entry. Nothing here is safe to call from an interrupt handler.
pub trait HwVcpu: Send {
    /// Whether PAE's PDPTEs are in registers of their own, loaded when control registers are written. Under SVM's nested
    /// paging alone they are read from memory at each walk (APM vol. 2, 15.25.10).
    fn keeps_pdptes(&self) -> bool {
        false
    }

    /// General-purpose registers, valid between two runs; see [`gpr`].
    fn gprs(&self) -> &[u64; 16];
    /// General-purpose registers, to be changed.
    fn gprs_mut(&mut self) -> &mut [u64; 16];

    /// How a run ended, before anybody asked why.
    type Ended: Copy;
    /// Runs the guest until it exits, on the CPU with index `cpu`, which is the one that calls. Host interrupts must
    /// be off; they end the run, and stay pending.
    fn run(&mut self, cpu: usize) -> Self::Ended;
    /// Why a run ended; once, right after it. Apart from the run, so that what each exit needs can be done before the ways
    /// part.
    fn exit(&mut self, ended: Self::Ended) -> Exit;

    /// RIP.
    fn rip(&self) -> u64;
    /// Sets RIP.
    fn set_rip(&mut self, rip: u64);
    /// RFLAGS.
    fn rflags(&self) -> u64;
    /// Sets RFLAGS.
    fn set_rflags(&mut self, rflags: u64);
    /// CR0.
    fn cr0(&self) -> u64;
    /// Sets CR0, whose value the caller has checked. EFER.LMA and PDPTEs are the caller's, too.
    fn set_cr0(&mut self, cr0: u64);
    /// The same of a CR0 that differs from what it is in WP alone, in a vCPU in long mode that runs on
    /// [shadow tables](Translation::Shadow).
    #[inline]
    fn set_write_protection(&mut self, cr0: u64) {
        self.set_cr0(cr0);
    }
    /// A number that is another one, and never an earlier one, after each change of CR0, CR4 or EFER, those of CR0.WP and
    /// CR4.PGE by the functions for them apart. Zero, which says nothing, where they can change without an exit.
    #[inline]
    fn control_stamp(&self) -> u64 {
        0
    }
    /// CR2.
    fn cr2(&self) -> u64;
    /// PAE's PDPTE registers while they are in use, where the hardware keeps them.
    fn pdptes(&self) -> Option<[u64; 4]> {
        None
    }
    /// Sets PAE's PDPTE registers, where the hardware has such.
    fn set_pdptes(&mut self, pdptes: [u64; 4]) {
        let _ = pdptes;
    }
    /// Sets CR2.
    fn set_cr2(&mut self, cr2: u64);
    /// CR3.
    fn cr3(&self) -> u64;
    /// Sets CR3, whose value the caller has checked.
    fn set_cr3(&mut self, cr3: u64);
    /// CR4.
    fn cr4(&self) -> u64;
    /// Sets CR4, whose value the caller has checked.
    fn set_cr4(&mut self, cr4: u64);
    /// The same of a CR4 that differs from what it is in PGE alone, in a vCPU in long mode that runs on
    /// [shadow tables](Translation::Shadow).
    #[inline]
    fn set_global_pages(&mut self, cr4: u64) {
        self.set_cr4(cr4);
    }
    /// CR8.
    fn cr8(&self) -> u8;
    /// Sets CR8.
    fn set_cr8(&mut self, tpr: u8);
    /// EFER as the guest sees it.
    fn efer(&self) -> u64;
    /// Sets EFER, whose value the caller has checked.
    fn set_efer(&mut self, efer: u64);
    /// DR6.
    fn dr6(&self) -> u64;
    /// Sets DR6.
    fn set_dr6(&mut self, dr6: u64);
    /// DR7.
    fn dr7(&self) -> u64;
    /// Current privilege level.
    fn cpl(&self) -> u8;
    /// A segment register.
    fn segment(&self, name: SegmentName) -> Segment;
    /// Attributes of CS.
    #[inline]
    fn cs_attributes(&self) -> u16 {
        self.segment(SegmentName::Cs).attributes
    }
    /// Attributes of TR.
    fn tr_attributes(&self) -> u16 {
        self.state().tr.attributes
    }
    /// The instruction at RIP is going to be emulated: a hint to read at once what that needs, where reads are dear.
    #[inline]
    fn prepare_emulation(&mut self) {}
    /// Base of FS, GS, KernelGSBase and the system-call MSRs: those that load and save with the vCPU.
    fn switched_msr(&self, msr: u32) -> Option<u64>;
    /// Sets such an MSR; false if `msr` is not one of them.
    fn set_switched_msr(&mut self, msr: u32, value: u64) -> bool;
    /// Guest PAT.
    fn set_pat(&mut self, pat: u64);
    /// Sets what is added to the host's TSC when the guest reads it.
    fn set_tsc_offset(&mut self, offset: u64);

    /// Everything the hardware switches, general-purpose registers apart.
    fn state(&self) -> CpuState;
    /// Replaces that state; shadow and events stay.
    fn set_state(&mut self, state: &CpuState);
    /// Replaces that state and ends any shadow, blocking of NMIs or pending event, as INIT does.
    fn load_state(&mut self, state: &CpuState);

    /// Puts what the processor does not switch at an entry into this CPU's registers: the vCPU is about to run here.
    fn switch_in(&mut self) {}
    /// Takes that out of the registers again: another vCPU is about to run here.
    fn switch_out(&mut self) {}

    /// Instruction bytes that the hardware saved at the last exit; empty if it saved none.
    fn exit_insn_bytes(&self) -> &[u8];
    /// Address of the instruction after the one that exited, where the hardware says it.
    fn exit_next_rip(&self) -> Option<u64>;

    /// Whether a maskable interrupt may be injected now: RFLAGS.IF, no shadow, no event in the way.
    fn interrupts_open(&self) -> bool;
    /// Whether the guest is in the shadow of STI or MOV SS.
    fn in_shadow(&self) -> bool;
    /// Puts the guest into a shadow again that the hardware forgot.
    fn restore_shadow(&mut self);
    /// Ends the shadow, as each completed instruction does.
    fn clear_shadow(&mut self);
    /// What each completed instruction does: RIP is `next_rip`, and the shadow ends. RFLAGS, where TF and RF ask for more.
    #[inline]
    fn end_instruction(&mut self, next_rip: u64) -> u64 {
        self.set_rip(next_rip);
        self.clear_shadow();
        self.rflags()
    }
    /// Delivers `event` at the next entry. An NMI blocks further ones until the guest executes IRET.
    fn inject(&mut self, event: Event);
    /// Whether an event is set for the next entry.
    fn injecting(&self) -> bool;
    /// Takes back the event that is set for the next entry if the hardware cannot deliver it in the guest's state, so that
    /// software does: VMX without unrestricted guest, in real mode.
    fn take_undeliverable(&mut self) -> Option<Event> {
        None
    }
    /// Takes the event whose delivery the last exit interrupted, if it must be injected again; once, right after the run. An
    /// NMI of that kind blocks no more.
    fn take_interrupted_event(&mut self) -> Option<Event>;
    /// Asks for [`Exit::InterruptWindow`] as soon as the guest can take an interrupt, or withdraws that.
    fn request_interrupt_window(&mut self, on: bool);
    /// Whether an NMI handler runs: no NMI may be injected before its IRET.
    fn nmis_blocked(&self) -> bool;
    /// Blocks NMIs, as their delivery does, or ends that, as IRET does.
    fn set_nmis_blocked(&mut self, blocked: bool);
    /// Asks for an exit as soon as the guest's NMI handler has ended, or withdraws that.
    fn request_nmi_window(&mut self, on: bool);
    /// Makes writes of CR8 exit, or not.
    fn intercept_cr8_writes(&mut self, on: bool);
    /// Asks for [`Exit::Deadline`] when the host's TSC reaches `tsc`. False where the hardware has no timer for that, or none
    /// to rely on: then a host interrupt must end the run.
    fn set_deadline(&mut self, tsc: u64) -> bool {
        let _ = tsc;
        false
    }

    /// Whether the hardware can have the local APIC while the guest runs: it then delivers interrupts by itself, and the
    /// guest's accesses to what that takes do not exit.
    fn has_virtual_apic(&self) -> bool {
        false
    }
    /// Hands the hardware a local APIC that [can be exported](LocalApic::can_be_exported). The state in `apic` is out of
    /// date from the next entry on, until [`reclaim_apic`](Self::reclaim_apic).
    fn lend_apic(&mut self, apic: &LocalApic) {
        let _ = apic;
    }
    /// Takes it back, with what became of it. The hardware has it no more unless it is lent again.
    fn reclaim_apic(&mut self, apic: &mut LocalApic) {
        let _ = apic;
    }

    /// Makes the hardware log each page whose second-stage entry becomes dirty, or ends that and forgets what was not
    /// drained. False where it cannot, or there is no memory for the log. Nobody asks for it yet: `mmu` has no dirty log.
    fn set_dirty_log(&mut self, on: bool) -> bool {
        let _ = on;
        false
    }
    /// Empties the log: calls `each` with the guest-physical address of each page in it, the oldest first.
    fn drain_dirty_log(&mut self, each: &mut impl FnMut(u64)) {
        let _ = each;
    }

    /// Sets the root of the tables: those of the second stage, which flushes all translations; or, with
    /// [`Translation::Shadow`], those that take the place of the guest's own, where the caller says what to flush.
    fn set_root(&mut self, root: u64);
    /// Flushes the translations of one page of linear addresses. May be left to
    /// [`flush_tlb`](Self::flush_tlb), which also ends what the processor keeps of the tables themselves.
    fn flush_page(&mut self, linear: u64) {
        let _ = linear;
        self.flush_tlb();
    }
    /// Flushes all translations of this vCPU at the next entry.
    fn flush_tlb(&mut self);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn startup_begins_at_the_vectors_page() {
        let state = CpuState::startup(0x9a);
        let cs = state.segments[SegmentName::Cs as usize];
        assert_eq!((cs.selector, cs.base, cs.limit, state.rip), (0x9a00, 0x9a000, 0xffff, 0));
        assert_eq!(state.cr0 & 1, 0);
    }

    #[test]
    fn each_refusal_says_what_to_do() {
        for refusal in [
            Refusal::NoVirtualization,
            Refusal::SvmDisabledByFirmware,
            Refusal::NoNestedPaging,
            Refusal::VmxDisabledByFirmware,
            Refusal::NoExtendedPageTables,
            Refusal::Unsuitable("EPT without INVEPT"),
            Refusal::NotEnabled("VMX"),
        ] {
            let sentence = std::format!("{refusal}");
            assert!(sentence.contains("; "), "{sentence}");
            assert!(!sentence.ends_with('.'));
        }
    }
}
