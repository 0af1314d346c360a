//! The local APIC of one vCPU: xAPIC registers, x2APIC MSRs, priorities, local vector table and timer.
//!
//! The model is complete in software and never looks at a clock: calls that need time get `now_ns`, nanoseconds on
//! the VM's clock, and `tsc`, the guest's TSC. What a register access must cause elsewhere (a message on the bus,
//! an EOI broadcast) comes back as an [`ApicAction`] for the caller to carry out.
//!
//! Choices where the architecture leaves one: the APIC ID is read-only; version 0x14 with six LVT entries, without
//! EOI-broadcast suppression; IPIs are edge triggered whatever the ICR says, as on every processor since the
//! Pentium 4; there is no focus processor.
//!
//! Intel SDM vol. 3, chapter 11 (chapter 10 in older editions) is cited as "SDM"; AMD APM vol. 2, chapter 16.
use super::apic_bus::{
    ApicMessage, ApicPort, DeliveryMode, Destination, Identity, Requests, Trigger, FIRST_LEGAL_VECTOR,
};

pub use timer::{Deadline, Timer, TimerMode, MIN_PERIODIC_INTERVAL_NS};

mod page;
mod timer;
mod vectors;

pub use page::{ApicPage, Exported};
pub use vectors::VectorSet;

/// The access raises #GP(0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gp;

// ---- Registers ----

/// Register numbers: MMIO offset / 16, or x2APIC MSR - 0x800 (SDM tables 11-1 and 11-6).
mod reg {
    pub(super) const ID: u32 = 0x02;
    pub(super) const VERSION: u32 = 0x03;
    pub(super) const TPR: u32 = 0x08;
    pub(super) const APR: u32 = 0x09;
    pub(super) const PPR: u32 = 0x0a;
    pub(super) const EOI: u32 = 0x0b;
    pub(super) const REMOTE_READ: u32 = 0x0c;
    pub(super) const LDR: u32 = 0x0d;
    pub(super) const DFR: u32 = 0x0e;
    pub(super) const SVR: u32 = 0x0f;
    pub(super) const ISR: u32 = 0x10;
    pub(super) const ISR_LAST: u32 = 0x17;
    pub(super) const TMR: u32 = 0x18;
    pub(super) const TMR_LAST: u32 = 0x1f;
    pub(super) const IRR: u32 = 0x20;
    pub(super) const IRR_LAST: u32 = 0x27;
    pub(super) const ESR: u32 = 0x28;
    pub(super) const ICR: u32 = 0x30;
    pub(super) const ICR_HIGH: u32 = 0x31;
    pub(super) const LVT: u32 = 0x32;
    pub(super) const LVT_LAST: u32 = 0x37;
    pub(super) const INITIAL_COUNT: u32 = 0x38;
    pub(super) const CURRENT_COUNT: u32 = 0x39;
    pub(super) const DIVIDE: u32 = 0x3e;
    pub(super) const SELF_IPI: u32 = 0x3f;
}

/// First x2APIC MSR.
pub const X2APIC_MSR_FIRST: u32 = 0x800;
/// Last x2APIC MSR that can have a meaning.
pub const X2APIC_MSR_LAST: u32 = 0x83f;

/// IA32_APIC_BASE: this is the bootstrap processor (SDM 11.4.4).
pub const APIC_BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode (SDM 11.12.1).
pub const APIC_BASE_EXTD: u64 = 1 << 10;
/// IA32_APIC_BASE: globally enabled.
pub const APIC_BASE_EN: u64 = 1 << 11;
const APIC_BASE_RESET: u64 = crate::vm::layout::LAPIC_START | APIC_BASE_EN;

/// Six LVT entries (highest index 5), integrated APIC version 0x14.
const VERSION: u32 = 5 << 16 | 0x14;

const SVR_ENABLE: u32 = 1 << 8;
const SVR_MASK: u32 = 0x3ff;
const SVR_RESET: u32 = 0xff;
const DFR_FLAT: u32 = 0xffff_ffff;
const DFR_ONES: u32 = 0x0fff_ffff;

const LVT_MASKED: u32 = 1 << 16;
const LVT_POLARITY_LOW: u32 = 1 << 13;
const LVT_REMOTE_IRR: u32 = 1 << 14;
const LVT_LEVEL: u32 = 1 << 15;
const LVT_DELIVERY_STATUS: u32 = 1 << 12;

