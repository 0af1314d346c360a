//! What the emulator needs of a vCPU: registers, segments, linear memory and ports, as one small trait.
use super::decode::{Gpr, Seg};
use crate::hw::CpuState;
use crate::vm::control_regs::{Change, GeneralProtection, Limits, Now};

/// Execution mode as far as it changes decoding, addressing or exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Real mode (CR0.PE = 0), 16-bit code. Exceptions carry no error code.
    Real,
    /// Virtual-8086 mode, 16-bit code at CPL 3.
    Vm86,
    /// Protected mode or compatibility mode with CS.D = 0.
    Protected16,
    /// Protected mode or compatibility mode with CS.D = 1.
    Protected32,
    /// 64-bit mode (EFER.LMA = 1 and CS.L = 1).
    Long64,
}

impl Mode {
    /// The mode that CR0, EFER, RFLAGS and the attributes of CS select. AMD APM vol. 2, 1.3 and 4.8.
    #[must_use]
    pub fn of(cr0: u64, efer: u64, rflags: u64, cs: Attributes) -> Self {
        const CR0_PE: u64 = 1;
        const EFER_LMA: u64 = 1 << 10;
        if cr0 & CR0_PE == 0 {
            Self::Real
        } else if efer & EFER_LMA != 0 && cs.long() {
            Self::Long64
        } else if efer & EFER_LMA == 0 && rflags & super::flags::VM != 0 {
            Self::Vm86
        } else if cs.big() {
            Self::Protected32
        } else {
            Self::Protected16
        }
    }

    /// Real or virtual-8086 mode: segments are an 8086's, and there are no VEX prefixes.
    #[must_use]
    pub fn is_8086(self) -> bool {
        matches!(self, Self::Real | Self::Vm86)
    }

    /// Default operand and address size of the code, in bits.
    #[must_use]
    pub fn bitness(self) -> u32 {
        match self {
            Self::Real | Self::Vm86 | Self::Protected16 => 16,
            Self::Protected32 => 32,
            Self::Long64 => 64,
        }
    }
}

/// Segment attributes in the packed form of the VMCB: type in bits 3:0, S 4, DPL 6:5, P 7, AVL 8, L 9, D/B 10,
/// G 11. AMD APM vol. 2, 15.5.1 and 4.7. A segment that cannot be used (null selector) has P = 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes(pub u16);

impl Attributes {
    const ACCESSIBLE: u16 = 1 << 1; // code: readable; data: writable
    const EXPAND_DOWN: u16 = 1 << 2;
    const CODE: u16 = 1 << 3;
    const PRESENT: u16 = 1 << 7;

    /// P: the segment is loaded and usable.
    #[must_use]
    pub fn present(self) -> bool {
        self.0 & Self::PRESENT != 0
    }
    /// L: 64-bit code.
    #[must_use]
    pub fn long(self) -> bool {
        self.0 & (1 << 9) != 0
    }
    /// D/B: 32-bit code, 32-bit stack pointer, or 4 GiB upper bound of an expand-down segment.
    #[must_use]
    pub fn big(self) -> bool {
        self.0 & (1 << 10) != 0
    }
    /// Data segment whose valid offsets lie above the limit.
    #[must_use]
    pub fn expand_down(self) -> bool {
        self.0 & (Self::CODE | Self::EXPAND_DOWN) == Self::EXPAND_DOWN
    }
    /// Data segment, or code segment that may be read.
    #[must_use]
    pub fn readable(self) -> bool {
        self.0 & Self::CODE == 0 || self.0 & Self::ACCESSIBLE != 0
    }
    /// Writable data segment.
    #[must_use]
    pub fn writable(self) -> bool {
        self.0 & (Self::CODE | Self::ACCESSIBLE) == Self::ACCESSIBLE
    }
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Attributes of the descriptor.
    pub attributes: Attributes,
    /// Limit in bytes (granularity already applied).
    pub limit: u32,
    /// Linear base address.
    pub base: u64,
}

/// Why memory is accessed, which decides the permissions of the guest's walk and its #PF error code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// The read of an operand that is written afterwards: permission to write is checked, and a fault reports a
    /// write (W/R = 1), as the processor does for a read-modify-write instruction.
    ReadModify,
    /// Read of a system structure (the TSS) with supervisor rights whatever the CPL; an implicit access to SMAP.
    System,
    /// Write of a system structure (a TSS, a descriptor's accessed or busy bit), otherwise like `System`.
    SystemWrite,
    /// Write to a stack at this privilege level, which the CPU is just about to enter.
    WriteAs(u8),
}

