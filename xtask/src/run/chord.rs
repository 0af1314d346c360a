//! The keys that are for xtask and not for the guest: `Ctrl-A x`. Umbra has other chords that begin with `Ctrl-A`.

/// The key that starts a chord.
const CTRL_A: u8 = 1;

/// What a person is told about them.
pub(super) const HELP: &str = "Ctrl-A x leaves, Ctrl-A Ctrl-A sends Ctrl-A";

/// Takes the chords out of what is typed.
#[derive(Debug, Default)]
pub(super) struct Chords {
    started: bool,
}

impl Chords {
    /// Appends to `guest` what of `typed` goes to the machine. Whether the user leaves: what comes after is dropped.
    pub(super) fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> bool {
        for &key in typed {
            match (std::mem::take(&mut self.started), key) {
                (false, CTRL_A) => self.started = true,
                (false, _) => guest.push(key),
                (true, b'x' | b'X') => return true,
                // Umbra's own chords; of two Ctrl-A it hands one to the guest.
                (true, _) => guest.extend([CTRL_A, key]),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut chords, mut guest) = (Chords::default(), Vec::new());
        let left = parts.iter().any(|part| chords.filter(part, &mut guest));
        (guest, left)
    }

    #[test]
    fn ordinary_keys_pass() {
        assert_eq!(filter(&[b"ls x\r\x03\x04\x1b[A"]), (b"ls x\r\x03\x04\x1b[A".to_vec(), false));
    }

    #[test]
    fn leaving_drops_the_rest() {
        assert_eq!(filter(&[b"a\x01xb"]), (b"a".to_vec(), true));
        assert_eq!(filter(&[b"a\x01", b"X"]), (b"a".to_vec(), true));
    }

    #[test]
    fn the_key_itself_can_be_sent() {
        assert_eq!(filter(&[b"\x01\x01x"]), (b"\x01\x01x".to_vec(), false));
        assert_eq!(filter(&[b"\x01", b"\x01"]), (b"\x01\x01".to_vec(), false));
    }

    #[test]
    fn other_chords_are_umbras() {
        assert_eq!(filter(&[b"\x01n", b"z"]), (b"\x01nz".to_vec(), false));
    }
}
