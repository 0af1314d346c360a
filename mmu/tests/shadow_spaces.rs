//! The shadow kind over two address spaces: a vCPU in SMM shadows tables of what SMM sees.
mod support;

use std::sync::atomic::{AtomicU32, AtomicU64};

use mmu::{
    AccessKind, Backing, CpuRole, Gva, Level, NoPage, Npt, NptHost, Pae, PaeHost, PageSize, PagingContext,
    RamAddr, Resolved, Root, RootRole, ShadowFault, Slot, SlotFlags, SlotNotes, Space, TableCache, VcpuMode,
    VmMemory,
};
use support::flat::FlatRam;
use support::manual::guest::{access, registers, regs, BASE};
use support::manual::{Machine, What, Who};
use support::shadow::{store, Kind};
use support::tables::HostTables;
use support::vm::{range, CPU};

const PAGES: u64 = 64;
/// Where the frames are that SMM alone sees.
const SMRAM_AT: u64 = 64;

/// A frame that is the lowest table of the normal guest, and the next higher one of SMM's.
const TABLE: u64 = 4;

/// Memory with notes for each slot.
struct Ram {
    flat: FlatRam,
    notes: Vec<Notes>,
}

struct Notes {
    cookie: u64,
    dirty: Vec<AtomicU64>,
    tracks: Vec<AtomicU32>,
    blocks: [Vec<AtomicU32>; 2],
}

impl Notes {
    fn new(cookie: u64) -> Self {
        let counts = |count| (0..count).map(|_| AtomicU32::new(0)).collect();
        Self { cookie, dirty: vec![AtomicU64::new(0)], tracks: counts(PAGES), blocks: [counts(1), counts(1)] }
    }
}

impl Backing for Ram {
    fn resolve(&self, at: &RamAddr, want: PageSize, access: AccessKind) -> Resolved {
        self.flat.resolve(at, want, access)
    }
    fn notes(&self, cookie: u64) -> SlotNotes<'_> {
        let found = self.notes.iter().find(|notes| notes.cookie == cookie).unwrap();
        let tracked_in = [&found.blocks[0][..], &found.blocks[1][..]];
        SlotNotes { dirty: &found.dirty, tracks: &found.tracks, tracked_in }
    }
    fn read(&self, at: &RamAddr, buf: &mut [u8]) -> Result<(), NoPage> {
        self.flat.read(at, buf)
    }
    fn write(&self, at: &RamAddr, data: &[u8]) -> Result<(), NoPage> {
        self.flat.write(at, data)
    }
    fn load_u32(&self, at: &RamAddr) -> Result<u32, NoPage> {
        self.flat.load_u32(at)
    }
    fn load_u64(&self, at: &RamAddr) -> Result<u64, NoPage> {
        self.flat.load_u64(at)
    }
    fn compare_exchange_u32(&self, at: &RamAddr, current: u32, new: u32) -> Result<u32, NoPage> {
        self.flat.compare_exchange_u32(at, current, new)
    }
    fn compare_exchange_u64(&self, at: &RamAddr, current: u64, new: u64) -> Result<u64, NoPage> {
        self.flat.compare_exchange_u64(at, current, new)
    }
}

struct World {
    memory: &'static VmMemory<Ram>,
    kind: Kind,
    tables: HostTables,
    cache: TableCache,
    /// Of the normal space and of SMM.
    roots: Vec<Root>,
}

