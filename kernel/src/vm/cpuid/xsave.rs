//! Sizes of XSAVE areas and consistency of XCR0 (Intel SDM vol. 1, chapter 13; AMD APM vol. 2, 11.5).
use super::CpuidLeaf;

/// XCR0: x87 state, always set.
pub const X87: u64 = 1 << 0;
/// XCR0: SSE state.
pub const SSE: u64 = 1 << 1;
/// XCR0: AVX state.
pub const AVX: u64 = 1 << 2;
/// XCR0: the three parts of AVX-512 state.
pub const AVX512: u64 = 7 << 5;
/// XCR0: protection-key rights.
pub const PKRU: u64 = 1 << 9;

/// The components that guests can have. MPX and AMX need MSRs of their own and stay out.
pub const SUPPORTED: u64 = X87 | SSE | AVX | AVX512 | PKRU;

/// Number of subleaves of leaf 0Dh that the supported components need.
pub(super) const SUBLEAVES: u32 = u64::BITS - SUPPORTED.leading_zeros();

/// Bytes of the legacy region and the header.
const LEGACY_AND_HEADER: u32 = 512 + 64;
/// Leaf 0Dh, ECX of a component: starts at a multiple of 64 in the compacted format.
const ALIGNED: u32 = 1 << 1;

/// Whether components are there that the present ones need.
pub const fn is_consistent(xcr0: u64) -> bool {
    let avx512 = xcr0 & AVX512;
    xcr0 & X87 != 0
        && (xcr0 & AVX == 0 || xcr0 & SSE != 0)
        && (avx512 == 0 || (avx512 == AVX512 && xcr0 & AVX != 0))
}

/// The entries of leaf 0Dh, by component number.
#[derive(Clone, Copy, Debug)]
pub struct Components<'a>(pub(super) &'a [CpuidLeaf]);

impl<'a> Components<'a> {
    /// Bytes that XSAVE needs for the components of `xcr0`.
    pub fn standard_size(self, xcr0: u64) -> u32 {
        self.extended(xcr0)
            .map(|component| component.ebx.saturating_add(component.eax))
            .fold(LEGACY_AND_HEADER, u32::max)
    }

    /// Bytes that XSAVEC and XSAVES need for the components of `mask`.
    pub fn compacted_size(self, mask: u64) -> u32 {
        self.extended(mask).fold(LEGACY_AND_HEADER, |size, component| {
            let start = if component.ecx & ALIGNED != 0 { size.saturating_add(63) & !63 } else { size };
            start.saturating_add(component.eax)
        })
    }

    /// The components of `mask` beyond x87 and SSE, lowest first.
    fn extended(self, mask: u64) -> impl Iterator<Item = CpuidLeaf> + 'a {
        self.0
            .iter()
            .enumerate()
            .skip(2)
            .filter(move |(index, _)| mask.checked_shr(*index as u32).is_some_and(|bits| bits & 1 != 0))
            .map(|(_, component)| *component)
    }
}
