//! The keyboard behind an i8042, polled. IBM Personal System/2 hardware interface technical reference, keyboard and
//! auxiliary device controller.
// Port I/O.
#![allow(unsafe_code)]

use super::keys::{self, MAX_BYTES};
use arrayvec::ArrayVec;
use pc_keyboard::layouts::Us104Key;
use pc_keyboard::{HandleControl, PS2Keyboard, ScancodeSet1};
use x86_64::instructions::port::Port;

/// Status register: a byte waits to be read.
const OUTPUT_FULL: u8 = 1;
/// Status register: the controller has not taken the last byte yet.
const INPUT_FULL: u8 = 1 << 1;
/// Status register: the byte that waits is the mouse's.
const FROM_AUXILIARY: u8 = 1 << 5;
/// What a port reads where nothing answers.
const NOTHING: u8 = 0xff;

/// Controller commands.
const READ_CONFIGURATION: u8 = 0x20;
const WRITE_CONFIGURATION: u8 = 0x60;
const DISABLE_AUXILIARY: u8 = 0xa7;
const ENABLE_KEYBOARD: u8 = 0xae;
/// Configuration: interrupts of both devices, and the two clocks off.
const INTERRUPTS: u8 = 0b11;
const KEYBOARD_OFF: u8 = 1 << 4;
/// Configuration: scan codes become those of set 1.
const TRANSLATE: u8 = 1 << 6;
/// Keyboard command: send what is typed.
const ENABLE_SCANNING: u8 = 0xf4;

/// A port access takes about a microsecond, and the controller some dozens for a command.
const POLLS: u32 = 10_000;
/// More bytes at once are not typed by people.
const BURST: usize = 16;

/// A keyboard with US layout.
pub(super) struct Keyboard {
    decoder: PS2Keyboard<Us104Key, ScancodeSet1>,
}

impl Keyboard {
    /// Takes the controller over, if there is one. What has been typed before is lost.
    pub(super) fn open() -> Option<Self> {
        if status() == NOTHING {
            return None;
        }
        drain();
        command(DISABLE_AUXILIARY)?;
        command(READ_CONFIGURATION)?;
        let configuration = answer()?;
        command(WRITE_CONFIGURATION)?;
        write(configuration & !(INTERRUPTS | KEYBOARD_OFF) | TRANSLATE)?;
        command(ENABLE_KEYBOARD)?;
        write(ENABLE_SCANNING)?;
        // Its acknowledgement, or none where there is no keyboard now: one may be plugged in.
        let _ = answer();
        let decoder = PS2Keyboard::new(ScancodeSet1::new(), Us104Key, HandleControl::MapLettersToUnicode);
        Some(Self { decoder })
    }

    /// The bytes of the next key that was typed; empty if there is none.
    pub(super) fn read(&mut self) -> ArrayVec<u8, MAX_BYTES> {
        for _ in 0..BURST {
            let status = status();
            if status & OUTPUT_FULL == 0 || status == NOTHING {
                break;
            }
            let byte = data();
            if status & FROM_AUXILIARY != 0 {
                continue;
            }
            // An unknown scan code is a key for other systems.
            let Ok(Some(event)) = self.decoder.add_byte(byte) else { continue };
            let bytes = self.decoder.process_keyevent(event).map(keys::bytes).unwrap_or_default();
            if !bytes.is_empty() {
                return bytes;
            }
        }
        ArrayVec::new()
    }
}

fn status() -> u8 {
    // SAFETY: the controller's status register; reading it changes nothing.
    unsafe { Port::new(0x64).read() }
}

fn data() -> u8 {
    // SAFETY: the controller's output, whose byte is taken by that.
    unsafe { Port::new(0x60).read() }
}

fn drain() {
    for _ in 0..BURST {
        if status() & OUTPUT_FULL == 0 {
            return;
        }
        data();
    }
}

/// Waits until the controller takes a byte.
fn ready() -> Option<()> {
    (0..POLLS).find(|_| status() & INPUT_FULL == 0).map(|_| ())
}

fn command(command: u8) -> Option<()> {
    ready()?;
    // SAFETY: a command of the controller that touches none but the two devices behind it.
    unsafe { Port::new(0x64).write(command) };
    Some(())
}

fn write(byte: u8) -> Option<()> {
    ready()?;
    // SAFETY: a command's argument, or a byte for the keyboard.
    unsafe { Port::new(0x60).write(byte) };
    Some(())
}

/// The byte that the controller or the keyboard answers with.
fn answer() -> Option<u8> {
    (0..POLLS).find(|_| status() & OUTPUT_FULL != 0).map(|_| data())
}
