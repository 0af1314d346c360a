//! Two cascaded 8259A interrupt controllers, with the chipset's edge/level control registers.
//!
//! Sources: Intel 8259A data sheet (231468-003); edge/level registers (ELCR): Intel ICH9 data sheet (316972),
//! "Interrupt Controller". As in that chipset ICW1.LTIM is ignored (ELCR decides), the cascade is wired to IR2
//! whatever ICW3 says, and the 8080 mode (ICW4.uPM = 0) delivers 8086 vectors.
//!
//! Deviation, on purpose: an edge-triggered request is latched until it is acknowledged. The 8259A would turn a
//! request that goes away before INTA into a spurious IR7, but then a timer pulse that passed while the vCPU
//! could not look would be a lost tick. Level-triggered requests follow their line, and one that goes away in
//! time ends as a spurious IR7 (IR15 through the slave), with no in-service bit for it.

/// Master command port (ICW1, OCW2, OCW3; reads IRR, ISR or the poll byte).
pub const MASTER_CMD: u16 = 0x20;
/// Master data port (ICW2 to ICW4, OCW1; reads IMR).
pub const MASTER_DATA: u16 = 0x21;
/// Slave command port.
pub const SLAVE_CMD: u16 = 0xa0;
/// Slave data port.
pub const SLAVE_DATA: u16 = 0xa1;
/// Edge/level control of IRQ0 to IRQ7.
pub const ELCR_MASTER: u16 = 0x4d0;
/// Edge/level control of IRQ8 to IRQ15.
pub const ELCR_SLAVE: u16 = 0x4d1;

/// Master input that the slave's INT is wired to.
const CASCADE: u8 = 2;
/// ELCR bits that can be set: IRQ0 (timer), 1 (keyboard), 2 (cascade), 8 (RTC) and 13 (FPU) are always edge.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

const ICW1: u8 = 1 << 4;
const ICW1_IC4: u8 = 1 << 0;
const ICW1_SNGL: u8 = 1 << 1;
const ICW4_AEOI: u8 = 1 << 1;
const ICW4_SFNM: u8 = 1 << 4;
const OCW3: u8 = 1 << 3;
const OCW3_RIS: u8 = 1 << 0;
const OCW3_RR: u8 = 1 << 1;
const OCW3_POLL: u8 = 1 << 2;
const OCW3_SMM: u8 = 1 << 5;
const OCW3_ESMM: u8 = 1 << 6;
const POLL_REQUEST: u8 = 1 << 7;

/// Which byte of the initialization sequence the data port expects next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// Initialized: the data port is OCW1, the interrupt mask.
    Ready,
    /// ICW2, the vector base.
    Icw2,
    /// ICW3, the cascade wiring.
    Icw3,
    /// ICW4, the modes.
    Icw4,
}

/// One 8259A.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChipState {
    /// Levels of the eight inputs.
    pub lines: u8,
    /// Edge-triggered requests not yet acknowledged.
    pub latched: u8,
    /// Inputs that request by level: ELCR, and the cascade on the master.
    pub level: u8,
    /// Interrupt mask register.
    pub imr: u8,
    /// In-service register.
    pub isr: u8,
    /// Vector of IR0 (ICW2, bits 7 to 3).
    pub base: u8,
    /// The input that now has the lowest priority.
    pub lowest: u8,
    /// Progress of the initialization sequence.
    pub init: Init,
    /// ICW1.IC4: an ICW4 follows.
    pub icw4_follows: bool,
    /// ICW1.SNGL: no cascade, no ICW3.
    pub single: bool,
    /// ICW4.AEOI.
    pub auto_eoi: bool,
    /// ICW4.SFNM.
    pub special_fully_nested: bool,
    /// Rotate in automatic EOI mode (OCW2).
    pub rotate_on_auto_eoi: bool,
    /// Special mask mode (OCW3).
    pub special_mask: bool,
    /// The command port reads ISR, not IRR.
    pub read_isr: bool,
    /// The next read is a poll.
    pub poll: bool,
}