impl AccessKind {
    /// The access needs write permission.
    #[must_use]
    pub fn is_write(self) -> bool {
        matches!(self, Self::Write | Self::ReadModify | Self::SystemWrite | Self::WriteAs(_))
    }

    /// The processor makes the access by itself, with supervisor rights.
    #[must_use]
    pub fn is_system(self) -> bool {
        matches!(self, Self::System | Self::SystemWrite)
    }
}

/// One access of an instruction to linear memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Why.
    pub kind: AccessKind,
    /// This operand is the only memory the instruction touches (for a repeated instruction: its first iteration),
    /// so what the exit says about the faulting access is about this one. See [`KnownOperand`].
    pub sole: bool,
}

/// What a nested page fault already told about the faulting operand, kept by the [`Cpu`] for the length of one
/// exit so that it may skip the guest walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownOperand {
    /// Guest-physical address of the faulting access.
    pub gpa: u64,
    /// Its linear address, where the hardware reports one (VMX; not SVM).
    pub linear: Option<u64>,
    /// The processor had checked the guest's page tables for a write.
    pub write: bool,
}

impl KnownOperand {
    /// The guest-physical address of an access of `size` bytes at `linear`, if it must be the access that faulted:
    /// the instruction's only operand, at the same offset in its page, inside that page, and not asking for more
    /// than the processor had already granted. `None`: walk.
    #[must_use]
    pub fn translate(&self, linear: u64, size: u8, access: Access) -> Option<u64> {
        let offset = linear & 0xfff;
        let same = match self.linear {
            Some(known) => known == linear,
            None => true,
        };
        (access.sole
            && same
            && matches!(access.kind, AccessKind::Read | AccessKind::Write | AccessKind::ReadModify)
            && (self.write || !access.kind.is_write())
            && self.gpa & 0xfff == offset
            && offset + u64::from(size) <= 0x1000)
            .then_some(self.gpa)
    }
}

/// An exception to inject into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31. AMD APM vol. 2, 8.2.
    pub vector: u8,
    /// Error code to push; `None` for vectors without one and in real mode.
    pub error_code: Option<u32>,
    /// The faulting linear address of a #PF.
    pub cr2: Option<u64>,
}

impl Exception {
    /// #DE, divide error.
    pub const DIVIDE: Self = Self { vector: 0, error_code: None, cr2: None };
    /// #BR, BOUND range exceeded.
    pub const BOUND_RANGE: Self = Self { vector: 5, error_code: None, cr2: None };
    /// #NM, device not available.
    pub const DEVICE_NOT_AVAILABLE: Self = Self { vector: 7, error_code: None, cr2: None };
    /// #MF, x87 floating-point exception pending.
    pub const X87_PENDING: Self = Self { vector: 16, error_code: None, cr2: None };
    /// #UD, invalid opcode.
    pub const INVALID_OPCODE: Self = Self { vector: 6, error_code: None, cr2: None };

    /// A #PF with its error code and linear address.
    #[must_use]
    pub fn page_fault(error_code: u32, linear: u64) -> Self {
        Self { vector: 14, error_code: Some(error_code), cr2: Some(linear) }
    }
}

/// Why an access, and with it the instruction, did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The guest takes this exception.
    Exception(Exception),
    /// Something changed underneath (a slot, a page-table entry): enter the guest again and let it fault anew.
    /// Only before any part of the access has taken effect.
    Retry,
    /// The VM has to stop; whoever answered knows why.
    Stop,
    /// The emulator does not do this.
    Unsupported(&'static str),
}

impl From<Exception> for Fault {
    fn from(exception: Exception) -> Self {
        Self::Exception(exception)
    }
}

/// What the emulator asks of a vCPU's x87 unit. None of it takes a pending x87 exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum X87Action {
    /// Initializes the unit, as FNINIT.
    Initialize,
    /// Clears the exception flags, as FNCLEX.
    ClearExceptions,
    /// Answers the status word.
    Status,
    /// Answers the control word.
    Control,
    /// Loads the control word.
    LoadControl(u16),
}

