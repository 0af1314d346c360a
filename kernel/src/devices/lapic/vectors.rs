//! A set of interrupt vectors, as IRR, ISR and TMR are.

/// 256 bits, one a vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorSet(pub [u64; 4]);

impl VectorSet {
    /// No vector.
    pub const EMPTY: Self = Self([0; 4]);

    /// Adds a vector.
    #[inline]
    pub fn insert(&mut self, vector: u8) {
        self.0[usize::from(vector >> 6)] |= 1 << (vector & 63);
    }

    /// Takes a vector out; answers whether it was there.
    #[inline]
    pub fn remove(&mut self, vector: u8) -> bool {
        let (group, bit) = (&mut self.0[usize::from(vector >> 6)], 1 << (vector & 63));
        let was = *group & bit != 0;
        *group &= !bit;
        was
    }

    /// Whether a vector is in the set.
    #[inline]
    pub const fn contains(&self, vector: u8) -> bool {
        self.0[(vector >> 6) as usize] >> (vector & 63) & 1 != 0
    }

    /// The highest vector; 0 if the set is empty.
    #[inline]
    pub fn highest(&self) -> u8 {
        for group in (0..4u8).rev() {
            let bits = self.0[usize::from(group)];
            if bits != 0 {
                return group << 6 | bits.ilog2() as u8;
            }
        }
        0
    }

    /// The 32-bit register number `index` (0 to 7) of the set.
    #[inline]
    pub(super) const fn word(&self, index: u32) -> u32 {
        (self.0[(index >> 1 & 3) as usize] >> ((index & 1) * 32)) as u32
    }

    /// Adds the vectors `bits` of one 64-vector group.
    #[inline]
    pub(super) fn merge(&mut self, group: usize, bits: u64) {
        self.0[group & 3] |= bits;
    }

    /// Makes the vectors `mask` of one group what `bits` says.
    #[inline]
    pub(super) fn assign(&mut self, group: usize, mask: u64, bits: u64) {
        let word = &mut self.0[group & 3];
        *word = *word & !mask | bits & mask;
    }

    /// Takes out the vectors that no fixed interrupt can have.
    pub(super) fn remove_illegal(&mut self) {
        self.0[0] &= !0xffff;
    }
}