impl ChipState {
    /// As firmware leaves it: initialized, everything masked.
    const fn new(base: u8, level: u8) -> Self {
        Self {
            lines: 0,
            latched: 0,
            level,
            imr: 0xff,
            isr: 0,
            base,
            lowest: 7,
            init: Init::Ready,
            icw4_follows: false,
            single: false,
            auto_eoi: false,
            special_fully_nested: false,
            rotate_on_auto_eoi: false,
            special_mask: false,
            read_isr: false,
            poll: false,
        }
    }

    /// Interrupt request register: latched edges and active levels.
    const fn irr(&self) -> u8 {
        self.latched | (self.lines & self.level)
    }

    /// Drives one input.
    fn set_line(&mut self, ir: u8, level: bool) {
        let bit = 1 << ir;
        if level {
            if self.lines & bit == 0 && self.level & bit == 0 {
                self.latched |= bit;
            }
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
    }

    /// Rotates a set of inputs so that bit 0 is the one of highest priority.
    const fn by_priority(&self, inputs: u8) -> u8 {
        inputs.rotate_right(self.lowest as u32 + 1)
    }

    /// The request that INT stands for: the highest-priority unmasked one that nothing in service outranks.
    #[inline]
    fn pending(&self) -> Option<u8> {
        let requests = self.irr() & !self.imr;
        if requests == 0 || self.init != Init::Ready {
            return None;
        }
        // Special mask mode: a masked level in service holds nothing back.
        let blocking = if self.special_mask { self.isr & !self.imr } else { self.isr };
        let request = self.by_priority(requests).trailing_zeros() as u8;
        let in_service = self.by_priority(blocking).trailing_zeros() as u8;
        let ir = (request + self.lowest + 1) & 7;
        // Special fully nested mode: the slave may interrupt its own service with something more urgent.
        let nested = self.special_fully_nested && ir == CASCADE && request == in_service;
        (request < in_service || nested).then_some(ir)
    }

    /// The first INTA cycle for `ir`.
    fn acknowledge(&mut self, ir: u8) {
        self.latched &= !(1 << ir);
        if !self.auto_eoi {
            self.isr |= 1 << ir;
        } else if self.rotate_on_auto_eoi {
            self.lowest = ir;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            *self = Self {
                lines: self.lines,
                level: self.level,
                base: self.base,
                imr: 0,
                init: Init::Icw2,
                icw4_follows: value & ICW1_IC4 != 0,
                single: value & ICW1_SNGL != 0,
                ..Self::new(0, 0)
            };
        } else if value & OCW3 != 0 {
            if value & OCW3_ESMM != 0 {
                self.special_mask = value & OCW3_SMM != 0;
            }
            if value & OCW3_POLL != 0 {
                self.poll = true;
            } else if value & OCW3_RR != 0 {
                self.read_isr = value & OCW3_RIS != 0;
            }
        } else {
            self.write_ocw2(value);
        }
    }

    /// End of interrupt and rotation: bits 7 to 5 are R, SL and EOI.
    fn write_ocw2(&mut self, value: u8) {
        let specified = value & 7;
        match value >> 5 {
            0b000 => self.rotate_on_auto_eoi = false,
            0b100 => self.rotate_on_auto_eoi = true,
            0b001 | 0b101 => {
                // A masked level in special mask mode is not cleared by a non-specific EOI.
                let candidates = if self.special_mask { self.isr & !self.imr } else { self.isr };
                let highest = self.by_priority(candidates).trailing_zeros() as u8;
                if highest < 8 {
                    let ir = (highest + self.lowest + 1) & 7;
                    self.isr &= !(1 << ir);
                    if value & 0x80 != 0 {
                        self.lowest = ir;
                    }
                }
            }
            0b011 => self.isr &= !(1 << specified),
            0b111 => {
                self.isr &= !(1 << specified);
                self.lowest = specified;
            }
            0b110 => self.lowest = specified,
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.icw4_follows { Init::Icw4 } else { Init::Ready };
        match self.init {
            Init::Ready => self.imr = value,
            Init::Icw2 => {
                self.base = value & 0xf8;
                self.init = if self.single { after_icw3 } else { Init::Icw3 };
            }
            Init::Icw3 => self.init = after_icw3,
            Init::Icw4 => {
                self.auto_eoi = value & ICW4_AEOI != 0;
                self.special_fully_nested = value & ICW4_SFNM != 0;
                self.init = Init::Ready;
            }
        }
    }

    fn read(&mut self, data_port: bool) -> u8 {
        if self.poll {
            self.poll = false;
            return match self.pending() {
                Some(ir) => {
                    self.acknowledge(ir);
                    POLL_REQUEST | ir
                }
                None => 0,
            };
        }
        match (data_port, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr(),
        }
    }

    /// A state that some stranger filled in, made one that this chip can be in.
    const fn sanitized(mut self, which: usize) -> Self {
        self.lowest &= 7;
        self.base &= 0xf8;
        self.level &= ELCR_WRITABLE[which];
        if which == 0 {
            self.level |= 1 << CASCADE;
        } else {
            self.special_fully_nested = false;
        }
        self.latched &= !self.level;
        self
    }
}

/// Everything the pair of controllers remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PicState {
    /// The chip that drives the CPU.
    pub master: ChipState,
    /// The chip behind the master's IR2.
    pub slave: ChipState,
}

/// The two controllers of a PC.
#[derive(Clone, Debug)]
pub struct Pic {
    state: PicState,
    /// The master's INT output, kept because it is asked for at every entry.
    intr: bool,
}

impl Pic {
    /// Initialized as firmware does: vectors 0x08 and 0x70, everything masked. `level_irqs` (bit n = IRQ n) are
    /// set to level triggering in the ELCR.
    pub fn new(level_irqs: u16) -> Self {
        let [low, high] = level_irqs.to_le_bytes();
        let state = PicState { master: ChipState::new(0x08, low), slave: ChipState::new(0x70, high) };
        let mut pic = Self { state, intr: false };
        pic.restore(&state);
        pic
    }

