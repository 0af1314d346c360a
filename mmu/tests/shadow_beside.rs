//! Both kinds in one VM: L1 on the direct kind, and a shadow of its nested tables beside it.
mod support;

use mmu::{
    Access, AccessKind, CpuId, CpuRole, Cr0, Cr4, DirectMmu, Efer, FaultOutcome, Gfn, GfnRange, Gpa,
    GuestCpu, Level, Mmu, NGpa, Npt, NptHost, Pae, PaeHost, PageSize, PagingContext, PagingRegs, Root,
    RootRole, ShadowFault, Sweep, TableCache, VcpuMode, VmMemory, WalkRegs,
};
use support::shadow::{memory, store, sweep, Kind, NotedRam, CPU, PAGES};
use support::tables::HostTables;

const L1_TABLES: u64 = 0x1000;

struct Both {
    memory: &'static VmMemory<NotedRam>,
    direct: DirectMmu<Npt, HostTables>,
    shadow: Kind,
    tables: HostTables,
    cache: TableCache,
    root: Option<Root>,
}

fn role() -> CpuRole {
    let regs = PagingRegs { cr0: Cr0::PG | Cr0::WP, cr4: Cr4::PAE, efer: Efer::LMA | Efer::NXE };
    let cpu = GuestCpu { max_phys_addr: 46, gib_pages: true, pse36: true, amd: true };
    CpuRole::nested(&regs, &cpu, false)
}

impl Both {
    fn new() -> Self {
        let memory: &'static _ = Box::leak(Box::new(memory()));
        let tables = HostTables::new(512);
        let format = Npt::new(&NptHost {
            five_level: false,
            max_phys_addr: 46,
            no_execute: true,
            largest: PageSize::Size2M,
        });
        let root = tables.allocate();
        let direct = DirectMmu::new(memory, format, tables.clone(), root, 46, PageSize::Size1G);
        let pae = Pae::new(&PaeHost { max_phys_addr: 46 });
        let shadow = Kind::new(memory, format, pae, tables.clone(), store(32)).unwrap();
        let ram = &memory.backing().flat;
        ram.set(L1_TABLES, 0x2067);
        ram.set(0x2000, 0x3067);
        ram.set(0x3000, 0x4067);
        for page in 0..64 {
            ram.set(0x4000 + page * 8, page << 12 | 0x67);
        }
        let mut both = Self { memory, direct, shadow, tables, cache: TableCache::new(), root: None };
        both.tables.fill(&mut both.cache);
        both
    }

    /// An access of L1 on the direct kind.
    fn l1(&mut self, gfn: u64, kind: AccessKind) -> FaultOutcome {
        self.tables.fill(&mut self.cache);
        let gpa = Gfn::new_truncate(gfn).gpa();
        self.direct.fault(&self.memory.shared(CPU), &mut self.cache, gpa, kind)
    }

    fn l1_writes(&self, gfn: u64) -> bool {
        let mut table = self.direct.root().hpa.pfn().number();
        for level in (1..=4u32).rev() {
            let entry = self.tables.peek(table, (gfn >> (9 * (level - 1)) & 511) as usize).unwrap();
            if entry & 3 != 3 {
                return false;
            }
            if level == 1 || entry >> 7 & 1 == 1 {
                return true;
            }
            table = (entry & 0x000f_ffff_ffff_f000) >> 12;
        }
        false
    }

    /// An access of L2 on the shadow of L1's nested tables.
    fn l2(&mut self, page: u64, kind: AccessKind) -> ShadowFault {
        self.tables.fill(&mut self.cache);
        let context = PagingContext::<NGpa, Gpa>::new(role());
        let regs = WalkRegs { cr3: L1_TABLES, ..WalkRegs::default() };
        let (at, access) = (NGpa::new_truncate(page << 12), Access::user(kind));
        let walk = context.walk(&self.memory.shared(CPU), &regs, at, access).unwrap();
        let mut guard = self.memory.exclusive(CPU).beside(&self.direct);
        let root = match self.root {
            Some(root) => root,
            None => {
                let vcpu = VcpuMode { smm: false, nested: true };
                let role = RootRole::shadow(role(), Level::L4, vcpu, true);
                let got = self.shadow.get_root(&mut guard, &mut self.cache, role, L1_TABLES, [0; 4]).outcome;
                let Ok(root) = got else { return ShadowFault::Wait };
                *self.root.insert(root)
            }
        };
        let outcome = self.shadow.fault(&mut guard, &mut self.cache, root, &walk, at, access).outcome;
        self.shadow.check(&guard).unwrap();
        outcome
    }

    fn finish(mut self) {
        self.tables.drain(&mut self.cache);
        self.shadow.dismantle(|page| self.tables.release(page));
        self.direct.dismantle(|page| self.tables.release(page));
        assert_eq!(self.tables.in_use(), 0);
    }
}