const LVT_COUNT: usize = 6;
const LVT_TIMER: usize = 0;
const LVT_LINT0: usize = 3;
const LVT_LINT1: usize = 4;
const LVT_ERROR: usize = 5;
/// Bits that software may set in each entry: timer, thermal, performance counter, LINT0, LINT1, error.
const LVT_WRITABLE: [u32; LVT_COUNT] =
    [0x0007_00ff, 0x0001_07ff, 0x0001_07ff, 0x0001_a7ff, 0x0001_a7ff, 0x0001_00ff];

/// ESR: an IPI with a vector below 16 was asked for (SDM 11.5.3).
const ESR_SEND_ILLEGAL: u32 = 1 << 5;
/// ESR: an interrupt with a vector below 16 arrived.
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
/// ESR: a reserved register was accessed.
const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;
const ESR_MASK: u32 = ESR_SEND_ILLEGAL | ESR_RECEIVE_ILLEGAL | ESR_ILLEGAL_REGISTER;

/// Bits of the ICR's low half that xAPIC software may set.
const ICR_LOW_WRITABLE: u32 = 0x000c_cfff;
/// Bits of the ICR that x2APIC software must leave clear. Bit 12, delivery status in xAPIC mode, is let through.
const ICR_X2APIC_RESERVED: u64 = 0xfff3_2000;
const ICR_LOGICAL: u64 = 1 << 11;
const ICR_ASSERT: u64 = 1 << 14;
const ICR_LEVEL: u64 = 1 << 15;

// ---- State ----

/// An input pin of the local APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lint {
    /// INTR: the output of the 8259 pair.
    Lint0,
    /// NMI.
    Lint1,
}

/// Everything that a save keeps. Plain data; [`LocalApic::restore`] makes its invariants hold again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LapicState {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Task-priority register.
    pub tpr: u8,
    /// Logical destination register, as written in xAPIC mode.
    pub ldr: u32,
    /// Destination format register.
    pub dfr: u32,
    /// Spurious-interrupt vector register.
    pub svr: u32,
    /// Error status as read.
    pub esr: u32,
    /// Errors since the last write of the ESR.
    pub esr_pending: u32,
    /// Interrupt command register; the destination is in bits 63:56 in xAPIC mode, 63:32 in x2APIC mode.
    pub icr: u64,
    /// Local vector table: timer, thermal, performance counter, LINT0, LINT1, error.
    pub lvt: [u32; LVT_COUNT],
    /// Interrupt request register.
    pub irr: VectorSet,
    /// In-service register.
    pub isr: VectorSet,
    /// Trigger mode register.
    pub tmr: VectorSet,
    /// The timer.
    pub timer: Timer,
    /// Levels of the two input pins.
    pub lint: [bool; 2],
    /// An ExtINT message waits for the CPU.
    pub extint: bool,
    /// NMI, SMI or INIT raised by a local interrupt and not yet fetched by [`LocalApic::sync`].
    pub requests: Requests,
}

/// What a register access causes outside the APIC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum ApicAction {
    /// Nothing.
    None,
    /// A level-triggered interrupt of this vector ended: tell the I/O APICs.
    Eoi(u8),
    /// Send this message on the bus.
    Send(ApicMessage),
}

// ---- Device ----

/// A local APIC.
#[derive(Clone, Debug)]
pub struct LocalApic {
    state: LapicState,
    /// Highest vector in IRR; 0 when empty, since vectors below 16 never get in.
    irr_top: u8,
    /// Highest vector in ISR, likewise.
    isr_top: u8,
    ppr: u8,
    /// vCPU index and APIC ID.
    id: u8,
    /// Bits of IA32_APIC_BASE that must be clear.
    base_reserved: u64,
    identity: Identity,
    published: Identity,
}

impl LocalApic {
    /// An APIC after power-up for the vCPU of index and APIC ID `id`; `bsp` marks the bootstrap processor,
    /// `phys_bits` is the guest's physical-address width.
    pub fn new(id: u8, bsp: bool, phys_bits: u8) -> Self {
        let state = LapicState::reset(APIC_BASE_RESET | if bsp { APIC_BASE_BSP } else { 0 });
        let above = u64::MAX.checked_shl(u32::from(phys_bits)).unwrap_or(0);
        let mut apic = Self {
            state,
            irr_top: 0,
            isr_top: 0,
            ppr: 0,
            id,
            base_reserved: above | 0x2ff & !APIC_BASE_BSP,
            identity: Identity::DISABLED,
            published: Identity::DISABLED,
        };
        apic.rebuild();
        apic
    }

