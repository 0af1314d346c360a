//! Tests of the MSR policy: what exists, which values are taken, what a write asks of the caller.
use super::*;
use crate::devices::apic_bus::Destination;
use proptest::prelude::*;

const BASE: u64 = 0xfee0_0000;
const BSP_EN: u64 = 0x900;

fn caps(vendor: Vendor) -> GuestCaps {
    GuestCaps {
        vendor,
        phys_bits: 40,
        efer: 0xd01,
        cr4: 0x7_07ff,
        xcr0: 7,
        tsc_aux: true,
        xsaves: true,
        invpcid: true,
        lfence_serializing: true,
    }
}

/// One vCPU's worth of MSRs.
struct Cpu {
    state: MsrState,
    caps: GuestCaps,
    lapic: LocalApic,
    tsc: u64,
    efer: u64,
    paging: bool,
}

impl Cpu {
    fn new(vendor: Vendor) -> Self {
        Self {
            state: MsrState::new(0xc000_0000, 0x1_4000_0000),
            caps: caps(vendor),
            lapic: LocalApic::new(0, true, 40),
            tsc: 1000,
            efer: 0,
            paging: false,
        }
    }

    fn read(&mut self, msr: u32) -> Result<u64, Gp> {
        let (tsc, efer, paging) = (self.tsc, self.efer, self.paging);
        let (caps, lapic) = (&self.caps, &mut self.lapic);
        self.state.read(msr, &mut MsrContext { caps, lapic, now_ns: 0, tsc, efer, paging, exits: 42 })
    }

    fn write(&mut self, msr: u32, value: u64) -> Result<MsrEffect, Gp> {
        let (tsc, efer, paging) = (self.tsc, self.efer, self.paging);
        let (caps, lapic) = (&self.caps, &mut self.lapic);
        self.state.write(msr, value, &mut MsrContext { caps, lapic, now_ns: 0, tsc, efer, paging, exits: 42 })
    }
}

const VENDORS: [Vendor; 2] = [Vendor::Intel, Vendor::Amd];

#[test]
fn reset_values() {
    for vendor in VENDORS {
        let mut cpu = Cpu::new(vendor);
        for (msr, value) in [
            (msr::TSC, 1000),
            (msr::TSC_ADJUST, 0),
            (msr::TSC_DEADLINE, 0),
            (msr::APIC_BASE, BASE | BSP_EN),
            (msr::EFER, 0),
            (msr::PAT, PAT_RESET),
            (msr::MTRR_CAP, 0x508),
            (msr::MTRR_DEF_TYPE, 0x806),
            (msr::MCG_CAP, 0),
            (msr::MCG_STATUS, 0),
            (msr::TSC_AUX, 0),
            (msr::XSS, 0),
            (msr::DEBUGCTL, 0),
            (msr::EXIT_COUNT, 42),
        ] {
            assert_eq!(cpu.read(msr), Ok(value), "{msr:#x}");
        }
        for msr in (0x200..=0x20f).chain([0x250, 0x258, 0x259]).chain(0x268..=0x26f) {
            assert_eq!(cpu.read(msr), Ok(0), "{msr:#x}");
        }
    }
    let mut intel = Cpu::new(Vendor::Intel);
    for (msr, value) in [(0x1a0, 0x1801), (0x17, 0), (0x8b, 1 << 32), (0x3a, 1)] {
        assert_eq!(intel.read(msr), Ok(value));
    }
    let mut amd = Cpu::new(Vendor::Amd);
    for (msr, value) in [
        (msr::SYSCFG, 0),
        (msr::HWCR, 1 << 24),
        (msr::NB_CFG, 0),
        (0x8b, 0x0100_0000),
        (msr::TOP_MEM, 0xc000_0000),
        (msr::TOP_MEM2, 0x1_4000_0000),
        (msr::DE_CFG, 2),
        (msr::VM_CR, 0x18),
        (msr::INT_PENDING, 0),
    ] {
        assert_eq!(amd.read(msr), Ok(value), "{msr:#x}");
    }
    amd.caps.lfence_serializing = false;
    assert_eq!(amd.read(msr::DE_CFG), Ok(0));
}

