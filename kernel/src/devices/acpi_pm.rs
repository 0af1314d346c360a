//! ACPI fixed hardware: PM1a event and control blocks and the power-management timer.
//!
//! Source: ACPI 6.5, section 4.8 "ACPI Register Model": PM1 status and enable 4.8.3.1, PM1 control 4.8.3.2, timer
//! 4.8.3.3. The FADT has no SMI command port, so the machine is always in ACPI mode (SCI_EN reads 1). There is
//! neither a power nor a sleep button, no global lock owner on the other side and no general-purpose event: the
//! timer's carry is the only thing that can raise the SCI.

use super::clock;
use crate::vm::layout::{PM1A_CNT, PM1A_EVT, PM_TMR, S5_SLP_TYP};

/// First port of the blocks.
pub const FIRST: u16 = PM1A_EVT;
/// Last port of the blocks.
pub const LAST: u16 = PM_TMR + 3;

const STATUS: u16 = PM1A_EVT;
const ENABLE: u16 = PM1A_EVT + 2;

const TMR: u16 = 1 << 0;
const GBL: u16 = 1 << 5;
const PWRBTN: u16 = 1 << 8;
const SLPBTN: u16 = 1 << 9;
const RTC: u16 = 1 << 10;
/// Enable bits that are kept.
const ENABLE_MASK: u16 = TMR | GBL | PWRBTN | SLPBTN | RTC;

const SCI_EN: u16 = 1 << 0;
const BM_RLD: u16 = 1 << 1;
const SLP_TYP_SHIFT: u32 = 10;
const SLP_TYP: u16 = 7 << SLP_TYP_SHIFT;
const SLP_EN: u16 = 1 << 13;

/// The timer's status is set when its top bit changes.
const CARRY_BIT: u32 = 31;

/// Everything the blocks remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiPmState {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control.
    pub control: u16,
    /// How often the timer's top bit had changed when last looked at.
    pub carries: u64,
}

/// The power-management registers.
#[derive(Clone, Debug)]
pub struct AcpiPm {
    state: AcpiPmState,
}

impl AcpiPm {
    /// After reset, already in ACPI mode.
    pub const fn new() -> Self {
        Self { state: AcpiPmState { status: 0, enable: 0, control: 0, carries: 0 } }
    }

    /// The power-management timer: 3.579545 MHz, 32 bits.
    #[inline]
    pub fn timer(now_ns: u64) -> u32 {
        clock::PM_TIMER.ticks(now_ns) as u32
    }

    /// Reads one byte of a block; bytes that belong to none read all ones.
    pub fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        self.advance(now_ns);
        let (register, at) = match port {
            STATUS..=0x601 => (self.state.status.into(), port - STATUS),
            ENABLE..=0x603 => (self.state.enable.into(), port - ENABLE),
            PM1A_CNT..=0x605 => (u32::from(self.state.control | SCI_EN), port - PM1A_CNT),
            PM_TMR..=LAST => (Self::timer(now_ns), port - PM_TMR),
            _ => return 0xff,
        };
        register.to_le_bytes()[usize::from(at)]
    }

    /// Writes one byte of a block; true if the guest asked for S5.
    #[must_use]
    pub fn write(&mut self, port: u16, value: u8, now_ns: u64) -> bool {
        self.advance(now_ns);
        let word = u16::from(value) << (8 * (port & 1));
        let kept = 0xff00 >> (8 * (port & 1));
        let s = &mut self.state;
        match port {
            // Status bits are cleared by writing ones.
            STATUS..=0x601 => s.status &= !word,
            ENABLE..=0x603 => s.enable = (s.enable & kept | word) & ENABLE_MASK,
            PM1A_CNT..=0x605 => {
                // GBL_RLS and SLP_EN are write-only; without S5 in SLP_TYP there is nothing to enter.
                s.control = (s.control & kept | word) & (BM_RLD | SLP_TYP);
                return word & SLP_EN != 0 && s.control >> SLP_TYP_SHIFT == u16::from(S5_SLP_TYP);
            }
            _ => {}
        }
        false
    }

    /// Brings the timer's status bit up to date.
    #[inline]
    pub fn advance(&mut self, now_ns: u64) {
        let carries = clock::PM_TIMER.ticks(now_ns) >> CARRY_BIT;
        if carries > self.state.carries {
            self.state.carries = carries;
            self.state.status |= TMR;
        }
    }

    /// The SCI, level triggered.
    pub fn irq(&self) -> bool {
        self.state.status & self.state.enable & ENABLE_MASK != 0
    }

    /// When the timer's carry raises the SCI.
    pub fn next_event(&self) -> Option<u64> {
        let waiting = self.state.enable & TMR != 0 && self.state.status & TMR == 0;
        waiting.then(|| clock::PM_TIMER.ns((self.state.carries + 1) << CARRY_BIT))
    }

    /// What must be kept to continue later.
    pub fn save(&self) -> AcpiPmState {
        self.state
    }

    /// Continues from `state`, whatever it holds.
    pub fn restore(&mut self, state: &AcpiPmState) {
        self.state = AcpiPmState {
            status: state.status & ENABLE_MASK,
            enable: state.enable & ENABLE_MASK,
            control: state.control & (BM_RLD | SLP_TYP),
            carries: state.carries.min(clock::PM_TIMER.ticks(u64::MAX) >> CARRY_BIT),
        };
    }
}