    /// Power-up reset (SDM 11.4.7.1).
    pub fn reset(&mut self) {
        self.state = LapicState::reset(APIC_BASE_RESET | self.state.base & APIC_BASE_BSP);
        self.rebuild();
    }

    /// INIT reset: as power-up, but IA32_APIC_BASE and with it the mode stay (SDM 11.4.7.3, 11.12.5.1). The levels of
    /// the input pins are not the APIC's to change.
    pub fn init_reset(&mut self) {
        let lint = self.state.lint;
        self.state = LapicState::reset(self.state.base);
        self.state.lint = lint;
        self.rebuild();
    }

    /// The state to save. The mailbox is not in it: [`sync`](Self::sync) first.
    pub fn save(&self) -> LapicState {
        self.state.clone()
    }

    /// Takes over a saved state; impossible values in it become possible ones.
    pub fn restore(&mut self, state: &LapicState) {
        self.state = state.clone();
        self.state.sanitize();
        self.state.base &= !self.base_reserved;
        self.rebuild();
    }

    /// Recomputes everything derived from the state.
    fn rebuild(&mut self) {
        self.irr_top = self.state.irr.highest();
        self.isr_top = self.state.isr.highest();
        self.refresh_identity();
        self.refresh_ppr();
    }

    // -- Running a vCPU --

    /// Publishes what changed in this APIC and empties the mailbox: vectors go to IRR, the rest is returned. To be
    /// called before each entry to the guest and before the guest looks at a register. Two compares and a load
    /// when there is nothing to do.
    ///
    /// On [`Requests::init`] the caller resets the CPU and calls [`init_reset`](Self::init_reset), when and if
    /// the CPU takes INITs.
    #[inline]
    pub fn sync(&mut self, port: &ApicPort) -> Requests {
        if self.identity != self.published {
            self.published = self.identity;
            port.publish(self.identity);
        }
        if port.is_empty() && self.state.requests.is_empty() {
            return Requests::NONE;
        }
        self.drain(port)
    }

    fn drain(&mut self, port: &ApicPort) -> Requests {
        let state = &mut self.state;
        let requests = port.take(|group, pending, level| {
            state.irr.merge(group, pending);
            state.tmr.assign(group, pending, level);
        });
        self.irr_top = self.state.irr.highest();
        if requests.bits() & Requests::EXTINT != 0 {
            self.state.extint = true;
        }
        if requests.bits() & Requests::ILLEGAL_VECTOR != 0 {
            self.error(ESR_RECEIVE_ILLEGAL);
        }
        let local = core::mem::take(&mut self.state.requests);
        Requests::from_bits(requests.bits() | local.bits())
    }

    /// Forces the next [`sync`](Self::sync) to publish, for a port that lost what it was told.
    pub fn republish(&mut self) {
        self.published = Identity::DISABLED;
    }

    /// The vector to inject, if the highest request outranks the processor priority (SDM 11.8.4).
    #[inline]
    pub fn pending_interrupt(&self) -> Option<u8> {
        (self.irr_top >> 4 > self.ppr >> 4).then_some(self.irr_top)
    }

    /// The highest requested vector whatever the priority, for deciding about a TPR intercept.
    #[inline]
    pub fn highest_request(&self) -> Option<u8> {
        (self.irr_top != 0).then_some(self.irr_top)
    }

    /// The CPU takes the interrupt: IRR to ISR. Does nothing if `vector` is not requested.
    #[inline]
    pub fn accept(&mut self, vector: u8) {
        if !self.state.irr.remove(vector) {
            return;
        }
        if vector == self.irr_top {
            self.irr_top = self.state.irr.highest();
        }
        self.state.isr.insert(vector);
        self.isr_top = self.isr_top.max(vector);
        self.refresh_ppr();
    }

    /// Whether LINT0 is an NMI here, as a watchdog on the PIT makes it.
    pub fn lint0_is_nmi(&self) -> bool {
        self.state.lvt[LVT_LINT0] & (LVT_MASKED | 7 << 8) == 4 << 8
    }

    /// Whether an interrupt from the 8259 pair reaches the CPU: LINT0 is asserted and programmed as ExtINT, or the
    /// APIC is globally disabled and the pin is plain INTR; or an ExtINT message arrived. The caller acknowledges
    /// at the 8259 and then calls [`accept_extint`](Self::accept_extint).
    #[inline]
    pub fn extint_pending(&self) -> bool {
        if self.state.extint {
            return true;
        }
        if self.state.base & APIC_BASE_EN == 0 {
            return self.state.lint[0];
        }
        let lvt = self.state.lvt[LVT_LINT0];
        lvt & (LVT_MASKED | 7 << 8) == 7 << 8 && self.lint_asserted(Lint::Lint0)
    }

