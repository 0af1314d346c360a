//! Carrying out what events asked for: roots are taken, synced and given back.
use super::requests::{Requests, Sync};
use super::roots::{Cached, ROOTS};
use super::Mmu;
use crate::access::Access;
use crate::addr::{Address, Gfn, Gpa, Gva};
use crate::format::EntryFormat;
use crate::kind::{DirectMmu, DirectRole, Issued, NoRoot, NoShadowRoot, ShadowDone, ShadowFault, ShadowMmu};
use crate::memory::{Backing, Exclusive, Held, Space};
use crate::mutant::{self, Mutant};
use crate::tables::{TableCache, TableMemory};
use crate::walk::GuestWalk;

fn is_ram<'m, B: Backing + 'm>(guard: &Exclusive<'m, B>, gfn: Gfn) -> bool {
    Space::ALL.iter().any(|&space| Held::<B>::memory(guard).find_slot(space, gfn.gpa()).is_some())
}

/// The flush of several operations: the last one covers those before, for generations only grow.
fn later(issued: &mut Option<Issued>, new: Option<Issued>) {
    *issued = new.or(*issued);
}

impl Mmu {
    /// Whether there is work before the vCPU can be entered.
    pub fn has_work(&self) -> bool {
        self.root == crate::kind::Root::NONE
    }

    /// Does what is due: drops obsolete roots, takes the root for what the vCPU is now if none is kept, and brings up
    /// to date what the guest has flushed. After a failure, do what it says and call this again; nothing is half
    /// done.
    ///
    /// If the page quota is used up, roots that were kept for later are given back first.
    pub fn carry_out<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
    ) -> ShadowDone<Result<(), NoShadowRoot>> {
        let mut issued = None;
        let generation = Held::<B>::memory(guard).root_generation();
        while let Some(old) = self.roots.take(|cached| cached.root.generation() != generation) {
            kind.put_root(guard, old.root);
        }
        if self.roots.current().is_none() {
            let loaded = self.load(kind, guard, cache, &mut issued);
            if let Err(reason) = loaded {
                self.settle_root();
                return ShadowDone { outcome: Err(reason), issued };
            }
        }
        for place in 0..ROOTS {
            let Some(cached) = self.roots.at_mut(place) else { break };
            let current = place == 0;
            match cached.behind {
                // A previous root is synced when it is run on again.
                Some(Sync::All) if current && mutant::is(Mutant::RootUnsynced) => {}
                Some(Sync::All) if current => later(&mut issued, kind.sync_root(guard, cached.root).issued),
                Some(Sync::Address(_)) if mutant::is(Mutant::AddressUnsynced) => {}
                Some(Sync::Address(at)) => kind.sync_address(guard, cached.root, at),
                _ => continue,
            }
            cached.behind = None;
        }
        self.settle_root();
        ShadowDone { outcome: Ok(()), issued }
    }

    fn load<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        issued: &mut Option<Issued>,
    ) -> Result<(), NoShadowRoot> {
        let key = self.key_of_now();
        if self.roots.is_full() {
            self.shed_root(kind, guard);
        }
        let root = loop {
            let done = kind.get_root(guard, cache, key.role(), key.pointer(), key.pdptes());
            later(issued, done.issued);
            match done.outcome {
                Err(NoShadowRoot::Full) if self.shed_root(kind, guard) => {}
                // A root table outside RAM is legal: each access is a fault then, which the walk finds.
                Err(NoShadowRoot::Unreachable(gfn)) if !is_ram(guard, gfn) => {
                    let role = key.role();
                    let empty = kind.get_empty_root(guard, cache, role.level(), role.base().vcpu());
                    later(issued, empty.issued);
                    match empty.outcome {
                        Err(NoShadowRoot::Full) if self.shed_root(kind, guard) => {}
                        outcome => break outcome?,
                    }
                }
                outcome => break outcome?,
            }
        };
        let slot = self.roots.free_slot();
        self.roots.push(Cached::new(key, root, true, slot));
        self.unprotected.is_pending = false;
        self.note_seen();
        // Remembered until the entry.
        let _ = self.run_on();
        Ok(())
    }

    /// Gives back the root that was used least lately, if it is not the current one; whether there was one. It pins
    /// pages of the quota no longer.
    pub fn shed_root<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
    ) -> bool {
        let Some(shed) = self.roots.pop() else { return false };
        if shed.held {
            kind.put_root(guard, shed.root);
        }
        true
    }

    /// Gives every root back: the vCPU ends, or has no use for this for a while.
    pub fn unload<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
    ) -> Requests {
        while let Some(cached) = self.roots.take(|_| true) {
            kind.put_root(guard, cached.root);
        }
        self.settle_root();
        Requests { load: true, ..Requests::NONE }
    }

    /// [`ShadowMmu::fault`] on the current root. A root that is gone is given back and has to be loaded anew; if the
    /// page quota is used up, roots that were kept for later go first.
    pub fn fault<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &mut ShadowMmu<'_, F, M>,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
        walk: &GuestWalk<Gpa>,
        address: impl Address,
        access: Access,
    ) -> ShadowDone<ShadowFault> {
        let mut issued = None;
        if !self.settle_write_protect() {
            return ShadowDone { outcome: ShadowFault::NoRoot, issued };
        }
        loop {
            let done = kind.fault(guard, cache, self.root, walk, address, access);
            later(&mut issued, done.issued);
            match done.outcome {
                ShadowFault::Full if self.shed_root(kind, guard) => continue,
                ShadowFault::NoRoot => {
                    let root = self.root;
                    if let Some(gone) = self.roots.take(|cached| cached.root == root) {
                        kind.put_root(guard, gone.root);
                    }
                    self.settle_root();
                }
                ShadowFault::Mapped => {
                    let near = kind.near(self.root, Gva::new(address.bits()));
                    if let (Some(current), Some(near)) = (self.roots.current_mut(), near) {
                        let [last, before] = current.near;
                        let same = last.is_some_and(|last| last.is_beside(&near));
                        current.near = [Some(near), if same { before } else { last }];
                    }
                }
                _ => {}
            }
            return ShadowDone { outcome: done.outcome, issued };
        }
    }

    /// [`carry_out`](Self::carry_out) of a vCPU that a direct kind serves.
    pub fn carry_out_direct<'m, F: EntryFormat, M: TableMemory, B: Backing + 'm>(
        &mut self,
        kind: &DirectMmu<F, M>,
        guard: &mut Exclusive<'m, B>,
        cache: &mut TableCache,
    ) -> Result<(), NoRoot> {
        let generation = Held::<B>::memory(guard).root_generation();
        while let Some(old) = self.roots.take(|cached| cached.root.generation() != generation) {
            if old.held {
                kind.put_root(guard, old.root);
            }
        }
        if self.roots.current().is_none() {
            let key = self.key_of_now();
            let mode = key.role().base().vcpu();
            let mut role = DirectRole::empty();
            role.set(DirectRole::SMM, mode.smm);
            role.set(DirectRole::GUEST_MODE, mode.nested);
            if self.roots.is_full() {
                if let Some(shed) = self.roots.pop().filter(|shed| shed.held) {
                    kind.put_root(guard, shed.root);
                }
            }
            let root = kind.get_root(guard, cache, role)?;
            let slot = self.roots.free_slot();
            self.roots.push(Cached::new(key, root, true, slot));
            let _ = self.run_on();
        }
        self.settle_root();
        Ok(())
    }
}
