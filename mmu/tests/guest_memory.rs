//! Copying and atomic access to guest memory, across pages, slots and holes.
mod support;

use mmu::{CpuId, Gfn, GfnRange, Gpa, NotRam, Slot, SlotFlags, VmMemory, PAGE_SIZE};
use proptest::prelude::*;
use support::flat::FlatRam;

/// Two adjoining slots whose memory does not adjoin, a hole, a read-only slot.
const SLOTS: [(u64, u64, u64, bool); 3] = [(0, 2, 4, false), (2, 1, 0, false), (5, 1, 8, true)];

fn memory() -> VmMemory<FlatRam> {
    let memory = VmMemory::new(FlatRam::new(16 * 4096));
    for (start, pages, at, read_only) in SLOTS {
        let range = GfnRange::new(Gfn::new_truncate(start), pages).unwrap();
        let flags = if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
        memory.exclusive(CpuId::BOOT).insert_slot(&Slot::new(range, flags, at * 512)).unwrap();
    }
    memory
}

/// Where a guest-physical byte is in memory, and whether it is read-only.
fn byte(gpa: u64) -> Option<(u64, bool)> {
    let (start, _, at, read_only) = *SLOTS
        .iter()
        .find(|&&(start, pages, ..)| (start * PAGE_SIZE..(start + pages) * PAGE_SIZE).contains(&gpa))?;
    Some((gpa - start * PAGE_SIZE + at * PAGE_SIZE, read_only))
}

fn peek(ram: &FlatRam, at: u64) -> u8 {
    ram.get(at).unwrap().to_le_bytes()[at as usize % 8]
}

proptest! {
    #[test]
    fn a_copy_is_whole_or_not_at_all(gpa in 0..8 * PAGE_SIZE, len in 0..3 * PAGE_SIZE as usize, seed: u8) {
        let memory = memory();
        let ram = memory.backing();
        let data: Vec<u8> = (0..len).map(|index| (index as u8).wrapping_mul(7).wrapping_add(seed) | 1).collect();
        let bytes: Vec<_> = (gpa..gpa + (len as u64).max(1)).map(byte).collect();
        let readable = bytes.iter().all(Option::is_some);
        let writable = bytes.iter().all(|byte| matches!(byte, Some((_, false))));
        let shared = memory.shared(CpuId::BOOT);
        let at = Gpa::new(gpa).unwrap();
        let refused = Err(NotRam { gpa: at, len });

        prop_assert_eq!(shared.write(at, &data), if writable { Ok(()) } else { refused });
        for (index, byte) in bytes.iter().flatten().take(len).enumerate() {
            prop_assert_eq!(peek(ram, byte.0), if writable { data[index] } else { 0 });
        }
        for (index, byte) in bytes.iter().flatten().take(len).enumerate() {
            let shift = byte.0 % 8 * 8;
            let word = ram.get(byte.0).unwrap() & !(0xff << shift);
            ram.set(byte.0, word | u64::from(data[index]) << shift);
        }
        let mut buf = vec![0; len];
        prop_assert_eq!(shared.read(at, &mut buf), if readable { Ok(()) } else { refused });
        prop_assert_eq!(buf == data, readable || len == 0);
    }
}

#[test]
fn atomic_accesses_are_aligned_and_bounded() {
    let memory = memory();
    let shared = memory.shared(CpuId::BOOT);
    let at = |bits| Gpa::new(bits).unwrap();
    shared.write(at(0x1ff8), &0x1122_3344_5566_7788u64.to_le_bytes()).unwrap();
    assert_eq!(shared.load_u64(at(0x1ff8)), Ok(0x1122_3344_5566_7788));
    assert_eq!(shared.load_u64(at(0x1fff)), Ok(0x1122_3344_5566_7788), "rounded down, never across a page");
    assert_eq!(shared.load_u32(at(0x1ffd)), Ok(0x1122_3344));
    assert_eq!(shared.compare_exchange_u32(at(0x1ffc), 0x1122_3344, 5), Ok(0x1122_3344));
    assert_eq!(shared.compare_exchange_u32(at(0x1ffc), 0x1122_3344, 6), Ok(5));
    assert_eq!(shared.compare_exchange_u64(at(0x1ff8), 0x5_5566_7788, 9), Ok(0x5_5566_7788));
    assert_eq!(shared.load_u64(at(0x1ff8)), Ok(9));
    let hole = at(0x3000);
    assert_eq!(shared.load_u64(hole), Err(NotRam { gpa: hole, len: 8 }));
    assert_eq!(shared.load_u32(hole), Err(NotRam { gpa: hole, len: 4 }));
    let rom = at(0x5008);
    assert_eq!(shared.load_u64(rom), Ok(0));
    assert_eq!(shared.compare_exchange_u64(rom, 0, 1), Err(NotRam { gpa: rom, len: 8 }));
    assert_eq!(shared.compare_exchange_u32(rom, 0, 1), Err(NotRam { gpa: rom, len: 4 }));
}

#[test]
fn accesses_end_within_the_address_space() {
    let memory = memory();
    let shared = memory.shared(CpuId::BOOT);
    let last = Gpa::new_truncate(u64::MAX);
    assert!(shared.read(last, &mut [0; 2]).is_err());
    assert!(shared.write(last, &[0; 4096]).is_err());
}