    /// The CPU took an interrupt from the 8259 pair.
    #[inline]
    pub fn accept_extint(&mut self) {
        self.state.extint = false;
    }

    /// CR8: the task-priority class.
    #[inline]
    pub fn cr8(&self) -> u8 {
        self.state.tpr >> 4
    }

    /// Follows CR8 (bits 3:0 of `value`). An unchanged class leaves the TPR's sub-class alone, so that this can be
    /// called at each exit with the virtual TPR.
    #[inline]
    pub fn set_cr8(&mut self, value: u8) {
        if self.state.tpr >> 4 != value & 0xf {
            self.set_tpr(value << 4);
        }
    }

    /// When the timer next interrupts.
    #[inline]
    pub fn next_event(&self) -> Option<Deadline> {
        if self.state.lvt[LVT_TIMER] & LVT_MASKED != 0 {
            return None;
        }
        self.state.timer.next_event()
    }

    /// Brings the timer to this moment.
    #[inline]
    pub fn advance(&mut self, now_ns: u64, tsc: u64) {
        if self.state.timer.expire(now_ns, tsc) {
            self.raise_lvt(LVT_TIMER);
        }
    }

    /// Sets the level of an input pin.
    pub fn set_lint(&mut self, pin: Lint, level: bool) {
        let (index, lvt) = pin.indices();
        if self.state.lint[index] == level {
            return;
        }
        self.state.lint[index] = level;
        if !self.lint_asserted(pin) {
            return;
        }
        if self.lint_is_level(pin) {
            self.poll_level_lint();
        } else {
            self.raise_lvt(lvt);
        }
    }

    // -- IA32_APIC_BASE, IA32_TSC_DEADLINE --

    /// IA32_APIC_BASE.
    #[inline]
    pub fn base(&self) -> u64 {
        self.state.base
    }

    /// Guest-physical address of the register page, while there is one (xAPIC mode).
    #[inline]
    pub fn mmio_base(&self) -> Option<u64> {
        (self.state.base & (APIC_BASE_EN | APIC_BASE_EXTD) == APIC_BASE_EN)
            .then_some(self.state.base & !0xfff)
    }

    /// Whether the APIC is enabled globally: CPUID.1:EDX.APIC follows it.
    #[inline]
    pub fn is_enabled(&self) -> bool {
        self.state.base & APIC_BASE_EN != 0
    }

    /// Whether the APIC is in x2APIC mode.
    #[inline]
    pub fn is_x2apic(&self) -> bool {
        self.state.base & APIC_BASE_EXTD != 0
    }

    /// Writes IA32_APIC_BASE. Reserved bits and the transitions that SDM figure 11-27 leaves out raise #GP. Disabling
    /// resets the APIC. The caller looks at [`mmio_base`](Self::mmio_base) again afterwards.
    pub fn set_base(&mut self, value: u64) -> Result<(), Gp> {
        const MODE: u64 = APIC_BASE_EN | APIC_BASE_EXTD;
        const DISABLED: u64 = 0;
        const XAPIC: u64 = APIC_BASE_EN;
        const X2APIC: u64 = MODE;
        if value & self.base_reserved != 0 {
            return Err(Gp);
        }
        match (self.state.base & MODE, value & MODE) {
            (old, new) if old == new => {}
            (DISABLED, XAPIC) => {}
            (XAPIC, X2APIC) => self.state.icr &= 0xffff_ffff,
            (XAPIC | X2APIC, DISABLED) => {
                let lint = self.state.lint;
                self.state = LapicState::reset(value);
                self.state.lint = lint;
            }
            _ => return Err(Gp),
        }
        self.state.base = value;
        self.rebuild();
        Ok(())
    }

    /// IA32_TSC_DEADLINE.
    #[inline]
    pub fn tsc_deadline(&mut self, now_ns: u64, tsc: u64) -> u64 {
        self.advance(now_ns, tsc);
        self.state.timer.tsc_deadline()
    }

    /// Writes IA32_TSC_DEADLINE. A deadline that has passed interrupts at once.
    #[inline]
    pub fn set_tsc_deadline(&mut self, deadline: u64, now_ns: u64, tsc: u64) {
        // A deadline that was due before this write has fired; the write cannot take it back.
        self.advance(now_ns, tsc);
        self.state.timer.set_tsc_deadline(deadline);
        self.advance(now_ns, tsc);
    }

