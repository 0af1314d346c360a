//! The console's keyboard: bytes go to the VM that has the focus, a chord moves the focus.
//!
//! `Ctrl-A 1` to `Ctrl-A 9` give the focus to that VM, `Ctrl-A n` to the next one, `Ctrl-A Ctrl-A` sends one
//! Ctrl-A, and any other key after Ctrl-A sends both.
use crate::console;

const PREFIX: u8 = 0x01;

/// What a byte means after those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Nothing,
    One(u8),
    Two(u8, u8),
    Focus(usize),
}

/// State of the keyboard.
#[derive(Debug)]
pub(super) struct Terminal {
    vms: usize,
    focus: usize,
    after_prefix: bool,
    /// Bytes that the VM's UART had no room for yet.
    held: [Option<u8>; 2],
}

impl Terminal {
    /// A keyboard for `vms` VMs; the first has the focus.
    pub(super) const fn new(vms: usize) -> Self {
        Self { vms, focus: 0, after_prefix: false, held: [None; 2] }
    }

    /// Index of the VM with the focus.
    pub(super) const fn focus(&self) -> usize {
        self.focus
    }

    /// Hands what was typed to `give`, which answers whether it took the byte.
    pub(super) fn poll(&mut self, mut give: impl FnMut(usize, u8) -> bool) {
        loop {
            while let [Some(byte), next] = self.held {
                if !give(self.focus, byte) {
                    return;
                }
                self.held = [next, None];
            }
            let Some(byte) = console::read_byte() else { return };
            match self.interpret(byte) {
                Meaning::Nothing => {}
                Meaning::One(byte) => self.held = [Some(byte), None],
                Meaning::Two(first, second) => self.held = [Some(first), Some(second)],
                Meaning::Focus(vm) => self.focus = vm,
            }
        }
    }

    fn interpret(&mut self, byte: u8) -> Meaning {
        if !core::mem::take(&mut self.after_prefix) {
            self.after_prefix = byte == PREFIX;
            return if self.after_prefix { Meaning::Nothing } else { Meaning::One(byte) };
        }
        match byte {
            PREFIX => Meaning::One(PREFIX),
            b'n' => Meaning::Focus((self.focus + 1) % self.vms),
            b'1'..=b'9' if usize::from(byte - b'1') < self.vms => Meaning::Focus(usize::from(byte - b'1')),
            other => Meaning::Two(PREFIX, other),
        }
    }
}
