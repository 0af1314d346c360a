//! What the processor can do, read once. Pure: CPUID itself comes through `raw_cpuid::CpuIdReader`.

use arrayvec::ArrayString;
use core::fmt;
use raw_cpuid::{CpuId, CpuIdReader};

/// Features that Umbra asks about. Nothing else of it looks at CPUID to decide what to do.
#[derive(Clone, Debug, Default)]
pub struct Features {
    /// Vendor string, such as `AuthenticAMD`.
    pub vendor: ArrayString<12>,
    /// Marketing name, trimmed.
    pub brand: ArrayString<48>,
    /// Family, extended part included.
    pub family: u8,
    /// Model, extended part included.
    pub model: u8,
    /// Stepping.
    pub stepping: u8,
    /// AMD's SVM, if the processor has it; firmware may still have switched it off (VM_CR.SVMDIS).
    pub svm: Option<Svm>,
    /// Intel's VMX.
    pub vmx: bool,
    /// Umbra itself runs under a hypervisor.
    pub hypervisor: bool,
    /// Width of physical addresses in bits.
    pub physical_address_bits: u8,
    /// NX in page tables, which Umbra requires.
    pub nx: bool,
    /// 1 GiB pages.
    pub pages_1g: bool,
    /// Global pages.
    pub pge: bool,
    /// Five-level paging.
    pub la57: bool,
    /// Process-context identifiers.
    pub pcid: bool,
    /// INVPCID.
    pub invpcid: bool,
    /// Supervisor-mode execution prevention.
    pub smep: bool,
    /// Supervisor-mode access prevention.
    pub smap: bool,
    /// User-mode instruction prevention.
    pub umip: bool,
    /// Protection keys for user pages.
    pub pku: bool,
    /// Machine check exception.
    pub mce: bool,
    /// Page attribute table.
    pub pat: bool,
    /// Memory type range registers.
    pub mtrr: bool,
    /// FXSAVE, FXRSTOR.
    pub fxsr: bool,
    /// XSAVE and XCR0.
    pub xsave: Option<Xsave>,
    /// RDFSBASE and friends.
    pub fsgsbase: bool,
    /// RDTSCP and TSC_AUX.
    pub rdtscp: bool,
    /// The time-stamp counter runs at a constant rate in all power states.
    pub invariant_tsc: bool,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: bool,
    /// The local APIC's timer has TSC-deadline mode.
    pub tsc_deadline: bool,
    /// The local APIC's timer runs in all power states.
    pub arat: bool,
    /// x2APIC mode.
    pub x2apic: bool,
    /// Initial local APIC id of the processor that was asked.
    pub apic_id: u32,
    /// MONITOR and MWAIT.
    pub monitor: bool,
    /// Frequency of the TSC in kHz as CPUID leaves 15h and 16h tell it; Intel only.
    pub cpuid_tsc_khz: Option<u64>,
}

/// CPUID 8000_000Ah. AMD APM vol. 3 appendix E.4.9.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Svm {
    /// Revision.
    pub revision: u8,
    /// Number of address-space identifiers.
    pub asids: u32,
    /// Nested paging.
    pub npt: bool,
    /// LBR virtualization.
    pub lbr: bool,
    /// The VMCB tells the next RIP at an exit.
    pub nrips: bool,
    /// TSC ratio MSR.
    pub tsc_rate_msr: bool,
    /// VMCB clean bits.
    pub vmcb_clean: bool,
    /// Flush by ASID.
    pub flush_by_asid: bool,
    /// Decode assists.
    pub decode_assists: bool,
    /// PAUSE intercept filter.
    pub pause_filter: bool,
    /// PAUSE filter cycle threshold.
    pub pause_filter_threshold: bool,
    /// Advanced virtual interrupt controller.
    pub avic: bool,
    /// Virtualized VMSAVE and VMLOAD.
    pub vmsave_virtualization: bool,
    /// Virtual GIF.
    pub vgif: bool,
    /// SPEC_CTRL virtualization.
    pub spec_ctrl: bool,
}

