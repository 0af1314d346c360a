//! 16550A serial port, wired to a console by two bounded queues.
//!
//! Source: National Semiconductor PC16550D data sheet (section 8, "Registers"). The crystal is 1.8432 MHz.
//!
//! Sending takes no time: a character goes straight to the output queue, and "transmitter holding register empty"
//! means that the queue can take a whole FIFO more, so a console that is not drained slows the guest down instead
//! of losing text. Received characters wait in the input queue until the receiver has room, as if the other end
//! honoured flow control: only loopback can overrun. Characters cross as eight bits whatever LCR says.
//!
//! The line status never shows parity or framing errors or breaks, for nothing can cause one.

use super::ring::Ring;

/// Number of I/O ports.
pub const PORTS: u16 = 8;

// Registers by offset; DLAB in LCR turns the first two into the divisor latch.
const RBR_THR: u16 = 0;
const IER: u16 = 1;
const IIR_FCR: u16 = 2;
const LCR: u16 = 3;
const MCR: u16 = 4;
const LSR: u16 = 5;
const MSR: u16 = 6;
const SCR: u16 = 7;

const IER_RDA: u8 = 1 << 0;
const IER_THRE: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_MODEM: u8 = 0x0;
const IIR_NONE: u8 = 0x1;
const IIR_THRE: u8 = 0x2;
const IIR_RDA: u8 = 0x4;
const IIR_LINE: u8 = 0x6;
const IIR_TIMEOUT: u8 = 0xc;
const IIR_FIFO: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;
const FCR_TRIGGER_SHIFT: u32 = 6;
/// Bits of FCR that are kept: enable and receiver trigger level.
const FCR_KEPT: u8 = 0xc0 | FCR_ENABLE;
const TRIGGER_LEVELS: [usize; 4] = [1, 4, 8, 14];

const LCR_DLAB: u8 = 1 << 7;

const MCR_MASK: u8 = 0x1f;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;

const LSR_DR: u8 = 1 << 0;
const LSR_OE: u8 = 1 << 1;
const LSR_THRE: u8 = 1 << 5;
const LSR_TEMT: u8 = 1 << 6;

const MSR_DCTS: u8 = 1 << 0;
const MSR_DDSR: u8 = 1 << 1;
const MSR_TERI: u8 = 1 << 2;
const MSR_DDCD: u8 = 1 << 3;
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// Modem inputs with a console at the other end.
const CONNECTED: u8 = MSR_CTS | MSR_DSR | MSR_DCD;

const FIFO: usize = 16;
/// Nanoseconds per bit and unit of the divisor: 16 pulses of 1.8432 MHz, as a fraction.
const BIT_NS_MUL: u64 = 78_125;
const BIT_NS_DIV: u64 = 9;

/// Everything the port remembers, including what waits in its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UartState {
    /// Interrupt enable register.
    pub ier: u8,
    /// FIFO control register: enable and trigger level.
    pub fcr: u8,
    /// Line control register.
    pub lcr: u8,
    /// Modem control register.
    pub mcr: u8,
    /// Scratch register.
    pub scr: u8,
    /// Divisor latch.
    pub divisor: u16,
    /// LSR.OE: a character was lost.
    pub overrun: bool,
    /// MSR bits 3 to 0: modem inputs that changed.
    pub msr_delta: u8,
    /// The transmitter-empty interrupt is due.
    pub thre_pending: bool,
    /// The receiver FIFO; one character deep while FIFOs are off.
    pub rx: Ring<FIFO>,
    /// The character timeout has expired.
    pub timed_out: bool,
    /// When the character timeout expires if nothing happens.
    pub timeout_ns: u64,
    /// Characters from the console that the receiver has no room for yet.
    pub input: Ring<256>,
    /// Characters for the console.
    pub output: Ring<1024>,
}

/// A serial port.
#[derive(Clone, Debug)]
pub struct Uart {
    state: UartState,
    /// The interrupt line dropped for a moment and is up again.
    pulsed: bool,
}

