//! Moves to a root that was run on with the same registers before: guests switch between few address spaces, and
//! switch CR0.WP and CR4.PGE off and on. What was worked out then still holds.
use super::events::{flushed_by_cr0, flushed_by_cr3, flushed_by_cr4, Flushed, NO_FLUSH};
use super::requests::Sync;
use super::{Mmu, Tags};
use crate::format::EntryFormat;
use crate::kind::{ShadowDone, ShadowMmu};
use crate::memory::{Backing, Exclusive, Held};
use crate::mutant::{self, FlushSite, Mutant};
use crate::role::{CpuRole, Cr0, Cr4, Efer, PagingRegs, VcpuMode};
use crate::tables::TableMemory;

/// Registers from which a role and a root followed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// The bits of CR0, CR4 and EFER that a role or a PCID depends on, which are different bits in all three; zero
    /// for nothing.
    bits: u64,
    cr3: u64,
    role: CpuRole,
}

/// What a role and a PCID depend on.
const CR0: Cr0 = Cr0::PG.union(Cr0::WP);
const CR4: Cr4 = Cr4::PSE
    .union(Cr4::PAE)
    .union(Cr4::LA57)
    .union(Cr4::PCIDE)
    .union(Cr4::SMEP)
    .union(Cr4::SMAP)
    .union(Cr4::PKE)
    .union(Cr4::PKS);
const EFER: Efer = Efer::LMA.union(Efer::NXE);
const _: () =
    assert!(CR0.bits() & CR4.bits() == 0 && CR0.bits() & EFER.bits() == 0 && CR4.bits() & EFER.bits() == 0);

/// The bits of these registers; `None` where a root depends on more, on PAE's pointers.
#[inline]
fn bits(regs: &PagingRegs) -> Option<u64> {
    let PagingRegs { cr0, cr4, efer } = *regs;
    let pae = cr4.contains(Cr4::PAE) && !efer.contains(Efer::LMA);
    let bits = cr0.bits() & CR0.bits() | cr4.bits() & CR4.bits() | efer.bits() & EFER.bits();
    (cr0.contains(Cr0::PG) && !pae).then_some(bits)
}

impl Seen {
    pub(super) const NOTHING: Self = Self { bits: 0, cr3: 0, role: CpuRole::UNPAGED };
}

impl Mmu {
    /// Whether nothing but the registers decides which root the vCPU runs on.
    #[inline]
    fn follows_registers(&self) -> bool {
        self.is_shadow()
            && self.tags == Tags::One
            && self.context == 0
            && self.mode == VcpuMode { smm: false, nested: false }
            && self.nested.is_none()
    }

    /// Whether the vCPU runs on a root that nothing but its registers decides, PAE's pointers not among them.
    #[inline]
    pub(super) fn is_plain(&self) -> bool {
        bits(&self.state.regs).is_some() && self.follows_registers() && !self.has_work()
    }

    /// Notes the registers with the current root.
    pub(super) fn note_seen(&mut self) {
        let plain = self.follows_registers();
        let (cr3, role) = (self.state.cr3, self.role);
        let bits = bits(&self.state.regs).filter(|_| plain);
        if let Some(current) = self.roots.current_mut() {
            current.seen = bits.map_or(Seen::NOTHING, |bits| Seen { bits, cr3, role });
        }
    }

    /// [`mov_to_cr3`](Self::mov_to_cr3) to what was run on before, together with what it asks for; the entry flushes the tag.
    /// `None`, here and below, if it takes more: then nothing has happened.
    #[inline]
    pub fn mov_to_seen_cr3<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        value: u64,
    ) -> Option<ShadowDone<()>> {
        let flushed = flushed_by_cr3(value, self.state.regs.cr4);
        self.go_back(kind, guard, self.state.regs, value & !NO_FLUSH, flushed)
    }

    /// The same of [`mov_to_cr0`](Self::mov_to_cr0).
    #[inline]
    pub fn mov_to_seen_cr0<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        cr0: Cr0,
        efer: Efer,
    ) -> Option<ShadowDone<()>> {
        let flushed = flushed_by_cr0(self.state.regs.cr0, cr0);
        let regs = PagingRegs { cr0, efer, ..self.state.regs };
        self.go_back(kind, guard, regs, self.state.cr3, flushed)
    }

    /// The same of [`mov_to_cr4`](Self::mov_to_cr4).
    #[inline]
    pub fn mov_to_seen_cr4<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        cr4: Cr4,
    ) -> Option<ShadowDone<()>> {
        if self.state.regs.cr4 ^ cr4 == Cr4::PGE && self.is_plain() {
            return self.toggle_global(kind, guard, cr4);
        }
        let pcid = if cr4.contains(Cr4::PCIDE) { self.state.cr3 as u16 & 0xfff } else { 0 };
        let flushed = flushed_by_cr4(self.state.regs.cr4, cr4, pcid);
        let regs = PagingRegs { cr4, ..self.state.regs };
        self.go_back(kind, guard, regs, self.state.cr3, flushed)
    }

    /// CR4.PGE changes: nothing else than that all translations go.
    #[inline(always)]
    fn toggle_global<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        cr4: Cr4,
    ) -> Option<ShadowDone<()>> {
        if self.root.generation() != Held::<B>::memory(guard).root_generation() {
            return None;
        }
        let mut issued = None;
        if !mutant::drops(FlushSite::MovToCr4) {
            self.roots.mark_from(1, Sync::All, |_| true);
            if !mutant::is(Mutant::SeenBehind) {
                issued = kind.sync_held(guard, self.root);
            }
            let _ = self.flush_current();
        }
        self.state.regs.cr4 = cr4;
        Some(ShadowDone { outcome: (), issued })
    }

    /// Runs on with these registers, on the root that they had before.
    #[inline]
    fn go_back<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        regs: PagingRegs,
        cr3: u64,
        flushed: Flushed,
    ) -> Option<ShadowDone<()>> {
        let bits = bits(&regs).filter(|_| self.follows_registers())?;
        let generation = Held::<B>::memory(guard).root_generation();
        let place = self.roots.find(|cached| {
            (cached.seen.bits == bits || mutant::is(Mutant::SeenOtherMode))
                && (cached.seen.cr3 == cr3 || mutant::is(Mutant::SeenOtherTable))
                && cached.root.generation() == generation
        })?;
        // The first is what the tag is of, if nothing has taken away the one before it.
        let another = place != 0 || self.roots.current().is_none();
        self.roots.bring_forward(place);
        if flushed != Flushed::Nothing {
            self.roots.mark_from(0, Sync::All, |key| flushed.covers(key.tag().pcid));
        }
        let current = self.roots.current_mut()?;
        let (root, role, behind) = (current.root, current.seen.role, current.behind.take());
        let issued = match behind {
            _ if mutant::is(Mutant::SeenBehind) => None,
            None => None,
            Some(Sync::Address(address)) => {
                kind.sync_address(guard, root, address);
                None
            }
            Some(Sync::All) => kind.sync_held(guard, root),
        };
        (self.state.regs, self.state.cr3) = (regs, cr3);
        (self.role, self.root) = (role, root);
        self.unprotected.is_pending = false;
        if another || behind.is_some() {
            let _ = self.flush_current();
        }
        Some(ShadowDone { outcome: (), issued })
    }
}