/// CPUID 0Dh. AMD APM vol. 3 appendix E.3.8.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Xsave {
    /// Bits that XCR0 may have.
    pub xcr0: u64,
    /// Size in bytes of an area for all components that XCR0 may enable.
    pub area_bytes: u32,
    /// XSAVEOPT.
    pub xsaveopt: bool,
    /// XSAVEC.
    pub xsavec: bool,
    /// XSAVES, XRSTORS and IA32_XSS.
    pub xsaves: bool,
}

impl Features {
    /// Asks the processor this runs on.
    #[cfg(target_os = "none")]
    pub fn detect() -> Self {
        Self::read(&CpuId::new())
    }

    /// Reads all features.
    pub fn read<R: CpuIdReader>(cpuid: &CpuId<R>) -> Self {
        let mut this = Self { physical_address_bits: 36, ..Self::default() };
        if let Some(vendor) = cpuid.get_vendor_info() {
            this.vendor = printable(vendor.as_str());
        }
        if let Some(brand) = cpuid.get_processor_brand_string() {
            this.brand = printable(brand.as_str());
        }
        if let Some(f) = cpuid.get_feature_info() {
            (this.family, this.model, this.stepping) = (f.family_id(), f.model_id(), f.stepping_id());
            this.vmx = f.has_vmx();
            this.hypervisor = f.has_hypervisor();
            this.pge = f.has_pge();
            this.mce = f.has_mce();
            this.pcid = f.has_pcid();
            this.pat = f.has_pat();
            this.mtrr = f.has_mtrr();
            this.fxsr = f.has_fxsave_fxstor();
            this.tsc_deadline = f.has_tsc_deadline();
            this.x2apic = f.has_x2apic();
            this.monitor = f.has_monitor_mwait();
            this.apic_id = u32::from(f.initial_local_apic_id());
            this.xsave = f.has_xsave().then(|| xsave(cpuid));
        }
        // The same 32 bits wide, where there is a level to ask. Leaf 0Bh EDX is the x2APIC id.
        if let Some(level) = cpuid.get_extended_topology_info().and_then(|mut levels| levels.next()) {
            this.apic_id = level.x2apic_id();
        }
        if let Some(f) = cpuid.get_extended_feature_info() {
            this.la57 = f.has_la57();
            this.invpcid = f.has_invpcid();
            this.smep = f.has_smep();
            this.smap = f.has_smap();
            this.umip = f.has_umip();
            this.pku = f.has_pku();
            this.fsgsbase = f.has_fsgsbase();
            this.tsc_adjust = f.has_tsc_adjust_msr();
        }
        if let Some(f) = cpuid.get_extended_processor_and_feature_identifiers() {
            this.nx = f.has_execute_disable();
            this.pages_1g = f.has_1gib_pages();
            this.rdtscp = f.has_rdtscp();
            this.svm = f.has_svm().then(|| svm(cpuid));
        }
        this.arat = cpuid.get_thermal_power_info().is_some_and(|f| f.has_arat());
        this.invariant_tsc = cpuid.get_advanced_power_mgmt_info().is_some_and(|f| f.has_invariant_tsc());
        if let Some(f) = cpuid.get_processor_capacity_feature_info() {
            this.physical_address_bits = f.physical_address_bits().clamp(32, 52);
        }
        if this.vendor.as_str() == "GenuineIntel" {
            this.cpuid_tsc_khz = tsc_khz(cpuid);
        }
        this
    }
}

impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.brand.is_empty() { &self.vendor[..] } else { &self.brand[..] };
        write!(f, "{name}, {}-bit physical addresses", self.physical_address_bits)?;
        match &self.svm {
            Some(svm) => {
                write!(f, ", SVM with {} ASIDs", svm.asids)?;
                for (has, what) in [
                    (svm.npt, "NPT"),
                    (svm.nrips, "NRIPS"),
                    (svm.decode_assists, "decode assists"),
                    (svm.flush_by_asid, "flush by ASID"),
                    (svm.vmcb_clean, "clean bits"),
                    (svm.tsc_rate_msr, "TSC scaling"),
                    (svm.pause_filter, "PAUSE filter"),
                    (svm.vgif, "vGIF"),
                ] {
                    if has {
                        write!(f, ", {what}")?;
                    }
                }
            }
            None if self.vmx => write!(f, ", VMX")?,
            None => write!(f, ", neither SVM nor VMX")?,
        }
        for (has, what) in [
            (self.pages_1g, "1G pages"),
            (self.x2apic, "x2APIC"),
            (self.tsc_deadline, "TSC deadline"),
            (self.invariant_tsc, "invariant TSC"),
            (self.hypervisor, "under a hypervisor"),
        ] {
            if has {
                write!(f, ", {what}")?;
            }
        }
        Ok(())
    }
}

fn svm<R: CpuIdReader>(cpuid: &CpuId<R>) -> Svm {
    cpuid.get_svm_info().map_or(Svm::default(), |s| Svm {
        revision: s.revision(),
        asids: s.supported_asids(),
        npt: s.has_nested_paging(),
        lbr: s.has_lbr_virtualization(),
        nrips: s.has_nrip(),
        tsc_rate_msr: s.has_tsc_rate_msr(),
        vmcb_clean: s.has_vmcb_clean_bits(),
        flush_by_asid: s.has_flush_by_asid(),
        decode_assists: s.has_decode_assists(),
        pause_filter: s.has_pause_filter(),
        pause_filter_threshold: s.has_pause_filter_threshold(),
        avic: s.has_avic(),
        vmsave_virtualization: s.has_vmsave_virtualization(),
        vgif: s.has_gif(),
        spec_ctrl: s.has_spec_ctrl(),
    })
}

fn xsave<R: CpuIdReader>(cpuid: &CpuId<R>) -> Xsave {
    cpuid.get_extended_state_info().map_or(Xsave::default(), |x| Xsave {
        xcr0: u64::from(x.xcr0_supports_legacy_x87())
            | u64::from(x.xcr0_supports_sse_128()) << 1
            | u64::from(x.xcr0_supports_avx_256()) << 2
            | u64::from(x.xcr0_supports_mpx_bndregs()) << 3
            | u64::from(x.xcr0_supports_mpx_bndcsr()) << 4
            | u64::from(x.xcr0_supports_avx512_opmask()) << 5
            | u64::from(x.xcr0_supports_avx512_zmm_hi256()) << 6
            | u64::from(x.xcr0_supports_avx512_zmm_hi16()) << 7
            | u64::from(x.xcr0_supports_pkru()) << 9,
        area_bytes: x.xsave_area_size_supported_features(),
        xsaveopt: x.has_xsaveopt(),
        xsavec: x.has_xsavec(),
        xsaves: x.has_xsaves_xrstors(),
    })
}

/// Intel SDM vol. 3 section 19.7.3: crystal frequency times ratio; without a crystal frequency the base frequency.
fn tsc_khz<R: CpuIdReader>(cpuid: &CpuId<R>) -> Option<u64> {
    let info = cpuid.get_tsc_info()?;
    let (numerator, denominator) = (u64::from(info.numerator()), u64::from(info.denominator()));
    if numerator == 0 || denominator == 0 {
        return None;
    }
    match u64::from(info.nominal_frequency()) {
        0 => {
            let mhz = u64::from(cpuid.get_processor_frequency_info()?.processor_base_frequency());
            (mhz != 0).then_some(mhz * 1000)
        }
        crystal_hz => {
            Some((u128::from(crystal_hz) * u128::from(numerator) / u128::from(denominator) / 1000) as u64)
        }
    }
}