impl Uart {
    /// After a master reset.
    pub const fn new() -> Self {
        let state = UartState {
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            scr: 0,
            divisor: 0,
            overrun: false,
            msr_delta: 0,
            thre_pending: false,
            rx: Ring::new(),
            timed_out: false,
            timeout_ns: u64::MAX,
            input: Ring::new(),
            output: Ring::new(),
        };
        Self { state, pulsed: false }
    }

    /// Reads the register at `offset` (0 to 7).
    pub fn read(&mut self, offset: u16, now_ns: u64) -> u8 {
        self.advance(now_ns);
        let s = &mut self.state;
        match offset {
            RBR_THR if s.lcr & LCR_DLAB != 0 => s.divisor as u8,
            RBR_THR => self.read_receiver(now_ns),
            IER if s.lcr & LCR_DLAB != 0 => (s.divisor >> 8) as u8,
            IER => s.ier,
            IIR_FCR => self.read_iir(),
            LCR => s.lcr,
            MCR => s.mcr,
            LSR => {
                let oe = if core::mem::take(&mut s.overrun) { LSR_OE } else { 0 };
                let dr = if s.rx.is_empty() { 0 } else { LSR_DR };
                let empty = if self.thr_empty() { LSR_THRE | LSR_TEMT } else { 0 };
                oe | dr | empty
            }
            MSR => {
                let delta = core::mem::take(&mut s.msr_delta);
                self.modem_lines() | delta
            }
            SCR => s.scr,
            _ => 0xff,
        }
    }

    /// Writes the register at `offset` (0 to 7). The status registers ignore it.
    pub fn write(&mut self, offset: u16, value: u8, now_ns: u64) {
        self.advance(now_ns);
        let s = &mut self.state;
        match offset {
            RBR_THR if s.lcr & LCR_DLAB != 0 => s.divisor = (s.divisor & 0xff00) | u16::from(value),
            RBR_THR => self.write_transmitter(value, now_ns),
            IER if s.lcr & LCR_DLAB != 0 => s.divisor = (s.divisor & 0x00ff) | u16::from(value) << 8,
            IER => {
                let enabled = value & !s.ier;
                s.ier = value & 0xf;
                if enabled & IER_THRE != 0 && self.thr_empty() {
                    self.state.thre_pending = true;
                }
            }
            IIR_FCR => self.write_fcr(value, now_ns),
            LCR => s.lcr = value,
            MCR => self.write_mcr(value, now_ns),
            SCR => s.scr = value,
            _ => {}
        }
    }

    /// Gives the guest a character; false if the input queue is full.
    pub fn push_input(&mut self, byte: u8, now_ns: u64) -> bool {
        self.advance(now_ns);
        let taken = self.state.input.push(byte);
        self.refill(now_ns);
        taken
    }

    /// Hands everything that the guest sent to `sink`.
    pub fn take_output(&mut self, sink: &mut impl FnMut(u8)) {
        let was_full = !self.thr_empty();
        while let Some(byte) = self.state.output.pop() {
            sink(byte);
        }
        if was_full {
            self.state.thre_pending = true;
        }
    }

    /// Whether the guest has sent anything that is not taken yet.
    #[inline]
    pub fn has_output(&self) -> bool {
        !self.state.output.is_empty()
    }

    fn fifo_enabled(&self) -> bool {
        self.state.fcr & FCR_ENABLE != 0
    }

    fn loopback(&self) -> bool {
        self.state.mcr & MCR_LOOP != 0
    }

    /// How many characters the receiver holds.
    fn rx_capacity(&self) -> usize {
        if self.fifo_enabled() {
            FIFO
        } else {
            1
        }
    }

    /// How many characters make a "received data available" interrupt.
    fn trigger(&self) -> usize {
        if self.fifo_enabled() {
            TRIGGER_LEVELS[usize::from(self.state.fcr >> FCR_TRIGGER_SHIFT)]
        } else {
            1
        }
    }

    fn thr_empty(&self) -> bool {
        self.state.output.free() >= FIFO
    }