impl World {
    /// The guest's tables, its normal ones from frame 1 on and SMM's from frame 16 on. `overlay` puts SMRAM over [`TABLE`].
    fn new(overlay: bool) -> Self {
        let flat = FlatRam::new((SMRAM_AT as usize + 1) * 4096);
        for (at, entry) in [(0x1000, 0x2067), (0x2000, 0x3067), (0x3000, TABLE << 12 | 0x67)] {
            flat.set(at, entry);
        }
        for page in 0..16 {
            flat.set((TABLE << 12) + page * 8, page << 12 | 0x67);
        }
        // SMM's lowest table is frame 18, by entry 8 of TABLE.
        let table = if overlay { SMRAM_AT } else { TABLE };
        for (at, entry) in
            [(0x1_0000, 0x1_1067), (0x1_1000, TABLE << 12 | 0x67), (table << 12 | 64, 0x1_2067)]
        {
            flat.set(at, entry);
        }
        flat.set(0x1_2000, 0x2_0067);
        flat.set(0x1_2008, TABLE << 12 | 0x67);
        let slot = |start, pages, at: u64| Slot::new(range(start, pages), SlotFlags::empty(), at * 512);
        let slots = match overlay {
            false => vec![slot(0, PAGES, 0)],
            true => vec![
                slot(0, TABLE, 0),
                slot(TABLE, 1, TABLE).only_in(Space::Normal),
                slot(TABLE, 1, SMRAM_AT).only_in(Space::Smm),
                slot(TABLE + 1, PAGES - TABLE - 1, TABLE + 1),
            ],
        };
        let notes = slots.iter().map(|slot| Notes::new(slot.cookie)).collect();
        let memory: &'static _ = Box::leak(Box::new(VmMemory::new(Ram { flat, notes })));
        for slot in &slots {
            memory.exclusive(CPU).insert_slot(slot).unwrap();
        }
        let tables = HostTables::new(128);
        let host =
            NptHost { five_level: false, max_phys_addr: 46, no_execute: true, largest: PageSize::Size2M };
        let pae = Pae::new(&PaeHost { max_phys_addr: 46 });
        let kind = Kind::new(memory, Npt::new(&host), pae, tables.clone(), store(64)).unwrap();
        let mut world = Self { memory, kind, tables, cache: TableCache::new(), roots: vec![] };
        for space in Space::ALL {
            let m = machine(space);
            let (paging, cpu) = registers(&m);
            let mode = VcpuMode { smm: space == Space::Smm, nested: false };
            let role = RootRole::shadow(CpuRole::new(&paging, &cpu), Level::L4, mode, true);
            world.tables.fill(&mut world.cache);
            let mut guard = memory.exclusive(CPU);
            let got = world.kind.get_root(&mut guard, &mut world.cache, role, m.cr3, [0; 4]);
            world.roots.push(got.outcome.unwrap());
        }
        world
    }

    fn access(&mut self, space: Space, va: u64, what: What) -> ShadowFault {
        self.tables.fill(&mut self.cache);
        let m = machine(space);
        let (paging, cpu) = registers(&m);
        let context = PagingContext::<Gva, mmu::Gpa>::new(CpuRole::new(&paging, &cpu));
        let access = access(what, Who::Supervisor);
        let shared = self.memory.shared(CPU);
        let walked = context.walk(&shared.in_space(space), &regs(&m), Gva::new(va), access).unwrap();
        drop(shared);
        let mut guard = self.memory.exclusive(CPU);
        let root = self.roots[space as usize];
        let done = self.kind.fault(&mut guard, &mut self.cache, root, &walked, Gva::new(va), access);
        drop(guard);
        self.check();
        done.outcome
    }

    fn check(&self) {
        self.kind.check(&self.memory.exclusive(CPU)).unwrap();
    }

    /// The frame that the processor finds, and whether it may write there.
    fn hit(&self, space: Space, va: u64) -> Option<(u64, bool)> {
        let mut table = self.roots[space as usize].hpa.pfn().number();
        let mut writable = true;
        for level in (0..4).rev() {
            let entry = self.tables.peek(table, (va >> (12 + 9 * level) & 511) as usize)?;
            if entry & 1 == 0 {
                return None;
            }
            writable &= entry & 2 != 0;
            table = (entry & 0x000f_ffff_ffff_f000) >> 12;
        }
        Some((table, writable))
    }

    fn finish(mut self) {
        self.check();
        self.tables.drain(&mut self.cache);
        self.kind.dismantle(|page| self.tables.release(page));
        assert_eq!(self.tables.in_use(), 0);
    }
}