impl Default for AcpiPm {
    fn default() -> Self {
        Self::new()
    }
}

const _: () = assert!(PM1A_EVT == 0x600 && PM1A_CNT == 0x604 && PM_TMR == 0x608);

#[cfg(test)]
mod tests {
    use super::*;

    fn word(pm: &mut AcpiPm, port: u16, now: u64) -> u16 {
        u16::from_le_bytes([pm.read(port, now), pm.read(port + 1, now)])
    }

    fn write_word(pm: &mut AcpiPm, port: u16, value: u16, now: u64) -> bool {
        let [low, high] = value.to_le_bytes();
        pm.write(port, low, now) | pm.write(port + 1, high, now)
    }

    #[test]
    fn timer_runs_at_its_rate() {
        assert_eq!(AcpiPm::timer(0), 0);
        assert_eq!(AcpiPm::timer(1_000_000_000), 3_579_545);
        let mut pm = AcpiPm::new();
        let now = 123_456_789_012;
        let bytes = [0, 1, 2, 3].map(|i| pm.read(PM_TMR + i, now));
        assert_eq!(u32::from_le_bytes(bytes), AcpiPm::timer(now));
        assert!(!pm.write(PM_TMR, 0, now));
    }

    #[test]
    fn carry_raises_the_sci() {
        let mut pm = AcpiPm::new();
        assert_eq!(pm.next_event(), None);
        write_word(&mut pm, ENABLE, TMR, 0);
        let carry = pm.next_event().unwrap();
        assert_eq!(AcpiPm::timer(carry), 1 << 31);
        pm.advance(carry - 1);
        assert!(!pm.irq());
        pm.advance(carry);
        assert!(pm.irq());
        assert_eq!(pm.next_event(), None);
        assert_eq!(word(&mut pm, STATUS, carry), TMR);
        write_word(&mut pm, STATUS, TMR, carry);
        assert!(!pm.irq());
        let next = pm.next_event().unwrap();
        assert_eq!(AcpiPm::timer(next), 0, "the top bit changes both ways");
        pm.advance(next);
        assert!(pm.irq());
    }

    #[test]
    fn enable_keeps_its_bits_and_status_clears_by_ones() {
        let mut pm = AcpiPm::new();
        write_word(&mut pm, ENABLE, 0xffff, 0);
        assert_eq!(word(&mut pm, ENABLE, 0), ENABLE_MASK);
        let _ = pm.write(ENABLE + 1, 0, 0);
        assert_eq!(word(&mut pm, ENABLE, 0), TMR | GBL);
        pm.advance(u64::MAX);
        write_word(&mut pm, STATUS, !TMR, u64::MAX);
        assert!(pm.irq());
        write_word(&mut pm, STATUS, TMR, u64::MAX);
        assert!(!pm.irq());
    }

    #[test]
    fn only_s5_with_slp_en_powers_off() {
        for typ in 0..8u16 {
            let mut pm = AcpiPm::new();
            assert!(!write_word(&mut pm, PM1A_CNT, typ << SLP_TYP_SHIFT, 0));
            assert_eq!(write_word(&mut pm, PM1A_CNT, SLP_EN | typ << SLP_TYP_SHIFT, 0), typ == 5);
            assert_eq!(word(&mut pm, PM1A_CNT, 0), typ << SLP_TYP_SHIFT | SCI_EN, "SLP_EN reads 0");
        }
        let mut pm = AcpiPm::new();
        assert!(pm.write(PM1A_CNT + 1, 0x34, 0), "one byte is enough");
    }

    #[test]
    fn bytes_between_the_blocks_are_nobodys() {
        let mut pm = AcpiPm::new();
        for port in [0x606, 0x607] {
            assert!(!pm.write(port, 0xff, 0));
            assert_eq!(pm.read(port, 0), 0xff);
        }
    }

    #[test]
    fn save_restore_continues_and_survives_garbage() {
        let mut pm = AcpiPm::new();
        write_word(&mut pm, ENABLE, TMR, 0);
        let mut other = AcpiPm::new();
        other.restore(&pm.save());
        assert_eq!(other.next_event(), pm.next_event());
        other.restore(&AcpiPmState { status: 0xfffe, enable: 0xffff, control: 0xffff, carries: u64::MAX });
        assert!(other.next_event().is_some());
        other.advance(u64::MAX);
        assert_eq!(word(&mut other, PM1A_CNT, 0) & SLP_EN, 0);
    }
}