/// D6: a table that is shadowed cannot be written on the direct kind either, and an emulated write there is followed.
#[test]
fn d6_l1_cannot_write_to_a_table_that_a_shadow_is_of() {
    let mut both = Both::new();
    for gfn in 1..5 {
        assert!(matches!(both.l1(gfn, AccessKind::Write), FaultOutcome::Mapped | FaultOutcome::Spurious));
        assert!(both.l1_writes(gfn));
    }
    assert_eq!(both.l2(0x20, AccessKind::Read), ShadowFault::Mapped);
    for gfn in 1..5 {
        assert!(!both.l1_writes(gfn), "{gfn}");
        let write = both.l1(gfn, AccessKind::Write);
        assert_eq!(write, FaultOutcome::WriteTracked(Gfn::new_truncate(gfn).gpa()));
        assert!(matches!(both.l1(gfn, AccessKind::Read), FaultOutcome::Mapped | FaultOutcome::Spurious));
    }
    assert!(!both.l1_writes(5), "a huge page around a table is gone");
    assert_eq!(both.l1(5, AccessKind::Write), FaultOutcome::Mapped);
    assert!(both.l1_writes(5));
    // The shadows go, and with them what they have asked for.
    let mut guard = both.memory.exclusive(CPU).beside(&both.direct);
    both.shadow.put_root(&mut guard, both.root.take().unwrap());
    let all = GfnRange::new(Gfn::default(), PAGES).unwrap();
    sweep(|progress| {
        let _ = both.shadow.zap(&mut guard, all, progress);
    });
    drop(guard);
    for gfn in 1..5 {
        assert_eq!(both.l1(gfn, AccessKind::Write), FaultOutcome::Mapped, "{gfn}");
    }
    both.finish();
}

/// C2, D6: while a CPU runs L1 with a writable translation of the table, the shadow is not used.
#[test]
fn d6_a_shadow_waits_for_cpus_that_run_l1() {
    let mut both = Both::new();
    assert_eq!(both.l1(1, AccessKind::Write), FaultOutcome::Mapped);
    let other = CpuId::new(1).unwrap();
    let mut mmu = Mmu::new(role(), both.direct.root());
    let entered = mmu.enter(both.memory, other);
    assert_eq!(both.l2(0x20, AccessKind::Read), ShadowFault::Wait);
    assert_eq!(both.l2(0x20, AccessKind::Read), ShadowFault::Wait);
    drop(entered);
    while both.l2(0x20, AccessKind::Read) == ShadowFault::Wait {}
    assert_eq!(both.l2(0x20, AccessKind::Read), ShadowFault::Spurious);
    both.finish();
}

/// D6, the other way round: a page that anybody tracks cannot be written through a shadow.
#[test]
fn d6_a_page_that_anybody_tracks_is_not_writable_in_a_shadow() {
    let mut both = Both::new();
    assert_eq!(both.l2(0x20, AccessKind::Write), ShadowFault::Mapped);
    let mut guard = both.memory.exclusive(CPU).beside(&both.direct);
    let sweep: Sweep = guard.track_writes(Gfn::new_truncate(0x20)).unwrap();
    let _ = both.shadow.track_range(&mut guard, sweep);
    both.shadow.check(&guard).unwrap();
    drop(guard);
    let gpa = Gfn::new_truncate(0x20).gpa();
    assert_eq!(both.l2(0x20, AccessKind::Write), ShadowFault::WriteTracked(gpa));
    assert_eq!(both.l2(0x20, AccessKind::Read), ShadowFault::Spurious);
    let mut guard = both.memory.exclusive(CPU).beside(&both.direct);
    let _ = guard.untrack_writes(Gfn::new_truncate(0x20)).unwrap();
    drop(guard);
    assert_eq!(both.l2(0x20, AccessKind::Write), ShadowFault::Mapped);
    both.finish();
}

/// D6, its other half: L1's lowest table becomes unsync by a write of L2, and then is writable on the direct kind, too.
#[test]
fn d6_an_unsync_table_is_writable_everywhere() {
    let mut both = Both::new();
    assert_eq!(both.l1(4, AccessKind::Write), FaultOutcome::Mapped);
    assert_eq!(both.l2(0x20, AccessKind::Read), ShadowFault::Mapped);
    assert!(!both.l1_writes(4));
    assert_eq!(both.l2(4, AccessKind::Write), ShadowFault::Mapped);
    assert_eq!(both.shadow.unsync_pages(), 1);
    assert!(matches!(both.l1(4, AccessKind::Write), FaultOutcome::Mapped | FaultOutcome::Spurious));
    let root = both.root.unwrap();
    let _ = both.shadow.sync_root(&mut both.memory.exclusive(CPU).beside(&both.direct), root);
    assert_eq!(both.shadow.unsync_pages(), 0);
    assert!(!both.l1_writes(4));
    both.finish();
}

/// Who forgets the other kind is stopped at the first operation, whatever it is.
#[test]
#[should_panic(expected = "does not name the direct kind")]
fn d6_the_direct_kind_cannot_be_forgotten() {
    let mut both = Both::new();
    let _ = both.shadow.invalidate_all(&mut both.memory.exclusive(CPU));
}