    /// Reads one of the six ports; another port reads all ones.
    pub fn read(&mut self, port: u16) -> u8 {
        let polled = self.state.master.poll || self.state.slave.poll;
        let value = match port {
            MASTER_CMD => self.state.master.read(false),
            MASTER_DATA => self.state.master.read(true),
            SLAVE_CMD => self.state.slave.read(false),
            SLAVE_DATA => self.state.slave.read(true),
            ELCR_MASTER => self.state.master.level & ELCR_WRITABLE[0],
            ELCR_SLAVE => self.state.slave.level & ELCR_WRITABLE[1],
            _ => 0xff,
        };
        if polled {
            self.update();
        }
        value
    }

    /// Writes one of the six ports.
    #[inline]
    pub fn write(&mut self, port: u16, value: u8) {
        match port {
            MASTER_CMD => self.state.master.write_command(value),
            MASTER_DATA => self.state.master.write_data(value),
            SLAVE_CMD => self.state.slave.write_command(value),
            SLAVE_DATA => {
                self.state.slave.write_data(value);
                // Special fully nested mode is a mode of the master.
                self.state.slave.special_fully_nested = false;
            }
            ELCR_MASTER => {
                Self::write_elcr(&mut self.state.master, (value & ELCR_WRITABLE[0]) | 1 << CASCADE)
            }
            ELCR_SLAVE => Self::write_elcr(&mut self.state.slave, value & ELCR_WRITABLE[1]),
            _ => {}
        }
        self.update();
    }

    fn write_elcr(chip: &mut ChipState, level: u8) {
        chip.level = level;
        chip.latched &= !level;
    }

    /// Drives IRQ `irq` (0 to 15; 2 is the cascade and cannot be driven).
    pub fn set_irq(&mut self, irq: u8, level: bool) {
        match irq {
            CASCADE => return,
            0..=7 => self.state.master.set_line(irq, level),
            8..=15 => self.state.slave.set_line(irq - 8, level),
            _ => return,
        }
        self.update();
    }