fn machine(space: Space) -> Machine {
    Machine { cr3: if space == Space::Normal { 0x1000 } else { 0x1_0000 }, ..BASE }
}

/// Where SMM maps its own page, and TABLE.
const SMM_PAGE: u64 = 8 << 21;
const SMM_TABLE: u64 = SMM_PAGE + 0x1000;
const NORMAL_TABLE: u64 = TABLE << 12;

/// 0f38453cdb2e: a frame that is a lowest table for one space alone would be written freely; an upper one of the other space
/// must never be, whichever is shadowed first.
#[test]
fn commit_0f38453cdb2e_a_frame_that_both_spaces_use_as_a_table_is_tracked_in_both() {
    let gfn = mmu::Gfn::new_truncate(TABLE);
    for overlay in [false, true] {
        let mut world = World::new(overlay);
        assert_eq!(world.access(Space::Smm, SMM_PAGE, What::Write), ShadowFault::Mapped);
        assert_eq!(world.access(Space::Normal, 0x5000, What::Write), ShadowFault::Mapped);
        for (space, va) in [(Space::Normal, NORMAL_TABLE), (Space::Smm, SMM_TABLE)] {
            let tracked = ShadowFault::WriteTracked(gfn.gpa());
            assert_eq!(world.access(space, va, What::Write), tracked, "{space:?} {overlay}");
            assert!(!world.hit(space, va).is_some_and(|(_, writable)| writable), "D6");
            let read = world.access(space, va, What::Read);
            assert!(matches!(read, ShadowFault::Mapped | ShadowFault::Spurious), "{read:?}");
            assert!(!world.hit(space, va).unwrap().1, "D6");
        }
        world.finish();

        let mut world = World::new(overlay);
        assert_eq!(world.access(Space::Normal, NORMAL_TABLE, What::Write), ShadowFault::Mapped);
        assert!(world.kind.unsync_pages() == 1 && world.hit(Space::Normal, NORMAL_TABLE).unwrap().1);
        assert_eq!(world.access(Space::Smm, SMM_PAGE, What::Write), ShadowFault::Mapped);
        assert!(world.memory.shared(CPU).is_write_tracked(gfn));
        assert!(!world.hit(Space::Normal, NORMAL_TABLE).is_some_and(|(_, writable)| writable), "D6");
        let tracked = ShadowFault::WriteTracked(gfn.gpa());
        assert_eq!(world.access(Space::Normal, NORMAL_TABLE, What::Write), tracked);
        world.finish();
    }
}

/// Tables are read, and leaves led, where the vCPU's space has them.
#[test]
fn a1_a_shadow_is_of_what_its_space_sees() {
    let mut world = World::new(true);
    for (space, va, frame) in [
        (Space::Normal, NORMAL_TABLE, TABLE),
        (Space::Smm, SMM_TABLE, SMRAM_AT),
        (Space::Smm, SMM_PAGE, 0x20),
        (Space::Normal, 0x5000, 5),
    ] {
        let read = world.access(space, va, What::Read);
        assert!(matches!(read, ShadowFault::Mapped | ShadowFault::Spurious), "{read:?}");
        assert_eq!(world.hit(space, va).map(|(frame, _)| frame), Some(frame));
    }
    // The one loses its entry by a write that concerns the other, and finds it again where it is.
    let at = mmu::Gpa::new_truncate(TABLE << 12 | 64);
    world.memory.shared(CPU).in_space(Space::Smm).write(at, &0x1_3067u64.to_le_bytes()).unwrap();
    let _ = world.kind.track_write(&mut world.memory.exclusive(CPU), at, 8);
    world.check();
    assert_eq!(world.hit(Space::Smm, SMM_PAGE), None);
    assert_eq!(world.memory.shared(CPU).load_u64(at), Ok(0x8067), "the other is as it was");
    assert_eq!(world.hit(Space::Normal, 0x5000).map(|(frame, _)| frame), Some(5));
    world.finish();
}