    /// MSR bits 7 to 4: in loopback the port's own outputs RTS, DTR, OUT1 and OUT2.
    fn modem_lines(&self) -> u8 {
        if !self.loopback() {
            return CONNECTED;
        }
        let mcr = self.state.mcr;
        (mcr & 1) << 5 | (mcr & 2) << 3 | (mcr & 4) << 4 | (mcr & 8) << 4
    }

    fn write_mcr(&mut self, value: u8, now_ns: u64) {
        let old = self.modem_lines();
        self.state.mcr = value & MCR_MASK;
        let new = self.modem_lines();
        let changed = old ^ new;
        let mut delta = 0;
        for (line, bit) in [(MSR_CTS, MSR_DCTS), (MSR_DSR, MSR_DDSR), (MSR_DCD, MSR_DDCD)] {
            if changed & line != 0 {
                delta |= bit;
            }
        }
        // Only the trailing edge of the ring indicator counts.
        if changed & old & MSR_RI != 0 {
            delta |= MSR_TERI;
        }
        self.state.msr_delta |= delta;
        self.refill(now_ns);
    }

    fn write_fcr(&mut self, value: u8, now_ns: u64) {
        let s = &mut self.state;
        let switched = (s.fcr ^ value) & FCR_ENABLE != 0;
        // The other bits are programmed only while FIFOs are on.
        s.fcr = if value & FCR_ENABLE != 0 { value & FCR_KEPT } else { 0 };
        if switched || value & (FCR_ENABLE | FCR_CLEAR_RX) == FCR_ENABLE | FCR_CLEAR_RX {
            s.rx.clear();
            s.timed_out = false;
            s.timeout_ns = u64::MAX;
            self.refill(now_ns);
        }
    }

    fn write_transmitter(&mut self, value: u8, now_ns: u64) {
        let was = self.irq();
        self.state.thre_pending = false;
        let dropped = was && !self.irq();
        if self.loopback() {
            self.receive(value, now_ns);
        } else {
            // A guest that sends while the transmitter is full loses the character, as on hardware.
            self.state.output.push(value);
        }
        self.state.thre_pending = self.thr_empty();
        self.pulsed |= dropped && self.irq();
    }

    /// A character arrives at the receiver.
    fn receive(&mut self, byte: u8, now_ns: u64) {
        let capacity = self.rx_capacity();
        let s = &mut self.state;
        if s.rx.len() >= capacity {
            s.overrun = true;
            if capacity > 1 {
                // The FIFO keeps what it has; the character in the shift register is lost.
                return;
            }
            s.rx.clear();
        }
        s.rx.push(byte);
        self.restart_timeout(now_ns);
    }

    /// Moves waiting input into the receiver.
    fn refill(&mut self, now_ns: u64) {
        if self.loopback() {
            return;
        }
        while self.state.rx.len() < self.rx_capacity() {
            let Some(byte) = self.state.input.pop() else { return };
            self.receive(byte, now_ns);
        }
    }

    fn read_receiver(&mut self, now_ns: u64) -> u8 {
        let was = self.irq();
        let byte = self.state.rx.pop().unwrap_or(0);
        self.state.timed_out = false;
        self.restart_timeout(now_ns);
        let dropped = was && !self.irq();
        self.refill(now_ns);
        self.pulsed |= dropped && self.irq();
        byte
    }

    fn read_iir(&mut self) -> u8 {
        let id = self.interrupt();
        if id == IIR_THRE {
            self.state.thre_pending = false;
        }
        id | if self.fifo_enabled() { IIR_FIFO } else { 0 }
    }