#[test]
fn what_does_not_exist_faults() {
    for vendor in VENDORS {
        let mut cpu = Cpu::new(vendor);
        // Speculation control, PMU, MPX, VMX, PT, LBR, SVM's save area, OSVW, machine-check banks.
        for msr in [
            0x48,
            0x49,
            0x10a,
            0x10b,
            0xc001_011f,
            0xc1,
            0x186,
            0x38f,
            0xd90,
            0x480,
            0x570,
            0x1c9,
            0xc001_0117,
            0xc001_0140,
            0x400,
            0x17b,
            0x7ff,
            0x840,
            0x8ff,
            0x4000_0000,
            0x4000_0101,
            0xffff_ffff,
        ] {
            assert_eq!(cpu.read(msr), Err(Gp), "{msr:#x}");
            assert_eq!(cpu.write(msr, 0), Err(Gp), "{msr:#x}");
        }
        // A vendor's own are absent on the other.
        let other: &[u32] = match vendor {
            Vendor::Intel => &[msr::SYSCFG, msr::HWCR, msr::VM_CR, msr::TOP_MEM, msr::DE_CFG],
            Vendor::Amd => &[msr::MISC_ENABLE, msr::PLATFORM_ID, msr::FEATURE_CONTROL],
        };
        for &msr in other {
            assert_eq!((cpu.read(msr), cpu.write(msr, 0)), (Err(Gp), Err(Gp)), "{msr:#x}");
        }
        cpu.caps.tsc_aux = false;
        cpu.caps.xsaves = false;
        for msr in [msr::TSC_AUX, msr::XSS] {
            assert_eq!((cpu.read(msr), cpu.write(msr, 0)), (Err(Gp), Err(Gp)), "{msr:#x}");
        }
        // Passed through: never here, and if so, absent.
        for msr in passthrough(true) {
            assert_eq!(cpu.read(msr), Err(Gp));
        }
    }
}

#[test]
fn read_only_registers() {
    for vendor in VENDORS {
        let mut cpu = Cpu::new(vendor);
        for msr in [msr::EXIT_COUNT, msr::MTRR_CAP, msr::MCG_CAP, msr::P5_MC_ADDR, msr::PLATFORM_ID] {
            assert_eq!(cpu.write(msr, 0), Err(Gp), "{msr:#x}");
        }
    }
}

#[test]
fn efer_rules() {
    const LME: u64 = EFER_LME;
    const LMA: u64 = EFER_LMA;
    let caps = caps(Vendor::Amd);
    for (value, old, paging, expected) in [
        (0x901, 0, false, Ok(0x901)),
        (LME, 0, true, Err(Gp)),
        (0, LME | LMA, true, Err(Gp)),
        (LME | 0x801, LME | LMA, true, Ok(LME | LMA | 0x801)),
        (LMA, 0, false, Ok(0)),
        (1, LMA | LME, false, Ok(LMA | 1)),
        (1 << 12, 0, false, Err(Gp)),
        (1 << 14, 0, false, Err(Gp)),
        (1 << 1, 0, false, Err(Gp)),
        (1 << 63, 0, false, Err(Gp)),
    ] {
        assert_eq!(efer_after_write(value, old, paging, &caps), expected, "{value:#x} over {old:#x}");
    }
    let mut cpu = Cpu::new(Vendor::Amd);
    assert_eq!(cpu.write(msr::EFER, 0x901), Ok(MsrEffect::Efer(0x901)));
    cpu.efer = 1 << 12 | 0x901;
    assert_eq!(cpu.read(msr::EFER), Ok(0x901), "the host's SVME does not show");
}

#[test]
fn tsc_and_its_adjustment_move_together() {
    let mut cpu = Cpu::new(Vendor::Intel);
    assert_eq!(cpu.write(msr::TSC_ADJUST, 500), Ok(MsrEffect::TscOffset(500)));
    assert_eq!(cpu.write(msr::TSC_ADJUST, 300), Ok(MsrEffect::TscOffset(200u64.wrapping_neg())));
    assert_eq!(cpu.write(msr::TSC, 400), Ok(MsrEffect::TscOffset(600u64.wrapping_neg())));
    assert_eq!(cpu.read(msr::TSC_ADJUST), Ok(300u64.wrapping_sub(600)));
    cpu.tsc = 400;
    assert_eq!(cpu.write(msr::TSC, u64::MAX), Ok(MsrEffect::TscOffset(u64::MAX - 400)));
    assert_eq!(cpu.read(msr::TSC_ADJUST), Ok(u64::MAX.wrapping_sub(700)));
}

