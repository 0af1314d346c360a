//! Physical CPUs as the crate counts them.

/// Physical CPUs that one VM can run on. (A model that looks at every interleaving takes fewer.)
pub const MAX_CPUS: usize = if cfg!(loom) { 3 } else { 64 };

/// Number of a physical CPU, dense from zero.
///
/// Invariant: less than [`MAX_CPUS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CpuId(u8);

impl CpuId {
    /// The CPU that brought the machine up.
    pub const BOOT: Self = Self(0);

    /// CPU `number`, if the crate can count that far.
    #[inline]
    pub const fn new(number: usize) -> Option<Self> {
        if number < MAX_CPUS {
            Some(Self(number as u8))
        } else {
            None
        }
    }

    /// The CPU's number.
    #[inline]
    pub const fn number(self) -> usize {
        self.0 as usize % MAX_CPUS
    }
}

/// A set of physical CPUs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuSet(u64);

impl CpuSet {
    /// Puts `cpu` into the set.
    #[inline]
    pub fn insert(&mut self, cpu: CpuId) {
        self.0 |= 1 << cpu.number();
    }

    /// Whether `cpu` is in the set.
    #[inline]
    pub const fn contains(self, cpu: CpuId) -> bool {
        self.0 >> cpu.number() & 1 != 0
    }

    /// Whether no CPU is in the set.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The CPUs of the set, lowest number first.
    pub fn iter(self) -> impl Iterator<Item = CpuId> {
        (0..MAX_CPUS).filter_map(CpuId::new).filter(move |&cpu| self.contains(cpu))
    }
}

const _: () = assert!(MAX_CPUS <= u64::BITS as usize);