    /// The most urgent interrupt source that is enabled and active.
    fn interrupt(&self) -> u8 {
        let s = &self.state;
        if s.ier & IER_LINE != 0 && s.overrun {
            IIR_LINE
        } else if s.ier & IER_RDA != 0 && s.rx.len() >= self.trigger() {
            IIR_RDA
        } else if s.ier & IER_RDA != 0 && s.timed_out {
            IIR_TIMEOUT
        } else if s.ier & IER_THRE != 0 && s.thre_pending {
            IIR_THRE
        } else if s.ier & IER_MODEM != 0 && s.msr_delta != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    /// Four character times from now, if characters wait in a FIFO.
    fn restart_timeout(&mut self, now_ns: u64) {
        let s = &mut self.state;
        if s.rx.is_empty() || s.fcr & FCR_ENABLE == 0 {
            s.timeout_ns = u64::MAX;
            return;
        }
        let lcr = u64::from(s.lcr);
        // Start bit, 5 to 8 data bits, parity, 1 or 2 stop bits.
        let bits = 1 + 5 + (lcr & 3) + ((lcr >> 3) & 1) + 1 + ((lcr >> 2) & 1);
        let divisor = u64::from(s.divisor.max(1));
        s.timeout_ns = now_ns.saturating_add(4 * bits * divisor * BIT_NS_MUL / BIT_NS_DIV);
    }

    /// Brings the character timeout up to date.
    #[inline]
    pub fn advance(&mut self, now_ns: u64) {
        let s = &mut self.state;
        if now_ns >= s.timeout_ns {
            s.timeout_ns = u64::MAX;
            s.timed_out = true;
        }
    }

    /// The interrupt line: on a PC the chip's INTR reaches the bus only while OUT2 is on, which loopback forces off.
    #[inline]
    pub fn irq(&self) -> bool {
        self.state.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2 && self.interrupt() != IIR_NONE
    }

    /// Whether the line dropped and rose again since the last call, so that an edge-triggered input must see it.
    #[inline]
    pub fn take_pulse(&mut self) -> bool {
        core::mem::take(&mut self.pulsed)
    }

    /// When the character timeout becomes an interrupt.
    #[inline]
    pub fn next_event(&self) -> Option<u64> {
        let s = &self.state;
        (s.ier & IER_RDA != 0 && s.timeout_ns != u64::MAX).then_some(s.timeout_ns)
    }

    /// What must be kept to continue later.
    pub fn save(&self) -> UartState {
        self.state
    }

    /// Continues from `state`, whatever it holds.
    pub fn restore(&mut self, state: &UartState) {
        self.state = UartState {
            ier: state.ier & 0xf,
            fcr: if state.fcr & FCR_ENABLE != 0 { state.fcr & FCR_KEPT } else { 0 },
            mcr: state.mcr & MCR_MASK,
            msr_delta: state.msr_delta & 0xf,
            ..*state
        };
        self.pulsed = false;
    }
}

impl Default for Uart {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One character at 115200 8N1, in nanoseconds, rounded up.
    const CHAR_NS: u64 = 86_806;

    /// 115200 8N1, FIFO on with `trigger`, `ier` enabled, line gated on.
    fn uart(fcr: u8, ier: u8) -> Uart {
        let mut u = Uart::new();
        u.write(LCR, 0x83, 0);
        u.write(RBR_THR, 1, 0);
        u.write(IER, 0, 0);
        u.write(LCR, 0x03, 0);
        u.write(IIR_FCR, fcr, 0);
        u.write(MCR, 0x0b, 0);
        u.write(IER, ier, 0);
        u
    }

    fn output(u: &mut Uart) -> Vec<u8> {
        let mut bytes = Vec::new();
        u.take_output(&mut |byte| bytes.push(byte));
        bytes
    }

    fn type_in(u: &mut Uart, text: &[u8], now: u64) {
        for &byte in text {
            assert!(u.push_input(byte, now));
        }
    }

    #[test]
    fn reset_values() {
        let mut u = Uart::new();
        let regs: Vec<u8> = (0..8).map(|offset| u.read(offset, 0)).collect();
        assert_eq!(regs, [0, 0, 0x01, 0, 0, 0x60, 0xb0, 0]);
        assert_eq!(u.read(8, 0), 0xff);
        assert!(!u.irq());
    }

