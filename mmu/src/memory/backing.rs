//! What a VM's memory consists of, as the kernel (or a test) provides it.
use crate::access::AccessKind;
use crate::addr::Pfn;
use crate::level::{PageSize, ENTRIES};
use crate::memory::{RamAddr, SlotNotes};
use core::sync::atomic::AtomicU64;

/// Host memory behind a guest page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolved {
    /// Host frames, contiguous and stable until the range is invalidated.
    Ram {
        /// First frame of the naturally aligned block of `size` around the guest page.
        pfn: Pfn,
        /// Size of the block: at most what was asked for.
        size: PageSize,
    },
    /// Not now: let the guest run on and fault again.
    Retry,
    /// There is no memory behind this page: treat the access like one outside every slot.
    Absent,
}

/// The backing cannot reach a page that a slot says is RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoPage;

/// The memory behind the slots. All methods are called under a guard and must not take one.
///
/// Guest memory changes at any time under the host's hands, so access is by copy and by atomic operation, never by
/// reference. Accesses never cross a page; the atomic ones are naturally aligned.
pub trait Backing {
    /// Host memory for the page of `at`, allocated and zeroed now if need be; at most `want` of it, which is as much as
    /// the slot and the kind allow. What it names stays the page's memory until an invalidation of the page begins.
    fn resolve(&self, at: &RamAddr, want: PageSize, access: AccessKind) -> Resolved;
    /// Memory for notes about the pages of the slot with this cookie. Without, its writes can be neither logged nor tracked.
    fn notes(&self, cookie: u64) -> SlotNotes<'_> {
        let _ = cookie;
        SlotNotes::default()
    }
    /// Copies out of guest memory.
    fn read(&self, at: &RamAddr, buf: &mut [u8]) -> Result<(), NoPage>;
    /// Copies into guest memory.
    fn write(&self, at: &RamAddr, data: &[u8]) -> Result<(), NoPage>;
    /// Reads four aligned bytes at once.
    fn load_u32(&self, at: &RamAddr) -> Result<u32, NoPage>;
    /// Reads eight aligned bytes at once.
    fn load_u64(&self, at: &RamAddr) -> Result<u64, NoPage>;
    /// The words of eight bytes in the page of `at`, for a backing that has them in one place; they are the guest's, and
    /// good for as long as what [`resolve`](Self::resolve) says.
    fn words(&self, at: &RamAddr) -> Option<&[AtomicU64; ENTRIES]> {
        let _ = at;
        None
    }
    /// Replaces four aligned bytes if they are `current`; says what was there.
    fn compare_exchange_u32(&self, at: &RamAddr, current: u32, new: u32) -> Result<u32, NoPage>;
    /// Replaces eight aligned bytes if they are `current`; says what was there.
    fn compare_exchange_u64(&self, at: &RamAddr, current: u64, new: u64) -> Result<u64, NoPage>;
}
