//! The two 8259s: moved off the exceptions' vectors, then masked. Intel 8259A data sheet.
// Port I/O.
#![allow(unsafe_code)]

use super::trap;
use x86_64::instructions::port::Port;

/// Masks all inputs; a spurious interrupt would arrive at [`trap::LEGACY`] or eight above.
pub fn disable() {
    const COMMAND: [u16; 2] = [0x20, 0xa0];
    const DATA: [u16; 2] = [0x21, 0xa1];
    // ICW1 with ICW4, vectors, the cascade on input 2, 8086 mode; then all masked.
    let words = [(trap::LEGACY, 1 << 2), (trap::LEGACY + 8, 2)];
    for ((command, data), (vectors, cascade)) in COMMAND.into_iter().zip(DATA).zip(words) {
        let (mut command, mut data) = (Port::<u8>::new(command), Port::<u8>::new(data));
        // SAFETY: the controllers' ports; on machines without them nothing answers.
        unsafe {
            command.write(0x11);
            data.write(vectors);
            data.write(cascade);
            data.write(1);
            data.write(0xff);
        }
    }
}