/// The vCPU that an instruction is emulated on. The kernel implements it over the VMCB or VMCS, the guest walk and
/// the device bus; tests implement it over arrays.
///
/// # Memory
///
/// `size` is 1, 2, 4 or 8 bytes; values are little-endian and zero-extended. The emulator has applied segmentation,
/// canonical and alignment checks: `linear..linear + size` never wraps, neither at 2^64 nor, outside 64-bit mode,
/// at 4 GiB. The implementation does paging: walk, permissions for [`Cpu::cpl`], RAM or device.
///
/// An access that crosses a page is split by the implementation. Both parts are translated and checked before a byte
/// of either moves, the lower first, so a fault has no effect; a #PF in the upper part reports the first
/// byte of the upper page in CR2. The parts then move in ascending order, and a device behind one of them sees an
/// access of that part's length, possibly 3, 5, 6 or 7 bytes or misaligned: such an access reaches the device as
/// consecutive byte accesses, lowest first, and counts as one for everything above. An access inside one
/// page reaches the device whole, aligned or not.
pub trait Cpu {
    /// A general register, all 64 bits.
    fn gpr(&self, gpr: Gpr) -> u64;
    /// Sets all 64 bits of a general register.
    fn set_gpr(&mut self, gpr: Gpr, value: u64);
    /// RIP of the instruction.
    fn rip(&self) -> u64;
    /// Sets RIP; called once, after everything else of the instruction has taken effect.
    fn set_rip(&mut self, rip: u64);
    /// RFLAGS.
    fn rflags(&self) -> u64;
    /// Sets RFLAGS. VM and reserved bits never change.
    fn set_rflags(&mut self, rflags: u64);
    /// Current privilege level (SVM: VMCB.CPL; VMX: DPL of SS).
    fn cpl(&self) -> u8;
    /// Execution mode, see [`Mode::of`].
    fn mode(&self) -> Mode;
    /// CR0 (MP, EM, TS, NE and AM are looked at).
    fn cr0(&self) -> u64;
    /// CR4 (VME, PVI and TSD are looked at).
    fn cr4(&self) -> u64;
    /// A segment register.
    fn segment(&self, seg: Seg) -> Segment;
    /// Width of canonical addresses: 57 with CR4.LA57, else 48.
    fn linear_bits(&self) -> u32 {
        48
    }
    /// Ends the interrupt shadow of a preceding STI or MOV SS.
    fn clear_interrupt_shadow(&mut self);
    /// Begins the interrupt shadow of an STI that set IF, a MOV SS or a POP SS: no interrupt before the next
    /// instruction's end.
    fn set_interrupt_shadow(&mut self);
    /// An interrupt that the guest could take now is waiting: a repeated instruction pauses.
    fn interrupt_pending(&self) -> bool {
        false
    }

    /// Reads memory; the bits above `size` bytes of the answer are zero.
    fn read(&mut self, linear: u64, size: u8, access: Access) -> Result<u64, Fault>;
    /// Writes the low `size` bytes of `value`.
    fn write(&mut self, linear: u64, size: u8, value: u64, access: Access) -> Result<(), Fault>;
    /// Whether a [`Cpu::write`] to the same place would fault, without writing. The guest's accessed and dirty bits
    /// may be set. Asked before a port or a device is read whose value would be lost by a fault.
    fn probe_write(&mut self, linear: u64, size: u8, access: Access) -> Result<(), Fault>;
    /// Whether a [`Cpu::read`] of the same place would fault, without reading (a device would notice).
    fn probe_read(&mut self, linear: u64, size: u8, access: Access) -> Result<(), Fault>;
    /// Atomically replaces `old` by `new` (`size` up to 16, naturally aligned or not); false: memory held
    /// something else and is unchanged. The emulator has read `old` just before. Where `linear` is device memory,
    /// `new` is written and the answer is true, so that a locked instruction is one read and one write of the
    /// device (16 bytes: two writes of 8, lower first). A misaligned operand that crosses a page needs no
    /// atomicity across the pages if none of them is a page that other vCPUs' walks read.
    fn compare_exchange(
        &mut self,
        linear: u64,
        size: u8,
        old: u128,
        new: u128,
        access: Access,
    ) -> Result<bool, Fault>;