#[test]
fn pat_types() {
    let mut cpu = Cpu::new(Vendor::Amd);
    for kind in 0..=255u64 {
        let valid = matches!(kind, 0 | 1 | 4 | 5 | 6 | 7);
        for byte in 0..8 {
            let value = PAT_RESET & !(0xff << (8 * byte)) | kind << (8 * byte);
            let expected = if valid { Ok(MsrEffect::Pat(value)) } else { Err(Gp) };
            let before = cpu.read(msr::PAT);
            assert_eq!(cpu.write(msr::PAT, value), expected);
            assert_eq!(cpu.read(msr::PAT), if valid { Ok(value) } else { before });
        }
    }
}

#[test]
fn mtrr_values() {
    let mut cpu = Cpu::new(Vendor::Amd);
    for (msr, value, valid) in [
        (0x2ff, 0xc06, true),
        (0x2ff, 0, true),
        (0x2ff, 0x802, false),
        (0x2ff, 0x807, false),
        (0x2ff, 0x1006, false),
        (0x2ff, 0xa06, false),
        (0x200, 0x12_3456_7006, true),
        (0x200, 0x12_3456_7002, false),
        (0x200, 0x12_3456_7106, false),
        (0x200, 0x12_3456_7806, false),
        (0x20e, 0x100_0000_0006, false),
        (0x201, 0xff_ffff_f800, true),
        (0x201, 0xff_ffff_f000, true),
        (0x201, 0xff_ffff_f801, false),
        (0x201, 0xff_ffff_f400, false),
        (0x20f, 0x100_0000_0800, false),
        (0x250, 0x0605_0401_0001_0405, true),
        (0x259, 0x0200_0000_0000_0000, false),
        (0x26f, 0x0000_0000_0000_0018, false),
        (0x268, 0x0606_0606_0606_0606, true),
    ] {
        let before = cpu.read(msr);
        let expected = if valid { Ok(MsrEffect::None) } else { Err(Gp) };
        assert_eq!(cpu.write(msr, value), expected, "{msr:#x} {value:#x}");
        assert_eq!(cpu.read(msr), if valid { Ok(value) } else { before });
    }
    for absent in [0x210, 0x251, 0x25a, 0x267, 0x270] {
        assert_eq!((cpu.read(absent), cpu.write(absent, 0)), (Err(Gp), Err(Gp)));
    }
}

#[test]
fn vendor_registers() {
    let mut intel = Cpu::new(Vendor::Intel);
    for (value, valid) in
        [(0x1800, true), (0x1801, true), (0x1800 | 1 << 34, false), (0x41801, false), (0, false)]
    {
        assert_eq!(intel.write(msr::MISC_ENABLE, value).is_ok(), valid, "{value:#x}");
    }
    assert_eq!(intel.read(msr::MISC_ENABLE), Ok(0x1801));
    assert_eq!(intel.write(msr::MICROCODE_REVISION, 0), Ok(MsrEffect::None));
    assert_eq!(intel.write(msr::TSC_AUX, 1 << 32), Err(Gp));
    assert_eq!(intel.write(msr::TSC_AUX, 7), Ok(MsrEffect::TscAux(7)));

    let mut amd = Cpu::new(Vendor::Amd);
    assert_eq!(amd.write(msr::TSC_AUX, 1 << 32 | 7), Ok(MsrEffect::TscAux(7)));
    assert_eq!(amd.read(msr::TSC_AUX), Ok(7));
    // Kernels set the flush filter bit on family 0Fh, and write back what they read.
    assert_eq!(amd.write(msr::HWCR, 1 << 24 | 1 << 6), Ok(MsrEffect::None));
    assert_eq!(amd.read(msr::HWCR), Ok(1 << 24));
    assert_eq!(amd.write(msr::HWCR, 1 << 18), Ok(MsrEffect::None));
    assert_eq!(amd.read(msr::HWCR), Ok(1 << 24 | 1 << 18));
    assert_eq!(amd.write(msr::HWCR, 1 << 30), Err(Gp));
    assert_eq!(amd.write(msr::NB_CFG, 1 << 46), Ok(MsrEffect::None));
    assert_eq!(amd.read(msr::NB_CFG), Ok(1 << 46));
    assert_eq!(amd.write(msr::NB_CFG, 1), Err(Gp));
    assert_eq!(amd.write(msr::VM_CR, 0), Ok(MsrEffect::None));
    assert_eq!(amd.read(msr::VM_CR), Ok(0x18), "locked");
    assert_eq!(amd.write(msr::VM_CR, 1 << 5), Err(Gp));
    assert_eq!(amd.write(msr::DE_CFG, 2), Ok(MsrEffect::None));
    assert_eq!(amd.write(msr::DE_CFG, 1 << 9), Err(Gp));
    assert_eq!(amd.write(msr::TOP_MEM, 0xc000_0000), Ok(MsrEffect::None));
    assert_eq!(amd.write(msr::TOP_MEM, 0), Err(Gp));
    assert_eq!(amd.write(msr::MCG_STATUS, 5), Ok(MsrEffect::None));
    assert_eq!(amd.write(msr::MCG_STATUS, 8), Err(Gp));
    assert_eq!((amd.write(msr::XSS, 0), amd.write(msr::XSS, 1)), (Ok(MsrEffect::None), Err(Gp)));
    assert_eq!((amd.write(msr::DEBUGCTL, 0), amd.write(msr::DEBUGCTL, 1)), (Ok(MsrEffect::None), Err(Gp)));
}

