//! Machine checks that came while a guest ran. AMD APM vol. 2, chapter 9.

// Clearing error registers.
#![allow(unsafe_code)]

use super::msr;

/// MCG_CAP: number of banks in bits 7:0.
const MCG_CAP: u32 = 0x179;
/// MCG_STATUS: bit 0, the interrupted program can go on; bit 2, a machine check is in progress.
const MCG_STATUS: u32 = 0x17a;
const RESTART_IP_VALID: u64 = 1;
/// MC0_STATUS; the next bank's is four further.
const MC0_STATUS: u32 = 0x401;

/// Logs and clears what the banks report.
///
/// # Panics
/// If the processor says that what it interrupted cannot go on: then nothing of its state can be trusted, Umbra's
/// neither.
pub fn acknowledge() {
    // SAFETY: reads of machine-check registers, and writes of zero that clear what was reported; where there are none,
    // the access is recovered from.
    unsafe {
        let status = msr::try_read(MCG_STATUS).unwrap_or(0);
        let banks = msr::try_read(MCG_CAP).unwrap_or(0) as u8;
        for bank in 0..u32::from(banks) {
            let register = MC0_STATUS + 4 * bank;
            let value = msr::try_read(register).unwrap_or(0);
            if value >> 63 != 0 {
                log::error!("machine check: bank {bank}, status {value:#x}");
                let _ = msr::try_write(register, 0);
            }
        }
        assert!(status & RESTART_IP_VALID != 0, "machine check that nothing can go on after");
        let _ = msr::try_write(MCG_STATUS, 0);
    }
}
