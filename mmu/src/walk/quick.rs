//! The walk that a shadow's fault most often takes, on the spot: four levels down to a page of 4 KiB, with no bit to
//! be set above its leaf.
use super::context::{PagingContext, Translation, WalkRegs};
use super::fault::PageFaultCode;
use super::result::{GuestWalk, WalkStep, MAX_STEPS};
use super::source::{TableSource, Update};
use super::walker::{ACCESSED, DIRTY, FRAME, GLOBAL, KEY_SHIFT, PRESENT};
use crate::access::{Access, AccessKind, Prot};
use crate::addr::{Address, PAGE_SHIFT, PAGE_SIZE};
use crate::level::Level;
use crate::mutant::{self, Mutant};
use crate::role::RoleFlags;

impl<In: Address, Out: Address> PagingContext<In, Out> {
    /// The end of a walk, in tables of eight-byte entries: the entry `raw` of a lowest table, which entries that
    /// permit `parents` lead to, as `access` marks it. If it does not permit the access, the guest's page fault; or
    /// nothing, if that takes a closer look.
    #[inline(always)]
    pub(crate) fn last_step(
        &self,
        regs: &WalkRegs,
        access: Access,
        parents: Prot,
        raw: u64,
    ) -> Result<u64, Option<PageFaultCode>> {
        let positive = raw ^ self.flip;
        if positive & self.wrong[Level::L1.ordinal()][0] != 0 {
            let absent = raw & PRESENT == 0;
            return Err(absent.then(|| PageFaultCode::of(access, self.role())));
        }
        let prot = parents & self.prot(positive);
        let key = (raw >> KEY_SHIFT & 15) as u32;
        if self.forbids(regs, access, prot) {
            let keys = self.role().flags().intersects(RoleFlags::PKE.union(RoleFlags::PKS));
            return Err((!keys).then(|| PageFaultCode::of(access, self.role()) | PageFaultCode::PRESENT));
        }
        if self.key_denies(regs, access, prot, key) {
            return Err(None);
        }
        let dirty = if access.kind == AccessKind::Write { DIRTY } else { 0 };
        Ok(raw | ACCESSED | dirty)
    }

    /// The walk, if it is of that kind and succeeds; its leaf is marked then. Nothing has happened otherwise.
    #[inline(always)]
    pub(super) fn quick_walk<S: TableSource<Out>>(
        &self,
        tables: &S,
        regs: &WalkRegs,
        address: In,
        access: Access,
    ) -> Option<GuestWalk<Out>> {
        let none =
            WalkStep { level: Level::L1, at: Out::from_bits_truncate(0), entry: 0, parents: Prot::empty() };
        let mut steps = [none; MAX_STEPS];
        let (mut table, mut all, mut above) = (regs.cr3 & FRAME, u64::MAX, u64::MAX);
        let (mut leaf, mut last) = (0, u64::MAX);
        for (level, place) in [Level::L4, Level::L3, Level::L2, Level::L1].into_iter().zip(&mut steps) {
            let at = table | (level.index(address.bits() >> PAGE_SHIFT) as u64) << 3;
            let at = Out::from_bits_truncate(at);
            let entry = tables.read_u64(at).ok()?;
            let positive = entry ^ self.flip;
            if positive & self.wrong[level.ordinal()][0] != 0 {
                return None;
            }
            let parents = if mutant::is(Mutant::StepRightsOfItself) { all & positive } else { all };
            let parents = if mutant::is(Mutant::StepRightsOfOneParent) { last } else { parents };
            *place = WalkStep { level, at, entry, parents: self.prot(parents) };
            (above, leaf, last) = (all, entry, positive);
            all &= positive;
            table = entry & FRAME;
        }
        let prot = self.prot(all);
        let key = (leaf >> KEY_SHIFT & 15) as u8;
        let refused = self.forbids(regs, access, prot) || self.key_denies(regs, access, prot, key.into());
        if refused || above & ACCESSED == 0 {
            return None;
        }
        let marked = leaf | ACCESSED | if access.kind == AccessKind::Write { DIRTY } else { 0 };
        if marked != leaf {
            let [_, _, _, last, _] = &mut steps;
            match tables.update_u64(last.at, leaf, marked) {
                Ok(Update::Done) => last.entry = marked,
                _ => return None,
            }
        }
        let start = leaf & FRAME | address.bits() & (PAGE_SIZE - 1);
        let address = Out::from_bits_truncate(start);
        let dirty = marked & DIRTY != 0;
        let writes = if dirty { Prot::empty() } else { Prot::WRITE };
        Some(GuestWalk {
            translation: Translation { address, page_bytes: PAGE_SIZE, prot },
            // A clean leaf was not written: the first write is to be noticed.
            shadow_prot: prot.difference(writes),
            level: Level::L1,
            key,
            global: leaf & GLOBAL != 0,
            dirty,
            pdpte: None,
            steps,
            len: 4,
        })
    }
}
