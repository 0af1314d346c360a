//! What a key of a keyboard means to a guest's terminal. Pure.

use arrayvec::ArrayVec;
use pc_keyboard::{DecodedKey, KeyCode};

/// Longest sequence of a key.
pub const MAX_BYTES: usize = 8;

/// The bytes that a terminal would send for a key: UTF-8, or the sequences of xterm.
pub fn bytes(key: DecodedKey) -> ArrayVec<u8, MAX_BYTES> {
    let mut out = ArrayVec::new();
    let mut buffer = [0; 4];
    let sequence: &[u8] = match key {
        DecodedKey::Unicode('\n') => b"\r",
        // Backspace is DEL to a Unix terminal, and Delete a sequence.
        DecodedKey::Unicode('\u{8}') => b"\x7f",
        DecodedKey::Unicode('\u{7f}') => b"\x1b[3~",
        DecodedKey::Unicode(character) => character.encode_utf8(&mut buffer).as_bytes(),
        DecodedKey::RawKey(code) => match code {
            KeyCode::ArrowUp => b"\x1b[A",
            KeyCode::ArrowDown => b"\x1b[B",
            KeyCode::ArrowRight => b"\x1b[C",
            KeyCode::ArrowLeft => b"\x1b[D",
            KeyCode::Home => b"\x1b[H",
            KeyCode::End => b"\x1b[F",
            KeyCode::Insert => b"\x1b[2~",
            KeyCode::PageUp => b"\x1b[5~",
            KeyCode::PageDown => b"\x1b[6~",
            _ => b"",
        },
    };
    // No sequence is longer than that.
    let _ = out.try_extend_from_slice(sequence);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use pc_keyboard::layouts::Us104Key;
    use pc_keyboard::{HandleControl, PS2Keyboard, ScancodeSet1};

    /// What scan codes of set 1 become.
    fn typed(codes: &[u8]) -> Vec<u8> {
        let mut keyboard =
            PS2Keyboard::new(ScancodeSet1::new(), Us104Key, HandleControl::MapLettersToUnicode);
        let mut out = Vec::new();
        for &code in codes {
            if let Ok(Some(event)) = keyboard.add_byte(code) {
                out.extend(keyboard.process_keyevent(event).into_iter().flat_map(bytes));
            }
        }
        out
    }

    #[test]
    fn keys_are_what_a_terminal_sends() {
        assert_eq!(typed(&[0x1e, 0x9e, 0x2a, 0x1e, 0x9e, 0xaa]), b"aA", "with shift");
        assert_eq!(typed(&[0x1d, 0x1e, 0x9e, 0x9d, 0x31]), b"\x01n", "with control");
        assert_eq!(typed(&[0x1c, 0x0e, 0x0f, 0x01]), b"\r\x7f\t\x1b", "enter, backspace, tab, escape");
        assert_eq!(typed(&[0xe0, 0x48, 0xe0, 0xc8, 0xe0, 0x53]), b"\x1b[A\x1b[3~", "up, delete");
        assert_eq!(typed(&[0x3b, 0xe0, 0x5b]), b"", "F1 and a key for other systems");
    }
}
