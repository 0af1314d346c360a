//! Access to guest memory by guest-physical address: by copy and by atomic operation.
use core::fmt;

use super::{Backing, NoPage, RamAddr, Shared, SlotFlags, Space, SpaceView};
use crate::addr::{Gpa, PAGE_SIZE};
use crate::mutant::{self, Mutant};

/// An access to guest-physical memory that is not, or not wholly, RAM that permits it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotRam {
    /// First address of the access.
    pub gpa: Gpa,
    /// Its length in bytes.
    pub len: usize,
}

impl fmt::Display for NotRam {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest-physical range {:#x}+{:#x} is not RAM", self.gpa, self.len)
    }
}

/// One store to guest memory.
enum Store<'a> {
    Bytes(&'a [u8]),
    Exchange32 { current: u32, new: u32 },
    Exchange64 { current: u64, new: u64 },
}

impl<B: Backing> SpaceView<'_, B> {
    /// Copies guest memory at `gpa` into `buf`; all of it is RAM, or nothing is copied.
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), NotRam> {
        let refused = NotRam { gpa, len: buf.len() };
        self.check(gpa, buf.len(), SlotFlags::empty()).ok_or(refused)?;
        let (mut at, mut rest) = (gpa, buf);
        while !rest.is_empty() {
            let ram = self.ram(at).ok_or(refused)?;
            let (now, later) = rest.split_at_mut(in_page(at, rest.len()));
            self.memory().backing().read(&ram, now).map_err(|NoPage| refused)?;
            at = Gpa::new_truncate(at.bits() + now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    /// Copies `data` to guest memory at `gpa`; all of it is writable RAM, or nothing is copied.
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), NotRam> {
        let refused = NotRam { gpa, len: data.len() };
        self.check(gpa, data.len(), SlotFlags::READ_ONLY).ok_or(refused)?;
        let (mut at, mut rest) = (gpa, data);
        while !rest.is_empty() {
            let ram = self.ram(at).ok_or(refused)?;
            let (now, later) = rest.split_at(in_page(at, rest.len()));
            self.store(&ram, Store::Bytes(now)).map_err(|NoPage| refused)?;
            at = Gpa::new_truncate(at.bits() + now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    /// Reads four bytes at once; `gpa` is rounded down to a multiple of four.
    #[inline]
    pub fn load_u32(&self, gpa: Gpa) -> Result<u32, NotRam> {
        let (gpa, refused) = aligned(gpa, 4);
        let ram = self.ram(gpa).ok_or(refused)?;
        self.memory().backing().load_u32(&ram).map_err(|NoPage| refused)
    }

    /// Reads eight bytes at once; `gpa` is rounded down to a multiple of eight.
    #[inline(always)]
    pub fn load_u64(&self, gpa: Gpa) -> Result<u64, NotRam> {
        let (gpa, refused) = aligned(gpa, 8);
        let ram = self.ram(gpa).ok_or(refused)?;
        self.memory().backing().load_u64(&ram).map_err(|NoPage| refused)
    }

    /// Replaces four bytes at once if they are `current`, and says what was there; `gpa` is rounded down.
    pub fn compare_exchange_u32(&self, gpa: Gpa, current: u32, new: u32) -> Result<u32, NotRam> {
        let (gpa, refused) = aligned(gpa, 4);
        let ram = self.writable(gpa).ok_or(refused)?;
        self.store(&ram, Store::Exchange32 { current, new })
            .map(|found| found as u32)
            .map_err(|NoPage| refused)
    }

    /// Replaces eight bytes at once if they are `current`, and says what was there; `gpa` is rounded down.
    pub fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<u64, NotRam> {
        let (gpa, refused) = aligned(gpa, 8);
        let ram = self.writable(gpa).ok_or(refused)?;
        self.store(&ram, Store::Exchange64 { current, new }).map_err(|NoPage| refused)
    }

    /// The one place where guest memory is written on the hypervisor's side, by whatever means: what wants to know of
    /// written pages (the dirty log) is told here, after the fact. Returns what an exchange found.
    fn store(&self, at: &RamAddr, store: Store<'_>) -> Result<u64, NoPage> {
        let backing = self.memory().backing();
        let found = match store {
            Store::Bytes(data) => backing.write(at, data).map(|()| 0),
            Store::Exchange32 { current, new } => {
                backing.compare_exchange_u32(at, current, new).map(u64::from)
            }
            Store::Exchange64 { current, new } => backing.compare_exchange_u64(at, current, new),
        };
        if !mutant::is(Mutant::EmulatedWriteUnlogged) {
            self.memory().note_write(self.space(), at.gfn());
        }
        found
    }

    /// The place in writable RAM that `gpa` names.
    pub fn writable(&self, gpa: Gpa) -> Option<RamAddr> {
        let found = self.memory().find_slot(self.space(), gpa)?;
        (!found.flags().contains(SlotFlags::READ_ONLY)).then(|| found.ram())
    }

    /// Whether `len` bytes from `gpa` on (at least one) lie in slots without any flag of `without`. Takes one step a slot.
    fn check(&self, gpa: Gpa, len: usize, without: SlotFlags) -> Option<()> {
        let last = gpa.checked_add((len as u64).saturating_sub(1))?;
        let mut at = gpa;
        loop {
            let found = self.memory().find_slot(self.space(), at)?;
            if found.flags().intersects(without) && !mutant::is(Mutant::ReadOnlySlotWritten) {
                return None;
            }
            if found.slot_end() > last.bits() {
                return Some(());
            }
            at = Gpa::new(found.slot_end()).ok()?;
        }
    }
}

/// The same in the normal space.
impl<B: Backing> Shared<'_, B> {
    /// [`SpaceView::read`].
    pub fn read(&self, gpa: Gpa, buf: &mut [u8]) -> Result<(), NotRam> {
        self.in_space(Space::Normal).read(gpa, buf)
    }

    /// [`SpaceView::write`].
    pub fn write(&self, gpa: Gpa, data: &[u8]) -> Result<(), NotRam> {
        self.in_space(Space::Normal).write(gpa, data)
    }

    /// [`SpaceView::load_u32`].
    #[inline]
    pub fn load_u32(&self, gpa: Gpa) -> Result<u32, NotRam> {
        self.in_space(Space::Normal).load_u32(gpa)
    }

    /// [`SpaceView::load_u64`].
    #[inline(always)]
    pub fn load_u64(&self, gpa: Gpa) -> Result<u64, NotRam> {
        self.in_space(Space::Normal).load_u64(gpa)
    }

    /// [`SpaceView::compare_exchange_u32`].
    pub fn compare_exchange_u32(&self, gpa: Gpa, current: u32, new: u32) -> Result<u32, NotRam> {
        self.in_space(Space::Normal).compare_exchange_u32(gpa, current, new)
    }

    /// [`SpaceView::compare_exchange_u64`].
    pub fn compare_exchange_u64(&self, gpa: Gpa, current: u64, new: u64) -> Result<u64, NotRam> {
        self.in_space(Space::Normal).compare_exchange_u64(gpa, current, new)
    }

    /// [`SpaceView::writable`].
    pub fn writable(&self, gpa: Gpa) -> Option<RamAddr> {
        self.in_space(Space::Normal).writable(gpa)
    }
}

/// How many of `len` bytes from `gpa` on are in its page.
fn in_page(gpa: Gpa, len: usize) -> usize {
    len.min((PAGE_SIZE - gpa.page_offset()) as usize)
}

/// `gpa` rounded down to a multiple of `len`, and the error of an access there.
#[inline]
fn aligned(gpa: Gpa, len: usize) -> (Gpa, NotRam) {
    let gpa = Gpa::new_truncate(gpa.bits() & !(len as u64 - 1));
    (gpa, NotRam { gpa, len })
}