    /// What Linux's 8250 driver asks before it believes in a 16550A.
    #[test]
    fn linux_autoconfig() {
        let mut u = Uart::new();
        u.write(IER, 0, 0);
        assert_eq!(u.read(IER, 0) & 0xf, 0);
        u.write(IER, 0x0f, 0);
        assert_eq!(u.read(IER, 0) & 0xf, 0xf);
        u.write(IER, 0xff, 0);
        assert_eq!(u.read(IER, 0), 0xf, "bits 7 to 4 are always 0");
        u.write(IER, 0, 0);
        u.write(MCR, 0x1a, 0);
        assert_eq!(u.read(MSR, 0) & 0xf0, 0x90);
        u.write(MCR, 0, 0);
        u.write(LCR, 0xbf, 0); // no enhanced feature register
        u.write(LCR, 0, 0);
        u.write(IIR_FCR, FCR_ENABLE, 0);
        assert_eq!(u.read(IIR_FCR, 0), 0xc1);
        u.write(SCR, 0x5a, 0);
        assert_eq!(u.read(SCR, 0), 0x5a);
        // The THRE test of serial8250_do_startup: both times the interrupt shows at once.
        u.write(MCR, 0x08, 0);
        for _ in 0..2 {
            u.write(IER, IER_THRE, 0);
            assert!(u.irq());
            assert_eq!(u.read(IIR_FCR, 0), 0xc2);
            assert_eq!(u.read(IIR_FCR, 0), 0xc1, "reading IIR clears it");
            u.write(IER, 0, 0);
        }
    }

    #[test]
    fn thre_rises_on_enable_only_from_zero() {
        let mut u = uart(1, IER_THRE);
        assert_eq!(u.read(IIR_FCR, 0), 0xc2);
        u.write(IER, IER_THRE | IER_RDA, 0);
        assert_eq!(u.read(IIR_FCR, 0), 0xc1, "was enabled before");
        u.write(RBR_THR, b'x', 0);
        assert_eq!(u.read(IIR_FCR, 0), 0xc2, "sent");
        assert_eq!(output(&mut u), b"x");
    }

    #[test]
    fn a_write_without_reading_iir_is_a_new_edge() {
        let mut u = uart(1, IER_THRE);
        assert!(u.irq() && !u.take_pulse());
        u.write(RBR_THR, b'x', 0);
        assert!(u.irq() && u.take_pulse() && !u.take_pulse());
        u.read(IIR_FCR, 0);
        u.write(RBR_THR, b'y', 0);
        assert!(u.irq() && !u.take_pulse(), "an ordinary edge");
    }

    #[test]
    fn transmitter_is_paced_by_the_output_queue() {
        let mut u = uart(1, IER_THRE);
        let mut sent = 0u32;
        while u.read(LSR, 0) & LSR_THRE != 0 {
            for _ in 0..FIFO {
                u.write(RBR_THR, sent as u8, 0);
                sent += 1;
            }
        }
        assert_eq!(sent, 1024);
        assert_eq!(u.read(LSR, 0) & LSR_TEMT, 0);
        assert_eq!(u.read(IIR_FCR, 0), 0xc1);
        u.write(RBR_THR, b'!', 0); // lost
        let bytes = output(&mut u);
        assert_eq!(bytes.len(), 1024);
        assert!(bytes.iter().enumerate().all(|(i, &b)| b == i as u8));
        assert_eq!(u.read(LSR, 0), LSR_THRE | LSR_TEMT);
        assert_eq!(u.read(IIR_FCR, 0), 0xc2, "room again");
    }

    #[test]
    fn divisor_latch() {
        let mut u = Uart::new();
        u.write(LCR, LCR_DLAB, 0);
        u.write(RBR_THR, 0x34, 0);
        u.write(IER, 0x12, 0);
        assert_eq!((u.read(RBR_THR, 0), u.read(IER, 0)), (0x34, 0x12));
        u.write(LCR, 0, 0);
        assert_eq!(u.read(IER, 0), 0);
        assert!(!u.has_output());
    }