#[test]
fn what_intels_cpuid_hides_faults() {
    let mut cpu = Cpu::new(Vendor::Intel);
    // CORE_CAPABILITIES, PLATFORM_INFO, MPERF, APERF, FLUSH_CMD, TSX_CTRL, MCU_OPT_CTRL, MISC_FEATURES_ENABLES, PERFEVTSEL,
    // PERF_STATUS, thermal, ENERGY_PERF_BIAS, last branches, SMRR, PERF_CAPABILITIES, DS_AREA, RAPL, CET, HWP, UMWAIT.
    for msr in [
        0xcf, 0xce, 0xe7, 0xe8, 0x10b, 0x122, 0x123, 0x140, 0x186, 0x198, 0x19b, 0x1b0, 0x1c9, 0x1db, 0x1dc,
        0x1dd, 0x1de, 0x1f2, 0x345, 0x600, 0x606, 0x6a0, 0x6a2, 0x770, 0xe1, 0x4e, 0x33, 0x34, 0x4c1, 0xc8f,
        0x985, 0x560,
    ] {
        assert_eq!((cpu.read(msr), cpu.write(msr, 0)), (Err(Gp), Err(Gp)), "{msr:#x}");
    }
    // Limit CPUID, no NX, MONITOR, EIST: clear, and not to be set.
    for bit in [22, 34, 18, 16, 7, 3] {
        assert_eq!(cpu.read(msr::MISC_ENABLE).map(|value| value >> bit & 1), Ok(0), "bit {bit}");
        assert_eq!(cpu.write(msr::MISC_ENABLE, MISC_ENABLE_RESET | 1 << bit), Err(Gp), "bit {bit}");
    }
    assert_eq!(cpu.write(msr::FEATURE_CONTROL, 5), Err(Gp), "locked");
    // The revision is there after the ritual of writing 0 and CPUID.
    assert_eq!(cpu.write(msr::MICROCODE_REVISION, 0), Ok(MsrEffect::None));
    assert_ne!(cpu.read(msr::MICROCODE_REVISION), Ok(0));
}

#[test]
fn switched_registers_take_what_the_processor_would() {
    const BASES: [u32; 5] = [msr::LSTAR, msr::CSTAR, msr::FS_BASE, msr::GS_BASE, msr::KERNEL_GS_BASE];
    const SYSENTER: [u32; 2] = [msr::SYSENTER_ESP, msr::SYSENTER_EIP];
    for vendor in VENDORS {
        let four_levels = caps(vendor);
        let five_levels = GuestCaps { cr4: four_levels.cr4 | 1 << 12, ..four_levels };
        for (value, in_48, in_57) in [
            (0, true, true),
            (0x7fff_ffff_ffff, true, true),
            (0x8000_0000_0000, false, true),
            (0xffff_7fff_ffff_ffff, false, true),
            (0xffff_8000_0000_0000, true, true),
            (0x00ff_ffff_ffff_ffff, false, true),
            (0x0100_0000_0000_0000, false, false),
            (0xfeff_ffff_ffff_ffff, false, false),
            (1 << 63, false, false),
            (u64::MAX, true, true),
        ] {
            for msr in BASES {
                assert_eq!(switched_is_valid(msr, value, &four_levels), in_48, "{msr:#x} {value:#x}");
                assert_eq!(switched_is_valid(msr, value, &five_levels), in_57, "{msr:#x} {value:#x}");
            }
            for msr in SYSENTER {
                let expected = vendor == Vendor::Amd || in_48;
                assert_eq!(switched_is_valid(msr, value, &four_levels), expected, "{msr:#x} {value:#x}");
            }
            assert!(switched_is_valid(msr::STAR, value, &four_levels));
            assert!(switched_is_valid(msr::PAT, value, &four_levels), "not one of them");
        }
        assert!(switched_is_valid(msr::SFMASK, 0xffff_ffff, &four_levels));
        assert_eq!(switched_is_valid(msr::SFMASK, 1 << 32, &four_levels), vendor == Vendor::Amd);
    }
}

