//! The system control ports of a PC: 0x61, 0x64, 0x80, 0x92 and 0xCF9.
//!
//! Sources: Intel ICH9 data sheet (316972): NMI status and control (0x61), fast A20 and init (0x92), reset control
//! (0xCF9); IBM PC/AT technical reference for the keyboard controller (0x64) and the manufacturing port (0x80).
//!
//! There is no keyboard controller, and the FADT says so. Its status port still reads "ready, nothing to say"
//! instead of all ones, so that the old loops which wait for its input buffer to empty (A20, reset) end at once,
//! and its commands that pulse the reset line reset. A20 is always on: port 0x92 keeps the bit and ignores it.

/// NMI status and control: PIT channel 2 and the speaker.
pub const PORT_B: u16 = 0x61;
/// Keyboard controller data.
pub const KBD_DATA: u16 = 0x60;
/// Keyboard controller status and command.
pub const KBD_COMMAND: u16 = 0x64;
/// Manufacturing port, the POST code.
pub const POST: u16 = 0x80;
/// Fast A20 and init.
pub const PORT_A: u16 = 0x92;
/// Reset control.
pub const RESET_CONTROL: u16 = crate::vm::layout::RESET_PORT;

/// Port 0x61: GATE of PIT channel 2.
const GATE2: u8 = 1 << 0;
/// Port 0x61 bits that are kept: gate, speaker data, and the two NMI enables.
const PORT_B_KEPT: u8 = 0x0f;
/// Port 0x61: toggles with each memory refresh.
const REFRESH: u8 = 1 << 4;
/// Port 0x61: OUT of PIT channel 2.
const OUT2: u8 = 1 << 5;
/// One refresh of memory: PIT channel 1 with its customary count of 18.
const REFRESH_NS: u64 = 15_085;

/// Keyboard controller status: self-test passed, both buffers empty.
const KBD_STATUS: u8 = 1 << 2;
/// Keyboard controller commands 0xF0 to 0xFF pulse the output lines whose bit is 0; line 0 is reset.
const KBD_PULSE: u8 = 0xf0;

const A20: u8 = 1 << 1;
const INIT_NOW: u8 = 1 << 0;

const RST_CPU: u8 = 1 << 2;
const RESET_CONTROL_KEPT: u8 = 0x0e;

/// Everything the ports remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SysctlState {
    /// Port 0x61, bits 3 to 0.
    pub port_b: u8,
    /// Port 0x92.
    pub port_a: u8,
    /// Port 0xCF9.
    pub reset_control: u8,
    /// Last POST code.
    pub post: u8,
}

/// The system control ports.
#[derive(Clone, Debug)]
pub struct Sysctl {
    state: SysctlState,
}

impl Sysctl {
    /// After reset: A20 on.
    pub const fn new() -> Self {
        Self { state: SysctlState { port_b: 0, port_a: A20, reset_control: 0, post: 0 } }
    }

    /// Reads port 0x61, given OUT of PIT channel 2.
    pub fn read_port_b(&self, out2: bool, now_ns: u64) -> u8 {
        let refresh = if (now_ns / REFRESH_NS).is_multiple_of(2) { 0 } else { REFRESH };
        self.state.port_b | refresh | if out2 { OUT2 } else { 0 }
    }

    /// Writes port 0x61; returns GATE of PIT channel 2.
    pub fn write_port_b(&mut self, value: u8) -> bool {
        self.state.port_b = value & PORT_B_KEPT;
        self.gate2()
    }

    /// GATE of PIT channel 2.
    pub fn gate2(&self) -> bool {
        self.state.port_b & GATE2 != 0
    }

    /// Reads one of the other ports.
    #[inline]
    pub fn read(&self, port: u16) -> u8 {
        match port {
            KBD_DATA => 0,
            KBD_COMMAND => KBD_STATUS,
            POST => self.state.post,
            PORT_A => self.state.port_a,
            RESET_CONTROL => self.state.reset_control,
            _ => 0xff,
        }
    }