    // -- Register access --

    /// Reads `size` bytes (1, 2, 4, 8) at `offset` of the register page. A register is the low four bytes of its
    /// 16-byte slot; the architecture defines aligned 32-bit accesses only (SDM 11.4.1), here other reads see the
    /// bytes they name, and zeros beside the register.
    #[inline]
    pub fn mmio_read(&mut self, offset: u32, size: u8, now_ns: u64, tsc: u64) -> u64 {
        let register = (offset & 0xfff) >> 4;
        let value = match self.read_register(register, now_ns, tsc) {
            Some(value) => u64::from(value),
            None => {
                self.error(ESR_ILLEGAL_REGISTER);
                0
            }
        };
        let bytes = value.checked_shr((offset & 0xf) * 8).unwrap_or(0);
        match size {
            1 => bytes & 0xff,
            2 => bytes & 0xffff,
            4 => bytes & 0xffff_ffff,
            _ => bytes,
        }
    }

    /// Writes at `offset` of the register page. Takes effect when it starts at a register and covers it; other
    /// writes do nothing.
    #[inline]
    pub fn mmio_write(&mut self, offset: u32, size: u8, value: u64, now_ns: u64, tsc: u64) -> ApicAction {
        if offset & 0xf != 0 || size < 4 {
            return ApicAction::None;
        }
        let value = value as u32;
        match (offset & 0xfff) >> 4 {
            reg::EOI => self.eoi(),
            reg::ICR => {
                self.state.icr = self.state.icr & 0xff00_0000_0000_0000 | u64::from(value & ICR_LOW_WRITABLE);
                self.send_ipi()
            }
            reg::ICR_HIGH => {
                self.state.icr = self.state.icr & 0xffff_ffff | u64::from(value & 0xff00_0000) << 32;
                ApicAction::None
            }
            reg::LDR => {
                self.state.ldr = value & 0xff00_0000;
                self.refresh_identity();
                ApicAction::None
            }
            reg::DFR => {
                self.state.dfr = value | DFR_ONES;
                self.refresh_identity();
                ApicAction::None
            }
            register => {
                if !self.write_register(register, value, now_ns, tsc) {
                    self.error(ESR_ILLEGAL_REGISTER);
                }
                ApicAction::None
            }
        }
    }

    /// RDMSR of an x2APIC register (SDM 11.12.1.2): #GP outside x2APIC mode, on reserved and on write-only registers.
    #[inline]
    pub fn msr_read(&mut self, msr: u32, now_ns: u64, tsc: u64) -> Result<u64, Gp> {
        if !self.is_x2apic() {
            return Err(Gp);
        }
        match msr.wrapping_sub(X2APIC_MSR_FIRST) {
            reg::ICR => Ok(self.state.icr),
            reg::EOI | reg::APR | reg::REMOTE_READ | reg::DFR | reg::ICR_HIGH | reg::SELF_IPI => Err(Gp),
            register => self.read_register(register, now_ns, tsc).map(u64::from).ok_or(Gp),
        }
    }

    /// WRMSR of an x2APIC register: #GP as for reads, on read-only registers, and on reserved bits.
    #[inline]
    pub fn msr_write(&mut self, msr: u32, value: u64, now_ns: u64, tsc: u64) -> Result<ApicAction, Gp> {
        if !self.is_x2apic() {
            return Err(Gp);
        }
        let register = msr.wrapping_sub(X2APIC_MSR_FIRST);
        if register == reg::ICR {
            if value & ICR_X2APIC_RESERVED != 0 {
                return Err(Gp);
            }
            self.state.icr = value & !(1 << 12);
            return Ok(self.send_ipi());
        }
        let value = u32::try_from(value).map_err(|_| Gp)?;
        let reserved = match register {
            reg::EOI | reg::ESR => u32::MAX,
            reg::TPR | reg::SELF_IPI => !0xff,
            reg::SVR => !SVR_MASK,
            reg::DIVIDE => !timer::DIVIDE_MASK,
            reg::INITIAL_COUNT => 0,
            reg::LVT..=reg::LVT_LAST => {
                !(LVT_WRITABLE[(register - reg::LVT) as usize] | LVT_DELIVERY_STATUS | LVT_REMOTE_IRR)
            }
            _ => return Err(Gp),
        };
        if value & reserved != 0 {
            return Err(Gp);
        }
        match register {
            reg::EOI => Ok(self.eoi()),
            reg::SELF_IPI => {
                self.send_to_self(value as u8);
                Ok(ApicAction::None)
            }
            _ => {
                self.write_register(register, value, now_ns, tsc);
                Ok(ApicAction::None)
            }
        }
    }