    #[test]
    fn receive_without_fifo() {
        let mut u = uart(0, IER_RDA);
        type_in(&mut u, b"ab", 0);
        assert!(u.irq());
        assert_eq!(u.read(IIR_FCR, 0), IIR_RDA);
        assert_eq!(u.read(RBR_THR, 0), b'a');
        assert!(u.irq() && u.take_pulse(), "the next character is a new interrupt");
        assert_eq!(u.read(LSR, 0) & LSR_DR, LSR_DR);
        assert_eq!(u.read(RBR_THR, 0), b'b');
        assert!(!u.irq());
        assert_eq!(u.read(LSR, 0) & (LSR_DR | LSR_OE), 0);
        assert_eq!(u.next_event(), None, "no timeout without FIFO");
    }

    #[test]
    fn trigger_levels() {
        for (bits, level) in TRIGGER_LEVELS.into_iter().enumerate() {
            let mut u = uart(1 | (bits as u8) << 6, IER_RDA);
            for i in 1..=FIFO {
                type_in(&mut u, b"z", 0);
                assert_eq!(u.irq(), i >= level, "{i} of {level}");
            }
            for i in (0..FIFO).rev() {
                u.read(RBR_THR, 0);
                assert_eq!(u.read(IIR_FCR, 0) == 0xc4, i >= level);
            }
        }
    }

    #[test]
    fn character_timeout() {
        let mut u = uart(0xc1, IER_RDA);
        type_in(&mut u, b"ab", 1000);
        let due = u.next_event().unwrap();
        assert!((1000 + 4 * CHAR_NS - 4..=1000 + 4 * CHAR_NS).contains(&due));
        u.advance(due - 1);
        assert!(!u.irq());
        u.advance(due);
        assert_eq!(u.read(IIR_FCR, due), 0xcc);
        assert_eq!(u.next_event(), None);
        assert_eq!(u.read(RBR_THR, due), b'a', "one read ends it and starts the next");
        assert!(!u.irq());
        let again = u.next_event().unwrap();
        type_in(&mut u, b"c", again - 1);
        u.advance(again);
        assert!(!u.irq(), "a new character restarts the time");
        u.advance(again + 4 * CHAR_NS);
        assert!(u.irq());
        for expected in [b'b', b'c'] {
            assert_eq!(u.read(RBR_THR, again + 4 * CHAR_NS), expected);
        }
        assert_eq!(u.next_event(), None);
    }

    #[test]
    fn input_waits_for_room() {
        let mut u = uart(1, IER_RDA);
        let mut pushed = 0u32;
        while u.push_input(pushed as u8, 0) {
            pushed += 1;
        }
        assert_eq!(pushed, 16 + 256);
        assert_eq!(u.read(LSR, 0) & LSR_OE, 0);
        for i in 0..pushed {
            assert_eq!(u.read(LSR, 0) & LSR_DR, LSR_DR);
            assert_eq!(u.read(RBR_THR, 0), i as u8);
        }
        assert_eq!(u.read(LSR, 0) & LSR_DR, 0);
    }

    #[test]
    fn loopback_overruns_as_the_data_sheet_says() {
        let mut u = uart(1, IER_LINE);
        u.write(MCR, 0x1b, 0);
        for i in 0..17 {
            u.write(RBR_THR, i, 0);
        }
        assert_eq!(u.read(IIR_FCR, 0), 0xc6);
        assert!(!u.irq(), "loopback cuts OUT2");
        assert_eq!(u.read(LSR, 0), LSR_OE | LSR_DR | LSR_THRE | LSR_TEMT);
        assert_eq!(u.read(LSR, 0) & LSR_OE, 0, "reading clears it");
        for i in 0..16 {
            assert_eq!(u.read(RBR_THR, 0), i, "the FIFO kept the first sixteen");
        }
        u.write(IIR_FCR, 0, 0);
        u.write(RBR_THR, 1, 0);
        u.write(RBR_THR, 2, 0);
        assert_eq!(u.read(LSR, 0) & LSR_OE, LSR_OE);
        assert_eq!(u.read(RBR_THR, 0), 2, "without FIFO the newest wins");
        assert!(!u.has_output());
    }