    /// Writes one of the other ports; true if that resets the machine.
    #[inline]
    #[must_use]
    pub fn write(&mut self, port: u16, value: u8) -> bool {
        match port {
            KBD_COMMAND => value & (KBD_PULSE | 1) == KBD_PULSE,
            POST => {
                self.state.post = value;
                false
            }
            PORT_A => {
                let rising = value & !self.state.port_a;
                self.state.port_a = value & (A20 | INIT_NOW);
                rising & INIT_NOW != 0
            }
            RESET_CONTROL => {
                let rising = value & !self.state.reset_control;
                self.state.reset_control = value & RESET_CONTROL_KEPT;
                rising & RST_CPU != 0
            }
            _ => false,
        }
    }

    /// What must be kept to continue later.
    pub fn save(&self) -> SysctlState {
        self.state
    }

    /// Continues from `state`, whatever it holds.
    pub fn restore(&mut self, state: &SysctlState) {
        self.state = SysctlState {
            port_b: state.port_b & PORT_B_KEPT,
            port_a: state.port_a & (A20 | INIT_NOW),
            reset_control: state.reset_control & RESET_CONTROL_KEPT,
            post: state.post,
        };
    }
}

impl Default for Sysctl {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_61_shows_gate_refresh_and_out2() {
        let mut s = Sysctl::new();
        assert!(s.write_port_b(0xff));
        assert_eq!(s.read_port_b(false, 0), 0x0f);
        assert_eq!(s.read_port_b(true, REFRESH_NS), 0x3f);
        assert_eq!(s.read_port_b(true, 2 * REFRESH_NS), 0x2f);
        assert!(!s.write_port_b(0x02));
        assert!(!s.gate2());
    }

    #[test]
    fn reset_control_needs_a_rising_rst_cpu() {
        let mut s = Sysctl::new();
        assert!(!s.write(RESET_CONTROL, 0x02));
        assert_eq!(s.read(RESET_CONTROL), 0x02);
        assert!(s.write(RESET_CONTROL, 0x06));
        assert!(!s.write(RESET_CONTROL, 0x06));
        assert!(!s.write(RESET_CONTROL, 0xf1));
        assert_eq!(s.read(RESET_CONTROL), 0);
        assert!(s.write(RESET_CONTROL, 0x0e));
    }

    #[test]
    fn keyboard_controller_only_resets() {
        let mut s = Sysctl::new();
        for command in 0..=0xffu8 {
            assert_eq!(s.write(KBD_COMMAND, command), command >= 0xf0 && command % 2 == 0);
        }
        assert_eq!(s.read(KBD_COMMAND) & 3, 0, "both buffers empty");
        assert!(!s.write(KBD_DATA, 0xfe));
    }

    #[test]
    fn port_92_resets_on_a_rising_edge_and_keeps_a20() {
        let mut s = Sysctl::new();
        assert_eq!(s.read(PORT_A), A20);
        assert!(!s.write(PORT_A, 0xfe));
        assert_eq!(s.read(PORT_A), A20);
        assert!(s.write(PORT_A, 0x01));
        assert!(!s.write(PORT_A, 0x01));
    }

    #[test]
    fn post_code_reads_back() {
        let mut s = Sysctl::new();
        assert!(!s.write(POST, 0x5a));
        assert_eq!(s.read(POST), 0x5a);
        assert_eq!(s.read(0x62), 0xff);
    }

    #[test]
    fn save_restore_survives_garbage() {
        let mut s = Sysctl::new();
        s.restore(&SysctlState { port_b: 0xff, port_a: 0xff, reset_control: 0xff, post: 0xff });
        assert_eq!(s.save(), SysctlState { port_b: 0x0f, port_a: 3, reset_control: 0x0e, post: 0xff });
    }
}