#[test]
fn apic_registers() {
    let mut cpu = Cpu::new(Vendor::Intel);
    assert_eq!(cpu.read(0x802), Err(Gp), "not in x2APIC mode");
    assert_eq!(cpu.write(msr::APIC_BASE, BASE | BSP_EN | 0x400), Ok(MsrEffect::ApicBase));
    assert_eq!(cpu.write(msr::APIC_BASE, BASE | BSP_EN), Err(Gp), "back to xAPIC mode");
    assert_eq!(cpu.read(msr::APIC_BASE), Ok(BASE | BSP_EN | 0x400));
    assert_eq!(cpu.read(0x803), Ok(0x0005_0014));
    assert_eq!(cpu.write(0x80f, 0x1ff), Ok(MsrEffect::None));
    match cpu.write(0x830, 0x0000_0003_0000_0041) {
        Ok(MsrEffect::Apic(ApicAction::Send(message))) => {
            assert_eq!((message.destination, message.vector), (Destination::Physical(3), 0x41));
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(cpu.write(0x832, 0x4_0040), Ok(MsrEffect::None));
    assert_eq!(cpu.write(msr::TSC_DEADLINE, 5000), Ok(MsrEffect::None));
    assert_eq!(cpu.read(msr::TSC_DEADLINE), Ok(5000));
    cpu.tsc = 5000;
    assert_eq!(cpu.read(msr::TSC_DEADLINE), Ok(0));
    assert_eq!(cpu.lapic.pending_interrupt(), Some(0x40));
}

proptest! {
    /// No access panics; a write that is refused changes nothing; a save restores to the same.
    #[test]
    fn any_access_is_survived(
        intel: bool,
        accesses in prop::collection::vec((any::<u32>(), 0u8..8, any::<u64>(), 0u32..64), 0..100),
    ) {
        let mut cpu = Cpu::new(if intel { Vendor::Intel } else { Vendor::Amd });
        for (random, range, value, shift) in accesses {
            let msr = match range {
                0 => random,
                1 => 0x200 + random % 0x100,
                2 => 0x800 + random % 0x40,
                3 => 0xc000_0080 + random % 0x90,
                4 => 0xc001_0000 + random % 0x120,
                5 => [msr::APIC_BASE, msr::TSC_DEADLINE, msr::TSC, msr::PAT, msr::EFER][random as usize % 5],
                _ => random % 0x400,
            };
            let before = cpu.state.clone();
            match cpu.write(msr, value >> shift) {
                Ok(MsrEffect::Efer(efer)) => cpu.efer = efer,
                Ok(MsrEffect::TscOffset(offset)) => cpu.tsc = cpu.tsc.wrapping_add(offset),
                Ok(_) => {}
                Err(Gp) => prop_assert_eq!(&cpu.state, &before),
            }
            let _ = cpu.read(msr);
        }
        let mut restored = MsrState::new(0, 0);
        restored.restore(&cpu.state, &cpu.caps);
        prop_assert_eq!(restored, cpu.state);
    }

    /// A state of doubtful origin restores to one whose every register could have been written.
    #[test]
    fn any_state_restores_to_a_sound_one(words in prop::array::uniform32(any::<u64>()), shift in 0u32..64) {
        let caps = caps(Vendor::Amd);
        let mut wild = MsrState::new(words[0], words[1]);
        wild.pat = words[2] >> shift;
        wild.mtrrs.def_type = words[3] >> shift;
        wild.mtrrs.fixed.copy_from_slice(&words[4..15]);
        for (range, word) in wild.mtrrs.variable.iter_mut().zip(&words[15..23]) {
            (range.base, range.mask) = (word >> shift, word.rotate_left(shift));
        }
        (wild.misc_enable, wild.mcg_status, wild.hwcr, wild.nb_cfg) = (words[23], words[24], words[25], words[26]);
        let mut cpu = Cpu::new(Vendor::Amd);
        cpu.state.restore(&wild, &caps);
        for msr in (0x200..=0x20f).chain([0x250, 0x258, 0x259, 0x277, 0x2ff, 0x17a]).chain(0x268..=0x26f).chain([msr::HWCR, msr::NB_CFG]) {
            let value = cpu.read(msr).unwrap();
            prop_assert!(cpu.write(msr, value).is_ok(), "{:#x}", msr);
        }
    }
}