    #[test]
    fn input_is_held_back_during_loopback() {
        let mut u = uart(1, IER_RDA);
        u.write(MCR, 0x1b, 0);
        type_in(&mut u, b"k", 0);
        assert_eq!(u.read(LSR, 0) & LSR_DR, 0);
        u.write(MCR, 0x0b, 0);
        assert_eq!(u.read(RBR_THR, 0), b'k');
    }

    #[test]
    fn modem_status_and_deltas() {
        let mut u = uart(1, IER_MODEM);
        assert_eq!(u.read(MSR, 0), CONNECTED);
        u.write(MCR, 0x10 | 0x04, 0); // loop, OUT1: everything else drops
        assert_eq!(u.read(IIR_FCR, 0), 0xc0);
        assert_eq!(u.read(MSR, 0), MSR_RI | MSR_DCTS | MSR_DDSR | MSR_DDCD);
        assert_eq!(u.read(IIR_FCR, 0), 0xc1);
        u.write(MCR, 0x10, 0);
        assert_eq!(u.read(MSR, 0), MSR_TERI, "trailing edge of RI");
        u.write(MCR, 0x1f, 0);
        assert_eq!(u.read(MSR, 0), 0xf0 | MSR_DCTS | MSR_DDSR | MSR_DDCD);
    }

    #[test]
    fn priorities_of_the_interrupt_sources() {
        let mut u = uart(1, 0xf);
        u.write(MCR, 0x18, 0);
        for i in 0..17 {
            u.write(RBR_THR, i, 0);
        }
        assert_eq!(u.read(IIR_FCR, 0), 0xc6);
        u.read(LSR, 0);
        assert_eq!(u.read(IIR_FCR, 0), 0xc4);
        u.write(IIR_FCR, 0x03, 0);
        assert_eq!(u.read(IIR_FCR, 0), 0xc2);
        assert_eq!(u.read(IIR_FCR, 0), 0xc0);
        u.read(MSR, 0);
        assert_eq!(u.read(IIR_FCR, 0), 0xc1);
    }

    #[test]
    fn fcr_needs_its_enable_bit() {
        let mut u = uart(1, IER_RDA);
        type_in(&mut u, b"abc", 0);
        u.write(IIR_FCR, 0xc0, 0);
        assert_eq!(u.read(IIR_FCR, 0), IIR_NONE, "FIFO off: emptied, trigger bits ignored");
        u.write(IIR_FCR, 0xc1, 0);
        type_in(&mut u, b"d", 0);
        u.write(IIR_FCR, 0xc3, 0);
        assert_eq!(u.read(LSR, 0) & LSR_DR, 0, "cleared on request");
        assert_eq!(u.next_event(), None);
    }

    #[test]
    fn out2_gates_the_line() {
        let mut u = uart(1, IER_THRE);
        assert!(u.irq());
        u.write(MCR, 0x03, 0);
        assert!(!u.irq());
        u.write(MCR, 0x0b, 0);
        assert!(u.irq());
    }

    #[test]
    fn save_restore_continues_and_survives_garbage() {
        let mut u = uart(0xc1, 0xf);
        type_in(&mut u, b"hello", 77);
        u.write(RBR_THR, b'>', 80);
        let mut other = Uart::new();
        other.restore(&u.save());
        assert_eq!(other.save(), u.save());
        assert_eq!(other.next_event(), u.next_event());
        assert_eq!(output(&mut other), b">");
        assert_eq!(other.read(RBR_THR, 90), b'h');

        let bad = UartState {
            ier: 0xff,
            fcr: 0xff,
            lcr: 0xff,
            mcr: 0xff,
            msr_delta: 0xff,
            divisor: 0xffff,
            ..u.save()
        };
        other.restore(&bad);
        for offset in 0..8 {
            other.read(offset, u64::MAX);
            other.write(offset, 0xff, u64::MAX);
        }
        assert_eq!(other.read(IER, 0) & 0xf0, 0xf0, "the divisor latch is open");
        assert_eq!(other.read(MCR, 0), 0x1f);
    }
}