    /// The registers that read alike in both modes, and those of xAPIC mode; `None` for reserved ones.
    #[inline]
    fn read_register(&mut self, register: u32, now_ns: u64, tsc: u64) -> Option<u32> {
        let state = &self.state;
        Some(match register {
            reg::CURRENT_COUNT => {
                self.advance(now_ns, tsc);
                self.state.timer.current_count(now_ns)
            }
            reg::ICR => state.icr as u32,
            reg::ICR_HIGH => (state.icr >> 32) as u32,
            reg::INITIAL_COUNT => state.timer.initial_count(),
            reg::TPR => u32::from(state.tpr),
            reg::ID if self.is_x2apic() => u32::from(self.id),
            reg::ID => u32::from(self.id) << 24,
            reg::VERSION => VERSION,
            reg::APR => u32::from(self.apr()),
            reg::PPR => u32::from(self.ppr),
            // Write-only; and the remote read register, which remembers nothing since remote reads are gone.
            reg::EOI | reg::REMOTE_READ => 0,
            reg::LDR => self.ldr(),
            reg::DFR => state.dfr,
            reg::SVR => state.svr,
            reg::ISR..=reg::ISR_LAST => state.isr.word(register - reg::ISR),
            reg::TMR..=reg::TMR_LAST => state.tmr.word(register - reg::TMR),
            reg::IRR..=reg::IRR_LAST => state.irr.word(register - reg::IRR),
            reg::ESR => state.esr,
            reg::LVT..=reg::LVT_LAST => state.lvt[(register - reg::LVT) as usize],
            reg::DIVIDE => state.timer.divide(),
            _ => return None,
        })
    }

    /// Writes a register that behaves alike in both modes; `false` for reserved ones.
    #[inline]
    fn write_register(&mut self, register: u32, value: u32, now_ns: u64, tsc: u64) -> bool {
        match register {
            reg::TPR => self.set_tpr(value as u8),
            reg::INITIAL_COUNT => {
                self.advance(now_ns, tsc);
                self.state.timer.set_initial_count(value, now_ns);
            }
            reg::SVR => {
                self.state.svr = value & SVR_MASK;
                if value & SVR_ENABLE == 0 {
                    // SDM 11.4.7.2: software-disabled, every LVT entry is masked.
                    for lvt in &mut self.state.lvt {
                        *lvt |= LVT_MASKED;
                    }
                }
                self.refresh_identity();
            }
            reg::ESR => {
                self.state.esr = self.state.esr_pending;
                self.state.esr_pending = 0;
            }
            reg::LVT..=reg::LVT_LAST => self.set_lvt((register - reg::LVT) as usize, value, now_ns, tsc),
            reg::DIVIDE => {
                self.advance(now_ns, tsc);
                self.state.timer.set_divide(value, now_ns);
            }
            // Read-only registers take writes in silence.
            reg::ID
            | reg::VERSION
            | reg::APR
            | reg::PPR
            | reg::REMOTE_READ
            | reg::ISR..=reg::IRR_LAST
            | reg::CURRENT_COUNT => {}
            _ => return false,
        }
        true
    }

    fn set_lvt(&mut self, index: usize, value: u32, now_ns: u64, tsc: u64) {
        if index == LVT_TIMER {
            self.advance(now_ns, tsc);
            self.state.timer.set_mode(TimerMode::from_lvt(value), now_ns);
        }
        let old = self.state.lvt[index];
        let mut lvt = value & LVT_WRITABLE[index] | old & LVT_REMOTE_IRR;
        if self.state.svr & SVR_ENABLE == 0 {
            lvt |= LVT_MASKED;
        }
        self.state.lvt[index] = lvt;
        if index == LVT_LINT0 {
            if !self.lint_is_level(Lint::Lint0) {
                self.state.lvt[index] &= !LVT_REMOTE_IRR;
            }
            self.poll_level_lint();
        }
    }

    // -- Priorities --

    #[inline]
    fn set_tpr(&mut self, tpr: u8) {
        self.state.tpr = tpr;
        self.refresh_ppr();
    }