    /// Reads `size` (1, 2 or 4) bytes from a port. The emulator has checked IOPL and the TSS's permission map.
    fn port_in(&mut self, port: u16, size: u8) -> Result<u32, Fault>;
    /// Writes `size` (1, 2 or 4) bytes to a port.
    fn port_out(&mut self, port: u16, size: u8, value: u32) -> Result<(), Fault>;

    /// The time-stamp counter as the guest reads it.
    fn tsc(&mut self) -> u64;
    /// TSC_AUX; `None` without RDTSCP.
    fn tsc_aux(&self) -> Option<u32>;

    /// Whether the guest has RDRAND, or RDSEED (`seed`).
    fn has_random(&self, seed: bool) -> bool {
        let _ = seed;
        false
    }
    /// A number of the processor's generator; `None`: none at the moment.
    fn random(&mut self, seed: bool) -> Option<u64> {
        let _ = seed;
        None
    }

    /// Acts on the x87 unit. The emulator has checked CR0; the answer is the word asked for, and 0 where none is.
    /// `None` where the unit cannot be reached, which makes these instructions unsupported.
    fn x87(&mut self, action: X87Action) -> Option<u16> {
        let _ = action;
        None
    }

    /// The low 128 bits of a vector register; `None` where they cannot be reached, which makes SSE loads and
    /// stores unsupported.
    fn xmm(&mut self, index: u8) -> Option<u128> {
        let _ = index;
        None
    }
    /// Sets the low 128 bits of a vector register, the rest unchanged; false where that cannot be done.
    /// Called with a register whose [`Cpu::xmm`] was `Some`.
    fn set_xmm(&mut self, index: u8, value: u128) -> bool {
        let _ = (index, value);
        false
    }

    /// Everything that system instructions change: segments, tables, control and debug registers, RFLAGS, RIP.
    fn state(&self) -> CpuState;
    /// Replaces all of that at once. CPL is the DPL of SS (0 in real mode). RFLAGS may change in any bit, EFER only
    /// in LMA. The emulator has checked the values and asks for the flush of translations itself.
    fn set_state(&mut self, state: &CpuState);
    /// What the guest's CPU allows in control registers.
    fn limits(&self) -> Limits;
    /// All translations become invalid.
    fn flush(&mut self);
    /// Translations of the page of `linear` become invalid; more may.
    fn invalidate(&mut self, linear: u64) {
        let _ = linear;
        self.flush();
    }
    /// INVPCID of `kind` 0 to 3, its operands checked: more translations may become invalid than it names.
    fn invalidate_context(&mut self, kind: u8, pcid: u16, linear: u64) {
        let _ = (kind, pcid, linear);
        self.flush();
    }
    /// Makes a write of a control register take effect, with PDPTEs and the flush of translations; #GP for PDPTEs that
    /// the processor would refuse.
    fn change_controls(&mut self, now: &Now, change: &Change) -> Result<(), GeneralProtection>;
    /// The four PDPTEs that `cr3` names; `None` where no registers keep them.
    fn read_pdptes(&mut self, cr3: u64) -> Option<[u64; 4]>;
    /// Loads those registers.
    fn set_pdptes(&mut self, pdptes: [u64; 4]);
    /// CR8, the task priority.
    fn cr8(&self) -> u8;
    /// Sets CR8.
    fn set_cr8(&mut self, value: u8);
    /// DR0 to DR3.
    fn breakpoint(&self, index: u8) -> u64;
    /// Sets DR0 to DR3.
    fn set_breakpoint(&mut self, index: u8, address: u64);
    /// Reads an MSR; `None`: #GP.
    fn read_msr(&mut self, msr: u32) -> Option<u64>;
    /// Writes an MSR with everything that follows; false: #GP.
    fn write_msr(&mut self, msr: u32, value: u64) -> bool;
    /// CPUID: EAX, EBX, ECX, EDX.
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4];
    /// XCR0.
    fn xcr0(&self) -> u64;
    /// Sets XCR0; false: #GP.
    fn set_xcr0(&mut self, value: u64) -> bool;
    /// The CPU halts once the instruction, a HLT, is complete.
    fn halt(&mut self);
    /// An IRET completed, which ends the blocking of NMIs.
    fn unblock_nmi(&mut self) {}
}
