//! What happens when an exception arises while another event is being delivered. AMD APM vol. 2, 8.2.9 and
//! table 8-3; Intel SDM vol. 3, table 6-5.
use crate::hw::Event;

/// Divide error.
pub const DE: u8 = 0;
/// Debug.
pub const DB: u8 = 1;
/// Invalid opcode.
pub const UD: u8 = 6;
/// Double fault.
pub const DF: u8 = 8;
/// Invalid TSS.
const TS: u8 = 10;
/// Segment not present.
const NP: u8 = 11;
/// Stack fault.
const SS: u8 = 12;
/// General protection.
pub const GP: u8 = 13;
/// Page fault.
pub const PF: u8 = 14;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
}

fn class(vector: u8) -> Class {
    match vector {
        DE | TS | NP | SS | GP => Class::Contributory,
        PF => Class::PageFault,
        _ => Class::Benign,
    }
}

/// What is delivered when exception `second` arises during the delivery of `first`; None is a triple fault.
///
/// Where the two are handled one after the other, the second goes first: the first was caused by an instruction
/// that runs again or, if it came from outside, is handed back as the second value.
pub fn combine(first: Event, second: (u8, Option<u32>)) -> Option<(Event, Option<Event>)> {
    let second_event = Event::Exception(second.0, second.1);
    let Event::Exception(first_vector, _) = first else {
        return Some((second_event, Some(first)));
    };
    let (a, b) = (class(first_vector), class(second.0));
    if first_vector == DF && b != Class::Benign {
        return None;
    }
    let double = matches!(
        (a, b),
        (Class::Contributory, Class::Contributory)
            | (Class::PageFault, Class::Contributory)
            | (Class::PageFault, Class::PageFault)
    );
    Some(if double { (Event::Exception(DF, Some(0)), None) } else { (second_event, None) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vector(first: u8, second: u8) -> Option<u8> {
        combine(Event::Exception(first, Some(0)), (second, Some(0))).map(|(event, _)| match event {
            Event::Exception(vector, _) => vector,
            _ => panic!("an exception"),
        })
    }

    #[test]
    fn the_manuals_table() {
        for first in [DE, TS, NP, SS, GP] {
            for second in [DE, TS, NP, SS, GP] {
                assert_eq!(vector(first, second), Some(DF));
            }
            assert_eq!(vector(first, PF), Some(PF), "a page fault after a contributory fault is serial");
        }
        for second in [DE, TS, NP, SS, GP, PF] {
            assert_eq!(vector(PF, second), Some(DF));
            assert_eq!(vector(DF, second), None);
        }
        for benign in [DB, 3, 5, UD, 7, 9, 16, 17, 19] {
            assert_eq!(vector(benign, PF), Some(PF));
            assert_eq!(vector(PF, benign), Some(benign));
            assert_eq!(vector(GP, benign), Some(benign));
        }
    }

    #[test]
    fn outside_events_are_kept_for_later() {
        for event in [Event::Interrupt(0x31), Event::Nmi] {
            let (now, later) = combine(event, (PF, Some(2))).unwrap();
            assert_eq!(now, Event::Exception(PF, Some(2)));
            assert_eq!(later, Some(event));
        }
    }
}