    /// PPR: the higher class of TPR and the interrupt in service (SDM 11.8.3.1).
    #[inline]
    fn refresh_ppr(&mut self) {
        let tpr = self.state.tpr;
        self.ppr = if tpr >> 4 >= self.isr_top >> 4 { tpr } else { self.isr_top & 0xf0 };
        self.identity = self.identity.with_priority(self.ppr);
    }

    /// APR, as the P6 family defined it (SDM 11.6.2.4).
    fn apr(&self) -> u8 {
        let (tpr, irr, isr) = (self.state.tpr >> 4, self.irr_top >> 4, self.isr_top >> 4);
        if tpr >= irr && tpr > isr {
            self.state.tpr
        } else {
            (tpr & isr).max(irr) << 4
        }
    }

    fn eoi(&mut self) -> ApicAction {
        let vector = self.isr_top;
        if vector == 0 {
            return ApicAction::None;
        }
        self.state.isr.remove(vector);
        self.isr_top = self.state.isr.highest();
        self.refresh_ppr();
        self.ended(vector)
    }

    /// A fixed interrupt arrives.
    #[inline]
    fn request(&mut self, vector: u8, trigger: Trigger) {
        if vector < FIRST_LEGAL_VECTOR {
            self.error(ESR_RECEIVE_ILLEGAL);
            return;
        }
        self.state.irr.insert(vector);
        self.irr_top = self.irr_top.max(vector);
        match trigger {
            Trigger::Edge => {
                self.state.tmr.remove(vector);
            }
            Trigger::Level => self.state.tmr.insert(vector),
        }
    }

    // -- Local interrupts --

    /// A local interrupt source fires.
    fn raise_lvt(&mut self, index: usize) {
        let lvt = self.state.lvt[index];
        if lvt & LVT_MASKED != 0 {
            return;
        }
        // The timer and error entries have no delivery mode: their bits 10:8 are always zero.
        let request = match DeliveryMode::from_bits(lvt >> 8) {
            Some(DeliveryMode::Fixed) => return self.request(lvt as u8, Trigger::Edge),
            Some(DeliveryMode::Nmi) => Requests::NMI,
            Some(DeliveryMode::Smi) => Requests::SMI,
            Some(DeliveryMode::Init) => Requests::INIT,
            // ExtINT is a level, see `extint_pending`; the rest is reserved here (SDM 11.5.1).
            _ => return,
        };
        self.state.requests = Requests::from_bits(self.state.requests.bits() | request);
    }

    /// An error was detected: it shows in the ESR after the next write there, and interrupts when it is new.
    fn error(&mut self, bit: u32) {
        if self.state.esr_pending & bit == 0 {
            self.state.esr_pending |= bit;
            self.raise_lvt(LVT_ERROR);
        }
    }

    #[inline]
    fn lint_asserted(&self, pin: Lint) -> bool {
        let (index, lvt) = pin.indices();
        self.state.lint[index] != (self.state.lvt[lvt] & LVT_POLARITY_LOW != 0)
    }

    /// Whether the pin is level sensitive: only LINT0, only in fixed mode (SDM 11.5.1, "Trigger Mode").
    fn lint_is_level(&self, pin: Lint) -> bool {
        pin == Lint::Lint0 && self.state.lvt[LVT_LINT0] & (LVT_LEVEL | 7 << 8) == LVT_LEVEL
    }

    /// Requests LINT0's interrupt if it is level triggered, asserted, unmasked and not yet in progress.
    fn poll_level_lint(&mut self) {
        let lvt = self.state.lvt[LVT_LINT0];
        let legal = lvt as u8 >= FIRST_LEGAL_VECTOR;
        if lvt & (LVT_MASKED | LVT_REMOTE_IRR) == 0
            && legal
            && self.lint_is_level(Lint::Lint0)
            && self.lint_asserted(Lint::Lint0)
        {
            self.state.lvt[LVT_LINT0] |= LVT_REMOTE_IRR;
            self.request(lvt as u8, Trigger::Level);
        }
    }

    // -- Sending --