/// The printable part of a string of CPUID, as much as fits.
fn printable<const N: usize>(text: &str) -> ArrayString<N> {
    let mut out = ArrayString::new();
    for c in text.trim().chars().filter(|c| c.is_ascii_graphic() || *c == ' ') {
        if out.try_push(c).is_err() {
            break;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use raw_cpuid::CpuIdResult;
    use std::collections::HashMap;

    #[derive(Clone, Default)]
    struct Leaves(HashMap<(u32, u32), [u32; 4]>);

    impl Leaves {
        fn with(mut self, leaf: u32, subleaf: u32, regs: [u32; 4]) -> Self {
            self.0.insert((leaf, subleaf), regs);
            self
        }
        fn features(self) -> Features {
            Features::read(&CpuId::with_cpuid_reader(self))
        }
    }

    impl CpuIdReader for Leaves {
        fn cpuid2(&self, eax: u32, ecx: u32) -> CpuIdResult {
            let [eax, ebx, ecx, edx] = self.0.get(&(eax, ecx)).copied().unwrap_or_default();
            CpuIdResult { eax, ebx, ecx, edx }
        }
    }

    fn vendor(name: &[u8; 12], max_leaf: u32) -> Leaves {
        let word = |i: usize| u32::from_le_bytes(name[i..i + 4].try_into().unwrap());
        Leaves::default().with(0, 0, [max_leaf, word(0), word(8), word(4)]).with(
            0x8000_0000,
            0,
            [0x8000_001f, word(0), word(8), word(4)],
        )
    }

    #[test]
    fn a_processor_without_anything_has_no_features() {
        let f = Leaves::default().features();
        assert!(f.svm.is_none() && !f.vmx && !f.nx && f.xsave.is_none() && f.cpuid_tsc_khz.is_none());
        assert_eq!(f.physical_address_bits, 36);
        assert!(f.to_string().contains("neither SVM nor VMX"));
    }

    #[test]
    fn the_svm_leaf_is_read() {
        let f = vendor(b"AuthenticAMD", 0xd)
            .with(0x8000_0001, 0, [0, 0, 1 << 2, 1 << 20 | 1 << 26])
            .with(0x8000_0008, 0, [0x3028, 0, 0, 0])
            .with(0x8000_000a, 0, [1, 16, 0, 1 | 1 << 3 | 1 << 6 | 1 << 16])
            .features();
        let svm = f.svm.unwrap();
        assert_eq!((svm.revision, svm.asids), (1, 16));
        assert!(svm.npt && svm.nrips && svm.flush_by_asid && svm.vgif);
        assert!(!svm.decode_assists && !svm.vmcb_clean && !svm.tsc_rate_msr);
        assert!(f.nx && f.pages_1g && f.physical_address_bits == 40);
        assert!(f.to_string().contains("SVM with 16 ASIDs, NPT, NRIPS"), "{f}");
    }

    #[test]
    fn the_tsc_frequency_of_cpuid_is_intel_only() {
        let leaves = |name| {
            vendor(name, 0x16).with(0x15, 0, [2, 250, 24_000_000, 0]).with(0x16, 0, [3000, 3500, 100, 0])
        };
        assert_eq!(leaves(b"GenuineIntel").features().cpuid_tsc_khz, Some(3_000_000));
        assert_eq!(leaves(b"AuthenticAMD").features().cpuid_tsc_khz, None);
        let no_crystal = leaves(b"GenuineIntel").with(0x15, 0, [2, 250, 0, 0]);
        assert_eq!(no_crystal.features().cpuid_tsc_khz, Some(3_000_000));
        let no_ratio = leaves(b"GenuineIntel").with(0x15, 0, [0, 250, 24_000_000, 0]);
        assert_eq!(no_ratio.features().cpuid_tsc_khz, None);
    }

    #[test]
    fn absurd_address_widths_are_bounded() {
        for (eax, bits) in [(0, 32), (0xff, 52), (48, 48)] {
            let f = vendor(b"GenuineIntel", 1).with(0x8000_0008, 0, [eax, 0, 0, 0]).features();
            assert_eq!(f.physical_address_bits, bits);
        }
    }
}