    /// The INT output to the CPU.
    #[inline]
    pub fn intr(&self) -> bool {
        self.intr
    }

    /// The CPU's interrupt acknowledge: the vector to deliver. Without a request it is the spurious IR7.
    pub fn ack(&mut self) -> u8 {
        let PicState { master, slave } = &mut self.state;
        let vector = match master.pending() {
            Some(CASCADE) if !master.single => {
                master.acknowledge(CASCADE);
                match slave.pending() {
                    Some(ir) => {
                        slave.acknowledge(ir);
                        slave.base | ir
                    }
                    None => slave.base | 7,
                }
            }
            Some(ir) => {
                master.acknowledge(ir);
                master.base | ir
            }
            None => master.base | 7,
        };
        self.update();
        vector
    }

    /// Propagates the slave's INT to the master and the master's to the CPU. The cascade requests by level: the
    /// slave would pulse its INT for each further request, with the same outcome.
    fn update(&mut self) {
        let slave = self.state.slave.pending().is_some();
        self.state.master.set_line(CASCADE, slave);
        self.intr = self.state.master.pending().is_some();
    }

    /// What must be kept to continue later.
    pub fn save(&self) -> PicState {
        self.state
    }

    /// Continues from `state`, whatever it holds.
    pub fn restore(&mut self, state: &PicState) {
        self.state = PicState { master: state.master.sanitized(0), slave: state.slave.sanitized(1) };
        self.update();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Initialized as Linux does: vectors 0x30 and 0x38, nothing masked.
    fn pic() -> Pic {
        let mut pic = Pic::new(0);
        init(&mut pic, 0x01);
        pic
    }

    fn init(pic: &mut Pic, icw4: u8) {
        for (cmd, data, base, cascade) in
            [(MASTER_CMD, MASTER_DATA, 0x30, 4), (SLAVE_CMD, SLAVE_DATA, 0x38, 2)]
        {
            pic.write(cmd, 0x11);
            pic.write(data, base);
            pic.write(data, cascade);
            pic.write(data, icw4);
        }
    }

    fn pulse(pic: &mut Pic, irq: u8) {
        pic.set_irq(irq, true);
        pic.set_irq(irq, false);
    }

    fn isr(pic: &mut Pic, port: u16) -> u8 {
        pic.write(port, 0x0b);
        let value = pic.read(port);
        pic.write(port, 0x0a);
        value
    }

    #[test]
    fn starts_masked_with_firmware_vectors() {
        let mut pic = Pic::new(1 << 9);
        assert_eq!((pic.read(MASTER_DATA), pic.read(SLAVE_DATA)), (0xff, 0xff));
        assert_eq!((pic.read(ELCR_MASTER), pic.read(ELCR_SLAVE)), (0, 2));
        pulse(&mut pic, 0);
        assert!(!pic.intr());
        pic.write(MASTER_DATA, 0);
        assert!(pic.intr());
        assert_eq!(pic.ack(), 0x08);
    }

    #[test]
    fn probe_reads_the_mask_back() {
        let mut pic = pic();
        pic.write(SLAVE_DATA, 0xff);
        pic.write(MASTER_DATA, 0xfb);
        assert_eq!((pic.read(MASTER_DATA), pic.read(SLAVE_DATA)), (0xfb, 0xff));
    }

    #[test]
    fn fixed_priority_and_eoi() {
        let mut pic = pic();
        pulse(&mut pic, 5);
        pulse(&mut pic, 3);
        assert_eq!(pic.ack(), 0x33);
        assert!(!pic.intr(), "IR5 waits for the end of IR3");
        pulse(&mut pic, 1);
        assert_eq!(pic.ack(), 0x31, "IR1 outranks IR3");
        assert_eq!(isr(&mut pic, MASTER_CMD), 0x0a);
        pic.write(MASTER_CMD, 0x20);
        assert_eq!(isr(&mut pic, MASTER_CMD), 0x08, "a non-specific EOI ends the highest");
        pic.write(MASTER_CMD, 0x63);
        assert_eq!(pic.ack(), 0x35);
    }

    #[test]
    fn cascade_delivers_slave_vectors_and_nests() {
        let mut pic = pic();
        pulse(&mut pic, 12);
        assert_eq!(pic.ack(), 0x3c);
        assert_eq!((isr(&mut pic, MASTER_CMD), isr(&mut pic, SLAVE_CMD)), (0x04, 0x10));
        pulse(&mut pic, 8);
        assert!(!pic.intr(), "fully nested: the slave is locked out until the master's EOI");
        pic.write(MASTER_CMD, 0x20);
        assert_eq!(pic.ack(), 0x38, "IRQ8 outranks IRQ12 within the slave");
        pic.write(SLAVE_CMD, 0x20);
        pic.write(MASTER_CMD, 0x20);
        assert_eq!(isr(&mut pic, SLAVE_CMD), 0x10);
    }

    #[test]
    fn special_fully_nested_lets_the_slave_interrupt_itself() {
        let mut pic = Pic::new(0);
        init(&mut pic, 0x11);
        pulse(&mut pic, 12);
        assert_eq!(pic.ack(), 0x3c);
        pulse(&mut pic, 3);
        assert!(!pic.intr(), "master inputs below the cascade still wait");
        pulse(&mut pic, 8);
        assert_eq!(pic.ack(), 0x38);
    }

    #[test]
    fn spurious_seven_and_fifteen() {
        let mut pic = Pic::new(0);
        init(&mut pic, 1);
        pic.write(ELCR_MASTER, 1 << 5);
        pic.write(ELCR_SLAVE, 1 << 2);
        pic.set_irq(5, true);
        assert!(pic.intr());
        pic.set_irq(5, false);
        assert!(!pic.intr());
        assert_eq!(pic.ack(), 0x37);
        assert_eq!(isr(&mut pic, MASTER_CMD), 0, "a spurious IR7 is not in service");
        // Through the slave: the request disappears between the master's decision and the slave's answer.
        pic.set_irq(10, true);
        pic.state.slave.lines = 0;
        assert_eq!(pic.ack(), 0x3f);
        assert_eq!((isr(&mut pic, MASTER_CMD), isr(&mut pic, SLAVE_CMD)), (0x04, 0x00));
    }

    #[test]
    fn edges_are_latched_and_levels_are_not() {
        let mut pic = pic();
        pic.write(ELCR_MASTER, 0xff);
        pic.write(ELCR_SLAVE, 0xff);
        assert_eq!((pic.read(ELCR_MASTER), pic.read(ELCR_SLAVE)), (0xf8, 0xde));
        pulse(&mut pic, 0);
        pulse(&mut pic, 5);
        assert_eq!(pic.read(MASTER_CMD), 0x01);
        assert_eq!(pic.ack(), 0x30);
        pic.write(MASTER_CMD, 0x20);
        pic.set_irq(5, true);
        assert_eq!(pic.ack(), 0x35);
        pic.write(MASTER_CMD, 0x20);
        assert_eq!(pic.ack(), 0x35, "a level that stays requests again");
        pic.set_irq(1, true);
        pic.write(MASTER_CMD, 0x20);
        assert_eq!(pic.ack(), 0x31);
        pic.set_irq(5, false);
        pic.write(MASTER_CMD, 0x20);
        assert!(!pic.intr(), "an edge that stays high does not");
    }

    #[test]
    fn icw1_resets_edge_detection_and_mask() {
        let mut pic = pic();
        pic.write(MASTER_DATA, 0xff);
        pic.set_irq(4, true);
        pic.write(MASTER_CMD, 0x11);
        assert!(!pic.intr(), "no interrupt while ICWs are outstanding");
        pic.write(MASTER_DATA, 0x47);
        pic.write(MASTER_DATA, 0x04);
        pic.write(MASTER_DATA, 0x01);
        assert_eq!(pic.read(MASTER_DATA), 0);
        assert!(!pic.intr(), "a new low-to-high transition is needed");
        pic.set_irq(4, false);
        pic.set_irq(4, true);
        assert_eq!(pic.ack(), 0x44, "ICW2 keeps bits 7 to 3");
    }

    #[test]
    fn single_mode_skips_icw3_and_icw4() {
        let mut pic = Pic::new(0);
        pic.write(MASTER_CMD, 0x12);
        pic.write(MASTER_DATA, 0x50);
        pic.write(MASTER_DATA, 0xfe);
        assert_eq!(pic.read(MASTER_DATA), 0xfe);
        pulse(&mut pic, 0);
        assert_eq!(pic.ack(), 0x50);
    }

    #[test]
    fn auto_eoi_and_rotation() {
        let mut pic = Pic::new(0);
        init(&mut pic, 0x03);
        pulse(&mut pic, 3);
        assert_eq!(pic.ack(), 0x33);
        assert_eq!(isr(&mut pic, MASTER_CMD), 0);
        pic.write(MASTER_CMD, 0x80);
        pulse(&mut pic, 3);
        assert_eq!(pic.ack(), 0x33);
        pulse(&mut pic, 3);
        pulse(&mut pic, 5);
        assert_eq!(pic.ack(), 0x35, "IR3 went to the bottom");
        assert_eq!(pic.ack(), 0x33);
        pic.write(MASTER_CMD, 0x00);
        pulse(&mut pic, 6);
        assert_eq!(pic.ack(), 0x36);
        assert_eq!(pic.state.master.lowest, 3, "rotation is off again");
    }

    #[test]
    fn rotation_commands() {
        let mut pic = pic();
        pic.write(MASTER_CMD, 0xc4); // set priority: IR4 lowest, IR5 highest
        pulse(&mut pic, 0);
        pulse(&mut pic, 5);
        assert_eq!(pic.ack(), 0x35);
        pic.write(MASTER_CMD, 0xa0); // rotate on non-specific EOI
        pulse(&mut pic, 6);
        pulse(&mut pic, 5);
        assert_eq!(pic.ack(), 0x36);
        pic.write(MASTER_CMD, 0xe6); // rotate on specific EOI
        assert_eq!(pic.ack(), 0x30);
        pic.write(MASTER_CMD, 0x40); // no operation
        assert_eq!(isr(&mut pic, MASTER_CMD), 0x01);
    }

    #[test]
    fn special_mask_mode_opens_lower_levels() {
        let mut pic = pic();
        pulse(&mut pic, 2 + 1);
        assert_eq!(pic.ack(), 0x33);
        pic.write(MASTER_DATA, 1 << 3);
        pulse(&mut pic, 6);
        assert!(!pic.intr());
        pic.write(MASTER_CMD, 0x68);
        assert_eq!(pic.ack(), 0x36);
        pic.write(MASTER_CMD, 0x20);
        assert_eq!(isr(&mut pic, MASTER_CMD), 0x08, "masked IR3 is not ended by a non-specific EOI");
        pic.write(MASTER_CMD, 0x20);
        assert_eq!(isr(&mut pic, MASTER_CMD), 0x08);
        pic.write(MASTER_CMD, 0x48);
        pic.write(MASTER_CMD, 0x20);
        assert_eq!(isr(&mut pic, MASTER_CMD), 0);
    }

    #[test]
    fn poll_acknowledges() {
        let mut pic = pic();
        pulse(&mut pic, 14);
        pic.write(MASTER_CMD, 0x0c);
        assert_eq!(pic.read(MASTER_CMD), 0x82);
        pic.write(SLAVE_CMD, 0x0c);
        assert_eq!(pic.read(SLAVE_CMD), 0x86);
        assert!(!pic.intr());
        assert_eq!((isr(&mut pic, MASTER_CMD), isr(&mut pic, SLAVE_CMD)), (0x04, 0x40));
        pic.write(SLAVE_CMD, 0x0c);
        assert_eq!(pic.read(SLAVE_DATA), 0, "nothing requests");
        assert_eq!(pic.read(SLAVE_DATA), 0, "and the poll is over: IMR");
    }

    #[test]
    fn save_restore_continues_and_survives_garbage() {
        let mut pic = pic();
        pulse(&mut pic, 12);
        pulse(&mut pic, 1);
        assert_eq!(pic.ack(), 0x31);
        let mut other = Pic::new(0);
        other.restore(&pic.save());
        assert_eq!(other.save(), pic.save());
        other.write(MASTER_CMD, 0x20);
        assert_eq!(other.ack(), 0x3c);

        let bad = ChipState { lowest: 0xff, base: 0xff, level: 0xff, latched: 0xff, ..ChipState::new(0, 0) };
        other.restore(&PicState { master: bad, slave: bad });
        for _ in 0..40 {
            other.ack();
            other.write(MASTER_CMD, 0xa0);
            other.write(SLAVE_CMD, 0xa0);
        }
        assert_eq!(other.read(ELCR_MASTER), 0xf8);
    }

    /// The pair of controllers as the data sheet tells it, one set of numbers and one priority list per chip.
    #[derive(Default)]
    struct Model {
        chips: [ModelChip; 2],
    }

    #[derive(Default, Clone)]
    struct ModelChip {
        order: Vec<u8>,
        wires: [bool; 8],
        latch: [bool; 8],
        elcr: [bool; 8],
        masked: [bool; 8],
        service: [bool; 8],
        aeoi: bool,
        rotate: bool,
        smm: bool,
        sfnm: bool,
    }

    impl ModelChip {
        fn request(&self, ir: usize) -> bool {
            self.latch[ir] || (self.elcr[ir] && self.wires[ir])
        }

        fn winner(&self) -> Option<u8> {
            for &ir in &self.order {
                let i = usize::from(ir);
                let own_slave = self.sfnm && ir == 2;
                let wanted = self.request(i) && !self.masked[i];
                let blocks = self.service[i] && !(self.smm && self.masked[i]);
                if wanted && (!blocks || own_slave) {
                    return Some(ir);
                }
                if blocks {
                    return None;
                }
            }
            None
        }

        fn bottom(&mut self, ir: u8) {
            while *self.order.last().unwrap() != ir {
                self.order.rotate_left(1);
            }
        }

        fn inta(&mut self, ir: u8) {
            self.latch[usize::from(ir)] = false;
            if self.aeoi {
                if self.rotate {
                    self.bottom(ir);
                }
            } else {
                self.service[usize::from(ir)] = true;
            }
        }

        fn eoi(&mut self, rotate: bool) {
            let found = self.order.iter().copied().find(|&ir| {
                let i = usize::from(ir);
                self.service[i] && !(self.smm && self.masked[i])
            });
            if let Some(ir) = found {
                self.service[usize::from(ir)] = false;
                if rotate {
                    self.bottom(ir);
                }
            }
        }
    }

    impl Model {
        fn wire(&mut self, irq: usize, level: bool) {
            let chip = &mut self.chips[irq / 8];
            let ir = irq % 8;
            if level && !chip.wires[ir] && !chip.elcr[ir] {
                chip.latch[ir] = true;
            }
            chip.wires[ir] = level;
        }

        fn cascade(&mut self) {
            let int = self.chips[1].winner().is_some();
            self.chips[0].elcr[2] = true;
            self.chips[0].wires[2] = int;
        }

        fn ack(&mut self) -> u8 {
            match self.chips[0].winner() {
                None => 0x37,
                Some(2) => {
                    self.chips[0].inta(2);
                    let ir = self.chips[1].winner();
                    if let Some(ir) = ir {
                        self.chips[1].inta(ir);
                    }
                    0x38 + ir.unwrap_or(7)
                }
                Some(ir) => {
                    self.chips[0].inta(ir);
                    0x30 + ir
                }
            }
        }
    }

    fn byte(set: &[bool; 8]) -> u8 {
        set.iter().enumerate().fold(0, |byte, (i, &on)| byte | (u8::from(on) << i))
    }

    fn set(byte: u8) -> [bool; 8] {
        core::array::from_fn(|i| byte & (1 << i) != 0)
    }

    #[derive(Clone, Debug)]
    enum Op {
        Wire(u8, bool),
        Mask(bool, u8),
        Elcr(bool, u8),
        Ocw2(bool, u8),
        SpecialMask(bool, bool),
        Ack,
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0..16u8, any::<bool>()).prop_map(|(irq, on)| Op::Wire(irq, on)),
            1 => (any::<bool>(), any::<u8>()).prop_map(|(chip, v)| Op::Mask(chip, v & v.rotate_left(3))),
            1 => (any::<bool>(), any::<u8>()).prop_map(|(chip, v)| Op::Elcr(chip, v)),
            4 => (any::<bool>(), any::<u8>()).prop_map(|(chip, v)| Op::Ocw2(chip, v & 0xe7)),
            1 => (any::<bool>(), any::<bool>()).prop_map(|(chip, on)| Op::SpecialMask(chip, on)),
            4 => Just(Op::Ack),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_the_data_sheet_model(
            aeoi in any::<bool>(), sfnm in any::<bool>(), ops in prop::collection::vec(op(), 1..200)
        ) {
            let mut pic = Pic::new(0);
            init(&mut pic, 1 | u8::from(aeoi) << 1 | u8::from(sfnm) << 4);
            let mut model = Model::default();
            for chip in &mut model.chips {
                *chip = ModelChip { order: (0..8).collect(), aeoi, sfnm, ..Default::default() };
            }
            model.chips[1].sfnm = false;
            for op in ops {
                let cmd = |slave: bool| if slave { SLAVE_CMD } else { MASTER_CMD };
                match op {
                    Op::Wire(2, _) => {}
                    Op::Wire(irq, on) => {
                        pic.set_irq(irq, on);
                        model.wire(irq.into(), on);
                    }
                    Op::Mask(chip, v) => {
                        pic.write(cmd(chip) + 1, v);
                        model.chips[usize::from(chip)].masked = set(v);
                    }
                    Op::Elcr(chip, v) => {
                        pic.write(ELCR_MASTER + u16::from(chip), v);
                        let m = &mut model.chips[usize::from(chip)];
                        m.elcr = set(v & ELCR_WRITABLE[usize::from(chip)]);
                        for i in 0..8 {
                            m.latch[i] &= !m.elcr[i];
                        }
                    }
                    Op::Ocw2(chip, v) => {
                        pic.write(cmd(chip), v);
                        let m = &mut model.chips[usize::from(chip)];
                        match v >> 5 {
                            0 => m.rotate = false,
                            4 => m.rotate = true,
                            1 => m.eoi(false),
                            5 => m.eoi(true),
                            3 => m.service[usize::from(v & 7)] = false,
                            7 => { m.service[usize::from(v & 7)] = false; m.bottom(v & 7); }
                            6 => m.bottom(v & 7),
                            _ => {}
                        }
                    }
                    Op::SpecialMask(chip, on) => {
                        pic.write(cmd(chip), 0x48 | u8::from(on) << 5);
                        model.chips[usize::from(chip)].smm = on;
                    }
                    Op::Ack => {
                        model.cascade();
                        prop_assert_eq!(pic.ack(), model.ack());
                    }
                }
                model.cascade();
                prop_assert_eq!(pic.intr(), model.chips[0].winner().is_some());
                for (i, port) in [MASTER_CMD, SLAVE_CMD].into_iter().enumerate() {
                    let m = &model.chips[i];
                    prop_assert_eq!(isr(&mut pic, port), byte(&m.service));
                    let irr: [bool; 8] = core::array::from_fn(|ir| m.request(ir));
                    prop_assert_eq!(pic.read(port), byte(&irr));
                }
            }
        }
    }
}
