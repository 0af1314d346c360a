//! I/O breakpoints, which the processor cannot match when the port access is done in the guest's place.
//! Intel SDM vol. 3, 18.2.4 and 18.2.5; AMD APM vol. 2, 13.1.1.

/// DR7: L0 to G3, the enable bits of the four breakpoints.
pub const ENABLED: u64 = 0xff;
/// DR7.R/W field: break on I/O accesses (with CR4.DE).
const ON_IO: u64 = 0b10;

/// Breakpoints that an access of `size` bytes at `port` hits, as DR6's low four bits.
pub fn io_hits(dr7: u64, addresses: &[u64; 4], port: u16, size: u8) -> u64 {
    let mut hits = 0;
    for (index, &address) in addresses.iter().enumerate() {
        let enabled = dr7 >> (2 * index) & 0b11 != 0;
        let kind = dr7 >> (16 + 4 * index) & 0b11;
        if !enabled || kind != ON_IO {
            continue;
        }
        // LEN 00, 01, 11 are 1, 2, 4 bytes; 10 is 8 bytes or undefined. The address is aligned to the length.
        let len: u64 = match dr7 >> (18 + 4 * index) & 0b11 {
            0b00 => 1,
            0b01 => 2,
            0b10 => 8,
            _ => 4,
        };
        let start = address & !(len - 1);
        let port = u64::from(port);
        if port < start.saturating_add(len) && start < port + u64::from(size) {
            hits |= 1 << index;
        }
    }
    hits
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn dr7(index: u32, kind: u64, len: u64) -> u64 {
        1 << (2 * index) | kind << (16 + 4 * index) | len << (18 + 4 * index)
    }

    #[test]
    fn an_access_that_touches_the_range_hits() {
        let addresses = [0x80, 0x3f9, 0, 0];
        assert_eq!(io_hits(dr7(0, ON_IO, 0), &addresses, 0x80, 1), 1);
        assert_eq!(io_hits(dr7(0, ON_IO, 0), &addresses, 0x7e, 4), 1, "a wide access over it");
        assert_eq!(io_hits(dr7(0, ON_IO, 0), &addresses, 0x81, 1), 0);
        assert_eq!(io_hits(dr7(1, ON_IO, 0b01), &addresses, 0x3f8, 1), 2, "aligned down to two bytes");
        assert_eq!(io_hits(dr7(1, ON_IO, 0b01), &addresses, 0x3fa, 1), 0);
        assert_eq!(io_hits(dr7(0, ON_IO, 0) | dr7(2, ON_IO, 0), &[0, 0, 0, 0], 0, 1), 0b101);
    }

    #[test]
    fn other_kinds_and_disabled_ones_do_not() {
        assert_eq!(io_hits(0b10 << 16, &[0x80; 4], 0x80, 1), 0);
        for kind in [0b00, 0b01, 0b11] {
            assert_eq!(io_hits(dr7(3, kind, 0), &[0x80; 4], 0x80, 1), 0);
        }
    }

    #[test]
    fn the_end_of_the_address_space_is_no_overflow() {
        assert_eq!(io_hits(dr7(0, ON_IO, 0b11), &[u64::MAX; 4], 0xffff, 4), 0);
    }
}
