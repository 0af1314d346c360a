//! Events as VMX writes them: VM-entry interruption information. SDM vol. 3, table 25-17.
use crate::hw::Event;

/// The information is valid.
pub const VALID: u32 = 1 << 31;
/// An error code goes with the event.
pub const ERROR_CODE: u32 = 1 << 11;
/// Shift of the type in bits 10:8.
pub const TYPE_SHIFT: u32 = 8;
/// External interrupt.
pub const TYPE_INTERRUPT: u32 = 0;
/// NMI.
pub const TYPE_NMI: u32 = 2;
/// Hardware exception.
pub const TYPE_EXCEPTION: u32 = 3;
/// INT n.
pub const TYPE_SOFTWARE_INTERRUPT: u32 = 4;
/// INT1.
pub const TYPE_PRIVILEGED_EXCEPTION: u32 = 5;
/// INT3 or INTO.
pub const TYPE_SOFTWARE_EXCEPTION: u32 = 6;
/// An event without vector: the monitor trap flag.
pub const TYPE_OTHER: u32 = 7;

/// Whether exception `vector` pushes an error code: #DF, #TS, #NP, #SS, #GP, #PF and #AC, those of the check
/// in SDM vol. 3, 27.2.1.3.
pub const fn has_error_code(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

/// Encodes an event for [`super::vmcs::ENTRY_INTERRUPTION`] and its error code for
/// [`super::vmcs::ENTRY_EXCEPTION_ERROR`], which the processor ignores unless the first says there is one.
///
/// The entry fails (27.2.1.3) unless exactly those exceptions have error codes that push one, and in real
/// mode, where `protected_mode` (CR0.PE) is clear, none.
#[inline]
pub const fn encode(event: Event, protected_mode: bool) -> (u32, u32) {
    match event {
        Event::Interrupt(vector) => (VALID | TYPE_INTERRUPT << TYPE_SHIFT | vector as u32, 0),
        Event::Nmi => (VALID | TYPE_NMI << TYPE_SHIFT | 2, 0),
        Event::Exception(vector, error) => {
            let info = VALID | TYPE_EXCEPTION << TYPE_SHIFT | vector as u32;
            match error {
                Some(error) if protected_mode && has_error_code(vector) => (info | ERROR_CODE, error),
                None if protected_mode && has_error_code(vector) => (info | ERROR_CODE, 0),
                _ => (info, 0),
            }
        }
    }
}

/// Decodes an event that was encoded for an entry, as long as it is valid: the entry clears the valid bit.
#[inline]
pub const fn decode(info: u32, error: u32) -> Option<Event> {
    if info & VALID == 0 {
        return None;
    }
    let vector = info as u8;
    match info >> TYPE_SHIFT & 7 {
        TYPE_INTERRUPT => Some(Event::Interrupt(vector)),
        TYPE_NMI => Some(Event::Nmi),
        TYPE_EXCEPTION if info & ERROR_CODE != 0 => Some(Event::Exception(vector, Some(error))),
        TYPE_EXCEPTION => Some(Event::Exception(vector, None)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_survive_the_round_trip() {
        for event in [
            Event::Interrupt(0x20),
            Event::Interrupt(255),
            Event::Nmi,
            Event::Exception(14, Some(0x1f)),
            Event::Exception(6, None),
            Event::Exception(3, None),
            Event::Exception(13, Some(u32::MAX)),
        ] {
            let (info, error) = encode(event, true);
            assert_eq!(decode(info, error), Some(event));
            assert_eq!(decode(info & !VALID, error), None);
        }
    }

    #[test]
    fn encodings_of_the_manual() {
        assert_eq!(encode(Event::Interrupt(0x31), true), (0x8000_0031, 0));
        assert_eq!(encode(Event::Nmi, true), (0x8000_0202, 0));
        assert_eq!(encode(Event::Exception(13, Some(8)), true), (0x8000_0b0d, 8));
        assert_eq!(encode(Event::Exception(6, None), true), (0x8000_0306, 0));
    }

    #[test]
    fn error_codes_are_where_the_entry_wants_them() {
        assert_eq!(encode(Event::Exception(13, Some(0)), false), (0x8000_030d, 0), "none in real mode");
        assert_eq!(encode(Event::Exception(13, None), true), (0x8000_0b0d, 0));
        assert_eq!(encode(Event::Exception(6, Some(5)), true), (0x8000_0306, 0));
    }
}