    /// Carries out the command in the ICR (SDM 11.6.1).
    fn send_ipi(&mut self) -> ApicAction {
        let icr = self.state.icr;
        let vector = icr as u8;
        let Some(mode) = DeliveryMode::from_bits((icr >> 8) as u32) else { return ApicAction::None };
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority if vector < FIRST_LEGAL_VECTOR => {
                self.error(ESR_SEND_ILLEGAL);
                return ApicAction::None;
            }
            // INIT level de-assert, which set arbitration IDs before the Pentium 4.
            DeliveryMode::Init if icr & (ICR_ASSERT | ICR_LEVEL) == ICR_LEVEL => return ApicAction::None,
            _ => {}
        }
        let resets = matches!(mode, DeliveryMode::Init | DeliveryMode::StartUp);
        let destination = match icr >> 18 & 3 {
            0 if self.is_x2apic() => Destination::from_u32((icr >> 32) as u32, icr & ICR_LOGICAL != 0),
            0 => Destination::from_u8((icr >> 56) as u8, icr & ICR_LOGICAL != 0),
            // A CPU cannot INIT or start itself by shorthand (SDM tables 11-3 and 11-4).
            1 | 2 if resets => return ApicAction::None,
            1 if matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) => {
                self.send_to_self(vector);
                return ApicAction::None;
            }
            1 => Destination::One(self.id),
            2 => Destination::All,
            _ => Destination::AllBut(self.id),
        };
        ApicAction::Send(ApicMessage { destination, mode, trigger: Trigger::Edge, vector })
    }

    /// A fixed IPI to oneself, which needs no bus. A software-disabled APIC does not take it.
    fn send_to_self(&mut self, vector: u8) {
        if vector < FIRST_LEGAL_VECTOR {
            self.error(ESR_SEND_ILLEGAL);
        } else if self.state.svr & SVR_ENABLE != 0 {
            self.request(vector, Trigger::Edge);
        }
    }

    // -- Addressing --

    /// LDR as read: in x2APIC mode it follows from the ID (SDM 11.12.10.2).
    fn ldr(&self) -> u32 {
        if self.is_x2apic() {
            let id = u32::from(self.id);
            (id >> 4) << 16 | 1 << (id & 0xf)
        } else {
            self.state.ldr
        }
    }

    fn refresh_identity(&mut self) {
        self.identity = if self.is_enabled() {
            Identity::new(
                self.is_x2apic(),
                self.state.svr & SVR_ENABLE != 0,
                self.state.dfr >> 28 == 0xf,
                self.ldr(),
                self.ppr,
            )
        } else {
            Identity::DISABLED
        };
    }
}

impl Lint {
    /// Index of the pin and of its LVT entry.
    const fn indices(self) -> (usize, usize) {
        match self {
            Self::Lint0 => (0, LVT_LINT0),
            Self::Lint1 => (1, LVT_LINT1),
        }
    }
}

impl LapicState {
    /// Everything after power-up but the base (SDM 11.4.7.1).
    fn reset(base: u64) -> Self {
        Self {
            base,
            tpr: 0,
            ldr: 0,
            dfr: DFR_FLAT,
            svr: SVR_RESET,
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [LVT_MASKED; LVT_COUNT],
            irr: VectorSet::EMPTY,
            isr: VectorSet::EMPTY,
            tmr: VectorSet::EMPTY,
            timer: Timer::new(),
            lint: [false; 2],
            extint: false,
            requests: Requests::NONE,
        }
    }

    fn sanitize(&mut self) {
        if self.base & APIC_BASE_EN == 0 {
            self.base &= !APIC_BASE_EXTD;
        }
        self.ldr &= 0xff00_0000;
        self.dfr |= DFR_ONES;
        self.svr &= SVR_MASK;
        self.esr &= ESR_MASK;
        self.esr_pending &= ESR_MASK;
        self.icr &= if self.base & APIC_BASE_EXTD != 0 {
            !ICR_X2APIC_RESERVED & !(1 << 12)
        } else {
            0xff00_0000_0000_0000 | u64::from(ICR_LOW_WRITABLE)
        };
        for (lvt, writable) in self.lvt.iter_mut().zip(LVT_WRITABLE) {
            *lvt &= writable | LVT_REMOTE_IRR;
            if self.svr & SVR_ENABLE == 0 {
                *lvt |= LVT_MASKED;
            }
        }
        for (index, lvt) in self.lvt.iter_mut().enumerate() {
            if index != LVT_LINT0 {
                *lvt &= !LVT_REMOTE_IRR;
            }
        }
        self.irr.remove_illegal();
        self.isr.remove_illegal();
        self.timer.set_mode(TimerMode::from_lvt(self.lvt[LVT_TIMER]), 0);
        self.timer.sanitize();
        self.requests =
            Requests::from_bits(self.requests.bits() & (Requests::NMI | Requests::SMI | Requests::INIT));
    }
}

#[cfg(test)]
mod tests;
