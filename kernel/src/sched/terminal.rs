//! The console's keyboard: bytes go to the VM that has the focus, a chord moves the focus.
//!
//! `Ctrl-A 1` to `Ctrl-A 9` give the focus to that VM, `Ctrl-A n` to the next one, `Ctrl-A r` prints the boot report,
//! `Ctrl-A Ctrl-A` sends one Ctrl-A, and any other key after Ctrl-A sends both.
use crate::console;
use arrayvec::ArrayVec;

const PREFIX: u8 = 0x01;
/// Bytes that wait for a VM that does not read its COM1; more are lost, for the chords must be seen behind them.
const HELD_BYTES: usize = 1024;

/// What a byte means after those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Nothing,
    One(u8),
    Two(u8, u8),
    Focus(usize),
    Report,
}

/// State of the keyboard.
#[derive(Debug)]
pub(super) struct Terminal {
    vms: usize,
    focus: usize,
    after_prefix: bool,
    /// Bytes that the VM's UART had no room for yet.
    held: ArrayVec<u8, HELD_BYTES>,
}

impl Terminal {
    /// A keyboard for `vms` VMs; the first has the focus.
    pub(super) fn new(vms: usize) -> Self {
        Self { vms, focus: 0, after_prefix: false, held: ArrayVec::new() }
    }

    /// Index of the VM with the focus.
    pub(super) const fn focus(&self) -> usize {
        self.focus
    }

    /// Hands what was typed to `give`, which answers whether it took the byte. Returns whether the boot report was asked
    /// for.
    pub(super) fn poll(&mut self, mut give: impl FnMut(usize, u8) -> bool) -> bool {
        let mut wants_report = false;
        loop {
            let given = self.held.iter().take_while(|&&byte| give(self.focus, byte)).count();
            self.held.drain(..given);
            let Some(byte) = console::read_byte() else { return wants_report };
            let mut hold = |byte| _ = self.held.try_push(byte);
            match interpret(byte, &mut self.after_prefix, self.focus, self.vms) {
                Meaning::Nothing => {}
                Meaning::Report => wants_report = true,
                Meaning::One(byte) => hold(byte),
                Meaning::Two(first, second) => {
                    hold(first);
                    hold(second);
                }
                Meaning::Focus(vm) => {
                    self.focus = vm;
                    self.held.clear();
                }
            }
        }
    }
}

/// What `byte` means to a keyboard of `vms` VMs, `focus` the one that has it.
fn interpret(byte: u8, after_prefix: &mut bool, focus: usize, vms: usize) -> Meaning {
    if !core::mem::take(after_prefix) {
        *after_prefix = byte == PREFIX;
        return if *after_prefix { Meaning::Nothing } else { Meaning::One(byte) };
    }
    match byte {
        PREFIX => Meaning::One(PREFIX),
        b'r' => Meaning::Report,
        b'n' => Meaning::Focus((focus + 1) % vms),
        b'1'..=b'9' if usize::from(byte - b'1') < vms => Meaning::Focus(usize::from(byte - b'1')),
        other => Meaning::Two(PREFIX, other),
    }
}
