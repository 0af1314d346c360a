//! Finds ACPI tables: RSDP in low memory, then the root table. ACPI 6.5, 5.2.5.
use crate::cpu::peek;

/// The root pointer in E0000 to FFFFF, on a 16-byte boundary with a right checksum.
pub fn rsdp() -> Option<u64> {
    (0xe_0000..0x10_0000).step_by(16).find(|&at| {
        peek::<[u8; 8]>(at) == *b"RSD PTR "
            && (0..20).fold(0u8, |sum, byte| sum.wrapping_add(peek(at + byte))) == 0
    })
}

/// The table with `signature`, its checksum right.
pub fn table(signature: &[u8; 4]) -> Option<u64> {
    let rsdp = rsdp()?;
    let xsdt = if peek::<u8>(rsdp + 15) >= 2 { peek::<[u32; 2]>(rsdp + 24) } else { [0; 2] };
    let xsdt = u64::from(xsdt[0]) | u64::from(xsdt[1]) << 32;
    let (root, size) = if xsdt != 0 {
        (xsdt, 8)
    } else {
        (peek::<[u8; 4]>(rsdp + 16).map(u64::from).iter().rev().fold(0, |sum, byte| sum << 8 | byte), 4)
    };
    let len = u64::from(peek::<u32>(root + 4)).min(4096);
    (36..len).step_by(size).find_map(|at| {
        // Entries of the XSDT are not 8-aligned.
        let low: u32 = peek(root + at);
        let high: u32 = if size == 8 { peek(root + at + 4) } else { 0 };
        let table = u64::from(low) | u64::from(high) << 32;
        let len = u64::from(peek::<u32>(table + 4)).min(1 << 20);
        let sum = (0..len).fold(0u8, |sum, byte| sum.wrapping_add(peek(table + byte)));
        (peek::<[u8; 4]>(table) == *signature && sum == 0).then_some(table)
    })
}

/// Base of PCI Express configuration space for segment 0, bus 0. PCI Firmware 3.3, 4.1.2.
pub fn ecam() -> Option<u64> {
    let mcfg = table(b"MCFG")?;
    let low: u32 = peek(mcfg + 44);
    let high: u32 = peek(mcfg + 48);
    Some(u64::from(low) | u64::from(high) << 32)
}
